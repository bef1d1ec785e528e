//! Recurrent layers: LSTM, GRU and the plain RNN.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide, conv::differ};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Shape, Tensor, Value};

/// Inputs `X [t, n, input]`, `W [d, g·h, input]`, `R [d, g·h, h]`, and, each optional, `B [d, 2·g·h]` (of `W`, then of `R`),
/// `sequence_lens [n]` (i32), `initial_h [d, n, h]`, and for an LSTM `initial_c [d, n, h]` and peepholes `P [d, 3·h]`.
/// Outputs `Y [t, d, n, h]`, `Y_h [d, n, h]`, and for an LSTM `Y_c [d, n, h]`. Here `t` are steps, `d` directions, `h` is the
/// hidden size and `g` the number of gates. Formulas are those of ONNX's LSTM, GRU and RNN.
#[derive(Clone, Debug, PartialEq)]
pub struct Recurrent {
    pub cell: Cell,
    pub direction: Direction,
    /// Where the model says; `R` always does.
    pub hidden_size: Option<usize>,
    /// [`Cell::activation_count`] for each direction.
    pub activations: Vec<CellActivation>,
    /// What goes into a gate's activation is kept within `±clip`.
    pub clip: Option<f32>,
    /// ONNX's `layout` 1: `X [n, t, input]`, states `[n, d, h]`, `Y [n, t, d, h]`.
    pub batch_first: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// Gates in the order input, output, forget, cell.
    Lstm {
        /// The forget gate is `1 − input gate`.
        coupled: bool,
    },
    /// Gates in the order update, reset, hidden.
    Gru {
        /// The reset gate scales `R·h + b` instead of `h`.
        linear_before_reset: bool,
    },
    Rnn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Forward,
    Reverse,
    Bidirectional,
}

/// Activations inside recurrent cells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CellActivation {
    Relu,
    Tanh,
    Sigmoid,
    Softsign,
    Softplus,
    /// `alpha·x + beta`.
    Affine {
        alpha: f32,
        beta: f32,
    },
    LeakyRelu {
        alpha: f32,
    },
    ThresholdedRelu {
        alpha: f32,
    },
    /// `alpha·tanh(beta·x)`.
    ScaledTanh {
        alpha: f32,
        beta: f32,
    },
    HardSigmoid {
        alpha: f32,
        beta: f32,
    },
    Elu {
        alpha: f32,
    },
}

impl Cell {
    pub fn gates(self) -> usize {
        match self {
            Cell::Lstm { .. } => 4,
            Cell::Gru { .. } => 3,
            Cell::Rnn => 1,
        }
    }

    pub fn activation_count(self) -> usize {
        self.default_activations().len()
    }

    fn default_activations(self) -> &'static [CellActivation] {
        use CellActivation::*;
        match self {
            Cell::Lstm { .. } => &[Sigmoid, Tanh, Tanh],
            Cell::Gru { .. } => &[Sigmoid, Tanh],
            Cell::Rnn => &[Tanh],
        }
    }
}

impl Direction {
    pub fn count(self) -> usize {
        if self == Direction::Bidirectional { 2 } else { 1 }
    }
}

