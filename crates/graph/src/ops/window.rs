//! The sliding window that convolution and pooling share.

/// Kernel extents, strides, dilations and padding over the spatial axes (all but `n` and `c`).
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// `None` where the weight says (convolutions).
    pub kernel_shape: Option<Vec<usize>>,
    /// Empty for all ones.
    pub strides: Vec<usize>,
    /// Empty for all ones.
    pub dilations: Vec<usize>,
    pub padding: Padding,
    /// Output extents round up instead of down (pooling only).
    pub ceil_mode: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Padding {
    /// Elements added before and after each spatial axis; empty for none.
    Explicit { begin: Vec<usize>, end: Vec<usize> },
    /// `output = ⌈input / stride⌉`, an odd element of padding at the end.
    SameUpper,
    /// The same, an odd element at the beginning.
    SameLower,
}

/// One spatial axis of a window over an input of known extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowAxis {
    pub input: usize,
    pub output: usize,
    pub kernel: usize,
    pub stride: usize,
    pub dilation: usize,
    pub pad_begin: usize,
    pub pad_end: usize,
}
