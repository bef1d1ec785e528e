//! One step of an optimizer, from ONNX's preview of training.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// Inputs: the learning rate `R` and the number of steps `T` made before (i64), both scalars; then for any number of tensors all the
/// values `X`, all their gradients, and all of each state. Outputs: the new `X`, and the new states in the same order.
/// `G` below is the gradient `+ norm_coefficient · X`.
#[derive(Clone, Debug, PartialEq)]
pub struct Optimizer {
    pub norm_coefficient: f32,
    pub rule: OptimizerRule,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OptimizerRule {
    /// `H' = H + G²`, `X' = X − R / (1 + T · decay_factor) · G / (√H' + epsilon)`.
    Adagrad { decay_factor: f32, epsilon: f32 },
    /// `V' = alpha · V + (1 − alpha) · G`, `H' = beta · H + (1 − beta) · G²`, and with `r = R · √(1 − betaᵀ) / (1 − alphaᵀ)`, or `R` at
    /// `T = 0`, `X' = (1 − norm_coefficient_post) · (X − r · V' / (√H' + epsilon))`.
    Adam { alpha: f32, beta: f32, epsilon: f32, norm_coefficient_post: f32 },
    /// `V' = alpha · V + beta · G`, where beta counts as 1 at `T = 0`, and `X' = X − R · V'`, or `X − R · (G + alpha · V')` as Nesterov
    /// has it.
    Momentum { alpha: f32, beta: f32, is_nesterov: bool },
}

impl Operator for Optimizer {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let rule = match node.op_type.as_str() {
            "Adagrad" => OptimizerRule::Adagrad {
                decay_factor: node.float("decay_factor", 0.0)?,
                epsilon: node.float("epsilon", 1e-6)?,
            },
            "Adam" => OptimizerRule::Adam {
                alpha: node.float("alpha", 0.9)?,
                beta: node.float("beta", 0.999)?,
                epsilon: node.float("epsilon", 1e-6)?,
                norm_coefficient_post: node.float("norm_coefficient_post", 0.0)?,
            },
            _ => OptimizerRule::Momentum {
                alpha: required(node, "alpha")?,
                beta: required(node, "beta")?,
                is_nesterov: match node.optional_string("mode")?.as_deref() {
                    Some("standard") => false,
                    Some("nesterov") => true,
                    other => return Err(node.corrupt(format!("mode {other:?}, expected standard or nesterov"))),
                },
            },
        };
        let norm_coefficient = match rule {
            OptimizerRule::Momentum { .. } => required(node, "norm_coefficient")?,
            _ => node.float("norm_coefficient", 0.0)?,
        };
        let op = Optimizer { norm_coefficient, rule };
        let per_tensor = 2 + op.states();
        if node.inputs.len() < 2 + per_tensor || !(node.inputs.len() - 2).is_multiple_of(per_tensor) {
            let count = node.inputs.len();
            return Err(node.corrupt(format!("has {count} inputs, expected 2 and {per_tensor} for every tensor")));
        }
        Ok(op.into())
    }

    fn export(&self) -> Spelling {
        let spelling = match self.rule {
            OptimizerRule::Adagrad { decay_factor, epsilon } => {
                Spelling::new("Adagrad").with("decay_factor", decay_factor).with("epsilon", epsilon)
            }
            OptimizerRule::Adam { alpha, beta, epsilon, norm_coefficient_post } => Spelling::new("Adam")
                .with("alpha", alpha)
                .with("beta", beta)
                .with("epsilon", epsilon)
                .with("norm_coefficient_post", norm_coefficient_post),
            OptimizerRule::Momentum { alpha, beta, is_nesterov } => Spelling::new("Momentum")
                .with("alpha", alpha)
                .with("beta", beta)
                .with("mode", if is_nesterov { "nesterov" } else { "standard" }),
        };
        spelling.with("norm_coefficient", self.norm_coefficient).in_domain("ai.onnx.preview.training")
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let tensors = self.tensors(inputs.len())?;
        // Every new value has the type and shape of its old one: values first, states after the gradients.
        let old = (0..tensors).chain(2 * tensors..(2 + self.states()) * tensors);
        old.map(|at| Ok(TensorFact { value: None, ..inputs.tensor(2 + at)?.clone() }.into())).collect()
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let tensors = self.tensors(inputs.len())?;
        let rate = match Wide::floats(inputs.tensor(0)?)?[..] {
            [rate] => rate,
            _ => return Err(OpError::input("the learning rate must be one number")),
        };
        let steps = match inputs.integers(1)?[..] {
            [steps] => steps,
            _ => return Err(OpError::input("the number of steps must be one integer")),
        };
        let mut results: Vec<Vec<Value>> = vec![Vec::new(); 1 + self.states()];
        for at in 0..tensors {
            let part = |nth: usize| inputs.tensor(2 + nth * tensors + at);
            let x = part(0)?;
            let mut columns: Vec<Vec<f64>> = Vec::new();
            for nth in 0..2 + self.states() {
                let tensor = part(nth)?;
                if tensor.shape() != x.shape() {
                    let (actual, expected) = (tensor.shape(), x.shape());
                    return Err(OpError::input(format!(
                        "a tensor of {expected}, but its gradient or state of {actual}"
                    )));
                }
                columns.push(Wide::floats(tensor)?);
            }
            let mut made: Vec<Vec<f64>> = vec![Vec::with_capacity(x.element_count()); 1 + self.states()];
            for i in 0..x.element_count() {
                let states = [columns[2][i], columns.last().map_or(0.0, |last| last[i])];
                let new = self.step(rate, steps, columns[0][i], columns[1][i], states);
                made.iter_mut().zip(new).for_each(|(made, new)| made.push(new));
            }
            for ((made, results), old) in made.into_iter().zip(&mut results).zip([0, 2, 3]) {
                let old: &Tensor = part(old)?;
                results.push(Wide::Float(made).narrow(old.dtype(), old.shape().clone())?.into());
            }
        }
        Ok(results.into_iter().flatten().collect())
    }
}

