//! What happens to an accumulator before it is stored: bias, residual, activation; and the output that several threads
//! may write.
//!
//! Clamping activations are applied in registers. The others run over the rows of a tile right after it was stored, while
//! they are in the first-level cache: one copy of their code per kernel instead of one per tile shape.

use std::marker::PhantomData;

use super::isa::Isa;
use super::vmath;

/// The memory that a kernel writes.
///
/// Made from a slice it is exclusive. [`Output::alias`] lets several threads compute ranges of one output.
#[derive(Debug)]
pub struct Output<'a, T = f32> {
    pointer: *mut T,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: it is as good as the `&mut [T]` it was made from; whoever aliases it vouches for disjoint writes.
unsafe impl<T: Send> Send for Output<'_, T> {}
// SAFETY: a shared reference allows nothing but `len` and the unsafe `alias`.
unsafe impl<T: Send> Sync for Output<'_, T> {}

impl<'a, T> Output<'a, T> {
    pub fn new(memory: &'a mut [T]) -> Output<'a, T> {
        Output { pointer: memory.as_mut_ptr(), len: memory.len(), memory: PhantomData }
    }

    /// # Safety
    /// For `'a`, `len` values at `pointer` are initialised and writable, and what others access concurrently are other
    /// elements than those that the kernels given this output write.
    pub unsafe fn from_raw(pointer: *mut T, len: usize) -> Output<'a, T> {
        Output { pointer, len, memory: PhantomData }
    }

    /// The same memory again, for another thread.
    ///
    /// # Safety
    /// Kernels run concurrently on the two are given ranges whose outputs are disjoint.
    pub unsafe fn alias(&self) -> Output<'a, T> {
        Output { pointer: self.pointer, len: self.len, memory: PhantomData }
    }

    /// What follows the first `elements`: where a head's columns or an image of a batch begin.
    pub fn skip(self, elements: usize) -> Output<'a, T> {
        assert!(elements <= self.len, "skipping {elements} of {} elements", self.len);
        Output { pointer: self.pointer.wrapping_add(elements), len: self.len - elements, memory: PhantomData }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn pointer(&self) -> *mut T {
        self.pointer
    }
}

impl<'a> From<&'a mut [f32]> for Output<'a> {
    fn from(memory: &'a mut [f32]) -> Output<'a> {
        Output::new(memory)
    }
}

/// Something added to the result before the activation, in the output's own layout.
#[derive(Clone, Copy, Debug, Default)]
pub enum Residual<'a> {
    #[default]
    None,
    /// Elsewhere in memory, at the same indices as the output.
    Slice(&'a [f32]),
    /// What the output holds already.
    Output,
}

/// The last step of a fused kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Activation {
    #[default]
    Identity,
    Relu,
    /// `min(max(x, low), high)`.
    Clip {
        low: f32,
        high: f32,
    },
    LeakyRelu {
        alpha: f32,
    },
    /// x for x ≥ 0, else alpha · (e^x − 1).
    Elu {
        alpha: f32,
    },
    Sigmoid,
    Tanh,
    /// x · σ(x).
    Silu,
    /// `max(0, min(1, alpha · x + beta))`.
    HardSigmoid {
        alpha: f32,
        beta: f32,
    },
    /// x · max(0, min(1, x/6 + ½)).
    HardSwish,
    /// x/2 · (1 + erf(x/√2)).
    Gelu,
    /// x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³))).
    GeluTanh,
}

impl Activation {
    /// The bounds to clamp to in registers; infinite for activations that do not clamp.
    pub(crate) fn bounds(self) -> (f32, f32) {
        match self {
            Activation::Relu => (0.0, f32::INFINITY),
            Activation::Clip { low, high } => (low, high),
            _ => (f32::NEG_INFINITY, f32::INFINITY),
        }
    }

    /// Whether [`Activation::bounds`] is all there is to it.
    pub(crate) fn clamps(self) -> bool {
        matches!(self, Activation::Identity | Activation::Relu | Activation::Clip { .. })
    }

