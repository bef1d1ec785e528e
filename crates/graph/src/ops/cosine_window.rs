//! Windows that taper a frame of a signal.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    cast::{cast, named_type},
    movement,
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// `a₀ − a₁·cos(2πn / N) + a₂·cos(4πn / N)` for every `n` below the one input, `size`. `N` is `size`, or where the window is not periodic
/// `size − 1`; a symmetric window of one element is 1.
#[derive(Clone, Debug, PartialEq)]
pub struct CosineWindow {
    pub kind: CosineWindowKind,
    pub periodic: bool,
    pub dtype: DType,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CosineWindowKind {
    Hann,
    Hamming,
    Blackman,
}

impl CosineWindowKind {
    /// `a₀`, `a₁` and `a₂`, as ONNX has them.
    fn coefficients(self) -> [f64; 3] {
        match self {
            CosineWindowKind::Hann => [0.5, 0.5, 0.0],
            CosineWindowKind::Hamming => [25.0 / 46.0, 21.0 / 46.0, 0.0],
            CosineWindowKind::Blackman => [0.42, 0.5, 0.08],
        }
    }
}

/// The type of numbers that attribute `output_datatype` says.
pub(super) fn output_type(node: &mut NodeReader) -> Result<DType, ImportError> {
    if !node.has_attribute("output_datatype") {
        return Ok(DType::F32);
    }
    let dtype = named_type(node, "output_datatype")?;
    match dtype {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => Ok(dtype),
        DType::I8 | DType::I16 | DType::I32 | DType::I64 | DType::U8 | DType::U16 | DType::U32 | DType::U64 => {
            Ok(dtype)
        }
        other => Err(node.corrupt(format!("attribute 'output_datatype' is {other}, which is no type of numbers"))),
    }
}

impl Operator for CosineWindow {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=1)?;
        let kind = match node.op_type.as_str() {
            "HannWindow" => CosineWindowKind::Hann,
            "HammingWindow" => CosineWindowKind::Hamming,
            _ => CosineWindowKind::Blackman,
        };
        Ok(CosineWindow { kind, periodic: node.flag("periodic", true)?, dtype: output_type(node)? }.into())
    }

    fn export(&self) -> Spelling {
        let name = match self.kind {
            CosineWindowKind::Hann => "HannWindow",
            CosineWindowKind::Hamming => "HammingWindow",
            CosineWindowKind::Blackman => "BlackmanWindow",
        };
        Spelling::new(name)
            .with("periodic", i64::from(self.periodic))
            .with("output_datatype", i64::from(self.dtype.onnx_code()))
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let size = inputs.tensor(0)?;
        if let Some(size) = movement::known_integer(inputs, 0)? {
            checked(size)?;
        }
        let size: Option<Dim> = size.value.as_ref().and_then(|value| value.first().cloned());
        Ok(vec![TensorFact::new(self.dtype, [size.unwrap_or_else(|| context.fresh("size"))]).into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let size = context.bounded_len(&[checked(movement::integer(inputs, 0)?)?])?;
        let [a0, a1, a2] = self.kind.coefficients();
        let period = if self.periodic { size } else { size.saturating_sub(1) };
        let turn = |n: usize| 2.0 * std::f64::consts::PI * n as f64 / period as f64;
        let element = |n: usize| match period {
            0 => 1.0,
            _ => a0 - a1 * turn(n).cos() + a2 * (2.0 * turn(n)).cos(),
        };
        let window = Wide::Float((0..size).map(element).collect()).narrow(DType::F64, [size])?;
        Ok(vec![cast(&window, self.dtype)?.into()])
    }
}

fn checked(size: i64) -> Result<usize, OpError> {
    usize::try_from(size).map_err(|_| OpError::input(format!("a window of {size} elements")))
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s, tensor};

    fn window(op: &'static str, size: i64, periodic: i64) -> Case {
        case(op, 17).with("periodic", periodic).input(tensor::<i64>(&[], &[size]))
    }

    #[test]
    fn agrees_with_scipy() {
        window("HannWindow", 4, 1).gives([f32s(&[4], &[0., 0.5, 1., 0.5])]);
        window("HannWindow", 5, 0).gives([f32s(&[5], &[0., 0.5, 1., 0.5, 0.])]);
        window("HammingWindow", 4, 1).gives([f32s(&[4], &[0.086957, 0.543478, 1., 0.543478])]);
        window("BlackmanWindow", 5, 0).gives([f32s(&[5], &[0., 0.34, 1., 0.34, 0.])]);
        window("BlackmanWindow", 1, 0).gives([f32s(&[1], &[1.])]);
        window("HammingWindow", 1, 1).gives([f32s(&[1], &[0.086957])]);
        window("HannWindow", 0, 1).gives([f32s(&[0], &[])]);
        let integers = window("HannWindow", 4, 1).with("output_datatype", 3);
        integers.gives([tensor::<i8>(&[4], &[0, 0, 1, 0])]);
    }

    #[test]
    fn refuses_sizes_and_types_that_are_none() {
        window("HannWindow", -1, 1).fails("a window of -1 elements");
        window("HannWindow", i64::MAX, 1).fails("resource limit");
        window("HannWindow", 4, 1).with("output_datatype", 8).fails("no type of numbers");
    }
}