impl Operator for Recurrent {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let cell = match node.op_type.as_str() {
            "LSTM" => Cell::Lstm { coupled: node.flag("input_forget", false)? },
            "GRU" => Cell::Gru { linear_before_reset: node.int("linear_before_reset", 0)? != 0 },
            _ => Cell::Rnn,
        };
        node.expect_inputs(3..=if matches!(cell, Cell::Lstm { .. }) { 8 } else { 6 })?;
        Ok(Recurrent::read(node, cell)?.into())
    }

    fn export(&self) -> Spelling {
        let spelling = match self.cell {
            Cell::Lstm { coupled } => Spelling::new("LSTM").with("input_forget", i64::from(coupled)),
            Cell::Gru { linear_before_reset } => {
                Spelling::new("GRU").with("linear_before_reset", i64::from(linear_before_reset))
            }
            Cell::Rnn => Spelling::new("RNN"),
        };
        let direction = match self.direction {
            Direction::Forward => "forward",
            Direction::Reverse => "reverse",
            Direction::Bidirectional => "bidirectional",
        };
        let mut spelling = spelling.with("direction", direction).with("layout", i64::from(self.batch_first));
        if let Some(size) = self.hidden_size {
            spelling = spelling.with("hidden_size", size as i64);
        }
        if let Some(clip) = self.clip {
            spelling = spelling.with("clip", clip);
        }
        let names: Vec<String> = self.activations.iter().map(|a| a.name().to_string()).collect();
        let alphas: Vec<f32> = self.activations.iter().filter_map(|a| a.parameters().0).collect();
        let betas: Vec<f32> = self.activations.iter().filter_map(|a| a.parameters().1).collect();
        spelling = spelling.with("activations", names);
        for (name, values) in [("activation_alpha", alphas), ("activation_beta", betas)] {
            if !values.is_empty() {
                spelling = spelling.with(name, values);
            }
        }
        spelling
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, w, r) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        for index in [1, 2, 3, 5, 6, 7] {
            inputs.same_dtype(0, index)?;
        }
        if let Some(lens) = inputs.optional_tensor(4)?
            && lens.dtype != DType::I32
        {
            return Err(OpError::input(format!("sequence_lens must be i32, got {lens}")));
        }
        let matrices = |fact: &TensorFact| match &fact.shape {
            Some(dims) if dims.len() != 3 => Err(OpError::input(format!("expected three axes, got {fact}"))),
            Some(dims) => Ok([dims[0].clone(), dims[1].clone(), dims[2].clone()]),
            None => Ok(["a", "b", "c"].map(|axis| context.fresh(axis))),
        };
        let ([x0, x1, features], [_, w_rows, w_columns], [_, r_rows, hidden]) =
            (matrices(x)?, matrices(w)?, matrices(r)?);
        let gates = Dim::from(self.cell.gates());
        let rows = hidden.clone() * gates;
        let hidden_is_wrong = self.hidden_size.is_some_and(|size| differ(&Dim::from(size), &hidden));
        if differ(&features, &w_columns) || differ(&w_rows, &rows) || differ(&r_rows, &rows) || hidden_is_wrong {
            return Err(OpError::input(format!(
                "X {x}, W {w} and R {r} don't fit {} gates and hidden size {}",
                self.cell.gates(),
                self.hidden_size.map_or(hidden.to_string(), |size| size.to_string()),
            )));
        }
        let hidden = self.hidden_size.map_or(hidden, Dim::from);
        let d = Dim::from(self.direction.count());
        let (y, state) = match self.batch_first {
            false => (vec![x0, d.clone(), x1.clone(), hidden.clone()], vec![d, x1, hidden]),
            true => (vec![x0.clone(), x1, d.clone(), hidden.clone()], vec![x0, d, hidden]),
        };
        for index in [5, 6] {
            if let Some(initial) = inputs.optional_tensor(index)?
                && let Some(dims) = &initial.shape
                && (dims.len() != 3 || dims.iter().zip(&state).any(|(a, b)| differ(a, b)))
            {
                return Err(OpError::input(format!("the initial state is {initial}, expected {state:?}")));
            }
        }
        let mut facts = vec![TensorFact::new(x.dtype, y).into(), TensorFact::new(x.dtype, state.clone()).into()];
        if matches!(self.cell, Cell::Lstm { .. }) {
            facts.push(TensorFact::new(x.dtype, state).into());
        }
        Ok(facts)
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let run = Run::new(self, inputs, context)?;
        let directions = self.direction.count();
        let (steps, batch, hidden) = (run.steps, run.batch, run.hidden);
        // Held as [t, d, n, h] and [d, n, h] until the end.
        let mut y = vec![0.0; steps * directions * batch * hidden];
        let (mut h, mut c) = (run.initial(inputs, 5)?, run.initial(inputs, 6)?);
        for d in 0..directions {
            let weights = Weights::new(self, inputs, d, &run)?;
            let reverse = self.direction == Direction::Reverse || d == 1;
            for n in 0..batch {
                let state = (d * batch + n) * hidden;
                let (h, c) = (&mut h[state..][..hidden], &mut c[state..][..hidden]);
                let len = run.lengths[n];
                let mut cell = CellRun::new(self, &weights, d);
                for step in 0..len {
                    let t = if reverse { len - 1 - step } else { step };
                    cell.step(run.x(t, n), h, c);
                    y[((t * directions + d) * batch + n) * hidden..][..hidden].copy_from_slice(h);
                }
                if len == 0 {
                    h.fill(0.0);
                    c.fill(0.0);
                }
            }
        }
        let dtype = inputs.tensor(0)?.dtype();
        let state = |values: Vec<f64>| -> Result<Tensor, OpError> {
            if !self.batch_first {
                return Wide::Float(values).narrow(dtype, [directions, batch, hidden]);
            }
            let order = (0..batch).flat_map(|n| (0..directions).map(move |d| (d * batch + n) * hidden));
            let values = order.flat_map(|from| values[from..from + hidden].iter().copied()).collect();
            Wide::Float(values).narrow(dtype, [batch, directions, hidden])
        };
        let y = if self.batch_first {
            let order = (0..batch).flat_map(|n| (0..steps).map(move |t| (t, n)));
            let order =
                order.flat_map(|(t, n)| (0..directions).map(move |d| ((t * directions + d) * batch + n) * hidden));
            let values = order.flat_map(|from| y[from..from + hidden].iter().copied()).collect();
            Wide::Float(values).narrow(dtype, [batch, steps, directions, hidden])?
        } else {
            Wide::Float(y).narrow(dtype, [steps, directions, batch, hidden])?
        };
        let mut results = vec![y.into(), state(h)?.into()];
        if matches!(self.cell, Cell::Lstm { .. }) {
            results.push(state(c)?.into());
        }
        Ok(results)
    }
}