    #[inline(always)]
    pub(crate) fn apply<I: Isa>(self, isa: I, x: I::V) -> I::V {
        match self {
            Activation::Identity => x,
            Activation::Relu => isa.max(isa.zero(), x),
            Activation::Clip { low, high } => vmath::clip(isa, x, low, high),
            Activation::LeakyRelu { alpha } => isa.select(isa.lt(x, isa.zero()), isa.mul(isa.splat(alpha), x), x),
            Activation::Elu { alpha } => vmath::elu(isa, x, alpha),
            Activation::Sigmoid => vmath::sigmoid(isa, x),
            Activation::Tanh => vmath::tanh(isa, x),
            Activation::Silu => vmath::silu(isa, x),
            Activation::HardSigmoid { alpha, beta } => vmath::hard_sigmoid(isa, x, alpha, beta),
            Activation::HardSwish => isa.mul(x, vmath::hard_sigmoid(isa, x, 1.0 / 6.0, 0.5)),
            Activation::Gelu => vmath::gelu(isa, x),
            Activation::GeluTanh => vmath::gelu_tanh(isa, x),
        }
    }

    /// Applies the activation in place to `rows` runs of `width` values, `row_stride` apart.
    ///
    /// # Safety
    /// The runs are readable and writable.
    #[inline(always)]
    pub(crate) unsafe fn apply_rows<I: Isa>(
        self,
        isa: I,
        pointer: *mut f32,
        rows: usize,
        row_stride: usize,
        width: usize,
    ) {
        macro_rules! each {
            ($($pattern:pat => $activation:expr,)+) => {
                match self {
                    $($pattern => {
                        for row in 0..rows {
                            // SAFETY: the caller vouches for every run.
                            unsafe {
                                let start = pointer.add(row * row_stride);
                                let mut i = 0;
                                // Two at a time: one alone waits for itself.
                                while i + 2 * I::LANES <= width {
                                    let (a, b) = (start.add(i), start.add(i + I::LANES));
                                    let (x, y) = (isa.load(a), isa.load(b));
                                    let (x, y) = ($activation.apply(isa, x), $activation.apply(isa, y));
                                    isa.store(a, x);
                                    isa.store(b, y);
                                    i += 2 * I::LANES;
                                }
                                while i + I::LANES <= width {
                                    isa.store(start.add(i), $activation.apply(isa, isa.load(start.add(i))));
                                    i += I::LANES;
                                }
                                if i < width {
                                    let x = isa.load_partial(start.add(i), width - i);
                                    isa.store_partial(start.add(i), $activation.apply(isa, x), width - i);
                                }
                            }
                        }
                    })+
                }
            };
        }
        // One loop per activation, so that the match is outside of it.
        each! {
            Activation::Identity | Activation::Relu | Activation::Clip { .. } => {
                let (low, high) = self.bounds();
                Activation::Clip { low, high }
            },
            Activation::LeakyRelu { alpha } => Activation::LeakyRelu { alpha },
            Activation::Elu { alpha } => Activation::Elu { alpha },
            Activation::Sigmoid => Activation::Sigmoid,
            Activation::Tanh => Activation::Tanh,
            Activation::Silu => Activation::Silu,
            Activation::HardSigmoid { alpha, beta } => Activation::HardSigmoid { alpha, beta },
            Activation::HardSwish => Activation::HardSwish,
            Activation::Gelu => Activation::Gelu,
            Activation::GeluTanh => Activation::GeluTanh,
        }
    }
}

/// [`Activation::apply_rows`] as a function of its own.
pub(crate) struct ApplyRows {
    pub activation: Activation,
    pub pointer: *mut f32,
    pub rows: usize,
    pub row_stride: usize,
    pub width: usize,
}

impl super::dispatch::Kernel for ApplyRows {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        // SAFETY: whoever makes this kernel vouches for the runs.
        unsafe { self.activation.apply_rows(isa, self.pointer, self.rows, self.row_stride, self.width) }
    }
}
