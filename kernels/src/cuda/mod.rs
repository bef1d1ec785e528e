//! Kernels for NVIDIA's GPUs as CUDA C, written by hand where that is faster than what is generated: products, convolutions, attention,
//! rows, recurrences.
//!
//! A family has a struct that describes its problem. [`Kernel`] is what becomes of it on a [`Device`]: text for the compiler, and what to
//! launch. The text stands on nothing but the compiler (no header of the toolkit) and is made for these sizes. Everything here is
//! text and arithmetic: no device is asked, so all of it is compiled and run on a processor in `tests/cuda.rs`.
//!
//! # How the text is built
//!
//! 1. [`DEVICE`]: numbers of 16 bits, asynchronous copies, tensor cores.
//! 2. `struct Operands`: the one parameter of every kernel, by value, pointers only, in the order of [`Kernel::arguments`].
//! 3. The caller's [`Functions`], which may read any member of it.
//! 4. Sizes as constants, then the kernels.
//!
//! So a launch passes one argument: the pointers as an array of 64-bit words. Indices are `u32`: a problem with an operand of 2³² elements
//! or more is refused ([`Refused`]).

mod attention;
mod bits;
mod conv;
mod product;
mod recurrent;
mod rows;
mod text;
mod winograd;

pub use attention::{Attention, Strides};
pub use bits::BlockedProduct;
pub use conv::{Conv, Layout};
pub use product::{Operand, Order, Product, Tile, Way};
pub use recurrent::{Cell, Recurrence};
pub use rows::{RowFunction, Rows, Transpose};
pub use text::{constant, index_text};
pub use winograd::Winograd;

/// Numbers of 16 bits, 16-byte accesses, asynchronous copies and tensor cores as functions.
pub const DEVICE: &str = include_str!("../../cuda/device.cuh");

/// For tests: with this before it, a kernel's text compiles as C++17 and `host::launch` runs it on a processor.
pub const HOST: &str = include_str!("../../cuda/host.h");

/// What kernels are chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Compute capability, 10 · major + minor: 75 and above.
    pub sm: u32,
    pub multiprocessors: u32,
    /// Shared memory that one block may have, in bytes, where it asks for more than 48 KiB.
    pub shared_bytes: u32,
}

impl Device {
    /// The NVIDIA H100 and H200.
    pub const H100: Device = Device { sm: 90, multiprocessors: 132, shared_bytes: 227 << 10 };
    /// The Jetson Orin.
    pub const ORIN: Device = Device { sm: 87, multiprocessors: 16, shared_bytes: 163 << 10 };
    /// The Tesla T4.
    pub const T4: Device = Device { sm: 75, multiprocessors: 40, shared_bytes: 64 << 10 };
}

/// An element in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    F32,
    F16,
    BF16,
    I32,
    I8,
    U8,
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 | Element::I32 => 4,
            Element::F16 | Element::BF16 => 2,
            Element::I8 | Element::U8 => 1,
        }
    }

    /// Its type in the kernels' text.
    pub fn name(self) -> &'static str {
        match self {
            Element::F32 => "float",
            Element::F16 => "f16",
            Element::BF16 => "bf16",
            Element::I32 => "i32",
            Element::I8 => "i8",
            Element::U8 => "u8",
        }
    }
}

/// How products of f32 are computed; of other elements there is one way, on tensor cores with sums in f32 or i32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// As f32, without tensor cores.
    Full,
    /// Factors rounded to TF32 (10 bits of fraction), sums in f32. Compute capability 8.0 and above.
    Tf32,
}

/// Pointers and functions of the caller's that a kernel is compiled with.
///
/// The functions get `const Operands& o` and read the pointers as its members. Those that every kernel calls:
///
/// - `__device__ Sum finish(const Operands& o, u32 i, u32 channel, Sum x)`: what is put at element `i` of the result, of the sum `x`;
///   `Sum` is `float`, of bytes `i32`. The kernel rounds it to the result's element.
/// - where an operand is [`Operand::Function`], `__device__ float a_at(const Operands& o, u32 z, u32 m, u32 k)` or
///   `b_at(const Operands& o, u32 z, u32 k, u32 n)`; they are only called inside the factors.
#[derive(Clone, Debug, Default)]
pub struct Functions {
    /// Type and name of further members of `Operands`, such as `("const float*", "bias")`.
    pub pointers: Vec<(String, String)>,
    /// Definitions of functions; without `finish`, the sum is the result.
    pub text: String,
}

/// A pointer that `Operands` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// An operand, in the order that the family's description says.
    Input(usize),
    Output(usize),
    /// Device memory of [`Kernel::workspace_bytes`], aligned to 256; what is in it means nothing before or after.
    Workspace,
    /// Of [`Functions::pointers`].
    Extra(usize),
}

/// A kernel to launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Its name in the module.
    pub entry: String,
    pub grid: [u32; 3],
    /// Threads of a block, along x.
    pub block: u32,
    /// Dynamic shared memory. Above 48 KiB the function's attribute has to be set to it.
    pub shared_bytes: u32,
}

/// A problem's kernels: one module, and what to launch, one after another on one stream.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub source: String,
    pub launches: Vec<Launch>,
    /// The members of `Operands`.
    pub arguments: Vec<Argument>,
    pub workspace_bytes: usize,
}

/// Why there is no kernel for a problem: its caller has another way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused(pub String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}
