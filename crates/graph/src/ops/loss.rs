//! The losses of classification.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, SoftmaxFunction, Spelling, Wide, conv::differ,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{Tensor, Value};

/// Inputs `x [n, c, …]`, the classes `target [n, …]` and optional weights `[c]`. The loss of a place is `−w[t] · log p[t]`, where `t` is its
/// target, and 0 where that is `ignore_index`. NegativeLogLikelihoodLoss takes `x` as the `log p`; SoftmaxCrossEntropyLoss makes them,
/// `x − log Σ exp x` over the classes, and has them as its second output.
#[derive(Clone, Debug, PartialEq)]
pub struct Loss {
    pub from_scores: bool,
    pub reduction: LossReduction,
    pub ignore_index: Option<i64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossReduction {
    /// The loss of every place, `[n, …]`.
    None,
    Sum,
    /// The sum, divided by the sum of the weights of all targets that are not ignored.
    Mean,
}

impl Operator for Loss {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=3)?;
        let reduction = match node.string("reduction", "mean")?.as_str() {
            "none" => LossReduction::None,
            "sum" => LossReduction::Sum,
            "mean" => LossReduction::Mean,
            other => return Err(node.corrupt(format!("reduction '{other}', expected none, sum or mean"))),
        };
        let from_scores = node.op_type == "SoftmaxCrossEntropyLoss";
        Ok(Loss { from_scores, reduction, ignore_index: node.optional_int("ignore_index")? }.into())
    }

    fn export(&self) -> Spelling {
        let name = if self.from_scores { "SoftmaxCrossEntropyLoss" } else { "NegativeLogLikelihoodLoss" };
        let spelling = Spelling::new(name).with(
            "reduction",
            match self.reduction {
                LossReduction::None => "none",
                LossReduction::Sum => "sum",
                LossReduction::Mean => "mean",
            },
        );
        match self.ignore_index {
            Some(index) => spelling.with("ignore_index", index),
            None => spelling,
        }
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, target) = (inputs.tensor(0)?, inputs.tensor(1)?);
        inputs.same_dtype(0, 2)?;
        let wrong = |what: String| Err(OpError::input(format!("expected scores [n, c, …] and {what}, got {x}")));
        if let Some(dims) = &x.shape {
            let [batch, classes, rest @ ..] = &dims[..] else { return wrong("classes [n, …]".to_string()) };
            let places: Vec<&Dim> = [batch].into_iter().chain(rest).collect();
            let fits = |t: &Vec<Dim>| t.len() == places.len() && !t.iter().zip(&places).any(|(t, p)| differ(t, p));
            if target.shape.as_ref().is_some_and(|t| !fits(t)) {
                return wrong(format!("classes [n, …]: {target}"));
            }
            if let Some(weight) = inputs.optional_tensor(2)?
                && weight.shape.as_ref().is_some_and(|w| w.len() != 1 || differ(&w[0], classes))
            {
                return wrong(format!("weights [c]: {weight}"));
            }
        }
        let shape = match self.reduction {
            LossReduction::None => target.shape.clone(),
            _ => Some(Vec::new()),
        };
        let loss = TensorFact { dtype: x.dtype, shape, value: None };
        let logarithms = TensorFact { value: None, ..x.clone() };
        Ok(if self.from_scores { vec![loss.into(), logarithms.into()] } else { vec![loss.into()] })
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, target) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let shape = x.shape().dims();
        let fits = |t: &[usize]| shape.len() >= 2 && t.first() == shape.first() && t.get(1..) == Some(&shape[2..]);
        if !fits(target.shape()) {
            let (x, target) = (x.shape(), target.shape());
            return Err(OpError::input(format!("scores {x} and classes {target}, expected [n, c, …] and [n, …]")));
        }
        let (classes, inner) = (shape[1], shape[2..].iter().product::<usize>());
        let mut logarithms = Wide::floats(x)?;
        if self.from_scores {
            let mut row = vec![0.0; classes];
            for start in (0..target.element_count()).map(|place| place / inner * classes * inner + place % inner) {
                row.iter_mut().enumerate().for_each(|(class, x)| *x = logarithms[start + class * inner]);
                SoftmaxFunction::LogSoftmax.apply(&mut row);
                row.iter().enumerate().for_each(|(class, &x)| logarithms[start + class * inner] = x);
            }
        }
        let weights = match inputs.optional_tensor(2)? {
            None => None,
            Some(weights) if weights.shape().dims() == [classes] => Some(Wide::floats(weights)?),
            Some(weights) => {
                return Err(OpError::input(format!("{classes} weights expected, got shape {}", weights.shape())));
            }
        };
        let (mut losses, mut weight_sum) = (vec![0.0; target.element_count()], 0.0);
        for (place, given) in inputs.integers(1)?.into_iter().enumerate() {
            if Some(given) == self.ignore_index {
                continue;
            }
            let class = usize::try_from(given).ok().filter(|&class| class < classes).ok_or_else(|| {
                OpError::input(format!("class {given} at place {place}, expected 0 to {}", classes as i64 - 1))
            })?;
            let weight = weights.as_ref().map_or(1.0, |weights| weights[class]);
            weight_sum += weight;
            losses[place] = -weight * logarithms[(place / inner * classes + class) * inner + place % inner];
        }
        let narrow = |values: Vec<f64>, shape: &[usize]| -> Result<Tensor, OpError> {
            Wide::Float(values).narrow(x.dtype(), shape)
        };
        let loss = match self.reduction {
            LossReduction::None => narrow(losses, target.shape())?,
            LossReduction::Sum => narrow(vec![losses.iter().sum()], &[])?,
            LossReduction::Mean => narrow(vec![losses.iter().sum::<f64>() / weight_sum], &[])?,
        };
        let mut results = vec![loss.into()];
        if self.from_scores {
            results.push(narrow(logarithms, shape)?.into());
        }
        Ok(results)
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};

    fn specification(case: Case) -> Case {
        let x = f32s(&[2, 3, 2], &[1., 2., 2., 2., 3., 2., 0., 1., 2., 2., 1., 2.]);
        case.input(x).input(tensor::<i64>(&[2, 2], &[2, 1, 0, 2]))
    }

    #[test]
    fn the_specifications_examples() {
        let loss = |reduction: &str| specification(case("NegativeLogLikelihoodLoss", 13).with("reduction", reduction));
        let weights = || f32s(&[3], &[0.2, 0.3, 0.1]);
        loss("none").gives([f32s(&[2, 2], &[-3., -2., 0., -2.])]);
        loss("sum").input(weights()).gives([f32s(&[], &[-1.1])]);
        loss("mean").input(weights()).gives([f32s(&[], &[-1.571429])]);
        loss("mean").with("ignore_index", 2).gives([f32s(&[], &[-1.0])]);
        loss("mean").with("ignore_index", 2).input(weights()).gives([f32s(&[], &[-1.2])]);
    }

    #[test]
    fn scores_become_logarithms_of_probabilities() {
        let x = || f32s(&[1, 2], &[0.0, 3f32.ln()]);
        let loss = || case("SoftmaxCrossEntropyLoss", 13).input(x()).input(tensor::<i32>(&[1], &[1]));
        loss().gives([f32s(&[], &[0.287682])]);
        loss().with("reduction", "none").gives([f32s(&[1], &[0.287682]), f32s(&[1, 2], &[-1.386294, -0.287682])]);
        // Nothing but what is ignored: no mean, and a sum of 0.
        let ignored = || loss().with("ignore_index", 1);
        ignored().gives([f32s(&[], &[f32::NAN])]);
        ignored().with("reduction", "sum").gives([f32s(&[], &[0.0])]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let loss = || case("NegativeLogLikelihoodLoss", 22);
        loss().wave(&[2, 3]).input(tensor::<i64>(&[2], &[0, 3])).fails("class 3 at place 1, expected 0 to 2");
        loss().wave(&[2, 3]).input(tensor::<i64>(&[2], &[0, -1])).fails("class -1");
        loss().wave(&[2, 3]).input(tensor::<i64>(&[3], &[0, 0, 0])).fails("expected");
        let weighted = loss().wave(&[2, 3]).input(tensor::<i64>(&[2], &[0, 0]));
        weighted.wave(&[2]).fails("weights");
        loss().with("reduction", "max").wave(&[1, 1]).input(tensor::<i64>(&[1], &[0])).fails("reduction 'max'");
    }
}