impl Optimizer {
    /// Number of states of a tensor.
    fn states(&self) -> usize {
        if let OptimizerRule::Adam { .. } = self.rule { 2 } else { 1 }
    }

    fn tensors(&self, inputs: usize) -> Result<usize, OpError> {
        let per_tensor = 2 + self.states();
        match inputs.checked_sub(2) {
            Some(all) if all > 0 && all.is_multiple_of(per_tensor) => Ok(all / per_tensor),
            _ => Err(OpError::input(format!("{inputs} inputs, expected 2 and {per_tensor} for every tensor"))),
        }
    }

    /// The new value and states of one element.
    fn step(&self, rate: f64, steps: i64, x: f64, gradient: f64, [first, second]: [f64; 2]) -> [f64; 3] {
        let wide = f64::from;
        let g = wide(self.norm_coefficient) * x + gradient;
        match self.rule {
            OptimizerRule::Adagrad { decay_factor, epsilon } => {
                let h = first + g * g;
                [x - rate / (1.0 + steps as f64 * wide(decay_factor)) * g / (h.sqrt() + wide(epsilon)), h, 0.0]
            }
            OptimizerRule::Adam { alpha, beta, epsilon, norm_coefficient_post } => {
                let (alpha, beta) = (wide(alpha), wide(beta));
                let v = alpha * first + (1.0 - alpha) * g;
                let h = beta * second + (1.0 - beta) * g * g;
                let rate = match steps > 0 {
                    true => rate * (1.0 - beta.powf(steps as f64)).sqrt() / (1.0 - alpha.powf(steps as f64)),
                    false => rate,
                };
                [(1.0 - wide(norm_coefficient_post)) * (x - rate * v / (h.sqrt() + wide(epsilon))), v, h]
            }
            OptimizerRule::Momentum { alpha, beta, is_nesterov } => {
                let v = wide(alpha) * first + if steps > 0 { wide(beta) } else { 1.0 } * g;
                let direction = if is_nesterov { g + wide(alpha) * v } else { v };
                [x - rate * direction, v, 0.0]
            }
        }
    }
}

fn required(node: &mut NodeReader, name: &str) -> Result<f32, ImportError> {
    node.optional_float(name)?.ok_or_else(|| node.corrupt(format!("attribute '{name}' is missing")))
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};

    fn of(name: &'static str, steps: i64) -> Case {
        case(name, 1).input(f32s(&[], &[0.5])).input(tensor::<i64>(&[], &[steps]))
    }

    #[test]
    fn the_formulas() {
        // G = 0.5 · 2 + 1 = 2, H = 5 + 4 = 9; the rate is 0.5 / (1 + 1).
        let adagrad = of("ai.onnx.preview.training.Adagrad", 4).with("decay_factor", 0.25f32).with("epsilon", 1.0f32);
        let one = |value: f32| f32s(&[1], &[value]);
        let node = adagrad.with("norm_coefficient", 0.5f32).input(one(2.0)).input(one(1.0)).input(one(5.0));
        node.gives([one(1.875), one(9.0)]);
        // V = 0.5 · 2 + 0.5 · 4 = 3, H = 0.75 · 8 + 0.25 · 16 = 10; the rate is 0.5 · √(1 − 0.75²) / (1 − 0.5²).
        let adam = |steps| {
            let node = of("ai.onnx.preview.training.Adam", steps).with("alpha", 0.5f32).with("beta", 0.75f32);
            let node = node.with("epsilon", 0.0f32).with("norm_coefficient_post", 0.5f32);
            node.input(one(1.0)).input(one(4.0)).input(one(2.0)).input(one(8.0))
        };
        adam(2).gives([one(0.290835), one(3.0), one(10.0)]);
        adam(0).gives([one(0.262829), one(3.0), one(10.0)]);
    }

    #[test]
    fn momentum_of_several_tensors() {
        let momentum = |mode: &str, steps| {
            let node = of("ai.onnx.preview.training.Momentum", steps).with("alpha", 0.5f32).with("beta", 0.25f32);
            let node = node.with("norm_coefficient", 0.0f32).with("mode", mode);
            let two = |case: Case, a: f32, b: [f32; 2]| case.input(f32s(&[], &[a])).input(f32s(&[2], &b));
            two(two(two(node, 1.0, [2.0, 3.0]), 4.0, [8.0, 0.0]), 2.0, [0.0, 4.0])
        };
        let results = |x: [f32; 3], v: [f32; 3]| {
            [f32s(&[], &x[..1]), f32s(&[2], &x[1..]), f32s(&[], &v[..1]), f32s(&[2], &v[1..])]
        };
        momentum("standard", 1).gives(results([0.0, 1.0, 2.0], [2.0, 2.0, 2.0]));
        momentum("standard", 0).gives(results([-1.5, -2.0, 2.0], [5.0, 8.0, 2.0]));
        momentum("nesterov", 1).gives(results([-1.5, -2.5, 2.5], [2.0, 2.0, 2.0]));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let name = "ai.onnx.preview.training.Adagrad";
        of(name, 0).wave(&[2]).wave(&[2]).fails("expected 2 and 3 for every tensor");
        of(name, 0).wave(&[2]).wave(&[2]).wave(&[3]).fails("its gradient or state of [3]");
        of("ai.onnx.preview.training.Momentum", 0).wave(&[2]).wave(&[2]).wave(&[2]).fails("'alpha' is missing");
    }
}