impl Recurrent {
    /// The attributes of every kind of cell.
    pub(super) fn read(node: &mut NodeReader, cell: Cell) -> Result<Recurrent, ImportError> {
        let direction = match node.string("direction", "forward")?.as_str() {
            "forward" => Direction::Forward,
            "reverse" => Direction::Reverse,
            "bidirectional" => Direction::Bidirectional,
            other => return Err(node.corrupt(format!("direction '{other}' is not defined"))),
        };
        let hidden_size = match node.count("hidden_size", 0)? {
            0 => None,
            size => Some(size),
        };
        let activations = read_activations(node, cell, direction)?;
        let clip = node.optional_float("clip")?;
        if clip.is_some_and(|clip| clip.is_nan() || clip < 0.0) {
            return Err(node.corrupt(format!("clip must not be negative, got {clip:?}")));
        }
        let batch_first = node.flag("layout", false)?;
        Ok(Recurrent { cell, direction, hidden_size, activations, clip, batch_first })
    }
}

/// The extents of one run, its input and the lengths of its sequences.
struct Run {
    steps: usize,
    batch: usize,
    features: usize,
    hidden: usize,
    directions: usize,
    batch_first: bool,
    x: Vec<f64>,
    lengths: Vec<usize>,
}

impl Run {
    fn new(op: &Recurrent, inputs: Inputs<'_>, context: &EvalContext) -> Result<Run, OpError> {
        let (x, r) = (inputs.tensor(0)?, inputs.tensor(2)?);
        let ([x0, x1, features], [_, _, hidden]) = (axes3(x)?, axes3(r)?);
        if let Some(size) = op.hidden_size.filter(|&size| size != hidden) {
            return Err(OpError::input(format!("R is of {hidden} hidden units, hidden_size is {size}")));
        }
        let (steps, batch) = if op.batch_first { (x1, x0) } else { (x0, x1) };
        // Without elements an extent may be as large as it likes, and is walked all the same.
        context.bounded_len(&[steps, op.direction.count(), batch, hidden].map(|extent| extent.max(1)))?;
        let lengths = match inputs.get(4) {
            None => vec![steps; batch],
            Some(_) => {
                let lengths = inputs.integers(4)?;
                let fits = |&len: &i64| usize::try_from(len).ok().filter(|&len| len <= steps);
                let checked: Option<Vec<usize>> = lengths.iter().map(fits).collect();
                checked.filter(|lengths| lengths.len() == batch).ok_or_else(|| {
                    OpError::input(format!("sequence_lens must be {batch} numbers up to {steps}, got {lengths:?}"))
                })?
            }
        };
        let (directions, batch_first) = (op.direction.count(), op.batch_first);
        Ok(Run { steps, batch, features, hidden, directions, batch_first, x: Wide::floats(x)?, lengths })
    }

