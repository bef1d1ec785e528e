//! Element types: ONNX's whole list, with their sizes and names.

use half::{bf16, f16};
use std::fmt;

macro_rules! dtypes {
    ($($variant:ident $name:literal $bits:literal $onnx:literal),* $(,)?) => {
        /// The type of a tensor's elements.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum DType { $($variant),* }

        impl DType {
            pub const ALL: &'static [DType] = &[$(DType::$variant),*];

            /// Short lower-case name, as ONNX Runtime and NumPy users write it.
            pub const fn name(self) -> &'static str {
                match self { $(DType::$variant => $name),* }
            }

            /// Bits that one element takes in a packed buffer; 0 for strings, which own their storage.
            pub const fn bits(self) -> usize {
                match self { $(DType::$variant => $bits),* }
            }

            /// `TensorProto.DataType` of the ONNX specification.
            pub const fn onnx_code(self) -> i32 {
                match self { $(DType::$variant => $onnx),* }
            }

            pub const fn from_onnx_code(code: i32) -> Option<DType> {
                match code { $($onnx => Some(DType::$variant),)* _ => None }
            }

            pub fn from_name(name: &str) -> Option<DType> {
                match name { $($name => Some(DType::$variant),)* _ => None }
            }
        }
    };
}

dtypes! {
    F32 "f32" 32 1,
    U8 "u8" 8 2,
    I8 "i8" 8 3,
    U16 "u16" 16 4,
    I16 "i16" 16 5,
    I32 "i32" 32 6,
    I64 "i64" 64 7,
    String "string" 0 8,
    Bool "bool" 8 9,
    F16 "f16" 16 10,
    F64 "f64" 64 11,
    U32 "u32" 32 12,
    U64 "u64" 64 13,
    Complex64 "complex64" 64 14,
    Complex128 "complex128" 128 15,
    BF16 "bf16" 16 16,
    F8E4M3FN "f8e4m3fn" 8 17,
    F8E4M3FNUZ "f8e4m3fnuz" 8 18,
    F8E5M2 "f8e5m2" 8 19,
    F8E5M2FNUZ "f8e5m2fnuz" 8 20,
    U4 "u4" 4 21,
    I4 "i4" 4 22,
    F4E2M1 "f4e2m1" 4 23,
    F8E8M0 "f8e8m0" 8 24,
    U2 "u2" 2 25,
    I2 "i2" 2 26,
}

impl DType {
    /// Bytes of `count` packed elements (sub-byte types are packed, the last byte padded); `None` on overflow.
    pub fn byte_len(self, count: usize) -> Option<usize> {
        match self.bits() {
            0 => Some(0),
            bits @ (2 | 4) => Some(count.div_ceil(8 / bits)),
            bits => count.checked_mul(bits / 8),
        }
    }

    pub const fn is_float(self) -> bool {
        use DType::*;
        matches!(self, F32 | F16 | F64 | BF16 | F8E4M3FN | F8E4M3FNUZ | F8E5M2 | F8E5M2FNUZ | F4E2M1 | F8E8M0)
    }

    pub const fn is_integer(self) -> bool {
        use DType::*;
        matches!(self, U8 | I8 | U16 | I16 | I32 | I64 | U32 | U64 | U4 | I4 | U2 | I2)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that is stored as is in a tensor of [`Element::DTYPE`].
pub trait Element: bytemuck::NoUninit + bytemuck::AnyBitPattern + Copy + PartialEq + fmt::Debug + Send + Sync {
    const DTYPE: DType;
}

macro_rules! elements {
    ($($t:ty => $d:ident),* $(,)?) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* };
}

elements! {
    f32 => F32, f64 => F64, f16 => F16, bf16 => BF16,
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
}
