//! The operators in terms of the families.

use super::{
    Fault, Flow, MOVES_MAX, MoveKey, Sources,
    elementwise::{self, Arithmetic, binary, unary},
    from_host,
    movement::{gather_rows, moved, permuted},
    product::{matmul, matmul_transposed},
    recurrent::{Kind, recur},
    rows::{Reduction, RowFunction, of_rows, reduce},
    window,
};
use candle_core::{DType as CandleType, Device, Tensor};
use cutover_graph::{
    Fact, Node, NodeId, Op, TensorFact,
    ops::{
        AspectPolicy, BatchNorm, Cell, CellActivation, Conv, ConvTranspose, CoordinateMode, Direction, EvalContext,
        Facts, Gemm, GlobalPoolFunction, InferContext, Inputs, InstanceNorm, LayerNorm, LpNormOrder, PadMode,
        Recurrent, Reduce, ReduceFunction, Resize, ResizeMode, Softmax, SoftmaxFunction, UnaryFunction,
        VariadicFunction, Window, WindowAxis, normalize_axes, normalize_axis,
    },
};
use cutover_tensor::{DType, Tensor as Host, Value};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

type Result<T> = std::result::Result<T, Fault>;

fn refuse<T>(message: impl Into<String>) -> Result<T> {
    Err(Fault(message.into()))
}

/// A value as a tensor of candle.
pub(super) fn live(flow: &Flow) -> Result<Tensor> {
    match flow {
        Flow::Live(tensor) => Ok(tensor.clone()),
        Flow::Host(value) => match value.as_tensor() {
            Some(tensor) => from_host(tensor),
            None => refuse(format!("a {} where a tensor was expected", value.kind())),
        },
    }
}

/// A node and what it reads.
pub(super) struct Operands<'a> {
    pub id: NodeId,
    pub node: &'a Node,
    pub inputs: &'a [Option<Flow>],
    pub moves: &'a Mutex<HashMap<MoveKey, Arc<Sources>>>,
}