    fn x(&self, t: usize, n: usize) -> &[f64] {
        let row = if self.batch_first { n * self.steps + t } else { t * self.batch + n };
        &self.x[row * self.features..][..self.features]
    }

    /// The state at `index` as `[d, n, h]`, zeros where it is omitted.
    fn initial(&self, inputs: Inputs<'_>, index: usize) -> Result<Vec<f64>, OpError> {
        let (d, n, h) = (self.directions, self.batch, self.hidden);
        let Some(tensor) = inputs.optional_tensor(index)? else { return Ok(vec![0.0; d * n * h]) };
        let expected: Shape = if self.batch_first { [n, d, h].into() } else { [d, n, h].into() };
        if *tensor.shape() != expected {
            return Err(OpError::input(format!("the initial state is {}, expected {expected}", tensor.shape())));
        }
        let values = Wide::floats(tensor)?;
        if !self.batch_first {
            return Ok(values);
        }
        let order = (0..d).flat_map(|d_index| (0..n).map(move |n_index| (n_index * d + d_index) * h));
        Ok(order.flat_map(|from| values[from..from + h].iter().copied()).collect())
    }
}

/// The weights of one direction.
pub(super) struct Weights {
    pub features: usize,
    pub hidden: usize,
    pub w: Vec<f64>,
    pub r: Vec<f64>,
    pub w_bias: Vec<f64>,
    pub r_bias: Vec<f64>,
    /// Of the input, output and forget gate.
    pub peepholes: Vec<f64>,
}

impl Weights {
    fn new(op: &Recurrent, inputs: Inputs<'_>, d: usize, run: &Run) -> Result<Weights, OpError> {
        let Run { features, hidden, directions, .. } = *run;
        let rows = op.cell.gates().saturating_mul(hidden);
        let part = |index: usize, shape: &[usize]| -> Result<Option<Vec<f64>>, OpError> {
            let Some(tensor) = inputs.optional_tensor(index)? else { return Ok(None) };
            let expected: Shape = [directions].iter().chain(shape).copied().collect();
            if *tensor.shape() != expected {
                return Err(OpError::input(format!("input {index} is {}, expected {expected}", tensor.shape())));
            }
            let len: usize = shape.iter().product();
            Ok(Some(Wide::floats(tensor)?[d * len..][..len].to_vec()))
        };
        let missing = || OpError::input("W and R are required");
        // Where these are of the shapes expected, so much memory is there already.
        let (w, r) = (part(1, &[rows, features])?, part(2, &[rows, hidden])?);
        let (w, r) = (w.ok_or_else(missing)?, r.ok_or_else(missing)?);
        let mut w_bias = part(3, &[2 * rows])?.unwrap_or_else(|| vec![0.0; 2 * rows]);
        let r_bias = w_bias.split_off(rows);
        Ok(Weights {
            features,
            hidden,
            w,
            r,
            w_bias,
            r_bias,
            peepholes: part(7, &[3 * hidden])?.unwrap_or_else(|| vec![0.0; 3 * hidden]),
        })
    }

    /// `W·x + b`, a row of every gate.
    fn of_input(&self, row: usize, x: &[f64]) -> f64 {
        dot(&self.w[row * self.features..][..self.features], x) + self.w_bias[row]
    }

