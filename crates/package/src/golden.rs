//! Golden vectors: inputs, and what the model answered to them where it was made.

use crate::{GoldenTolerance, PackageError, file};
use cutover_graph::onnx::safetensors;
use cutover_tensor::{DType, Tensor, bf16, f16};

/// One set of inputs with the outputs expected for it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Golden {
    pub inputs: Vec<(String, Tensor)>,
    pub outputs: Vec<(String, Tensor)>,
}

impl Golden {
    /// The bytes of `golden.safetensors`: tensors called `input.NAME` and `output.NAME`.
    pub fn encode(&self) -> Vec<u8> {
        let name = |side: &str, (name, tensor)| (format!("{side}.{name}"), tensor);
        let inputs = self.inputs.iter().map(|(n, t)| name("input", (n, t)));
        let outputs = self.outputs.iter().map(|(n, t)| name("output", (n, t)));
        let tensors: Vec<(String, &Tensor)> = inputs.chain(outputs).collect();
        let layout = safetensors::layout(&tensors);
        let mut bytes = Vec::new();
        safetensors::write(&layout, &tensors, &mut bytes).expect("a vector takes all");
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Golden, PackageError> {
        let corrupt = |message: String| PackageError::Corrupt { file: file::GOLDEN.to_string(), message };
        let file = ::safetensors::SafeTensors::deserialize(bytes).map_err(|e| corrupt(e.to_string()))?;
        let mut golden = Golden::default();
        let mut names: Vec<_> = file.names().into_iter().map(|n| n.to_string()).collect();
        names.sort();
        for name in names {
            let view = file.tensor(&name).map_err(|e| corrupt(e.to_string()))?;
            let side = match name.split_once('.') {
                Some(("input", _)) => &mut golden.inputs,
                Some(("output", _)) => &mut golden.outputs,
                _ => continue,
            };
            let dtype =
                dtype(view.dtype()).ok_or_else(|| corrupt(format!("'{name}' is of a type not compared here")))?;
            let tensor = Tensor::from_bytes(dtype, view.shape(), view.data()).map_err(|e| corrupt(e.to_string()))?;
            let name = name.split_once('.').expect("as matched above").1;
            side.push((name.to_string(), tensor));
        }
        Ok(golden)
    }

    /// Compares what a device answered, by name, with what is expected.
    ///
    /// # Errors
    /// The first output that is missing, of another type or shape, or off by more than the tolerance, and where.
    pub fn compare(&self, answered: &[(String, Tensor)], tolerance: GoldenTolerance) -> Result<(), String> {
        for (name, expected) in &self.outputs {
            let Some((_, actual)) = answered.iter().find(|(n, _)| n == name) else {
                return Err(format!("output '{name}' is missing"));
            };
            if actual.dtype() != expected.dtype() || actual.shape() != expected.shape() {
                return Err(format!("output '{name}' is {actual:?}, expected {expected:?}"));
            }
            let (Some(actual), Some(expected)) = (numbers(actual), numbers(expected)) else {
                if actual == expected {
                    continue;
                }
                return Err(format!("output '{name}' differs"));
            };
            for (at, (a, e)) in actual.into_iter().zip(expected).enumerate() {
                // An infinite difference is within no tolerance, though that of an infinite value is infinite.
                let difference = (a - e).abs();
                let close = difference.is_finite() && difference <= tolerance.atol + tolerance.rtol * e.abs();
                if !close && a != e && !(a.is_nan() && e.is_nan()) {
                    return Err(format!("output '{name}', element {at}: {a}, expected {e}"));
                }
            }
        }
        Ok(())
    }
}

fn numbers(tensor: &Tensor) -> Option<Vec<f64>> {
    Some(match tensor.dtype() {
        DType::F32 => tensor.to_vec::<f32>().ok()?.into_iter().map(f64::from).collect(),
        DType::F64 => tensor.to_vec::<f64>().ok()?,
        DType::F16 => tensor.to_vec::<f16>().ok()?.into_iter().map(f64::from).collect(),
        DType::BF16 => tensor.to_vec::<bf16>().ok()?.into_iter().map(f64::from).collect(),
        _ => return None,
    })
}

fn dtype(dtype: ::safetensors::Dtype) -> Option<DType> {
    use ::safetensors::Dtype::*;
    Some(match dtype {
        F64 => DType::F64,
        F32 => DType::F32,
        F16 => DType::F16,
        BF16 => DType::BF16,
        I64 => DType::I64,
        I32 => DType::I32,
        I16 => DType::I16,
        I8 => DType::I8,
        U64 => DType::U64,
        U32 => DType::U32,
        U16 => DType::U16,
        U8 => DType::U8,
        BOOL => DType::Bool,
        _ => return None,
    })
}