impl Operands<'_> {
    fn optional(&self, index: usize) -> Result<Option<Tensor>> {
        self.inputs.get(index).and_then(Option::as_ref).map(live).transpose()
    }

    fn tensor(&self, index: usize) -> Result<Tensor> {
        self.optional(index)?.ok_or_else(|| Fault(format!("input {index} is missing")))
    }

    /// An input that follows from no weight.
    fn host(&self, index: usize) -> Result<Option<&Host>> {
        match self.inputs.get(index).and_then(Option::as_ref) {
            None => Ok(None),
            Some(Flow::Host(value)) => Ok(value.as_tensor()),
            Some(Flow::Live(_)) => refuse(format!("input {index} follows from weights")),
        }
    }

    fn integers(&self, index: usize) -> Result<Option<Vec<i64>>> {
        Ok(match self.host(index)? {
            None => None,
            Some(tensor) if tensor.dtype() == DType::I64 => Some(tensor.to_vec()?),
            Some(tensor) => Some(tensor.to_vec::<i32>()?.into_iter().map(i64::from).collect()),
        })
    }

    /// The shapes of the node's outputs, by the operator's own inference.
    fn shapes(&self) -> Result<Vec<Vec<usize>>> {
        let fact = |flow: &Flow| -> Result<Fact> {
            Ok(match flow {
                Flow::Live(tensor) => TensorFact::of_constant_shape(DType::F32, tensor.dims()).into(),
                Flow::Host(value) => match value.as_tensor() {
                    Some(tensor) => TensorFact::of_tensor(tensor).into(),
                    None => return refuse(format!("a {} as input", value.kind())),
                },
            })
        };
        let facts: Vec<Option<Fact>> =
            self.inputs.iter().map(|f| f.as_ref().map(fact).transpose()).collect::<Result<_>>()?;
        let facts: Vec<Option<&Fact>> = facts.iter().map(Option::as_ref).collect();
        let context = InferContext { node: &self.node.name, outputs: self.node.outputs.len() };
        let outputs = self.node.op.infer(Facts(&facts), &context)?;
        let shape = |fact: &Fact| fact.as_tensor().and_then(TensorFact::constant_shape);
        outputs.iter().map(|f| shape(f).ok_or_else(|| Fault("its shape follows from data".to_string()))).collect()
    }

    fn shape(&self) -> Result<Vec<usize>> {
        self.shapes()?.into_iter().next().ok_or_else(|| Fault("has no output".to_string()))
    }

    pub fn apply(&self) -> Result<Vec<Tensor>> {
        let one = |tensor: candle_core::Result<Tensor>| Ok(vec![tensor?]);
        match &self.node.op {
            Op::Identity(_) | Op::Dropout(_) => Ok(vec![self.tensor(0)?]),
            Op::Cast(cast) if cast.to == DType::F32 => Ok(vec![self.tensor(0)?]),
            Op::Unary(op) => one(unary(op.function, &self.tensor(0)?)),
            Op::Binary(op) => match Arithmetic::of(op.function) {
                Some(function) => one(binary(function, &self.tensor(0)?, &self.tensor(1)?)),
                None => refuse("has no derivative"),
            },
            Op::Variadic(op) => Ok(vec![self.variadic(op.function)?]),
            Op::Clip(_) => {
                let bound = |index: usize, none: f32| -> Result<f32> {
                    Ok(match self.host(index)? {
                        Some(bound) => bound.to_vec::<f32>()?.first().copied().unwrap_or(none),
                        None => none,
                    })
                };
                let (low, high) = (bound(1, f32::NEG_INFINITY)?, bound(2, f32::INFINITY)?);
                one(elementwise::clip(&self.tensor(0)?, low, high))
            }
            Op::Where(_) => Ok(vec![self.select()?]),
            Op::Conv(op) => Ok(vec![self.convolution(op)?]),
            Op::ConvTranspose(op) => Ok(vec![self.transposed_convolution(op)?]),
            Op::MaxPool(op) if self.node.outputs.len() == 1 => {
                let x = self.tensor(0)?;
                one(window::max_pool(self.window(&op.window, &x)?, self.shape()?, &x))
            }
            Op::AveragePool(op) => {
                let x = self.tensor(0)?;
                one(window::average_pool(self.window(&op.window, &x)?, op.count_include_pad, self.shape()?, &x))
            }
            Op::GlobalPool(op) => {
                let x = self.tensor(0)?;
                let rows = x.reshape((x.dims()[..2].iter().product::<usize>(), ()))?;
                let y = match op.function {
                    GlobalPoolFunction::Average => {
                        reduce(Reduction::Sum, &rows)?.affine(1.0 / rows.dim(1)? as f64, 0.0)?
                    }
                    GlobalPoolFunction::Max => reduce(Reduction::Max, &rows)?,
                    GlobalPoolFunction::Lp { .. } => return refuse("powers in a pool"),
                };
                one(y.reshape(self.shape()?))
            }
            Op::MatMul(op) => {
                let y = matmul(&self.tensor(0)?, &self.tensor(1)?)?;
                let y = match self.optional(2)? {
                    Some(bias) => binary(Arithmetic::Add, &y, &bias)?,
                    None => y,
                };
                one(op.activation.map_or(Ok(y.clone()), |f| elementwise::fused(f, &y)))
            }
            Op::Gemm(op) => Ok(vec![self.gemm(op)?]),
            Op::BatchNorm(op) => Ok(vec![self.batch_norm(op)?]),
            Op::LayerNorm(op) => Ok(vec![self.layer_norm(op)?]),
            Op::InstanceNorm(op) => Ok(vec![self.instance_norm(op)?]),
            Op::LpNorm(op) => {
                let x = self.tensor(0)?;
                let axis = normalize_axis(op.axis, x.rank())?;
                self.over_axes(&x, &[axis], |rows| {
                    let powers = match op.p {
                        LpNormOrder::L1 => unary(UnaryFunction::Abs, rows)?,
                        LpNormOrder::L2 => binary(Arithmetic::Mul, rows, rows)?,
                    };
                    let norm = reduce(Reduction::Sum, &powers)?.unsqueeze(1)?;
                    let norm = if op.p == LpNormOrder::L2 { unary(UnaryFunction::Sqrt, &norm)? } else { norm };
                    Ok(binary(Arithmetic::Div, rows, &norm)?)
                })
                .map(|y| vec![y])
            }
            Op::Softmax(op) => Ok(vec![self.softmax(op)?]),
            Op::Reduce(op) => Ok(vec![self.reduce(op)?]),
            Op::Reshape(_) | Op::Flatten(_) | Op::Squeeze(_) | Op::Unsqueeze(_) => {
                one(self.tensor(0)?.reshape(self.shape()?))
            }
            Op::Transpose(op) => {
                let x = self.tensor(0)?;
                one(permuted(&x, op.permutation.clone().unwrap_or_else(|| (0..x.rank()).rev().collect())))
            }
            Op::Concat(op) => {
                let parts = (0..self.inputs.len()).map(|i| self.tensor(i)).collect::<Result<Vec<_>>>()?;
                let axis = normalize_axis(op.axis, parts.first().map_or(0, Tensor::rank))?;
                one(Tensor::cat(&parts, axis))
            }
            Op::Split(op) => {
                let x = self.tensor(0)?;
                let axis = normalize_axis(op.axis, x.rank())?;
                let mut from = 0;
                let parts = self.shapes()?.into_iter().map(|shape| {
                    from += shape[axis];
                    x.narrow(axis, from - shape[axis], shape[axis])
                });
                Ok(parts.collect::<candle_core::Result<_>>()?)
            }
            Op::Gather(op) if op.axis == 0 => {
                let (table, shape) = (self.tensor(0)?, self.shape()?);
                let count = table.dim(0)? as i64;
                let place =
                    |i: i64| usize::try_from(if i < 0 { i + count } else { i }).ok().filter(|&i| i < count as usize);
                let indices = self.integers(1)?.unwrap_or_default();
                let rows = indices.iter().map(|&i| place(i).ok_or_else(|| Fault(format!("index {i} of {count} rows"))));
                one(gather_rows(&table, rows.collect::<Result<_>>()?, shape))
            }
            Op::Gather(_) | Op::GatherElements(_) | Op::GatherNd(_) | Op::Slice(_) | Op::Expand(_) | Op::Tile(_) => {
                self.moved(0.0)
            }
            Op::DepthSpace(_) | Op::ReverseSequence(_) | Op::Trilu(_) | Op::CenterCropPad(_) => self.moved(0.0),
            Op::Resize(op) if op.mode == ResizeMode::Nearest => self.moved(0.0),
            Op::Resize(op) => Ok(vec![self.resampled(op)?]),
            Op::Pad(op) => match (&op.mode, self.host(2)?) {
                (PadMode::Constant, Some(fill)) => self.moved(fill.to_vec::<f32>()?.first().copied().unwrap_or(0.0)),
                _ => self.moved(0.0),
            },
            Op::Recurrent(op) => self.recurrent(op),
            _ => refuse("no derivative is known"),
        }
    }

    fn variadic(&self, function: VariadicFunction) -> Result<Tensor> {
        let arithmetic = match function {
            VariadicFunction::Sum | VariadicFunction::Mean => Arithmetic::Add,
            VariadicFunction::Min => Arithmetic::Min,
            VariadicFunction::Max => Arithmetic::Max,
        };
        let mut y = self.tensor(0)?;
        for index in 1..self.inputs.len() {
            y = binary(arithmetic, &y, &self.tensor(index)?)?;
        }
        match function {
            VariadicFunction::Mean => Ok(y.affine(1.0 / self.inputs.len() as f64, 0.0)?),
            _ => Ok(y),
        }
    }

    fn select(&self) -> Result<Tensor> {
        let Some(condition) = self.host(0)? else { return refuse("input 0 is missing") };
        let shape = self.shape()?;
        let truth: Vec<u8> = condition.to_bools()?.into_iter().map(u8::from).collect();
        let condition = Tensor::from_vec(truth, condition.shape().dims(), &Device::Cpu)?;
        let broadcast = |x: Tensor| x.broadcast_as(&shape[..])?.contiguous();
        let (x, y) = (broadcast(self.tensor(1)?)?, broadcast(self.tensor(2)?)?);
        Ok(broadcast(condition)?.where_cond(&x, &y)?)
    }

    fn window(&self, window: &Window, x: &Tensor) -> Result<[WindowAxis; 3]> {
        let Some(kernel) = &window.kernel_shape else { return refuse("has no kernel_shape") };
        three(&window.axes(&x.dims()[2..], kernel)?)
    }

    fn convolution(&self, op: &Conv) -> Result<Tensor> {
        let (x, weights) = (self.tensor(0)?, self.tensor(1)?);
        let (channels, outputs) = (x.dim(1)?, weights.dim(0)?);
        let axes = three(&op.window.axes(&x.dims()[2..], &weights.dims()[2..])?)?;
        let geometry = window::Geometry {
            groups: op.group,
            image_channels: channels / op.group,
            value_channels: outputs / op.group,
            axes,
        };
        let mut y = window::convolution(geometry, self.shape()?, &x, &weights, self.optional(2)?.as_ref())?;
        if let Some(residual) = self.optional(3)? {
            y = binary(Arithmetic::Add, &y, &residual)?;
        }
        Ok(op.activation.map_or(Ok(y.clone()), |f| elementwise::fused(f, &y))?)
    }

    fn transposed_convolution(&self, op: &ConvTranspose) -> Result<Tensor> {
        let (x, weights, shape) = (self.tensor(0)?, self.tensor(1)?, self.shape()?);
        let axes = op.axes(&x.dims()[2..], &weights.dims()[2..], &shape[2..])?;
        // Of the convolution whose images are the results.
        let swapped = |axis: WindowAxis| WindowAxis { input: axis.output, output: axis.input, ..axis };
        let axes: Vec<WindowAxis> = axes.into_iter().map(swapped).collect();
        let geometry = window::Geometry {
            groups: op.group,
            image_channels: weights.dim(1)?,
            value_channels: x.dim(1)? / op.group,
            axes: three(&axes)?,
        };
        Ok(window::transposed(geometry, shape, &x, &weights, self.optional(2)?.as_ref())?)
    }

    fn gemm(&self, op: &Gemm) -> Result<Tensor> {
        let (a, b) = (self.tensor(0)?, self.tensor(1)?);
        let a = if op.transpose_a { permuted(&a, vec![1, 0])? } else { a };
        let mut y = if op.transpose_b { matmul_transposed(&a, &b)? } else { matmul(&a, &b)? };
        if op.alpha != 1.0 {
            y = y.affine(op.alpha.into(), 0.0)?;
        }
        if let Some(c) = self.optional(2)? {
            let c = if op.beta == 1.0 { c } else { c.affine(op.beta.into(), 0.0)? };
            y = binary(Arithmetic::Add, &y, &c)?;
        }
        Ok(op.activation.map_or(Ok(y.clone()), |f| elementwise::fused(f, &y))?)
    }

    /// With the statistics that the model holds.
    fn batch_norm(&self, op: &BatchNorm) -> Result<Tensor> {
        if op.training.is_some() || op.per_element {
            return refuse("statistics of the batch, or of every element: only those that the model holds are frozen");
        }
        let x = self.tensor(0)?;
        let (mean, variance) = (self.tensor(3)?, self.tensor(4)?);
        let deviation = unary(UnaryFunction::Sqrt, &variance.affine(1.0, op.epsilon.into())?)?;
        let scale = binary(Arithmetic::Div, &self.tensor(1)?, &deviation)?;
        let shift = binary(Arithmetic::Sub, &self.tensor(2)?, &binary(Arithmetic::Mul, &mean, &scale)?)?;
        let y = binary(Arithmetic::Mul, &x, &per_channel(&scale, x.rank())?)?;
        Ok(binary(Arithmetic::Add, &y, &per_channel(&shift, x.rank())?)?)
    }

    fn layer_norm(&self, op: &LayerNorm) -> Result<Tensor> {
        let x = self.tensor(0)?;
        let axis = normalize_axis(op.axis, x.rank())?;
        let extent: usize = x.dims()[axis..].iter().product();
        let function = RowFunction::Standardize { epsilon: op.epsilon, centred: op.centred };
        let y = of_rows(function, &x.reshape(((), extent))?)?.reshape(x.dims())?;
        let y = binary(Arithmetic::Mul, &y, &self.tensor(1)?)?;
        Ok(match self.optional(2)? {
            Some(bias) => binary(Arithmetic::Add, &y, &bias)?,
            None => y,
        })
    }

    fn instance_norm(&self, op: &InstanceNorm) -> Result<Tensor> {
        let x = self.tensor(0)?;
        let (n, channels) = (x.dim(0)?, x.dim(1)?);
        let rows = x.reshape((n * op.groups.unwrap_or(channels), ()))?;
        let function = RowFunction::Standardize { epsilon: op.epsilon, centred: true };
        let y = of_rows(function, &rows)?.reshape(x.dims())?;
        let y = binary(Arithmetic::Mul, &y, &per_channel(&self.tensor(1)?, x.rank())?)?;
        Ok(binary(Arithmetic::Add, &y, &per_channel(&self.tensor(2)?, x.rank())?)?)
    }

    fn softmax(&self, op: &Softmax) -> Result<Tensor> {
        let x = self.tensor(0)?;
        let function = match op.function {
            SoftmaxFunction::Softmax => RowFunction::Softmax,
            SoftmaxFunction::LogSoftmax => RowFunction::LogSoftmax,
            SoftmaxFunction::Hardmax => return refuse("has no derivative"),
        };
        let axes: Vec<usize> = match op.coerced {
            true if op.axis == x.rank() as i64 => Vec::new(),
            true => (normalize_axis(op.axis, x.rank())?..x.rank()).collect(),
            false => vec![normalize_axis(op.axis, x.rank())?],
        };
        self.over_axes(&x, &axes, |rows| Ok(of_rows(function, rows)?))
    }

    /// `work` on `x` with `axes` as the rows of a matrix, its result of the same shape put back.
    fn over_axes(&self, x: &Tensor, axes: &[usize], work: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let (order, extent) = (last(axes, x.rank()), axes.iter().map(|&a| x.dims()[a]).product::<usize>());
        let front = permuted(x, order.clone())?;
        let y = work(&front.reshape(((), extent))?)?.reshape(front.dims())?;
        let mut back = vec![0; order.len()];
        order.iter().enumerate().for_each(|(i, &axis)| back[axis] = i);
        Ok(permuted(&y, back)?)
    }

    fn reduce(&self, op: &Reduce) -> Result<Tensor> {
        let x = self.tensor(0)?;
        let axes = self.integers(1)?.unwrap_or_default();
        let axes = match axes.is_empty() {
            true if op.noop_with_empty_axes => return Ok(x),
            true => (0..x.rank()).collect(),
            false => normalize_axes(&axes, x.rank())?,
        };
        let extent: usize = axes.iter().map(|&a| x.dims()[a]).product();
        let rows = permuted(&x, last(&axes, x.rank()))?.reshape(((), extent))?;
        let sum = |x: &Tensor| reduce(Reduction::Sum, x);
        let squares = || binary(Arithmetic::Mul, &rows, &rows);
        let y = match op.function {
            ReduceFunction::Sum => sum(&rows)?,
            ReduceFunction::Mean => sum(&rows)?.affine(1.0 / extent as f64, 0.0)?,
            ReduceFunction::Max => reduce(Reduction::Max, &rows)?,
            ReduceFunction::Min => reduce(Reduction::Min, &rows)?,
            ReduceFunction::L1 => sum(&unary(UnaryFunction::Abs, &rows)?)?,
            ReduceFunction::L2 => unary(UnaryFunction::Sqrt, &sum(&squares()?)?)?,
            ReduceFunction::SumSquare => sum(&squares()?)?,
            ReduceFunction::LogSum => unary(UnaryFunction::Log, &sum(&rows)?)?,
            ReduceFunction::LogSumExp => {
                let top = reduce(Reduction::Max, &rows)?.detach().unsqueeze(1)?;
                let powers = unary(UnaryFunction::Exp, &binary(Arithmetic::Sub, &rows, &top)?)?;
                binary(Arithmetic::Add, &unary(UnaryFunction::Log, &sum(&powers)?)?, &top.squeeze(1)?)?
            }
            _ => return refuse("no derivative is known"),
        };
        Ok(y.reshape(self.shape()?)?)
    }

    /// An operator that gives elements of its first input at other places.
    fn moved(&self, fill: f32) -> Result<Vec<Tensor>> {
        let x = self.tensor(0)?;
        let mut key = Vec::new();
        let mut values: Vec<Option<Value>> = vec![None];
        let is_pad = matches!(self.node.op, Op::Pad(_));
        for index in 1..self.inputs.len() {
            let host = self.host(index)?;
            match host {
                // Positions are filled in by 0.
                Some(_) if is_pad && index == 2 => values.push(None),
                _ => {
                    key.extend(host.iter().flat_map(|tensor| tensor.bytes().iter().copied()));
                    key.push(0xff);
                    values.push(host.cloned().map(Value::from));
                }
            }
        }
        let key = (self.id, x.dims().to_vec(), key);
        let known = self.moves.lock().ok().and_then(|moves| moves.get(&key).cloned());
        let sources = match known {
            Some(sources) => sources,
            None => {
                let positions: Vec<i64> = (1..=x.elem_count() as i64).collect();
                values[0] = Some(Host::from_vec(x.dims(), positions)?.into());
                let values: Vec<Option<&Value>> = values.iter().map(Option::as_ref).collect();
                let results = self.node.op.eval(Inputs(&values), &EvalContext::default())?;
                let result =
                    results.first().and_then(Value::as_tensor).ok_or_else(|| Fault("gave no tensor".to_string()))?;
                let positions: Vec<u32> = result.to_vec::<i64>()?.into_iter().map(|p| p as u32).collect();
                let sources = Arc::new(Sources { shape: result.shape().dims().to_vec(), positions, fill });
                if let Ok(mut moves) = self.moves.lock() {
                    if moves.len() >= MOVES_MAX {
                        moves.clear();
                    }
                    moves.insert(key, Arc::clone(&sources));
                }
                sources
            }
        };
        Ok(vec![moved(sources, &x)?])
    }

    /// Interpolation: a matrix for each axis, which is what the operator makes of the identity.
    fn resampled(&self, op: &Resize) -> Result<Tensor> {
        if op.coordinates == CoordinateMode::TfCropAndResize || op.aspect != AspectPolicy::Stretch {
            return refuse("a crop, or one scale for all axes");
        }
        let mut y = self.tensor(0)?;
        let rank = y.rank();
        let axes = match &op.axes {
            Some(axes) => normalize_axes(axes, rank)?,
            None => (0..rank).collect(),
        };
        let given = |index: usize| -> Result<Option<&Host>> { Ok(self.host(index)?.filter(|t| t.element_count() > 0)) };
        let (scales, sizes) = (given(2)?, self.integers(3)?.filter(|sizes| !sizes.is_empty()));
        let scales = scales.map(Host::to_vec::<f32>).transpose()?;
        for (place, &axis) in axes.iter().enumerate() {
            let extent = y.dims()[axis];
            let (scale, size) = (scales.as_ref().map(|s| s[place]), sizes.as_ref().map(|s| s[place]));
            if scale == Some(1.0) || size == Some(extent as i64) {
                continue;
            }
            let probe = Resize { axes: Some(vec![1]), ..op.clone() };
            let mut identity = vec![0f32; extent * extent];
            identity.iter_mut().step_by(extent + 1).for_each(|x| *x = 1.0);
            let identity: Value = Host::from_vec([extent, extent], identity)?.into();
            let scale = scale.map(|s| Host::from_vec([1], vec![s])).transpose()?.map(Value::from);
            let size = size.map(|s| Host::from_vec([1], vec![s])).transpose()?.map(Value::from);
            let inputs = [Some(&identity), None, scale.as_ref(), size.as_ref()];
            let results = Op::from(probe).eval(Inputs(&inputs), &EvalContext::default())?;
            let Some(matrix) = results.first().and_then(Value::as_tensor) else { return refuse("gave no tensor") };
            let order = last(&[axis], rank);
            let mut back = vec![0; rank];
            order.iter().enumerate().for_each(|(i, &axis)| back[axis] = i);
            y = permuted(&matmul(&permuted(&y, order)?, &from_host(matrix)?)?, back)?;
        }
        Ok(y)
    }

    fn recurrent(&self, op: &Recurrent) -> Result<Vec<Tensor>> {
        use CellActivation as A;
        let (kind, usual) = match op.cell {
            Cell::Lstm { coupled: false } => (Kind::Lstm, &[A::Sigmoid, A::Tanh, A::Tanh][..]),
            Cell::Lstm { coupled: true } => return refuse("coupled gates"),
            Cell::Gru { linear_before_reset } => (Kind::Gru { linear_before_reset }, &[A::Sigmoid, A::Tanh][..]),
            Cell::Rnn => (Kind::Rnn, &[A::Tanh][..]),
        };
        if op.clip.is_some() || self.optional(7)?.is_some() || op.activations.chunks(usual.len()).any(|a| a != usual) {
            return refuse("other activations than the usual, a clip, or peepholes");
        }
        let x = self.tensor(0)?;
        let x = if op.batch_first { permuted(&x, vec![1, 0, 2])? } else { x };
        let (steps, batch, features) = x.dims3()?;
        if let Some(lengths) = self.integers(4)?
            && lengths.iter().any(|&length| length != steps as i64)
        {
            return refuse("sequences of several lengths in a batch");
        }
        let (w, r, bias) = (self.tensor(1)?, self.tensor(2)?, self.optional(3)?);
        let (rows, hidden) = (r.dim(1)?, r.dim(2)?);
        let initial = |index: usize| -> Result<Option<Tensor>> {
            match self.optional(index)? {
                Some(state) if op.batch_first => Ok(Some(permuted(&state, vec![1, 0, 2])?)),
                state => Ok(state),
            }
        };
        let initial = [initial(5)?, initial(6)?];
        let zeros = |count: usize| Tensor::zeros(count, CandleType::F32, &Device::Cpu);
        let states = if kind == Kind::Lstm { 2 } else { 1 };
        let mut by_direction = Vec::new();
        for direction in 0..op.direction.count() {
            let reverse = op.direction == Direction::Reverse || direction == 1;
            let input = if reverse { flipped(&x)? } else { x.clone() };
            let of = |t: &Tensor| t.narrow(0, direction, 1)?.squeeze(0);
            let gates = matmul_transposed(&input.reshape((steps * batch, features))?, &of(&w)?)?;
            let (gates, state_bias) = match &bias {
                None => (gates, zeros(rows)?),
                Some(bias) => {
                    let bias = of(bias)?;
                    (binary(Arithmetic::Add, &gates, &bias.narrow(0, 0, rows)?)?, bias.narrow(0, rows, rows)?)
                }
            };
            let mut parts = Vec::new();
            for state in &initial[..states] {
                parts.push(match state {
                    Some(state) => of(state)?.flatten_all()?,
                    None => zeros(batch * hidden)?,
                });
            }
            parts.push(state_bias);
            let y = recur(kind, &gates.reshape((steps, batch, rows))?, &of(&r)?, &Tensor::cat(&parts, 0)?)?;
            let lasts = (0..states).map(|s| y.narrow(0, s, 1)?.narrow(1, steps - 1, 1)?.reshape((1, batch, hidden)));
            let lasts = lasts.collect::<candle_core::Result<Vec<_>>>()?;
            let y = y.narrow(0, 0, 1)?.squeeze(0)?;
            by_direction.push((if reverse { flipped(&y)? } else { y }.unsqueeze(1)?, lasts));
        }
        let ys: Vec<&Tensor> = by_direction.iter().map(|(y, _)| y).collect();
        let y = Tensor::cat(&ys, 1)?;
        let mut results = vec![if op.batch_first { permuted(&y, vec![2, 0, 1, 3])? } else { y }];
        for state in 0..states {
            let lasts: Vec<&Tensor> = by_direction.iter().map(|(_, lasts)| &lasts[state]).collect();
            let last = Tensor::cat(&lasts, 0)?;
            results.push(if op.batch_first { permuted(&last, vec![1, 0, 2])? } else { last });
        }
        Ok(results)
    }
}

/// Its first axis the other way round.
fn flipped(x: &Tensor) -> candle_core::Result<Tensor> {
    let rows = x.dim(0)?;
    gather_rows(x, (0..rows).rev().collect(), x.dims().to_vec())
}

/// All axes in order, these last.
fn last(axes: &[usize], rank: usize) -> Vec<usize> {
    (0..rank).filter(|axis| !axes.contains(axis)).chain(axes.iter().copied()).collect()
}

/// A number for each channel as `[c, 1, …]` of a tensor of this rank.
fn per_channel(x: &Tensor, rank: usize) -> candle_core::Result<Tensor> {
    let shape: Vec<usize> =
        std::iter::once(x.elem_count()).chain(std::iter::repeat_n(1, rank.saturating_sub(2))).collect();
    x.reshape(shape)
}

fn three(axes: &[WindowAxis]) -> Result<[WindowAxis; 3]> {
    window::three(axes).ok_or_else(|| Fault(format!("a window over {} spatial axes", axes.len())))
}