    /// `R·h + b`.
    fn of_state(&self, row: usize, h: &[f64]) -> f64 {
        dot(&self.r[row * self.hidden..][..self.hidden], h) + self.r_bias[row]
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A cell of one direction, with room for its gates.
pub(super) struct CellRun<'a> {
    cell: Cell,
    weights: &'a Weights,
    activations: &'a [CellActivation],
    clip: f64,
    pub gates: Vec<f64>,
    reset_state: Vec<f64>,
}

impl<'a> CellRun<'a> {
    pub fn new(op: &'a Recurrent, weights: &'a Weights, direction: usize) -> Self {
        let count = op.cell.activation_count();
        CellRun {
            cell: op.cell,
            weights,
            activations: &op.activations[direction * count..][..count],
            clip: op.clip.map_or(f64::INFINITY, f64::from),
            gates: vec![0.0; op.cell.gates() * weights.hidden],
            reset_state: vec![0.0; weights.hidden],
        }
    }

    fn activate(&self, index: usize, x: f64) -> f64 {
        // Not `clamp`: NaN goes through.
        let x = if x > self.clip { self.clip } else { x };
        self.activations[index].apply(if x < -self.clip { -self.clip } else { x })
    }

    fn step(&mut self, x: &[f64], h: &mut [f64], c: &mut [f64]) {
        let (weights, hidden) = (self.weights, self.weights.hidden);
        let sum = |row: usize, h: &[f64]| weights.of_input(row, x) + weights.of_state(row, h);
        match self.cell {
            Cell::Rnn => {
                for j in 0..hidden {
                    self.gates[j] = self.activate(0, sum(j, h));
                }
                h.copy_from_slice(&self.gates);
            }
            Cell::Gru { linear_before_reset } => {
                for row in 0..2 * hidden {
                    self.gates[row] = self.activate(0, sum(row, h));
                }
                let reset = self.gates[hidden..].iter().zip(h.iter());
                self.reset_state.iter_mut().zip(reset).for_each(|(state, (reset, h))| *state = reset * h);
                for j in 0..hidden {
                    let row = 2 * hidden + j;
                    let of_state = match linear_before_reset {
                        true => self.gates[hidden + j] * weights.of_state(row, h),
                        false => weights.of_state(row, &self.reset_state),
                    };
                    self.gates[row] = self.activate(1, weights.of_input(row, x) + of_state);
                }
                for (j, h) in h.iter_mut().enumerate() {
                    let update = self.gates[j];
                    *h = (1.0 - update) * self.gates[2 * hidden + j] + update * *h;
                }
            }
            Cell::Lstm { .. } => {
                for row in 0..4 * hidden {
                    self.gates[row] = sum(row, h);
                }
                self.finish_lstm(h, c);
            }
        }
    }

