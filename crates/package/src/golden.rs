//! Golden vectors: inputs, and what the model answered to them where it was made.

use crate::{GoldenTolerance, PackageError, file, ranking};
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

    /// Compares what a device answered, by name, with what is expected. Rows of equal rank may come in any order, see [`ranking`].
    ///
    /// # Errors
    /// The first output that is missing, of another type or shape, or off by more than the tolerance, and where.
    pub fn compare(&self, answered: &[(String, Tensor)], tolerance: GoldenTolerance) -> Result<(), String> {
        let found = |name: &String| answered.iter().find(|(n, _)| n == name).map(|(_, tensor)| tensor.clone());
        let mut pairs = Vec::new();
        for (name, expected) in &self.outputs {
            let actual = found(name).ok_or_else(|| format!("output '{name}' is missing"))?;
            if actual.dtype() != expected.dtype() || actual.shape() != expected.shape() {
                return Err(format!("output '{name}' is {actual:?}, expected {expected:?}"));
            }
            pairs.push((actual, expected));
        }
        let within = |actual, expected| tolerance.within(actual, expected);
        if let Some(reordering) = ranking::reorder(&pairs, within) {
            pairs.iter_mut().for_each(|(actual, _)| reordering.apply(actual));
        }
        for ((actual, expected), (name, _)) in pairs.iter().zip(&self.outputs) {
            let (true, Some(actual), Some(expected)) =
                (expected.dtype().is_float(), numbers(actual), numbers(expected))
            else {
                if actual == *expected {
                    continue;
                }
                return Err(format!("output '{name}' differs"));
            };
            if let Some(at) = actual.iter().zip(&expected).position(|(&a, &e)| !within(a, e)) {
                return Err(format!("output '{name}', element {at}: {}, expected {}", actual[at], expected[at]));
            }
        }
        Ok(())
    }
}

/// The elements as they are compared, one by one; `None` of strings, complex numbers and types below a byte.
pub fn numbers(tensor: &Tensor) -> Option<Vec<f64>> {
    macro_rules! wide {
        ($t:ty) => {
            tensor.to_vec::<$t>().ok()?.into_iter().map(|v| v as f64).collect()
        };
    }
    Some(match tensor.dtype() {
        DType::F32 => wide!(f32),
        DType::F64 => wide!(f64),
        DType::F16 => tensor.to_vec::<f16>().ok()?.into_iter().map(f64::from).collect(),
        DType::BF16 => tensor.to_vec::<bf16>().ok()?.into_iter().map(f64::from).collect(),
        DType::I8 => wide!(i8),
        DType::I16 => wide!(i16),
        DType::I32 => wide!(i32),
        DType::I64 => wide!(i64),
        DType::U8 => wide!(u8),
        DType::U16 => wide!(u16),
        DType::U32 => wide!(u32),
        DType::U64 => wide!(u64),
        DType::Bool => tensor.to_bools().ok()?.into_iter().map(|v| f64::from(u8::from(v))).collect(),
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
