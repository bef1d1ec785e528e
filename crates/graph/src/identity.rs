//! What a constant *is*: the key under which versions of a model share weights.

use cutover_tensor::Tensor;
use std::fmt;

/// The BLAKE3 digest of a constant's type, shape and bytes, or of (operator, attributes, identities) that folded it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity(pub [u8; 32]);

impl Identity {
    pub fn of_tensor(tensor: &Tensor) -> Identity {
        let mut hasher = blake3::Hasher::new();
        hasher.update(tensor.dtype().name().as_bytes());
        for &dim in tensor.shape().dims() {
            hasher.update(&(dim as u64).to_le_bytes());
        }
        match tensor.strings() {
            Ok(strings) => strings.iter().for_each(|s| {
                hasher.update(&(s.len() as u64).to_le_bytes());
                hasher.update(s.as_bytes());
            }),
            Err(_) => {
                hasher.update(tensor.bytes());
            }
        }
        Identity(*hasher.finalize().as_bytes())
    }

    /// The identity of what `recipe` (an operator with its attributes, spelled out) makes of `inputs`.
    pub fn derived(recipe: &str, inputs: &[Identity]) -> Identity {
        let mut hasher = blake3::Hasher::new();
        hasher.update(recipe.as_bytes());
        for input in inputs {
            hasher.update(&input.0);
        }
        Identity(*hasher.finalize().as_bytes())
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