    /// The end of an LSTM's step: from the sums that [`CellRun::gates`] hold.
    pub fn finish_lstm(&mut self, h: &mut [f64], c: &mut [f64]) {
        let (p, hidden) = (&self.weights.peepholes, self.weights.hidden);
        let coupled = matches!(self.cell, Cell::Lstm { coupled: true });
        for j in 0..hidden {
            let (input, output) = (self.gates[j], self.gates[hidden + j]);
            let (forget, candidate) = (self.gates[2 * hidden + j], self.gates[3 * hidden + j]);
            let input = self.activate(0, input + p[j] * c[j]);
            let forget = if coupled { 1.0 - input } else { self.activate(0, forget + p[2 * hidden + j] * c[j]) };
            c[j] = forget * c[j] + input * self.activate(1, candidate);
            let output = self.activate(0, output + p[hidden + j] * c[j]);
            // The state itself is not clipped: so do ONNX Runtime and the models exported for it.
            h[j] = output * self.activations[2].apply(c[j]);
        }
    }
}

fn axes3(tensor: &Tensor) -> Result<[usize; 3], OpError> {
    <[usize; 3]>::try_from(tensor.shape().dims())
        .map_err(|_| OpError::input(format!("expected three axes, got {}", tensor.shape())))
}

fn read_activations(
    node: &mut NodeReader,
    cell: Cell,
    direction: Direction,
) -> Result<Vec<CellActivation>, ImportError> {
    let mut alphas = node.optional_floats("activation_alpha")?.unwrap_or_default().into_iter();
    let mut betas = node.optional_floats("activation_beta")?.unwrap_or_default().into_iter();
    let Some(names) = node.optional_strings("activations")?.filter(|names| !names.is_empty()) else {
        return Ok(cell.default_activations().repeat(direction.count()));
    };
    let expected = cell.activation_count() * direction.count();
    if names.len() != expected {
        return Err(node.corrupt(format!("'activations' needs {expected} names, has {}", names.len())));
    }
    let read = |name: &String| {
        use CellActivation::*;
        let mut alpha = |default| alphas.next().unwrap_or(default);
        let mut beta = |default| betas.next().unwrap_or(default);
        Ok(match name.to_ascii_lowercase().as_str() {
            "relu" => Relu,
            "tanh" => Tanh,
            "sigmoid" => Sigmoid,
            "softsign" => Softsign,
            "softplus" => Softplus,
            "affine" => Affine { alpha: alpha(1.0), beta: beta(0.0) },
            "leakyrelu" => LeakyRelu { alpha: alpha(0.01) },
            "thresholdedrelu" => ThresholdedRelu { alpha: alpha(1.0) },
            "scaledtanh" => ScaledTanh { alpha: alpha(1.0), beta: beta(1.0) },
            "hardsigmoid" => HardSigmoid { alpha: alpha(0.2), beta: beta(0.5) },
            "elu" => Elu { alpha: alpha(1.0) },
            _ => return Err(node.corrupt(format!("activation '{name}' is not defined"))),
        })
    };
    names.iter().map(read).collect()
}

impl CellActivation {
    pub fn apply(self, x: f64) -> f64 {
        use CellActivation::*;
        let of = f64::from;
        match self {
            Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Tanh => x.tanh(),
            Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Softsign => x / (1.0 + x.abs()),
            // max(x, 0) + log(1 + exp(−|x|)): no overflow.
            Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
            Affine { alpha, beta } => of(alpha) * x + of(beta),
            LeakyRelu { alpha } => {
                if x < 0.0 {
                    of(alpha) * x
                } else {
                    x
                }
            }
            ThresholdedRelu { alpha } => {
                if x > of(alpha) {
                    x
                } else {
                    0.0
                }
            }
            ScaledTanh { alpha, beta } => of(alpha) * (of(beta) * x).tanh(),
            HardSigmoid { alpha, beta } => (of(alpha) * x + of(beta)).clamp(0.0, 1.0),
            Elu { alpha } => {
                if x < 0.0 {
                    of(alpha) * x.exp_m1()
                } else {
                    x
                }
            }
        }
    }

    fn name(self) -> &'static str {
        use CellActivation::*;
        match self {
            Relu => "Relu",
            Tanh => "Tanh",
            Sigmoid => "Sigmoid",
            Softsign => "Softsign",
            Softplus => "Softplus",
            Affine { .. } => "Affine",
            LeakyRelu { .. } => "LeakyRelu",
            ThresholdedRelu { .. } => "ThresholdedRelu",
            ScaledTanh { .. } => "ScaledTanh",
            HardSigmoid { .. } => "HardSigmoid",
            Elu { .. } => "Elu",
        }
    }

