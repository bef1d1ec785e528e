//! Values that may be missing.

use super::{EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// What is done with an optional value.
#[derive(Clone, Debug, PartialEq)]
pub struct Optional {
    pub function: OptionalFunction,
}

#[derive(Clone, Debug, PartialEq)]
pub enum OptionalFunction {
    /// The input as an optional; without an input an empty one, whose element would be `of`.
    Make { of: Option<Fact> },
    /// Whether there is an element, a boolean scalar. A tensor or a sequence is its own element; an omitted input has none.
    HasElement,
    /// The element; what is no optional is its own.
    GetElement,
}

impl Operator for Optional {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        let function = match node.op_type.as_str() {
            "Optional" => {
                node.expect_inputs(0..=1)?;
                let of = node.optional_type("type")?;
                if of.is_none() && !node.has_input(0) {
                    return Err(node.corrupt("has neither an input nor attribute 'type'"));
                }
                OptionalFunction::Make { of }
            }
            "OptionalHasElement" => {
                node.expect_inputs(0..=1)?;
                OptionalFunction::HasElement
            }
            "OptionalGetElement" => {
                node.expect_inputs(1..=1)?;
                OptionalFunction::GetElement
            }
            other => return Err(node.unsupported(format!("operator {other}"))),
        };
        Ok(Optional { function }.into())
    }

    fn export(&self) -> Spelling {
        match &self.function {
            OptionalFunction::Make { of: None } => Spelling::new("Optional"),
            OptionalFunction::Make { of: Some(of) } => Spelling::new("Optional").with("type", of.clone()),
            OptionalFunction::HasElement => Spelling::new("OptionalHasElement"),
            OptionalFunction::GetElement => Spelling::new("OptionalGetElement"),
        }
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let fact = match (&self.function, inputs.get(0)) {
            (OptionalFunction::Make { .. }, Some(Fact::Optional(_))) => {
                return Err(OpError::input("an optional of an optional"));
            }
            (OptionalFunction::Make { of }, Some(input)) => {
                // The declared type is to say the same; what is known of the input says more.
                let mut fresh = |axis: usize| context.fresh(&format!("extent{axis}"));
                if let Some(of) = of
                    && of.join(input, &mut fresh).is_none()
                {
                    return Err(OpError::input(format!("{input} for an optional of {of}")));
                }
                Fact::Optional(Box::new(input.clone()))
            }
            (OptionalFunction::Make { of: Some(of) }, None) => Fact::Optional(Box::new(of.clone())),
            (OptionalFunction::HasElement, input) => {
                let known = match input {
                    Some(Fact::Optional(_)) => None,
                    Some(_) => Some(vec![1i64.into()]),
                    None => Some(vec![0i64.into()]),
                };
                TensorFact::of_constant_shape(DType::Bool, &[]).with_value(known).into()
            }
            (OptionalFunction::GetElement, Some(Fact::Optional(of))) => Fact::clone(of),
            (OptionalFunction::GetElement, Some(input)) => input.clone(),
            (_, None) => return Err(OpError::input("input 0 is missing")),
        };
        Ok(vec![fact])
    }

    fn eval(&self, inputs: Inputs<'_>, _: &EvalContext) -> Result<Vec<Value>, OpError> {
        let result = match (&self.function, inputs.get(0)) {
            (OptionalFunction::Make { .. }, input) => Value::Optional(input.cloned().map(Box::new)),
            (OptionalFunction::HasElement, input) => {
                let has = !matches!(input, None | Some(Value::Optional(None)));
                Tensor::from_bools([], &[has])?.into()
            }
            (OptionalFunction::GetElement, Some(Value::Optional(Some(value)))) => Value::clone(value),
            (OptionalFunction::GetElement, Some(Value::Optional(None))) => {
                return Err(OpError::input("the optional has no element"));
            }
            (OptionalFunction::GetElement, Some(value)) => value.clone(),
            (OptionalFunction::GetElement, None) => return Err(OpError::input("input 0 is missing")),
        };
        Ok(vec![result])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, sequence, tensor, wave};
    use crate::{Fact, TensorFact};
    use cutover_tensor::{DType, Tensor, Value};

    fn some(value: impl Into<Value>) -> Value {
        Value::Optional(Some(Box::new(value.into())))
    }

    fn none(of: DType) -> (Value, Fact) {
        (Value::Optional(None), Fact::Optional(Box::new(TensorFact::unknown_rank(of).into())))
    }

    #[test]
    fn optionals_are_made_asked_and_opened() {
        let x = wave(&[2, 3], 0);
        let list = || sequence(&[&x, &wave(&[1], 1)]);
        let truth = |value: bool| Tensor::from_bools([], &[value]).unwrap();
        let of = Fact::Tensor(TensorFact::unknown_rank(DType::F32));
        case("Optional", 15).input(x.clone()).gives([some(x.clone())]);
        case("Optional", 15).input(x.clone()).with("type", of.clone()).gives([some(x.clone())]);
        case("Optional", 28).input(list()).gives([some(list())]);
        case("Optional", 15).with("type", of.clone()).gives([Value::Optional(None)]);
        case("Optional", 15).omitted().with("type", of.clone()).gives([Value::Optional(None)]);
        case("Optional", 15).fails("neither an input");
        case("Optional", 15).input(tensor(&[], &[1i64])).with("type", of).fails("i64[] for an optional of f32[..]");
        case("Optional", 15).input(some(x.clone())).fails("optional of an optional");

        case("OptionalHasElement", 15).input(some(x.clone())).gives([truth(true)]);
        case("OptionalHasElement", 15).declared(none(DType::I32)).gives([truth(false)]);
        case("OptionalHasElement", 18).input(list()).gives([truth(true)]);
        case("OptionalHasElement", 18).input(x.clone()).gives([truth(true)]);
        case("OptionalHasElement", 18).gives([truth(false)]);
        case("OptionalHasElement", 28).omitted().gives([truth(false)]);

        case("OptionalGetElement", 15).input(some(x.clone())).gives([x.clone()]);
        case("OptionalGetElement", 15).input(some(list())).gives([list()]);
        case("OptionalGetElement", 18).input(x.clone()).gives([x.clone()]);
        case("OptionalGetElement", 18).input(list()).gives([list()]);
        case("OptionalGetElement", 18).declared(none(DType::F32)).fails("no element");
        case("OptionalGetElement", 18).omitted().fails("missing");
    }
}