    /// Its alpha and beta, where it has them.
    fn parameters(self) -> (Option<f32>, Option<f32>) {
        use CellActivation::*;
        match self {
            Affine { alpha, beta } | ScaledTanh { alpha, beta } | HardSigmoid { alpha, beta } => {
                (Some(alpha), Some(beta))
            }
            LeakyRelu { alpha } | ThresholdedRelu { alpha } | Elu { alpha } => (Some(alpha), None),
            _ => (None, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cases::{case, f32s, run, tensor, wave};

    #[test]
    fn no_extent_is_walked_that_holds_nothing() {
        let rnn = |x: &[usize], r: &[usize]| {
            case("RNN", 14).input(f32s(x, &[])).input(f32s(&[1, r[1], x[2]], &[])).input(f32s(r, &[]))
        };
        rnn(&[0, 1 << 40, 0], &[1, 0, 0]).fails("resource limit");
        rnn(&[0, 1, 0], &[0, 1 << 20, 1 << 20]).fails("input 2 is");
    }

    #[test]
    fn lstm_agrees_with_onnx_runtime() {
        case("LSTM", 14)
            .with("hidden_size", 2)
            .wave(&[2, 1, 2])
            .wave(&[1, 8, 2])
            .wave(&[1, 8, 2])
            .wave(&[1, 16])
            .gives([
                f32s(&[2, 1, 1, 2], &[-0.00844108, 0.222198, 0.0728865, 0.173978]),
                f32s(&[1, 1, 2], &[0.0728865, 0.173978]),
                f32s(&[1, 1, 2], &[0.781108, 0.185538]),
            ]);
        case("LSTM", 14)
            .with("hidden_size", 1)
            .with("direction", "bidirectional")
            .with("clip", 0.5f32)
            .wave(&[3, 2, 1])
            .wave(&[2, 4, 1])
            .wave(&[2, 4, 1])
            .wave(&[2, 8])
            .input(tensor::<i32>(&[2], &[3, 1]))
            .wave(&[2, 2, 1])
            .wave(&[2, 2, 1])
            .wave(&[2, 3])
            .gives([
                f32s(
                    &[3, 2, 2, 1],
                    &[
                        0.167391, -0.131272, 0.0115888, 0.137603, 0.16468, 0.0, 0.125002, 0.0, 0.080073, 0.0, 0.235682,
                        0.0,
                    ],
                ),
                f32s(&[2, 2, 1], &[0.080073, -0.131272, 0.0115888, 0.137603]),
                f32s(&[2, 2, 1], &[0.21536, -0.237559, 0.0307052, 0.382034]),
            ]);
        case("LSTM", 14)
            .with("hidden_size", 1)
            .with("direction", "reverse")
            .with("input_forget", 1)
            .with("activations", vec!["HardSigmoid".to_string(), "LeakyRelu".to_string(), "Softsign".to_string()])
            .with("activation_alpha", vec![0.3f32, 0.1f32])
            .with("activation_beta", vec![0.4f32])
            .wave(&[2, 1, 1])
            .wave(&[1, 4, 1])
            .wave(&[1, 4, 1])
            .gives([f32s(&[2, 1, 1, 1], &[0.0, -0.00707394]), f32s(&[1, 1, 1], &[0.0]), f32s(&[1, 1, 1], &[0.54525])]);
    }

    #[test]
    fn gru_agrees_with_onnx_runtime() {
        case("GRU", 14).with("hidden_size", 2).wave(&[2, 1, 2]).wave(&[1, 6, 2]).wave(&[1, 6, 2]).wave(&[1, 12]).gives(
            [
                f32s(&[2, 1, 1, 2], &[-0.0519693, -0.620162, -0.0728346, -0.820814]),
                f32s(&[1, 1, 2], &[-0.0728346, -0.820814]),
            ],
        );
        case("GRU", 14)
            .with("hidden_size", 1)
            .with("linear_before_reset", 1)
            .with("direction", "bidirectional")
            .wave(&[3, 2, 1])
            .wave(&[2, 3, 1])
            .wave(&[2, 3, 1])
            .wave(&[2, 6])
            .input(tensor::<i32>(&[2], &[2, 3]))
            .wave(&[2, 2, 1])
            .gives([
                f32s(
                    &[3, 2, 2, 1],
                    &[
                        -0.309939, -1.19, 0.635813, 0.620865, -0.389121, -1.13031, 0.593426, 0.418245, 0.0, -1.10902,
                        0.0, -0.207913,
                    ],
                ),
                f32s(&[2, 2, 1], &[-0.389121, -1.10902, 0.635813, 0.620865]),
            ]);
    }

    #[test]
    fn rnn_agrees_with_onnx_runtime() {
        case("RNN", 14)
            .with("hidden_size", 2)
            .with("direction", "reverse")
            .wave(&[2, 2, 1])
            .wave(&[1, 2, 1])
            .wave(&[1, 2, 2])
            .wave(&[1, 4])
            .omitted()
            .wave(&[1, 2, 2])
            .gives([
                f32s(
                    &[2, 1, 2, 2],
                    &[0.726176, -0.00319898, -0.772177, 0.848465, 0.809301, -0.124353, -0.124353, 0.992813],
                ),
                f32s(&[1, 2, 2], &[0.726176, -0.00319898, -0.772177, 0.848465]),
            ]);
        case("RNN", 14)
            .with("hidden_size", 1)
            .with("activations", vec!["Affine".to_string()])
            .with("activation_alpha", vec![0.5f32])
            .with("activation_beta", vec![0.25f32])
            .with("clip", 1.0f32)
            .wave(&[2, 1, 2])
            .wave(&[1, 1, 2])
            .wave(&[1, 1, 1])
            .gives([f32s(&[2, 1, 1, 1], &[0.75, 0.75]), f32s(&[1, 1, 1], &[0.75])]);
    }

    #[test]
    fn a_batch_first_layer_is_the_transposed_one() {
        let weights = || (wave(&[2, 8, 2], 1), wave(&[2, 8, 2], 2), wave(&[2, 2, 2], 5));
        let (w, r, h) = weights();
        let time_first = Recurrent {
            cell: Cell::Lstm { coupled: false },
            direction: Direction::Bidirectional,
            hidden_size: None,
            activations: Cell::Lstm { coupled: false }.default_activations().repeat(2),
            clip: None,
            batch_first: false,
        };
        let batch_first = Recurrent { batch_first: true, ..time_first.clone() };
        let swap = |t: &Tensor| {
            let (a, b, rest) = (t.shape()[0], t.shape()[1], t.shape()[2..].iter().product::<usize>());
            let order = (0..b).flat_map(|j| (0..a).flat_map(move |i| (0..rest).map(move |k| (i * b + j) * rest + k)));
            let shape: Shape = [b, a].iter().chain(&t.shape()[2..]).copied().collect();
            crate::ops::select(t, shape, order).unwrap()
        };
        let x = wave(&[3, 2, 2], 0);
        let expected = run(
            &time_first.into(),
            &[Some(x.clone()), Some(w.clone()), Some(r.clone()), None, None, Some(h.clone())],
            3,
        )
        .unwrap();
        let got = run(&batch_first.into(), &[Some(swap(&x)), Some(w), Some(r), None, None, Some(swap(&h))], 3).unwrap();
        let tensors = |values: &[Value]| values.iter().map(|v| v.as_tensor().unwrap().clone()).collect::<Vec<_>>();
        let (got, expected) = (tensors(&got), tensors(&expected));
        assert_eq!([&swap(&got[1]), &swap(&got[2])], [&expected[1], &expected[2]]);
        // [n, t, d, h] to [t, d, n, h].
        let order = (0..3).flat_map(|t| {
            (0..2).flat_map(move |d| (0..2).flat_map(move |n| (0..2).map(move |h| ((n * 3 + t) * 2 + d) * 2 + h)))
        });
        assert_eq!(crate::ops::select(&got[0], [3, 2, 2, 2], order).unwrap(), expected[0]);
    }

    #[test]
    fn contradictions_are_errors() {
        case("LSTM", 14)
            .wave(&[2, 1, 2])
            .wave(&[1, 8, 2])
            .wave(&[1, 8, 3])
            .fails("don't fit 4 gates and hidden size 3");
        case("GRU", 14)
            .with("direction", "sideways")
            .wave(&[2, 1, 2])
            .wave(&[1, 6, 2])
            .wave(&[1, 6, 2])
            .fails("direction 'sideways'");
        case("RNN", 14)
            .wave(&[2, 1, 2])
            .wave(&[1, 2, 2])
            .wave(&[1, 2, 2])
            .omitted()
            .input(tensor::<i32>(&[1], &[3]))
            .fails("numbers up to 2");
    }
}
