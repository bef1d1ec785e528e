//! Element by element: one operand, two operands with broadcasting by strides, and a scale and shift per channel.
//!
//! Ranges count output elements, row-major, and may be cut anywhere. An operand may be the output's own memory. Broadcasting is
//! a stride of 0; which shapes broadcast is the caller's matter, as are types other than `f32`.

use std::ops::Range;

use super::dispatch::{Kernel, dispatch};
use super::epilogue::{Activation, ApplyRows, Output};
use super::isa::Isa;
use super::{BLOCK, IsaLevel, vmath};

/// Most axes of a broadcast.
pub const MAX_RANK: usize = 16;

/// Where an operand is.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    Slice(&'a [f32]),
    /// What the output holds, at the output's own indices.
    Output,
}

impl<'a> Source<'a> {
    /// First element and number of elements.
    pub(crate) fn parts(self, output: &Output<'_>) -> (*const f32, usize) {
        match self {
            Source::Slice(slice) => (slice.as_ptr(), slice.len()),
            Source::Output => (output.pointer().cast_const(), output.len()),
        }
    }
}

impl<'a> From<&'a [f32]> for Source<'a> {
    fn from(slice: &'a [f32]) -> Source<'a> {
        Source::Slice(slice)
    }
}

/// A function of one value. NaN gives NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unary {
    Activation(Activation),
    Abs,
    Neg,
    /// −1, 0 or 1.
    Sign,
    Reciprocal,
    Sqrt,
    Square,
    Exp,
    Log,
    Erf,
    Floor,
    Ceil,
    /// To the nearest integer, ties to even.
    Round,
    /// ln(1 + e^x).
    Softplus,
    /// x / (1 + |x|).
    Softsign,
    /// x · tanh(ln(1 + e^x)).
    Mish,
}

trait Map1: Copy {
    fn map<I: Isa>(self, isa: I, x: I::V) -> I::V;
}

macro_rules! unary_maps {
    ($($name:ident: |$isa:ident, $x:ident| $e:expr;)+) => {
        $(
            #[derive(Clone, Copy)]
            struct $name;
            impl Map1 for $name {
                #[inline(always)]
                fn map<I: Isa>(self, $isa: I, $x: I::V) -> I::V {
                    $e
                }
            }
        )+
    };
}

unary_maps! {
    Abs: |isa, x| isa.abs(x);
    Neg: |isa, x| isa.neg(x);
    Sign: |isa, x| {
        let sign = isa.copysign(isa.splat(1.0), x);
        isa.select(isa.lt(isa.zero(), isa.abs(x)), sign, x)
    };
    Reciprocal: |isa, x| isa.div(isa.splat(1.0), x);
    Sqrt: |isa, x| isa.sqrt(x);
    Square: |isa, x| isa.mul(x, x);
    Exp: |isa, x| vmath::exp(isa, x);
    Log: |isa, x| vmath::log(isa, x);
    Erf: |isa, x| vmath::erf(isa, x);
    Floor: |isa, x| isa.floor(x);
    Ceil: |isa, x| isa.ceil(x);
    Round: |isa, x| isa.round(x);
    Softplus: |isa, x| vmath::softplus(isa, x);
    Softsign: |isa, x| isa.div(x, isa.add(isa.splat(1.0), isa.abs(x)));
    Mish: |isa, x| isa.mul(x, vmath::tanh(isa, vmath::softplus(isa, x)));
}

/// `output[i] = op(input[i])` for the elements of the range.
pub fn unary(level: IsaLevel, op: Unary, input: Source<'_>, range: Range<usize>, output: Output<'_>) {
    let (from, len) = input.parts(&output);
    assert!(range.start <= range.end && range.end <= len && range.end <= output.len(), "{range:?} of {len} elements");
    let (from, to) = (from.wrapping_add(range.start), output.pointer().wrapping_add(range.start));
    let count = range.len();
    macro_rules! run {
        ($($op:ident)+) => {
            match op {
                Unary::Activation(activation) => dispatch(level, ActivateCopy { activation, from, to, count }),
                $(Unary::$op => dispatch(level, RunMap1 { map: $op, from, to, count }),)+
            }
        };
    }
    run!(Abs Neg Sign Reciprocal Sqrt Square Exp Log Erf Floor Ceil Round Softplus Softsign Mish)
}

struct RunMap1<F> {
    map: F,
    from: *const f32,
    to: *mut f32,
    count: usize,
}

impl<F: Map1> Kernel for RunMap1<F> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let RunMap1 { map, from, to, count } = self;
        let mut i = 0;
        // SAFETY: the entry checked that `count` values are readable and writable.
        unsafe {
            while i + I::LANES <= count {
                isa.store(to.add(i), map.map(isa, isa.load(from.add(i))));
                i += I::LANES;
            }
            if i < count {
                let x = isa.load_partial(from.add(i), count - i);
                isa.store_partial(to.add(i), map.map(isa, x), count - i);
            }
        }
    }
}

struct ActivateCopy {
    activation: Activation,
    from: *const f32,
    to: *mut f32,
    count: usize,
}

impl Kernel for ActivateCopy {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        // Pieces that stay in the first-level cache between the copy and the activation.
        for start in (0..self.count).step_by(2048) {
            let width = 2048.min(self.count - start);
            // SAFETY: the entry checked the range; source and target are the same or apart.
            unsafe {
                let pointer = self.to.add(start);
                if self.from != self.to.cast_const() {
                    std::ptr::copy(self.from.add(start), pointer, width);
                }
                isa.outline(ApplyRows { activation: self.activation, pointer, rows: 1, row_stride: 0, width });
            }
        }
    }
}

/// A function of two values. NaN in either gives NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Min,
    Max,
    /// a^b by the scalar library function.
    Pow,
    /// a for a ≥ 0, else a · b.
    PRelu,
    /// (a − b)².
    SquaredDifference,
}

trait Map2: Copy {
    fn map<I: Isa>(self, isa: I, a: I::V, b: I::V) -> I::V;
}

macro_rules! binary_maps {
    ($($name:ident: |$isa:ident, $a:ident, $b:ident| $e:expr;)+) => {
        mod binary_maps {
            $(
                #[derive(Clone, Copy)]
                pub struct $name;
            )+
        }
        $(
            impl Map2 for binary_maps::$name {
                #[inline(always)]
                fn map<I: Isa>(self, $isa: I, $a: I::V, $b: I::V) -> I::V {
                    $e
                }
            }
        )+
    };
}

binary_maps! {
    Add: |isa, a, b| isa.add(a, b);
    Sub: |isa, a, b| isa.sub(a, b);
    Mul: |isa, a, b| isa.mul(a, b);
    Div: |isa, a, b| isa.div(a, b);
    // `min` and `max` give b where either is NaN, which is right unless a is.
    Min: |isa, a, b| isa.select(isa.eq(a, a), isa.min(a, b), a);
    Max: |isa, a, b| isa.select(isa.eq(a, a), isa.max(a, b), a);
    Pow: |isa, a, b| {
        let (mut x, y) = (isa.to_lanes(a), isa.to_lanes(b));
        for (x, y) in x.iter_mut().zip(y) {
            *x = x.powf(y);
        }
        // SAFETY: the array holds 16 >= LANES values.
        unsafe { isa.load(x.as_ptr()) }
    };
    PRelu: |isa, a, b| isa.select(isa.lt(a, isa.zero()), isa.mul(a, b), a);
    SquaredDifference: |isa, a, b| {
        let d = isa.sub(a, b);
        isa.mul(d, d)
    };
}

/// An operand of a broadcast: element `i` (an index per axis) is `source[Σ i·strides]`.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// [`Source::Output`] only with the output's own strides.
    pub source: Source<'a>,
    /// One stride per axis of the output; 0 repeats.
    pub strides: &'a [usize],
}

/// `output = activation(op(a, b))` for the elements of the range of a contiguous output of `shape`.
pub fn binary(
    level: IsaLevel,
    op: Binary,
    shape: &[usize],
    a: Operand<'_>,
    b: Operand<'_>,
    activation: Activation,
    range: Range<usize>,
    output: Output<'_>,
) {
    assert!(range.start <= range.end && range.end <= output.len(), "{range:?} of {} elements", output.len());
    if range.is_empty() {
        return;
    }
    let odometer = Odometer::new(shape, [a.strides, b.strides]);
    assert!(range.end <= odometer.count(), "{range:?} of {shape:?}");
    let mut from = [std::ptr::null(); 2];
    for (pointer, operand) in from.iter_mut().zip([a, b]) {
        let (first, len) = operand.source.parts(&output);
        let last: usize = shape.iter().zip(operand.strides).map(|(n, stride)| (n - 1) * stride).sum();
        assert!(last < len, "an operand of {len} elements is read at {last}");
        if matches!(operand.source, Source::Output) {
            let mut stride = 1;
            for (axis, &n) in shape.iter().enumerate().rev() {
                assert!(n == 1 || operand.strides[axis] == stride, "the output as operand has its own strides");
                stride *= n;
            }
        }
        *pointer = first;
    }
    let to = output.pointer();
    macro_rules! run {
        ($($op:ident)+) => {
            match op {
                $(Binary::$op => {
                    dispatch(level, RunMap2 { map: binary_maps::$op, odometer, from, activation, range, to })
                })+
            }
        };
    }
    run!(Add Sub Mul Div Min Max Pow PRelu SquaredDifference)
}

/// Walks a shape row by row, with the offsets of `N` strided operands. Axes that all operands pass through alike are
/// merged, so that rows are as long as they can be.
#[derive(Clone, Copy)]
pub(crate) struct Odometer<const N: usize> {
    rank: usize,
    shape: [usize; MAX_RANK],
    strides: [[usize; MAX_RANK]; N],
    index: [usize; MAX_RANK],
    pub offsets: [usize; N],
}

impl<const N: usize> Odometer<N> {
    pub fn new(shape: &[usize], strides: [&[usize]; N]) -> Odometer<N> {
        assert!(shape.len() <= MAX_RANK, "{} axes, at most {MAX_RANK}", shape.len());
        let mut odometer = Odometer {
            rank: 0,
            shape: [1; MAX_RANK],
            strides: [[0; MAX_RANK]; N],
            index: [0; MAX_RANK],
            offsets: [0; N],
        };
        for (axis, &size) in shape.iter().enumerate() {
            if size == 1 {
                continue;
            }
            let last = odometer.rank.wrapping_sub(1);
            let merges = odometer.rank > 0
                && strides.iter().zip(&odometer.strides).all(|(new, old)| old[last] == new[axis] * size);
            let at = if merges { last } else { odometer.rank };
            odometer.shape[at] *= size;
            for (old, new) in odometer.strides.iter_mut().zip(&strides) {
                old[at] = new[axis];
            }
            odometer.rank = at + 1;
        }
        odometer.rank = odometer.rank.max(1);
        odometer
    }

    pub fn count(&self) -> usize {
        self.shape[..self.rank].iter().product()
    }

    /// Length of a row.
    pub fn row(&self) -> usize {
        self.shape[self.rank - 1]
    }

    /// Strides along a row.
    pub fn row_strides(&self) -> [usize; N] {
        self.strides.map(|strides| strides[self.rank - 1])
    }

    /// Rows left along the axis before the last, and the distance between them, for a single operand.
    pub fn rows_to_come(&self) -> Option<(usize, usize)> {
        let axis = self.rank.checked_sub(2)?;
        Some((self.shape[axis] - self.index[axis], self.strides[0][axis]))
    }

    /// Goes to an element; gives its position in its row.
    pub fn seek(&mut self, mut element: usize) -> usize {
        self.offsets = [0; N];
        for axis in (0..self.rank).rev() {
            self.index[axis] = element % self.shape[axis];
            element /= self.shape[axis];
            if axis + 1 < self.rank {
                for (offset, strides) in self.offsets.iter_mut().zip(&self.strides) {
                    *offset += self.index[axis] * strides[axis];
                }
            }
        }
        self.index[self.rank - 1]
    }

    /// Goes to the start of the next row; stays inside the shape by starting over after the last.
    #[inline(always)]
    pub fn next_row(&mut self) {
        for axis in (0..self.rank - 1).rev() {
            self.index[axis] += 1;
            for (offset, strides) in self.offsets.iter_mut().zip(&self.strides) {
                *offset += strides[axis];
            }
            if self.index[axis] < self.shape[axis] {
                return;
            }
            for (offset, strides) in self.offsets.iter_mut().zip(&self.strides) {
                *offset -= strides[axis] * self.shape[axis];
            }
            self.index[axis] = 0;
        }
    }
}

struct RunMap2<F> {
    map: F,
    odometer: Odometer<2>,
    from: [*const f32; 2],
    activation: Activation,
    range: Range<usize>,
    to: *mut f32,
}

impl<F: Map2> Kernel for RunMap2<F> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let mut odometer = self.odometer;
        let (row, strides) = (odometer.row(), odometer.row_strides());
        let mut position = odometer.seek(self.range.start);
        let mut element = self.range.start;
        let clip = Activation::Clip { low: self.activation.bounds().0, high: self.activation.bounds().1 };
        while element < self.range.end {
            let count = (row - position).min(self.range.end - element);
            // SAFETY: the entry checked the largest offset of each operand, and the range against the output.
            unsafe {
                let a = self.from[0].add(odometer.offsets[0] + position * strides[0]);
                let b = self.from[1].add(odometer.offsets[1] + position * strides[1]);
                let to = self.to.add(element);
                match strides {
                    [1, 1] => map_row::<I, F, false, false>(isa, self.map, clip, a, b, to, count),
                    [1, 0] => map_row::<I, F, false, true>(isa, self.map, clip, a, b, to, count),
                    [0, 1] => map_row::<I, F, true, false>(isa, self.map, clip, a, b, to, count),
                    _ => {
                        for i in 0..count {
                            let (x, y) = (isa.splat(*a.add(i * strides[0])), isa.splat(*b.add(i * strides[1])));
                            isa.store_partial(to.add(i), clip.apply(isa, self.map.map(isa, x, y)), 1);
                        }
                    }
                }
                if !self.activation.clamps() {
                    let activation = self.activation;
                    isa.outline(ApplyRows { activation, pointer: to, rows: 1, row_stride: 0, width: count });
                }
            }
            element += count;
            position = 0;
            odometer.next_row();
        }
    }
}

/// # Safety
/// `count` values of each operand that is not repeated are readable, and of the output writable.
#[inline(always)]
unsafe fn map_row<I: Isa, F: Map2, const A_REPEATS: bool, const B_REPEATS: bool>(
    isa: I,
    map: F,
    clip: Activation,
    a: *const f32,
    b: *const f32,
    to: *mut f32,
    count: usize,
) {
    // SAFETY: the caller.
    unsafe {
        let (first_a, first_b) = (isa.splat(*a), isa.splat(*b));
        let mut i = 0;
        while i + I::LANES <= count {
            let x = if A_REPEATS { first_a } else { isa.load(a.add(i)) };
            let y = if B_REPEATS { first_b } else { isa.load(b.add(i)) };
            isa.store(to.add(i), clip.apply(isa, map.map(isa, x, y)));
            i += I::LANES;
        }
        if i < count {
            let left = count - i;
            let x = if A_REPEATS { first_a } else { isa.load_partial(a.add(i), left) };
            let y = if B_REPEATS { first_b } else { isa.load_partial(b.add(i), left) };
            isa.store_partial(to.add(i), clip.apply(isa, map.map(isa, x, y)), left);
        }
    }
}

/// A scale and a shift per channel of a blocked image, and an activation: a batch normalization that nothing could take in.
#[derive(Clone, Copy, Debug)]
pub struct ChannelAffine<'a> {
    pub channels: usize,
    /// H · W.
    pub pixels: usize,
    /// `[ceil(C/16)][pixels][16]`.
    pub input: Source<'a>,
    /// One per channel; 1 if absent.
    pub scale: Option<&'a [f32]>,
    /// One per channel; 0 if absent.
    pub shift: Option<&'a [f32]>,
    pub activation: Activation,
}

/// Computes the given channel blocks, below `ceil(C/16)`. `output` is the whole blocked image.
pub fn channel_affine_blocked(level: IsaLevel, problem: &ChannelAffine<'_>, blocks: Range<usize>, output: Output<'_>) {
    let ChannelAffine { channels, pixels, input, scale, shift, .. } = *problem;
    if blocks.is_empty() {
        return;
    }
    let (from, len) = input.parts(&output);
    assert!(blocks.end <= channels.div_ceil(BLOCK), "blocks {blocks:?} of {channels} channels");
    assert!(len >= blocks.end * pixels * BLOCK && output.len() >= blocks.end * pixels * BLOCK);
    assert!(scale.is_none_or(|s| s.len() >= channels) && shift.is_none_or(|s| s.len() >= channels));
    dispatch(level, Affine { problem, blocks, from, to: output.pointer() });
}

struct Affine<'a> {
    problem: &'a ChannelAffine<'a>,
    blocks: Range<usize>,
    from: *const f32,
    to: *mut f32,
}

impl Kernel for Affine<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let ChannelAffine { pixels, scale, shift, activation, .. } = *self.problem;
        let (low, high) = activation.bounds();
        for block in self.blocks {
            // SAFETY: the entry checked the lengths.
            unsafe {
                let (from, to) = (self.from.add(block * pixels * BLOCK), self.to.add(block * pixels * BLOCK));
                for lane in (0..BLOCK).step_by(I::LANES) {
                    let first = block * BLOCK + lane;
                    let scale = scale.map_or(isa.splat(1.0), |s| super::conv::load_bias(isa, s, first));
                    let shift = shift.map_or(isa.zero(), |s| super::conv::load_bias(isa, s, first));
                    for pixel in 0..pixels {
                        let at = pixel * BLOCK + lane;
                        let value = isa.fma(isa.load(from.add(at)), scale, shift);
                        isa.store(to.add(at), vmath::clip(isa, value, low, high));
                    }
                }
                if !activation.clamps() {
                    isa.outline(ApplyRows { activation, pointer: to, rows: 1, row_stride: 0, width: pixels * BLOCK });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn unary_functions_match_their_definitions() {
        let cases: Vec<(Unary, fn(f64) -> f64)> = vec![
            (Unary::Abs, f64::abs),
            (Unary::Neg, |x| -x),
            (Unary::Sign, |x| if x == 0.0 || x.is_nan() { x } else { x.signum() }),
            (Unary::Reciprocal, f64::recip),
            (Unary::Sqrt, f64::sqrt),
            (Unary::Square, |x| x * x),
            (Unary::Exp, f64::exp),
            (Unary::Log, f64::ln),
            (Unary::Erf, erf),
            (Unary::Floor, f64::floor),
            (Unary::Ceil, f64::ceil),
            (Unary::Round, f64::round_ties_even),
            (Unary::Softplus, |x| x.max(0.0) + (-x.abs()).exp().ln_1p()),
            (Unary::Softsign, |x| x / (1.0 + x.abs())),
            (Unary::Mish, |x| x * (x.max(0.0) + (-x.abs()).exp().ln_1p()).tanh()),
        ];
        for level in levels() {
            let mut random = Random::new(10);
            for (op, definition) in &cases {
                for len in [0, 1, 7, 100] {
                    let mut input: Vec<f32> = (0..len).map(|_| random.unit() * 12.0).collect();
                    if len == 100 {
                        input[..6].copy_from_slice(&[0.0, -0.0, 0.5, 1.5, f32::NAN, -2.5]);
                    }
                    let expected: Vec<f64> = input.iter().map(|&x| definition(f64::from(x))).collect();
                    let mut output = vec![f32::NAN; len];
                    for range in random_cuts(&mut random, len) {
                        unary(level, *op, Source::Slice(&input), range, Output::new(&mut output));
                    }
                    // A few units in the last place; Mish multiplies two such errors.
                    assert_near(level, op, &output, &expected, 1e-6);
                    let mut in_place = input.clone();
                    for range in random_cuts(&mut random, len) {
                        unary(level, *op, Source::Output, range, Output::new(&mut in_place));
                    }
                    assert_same_bits(level, op, &in_place, &output);
                }
            }
            for activation in ACTIVATIONS {
                let input: Vec<f32> = (0..3000).map(|_| random.unit() * 12.0).collect();
                let expected: Vec<f64> = input.iter().map(|&x| activate(activation, x.into())).collect();
                let mut output = vec![f32::NAN; input.len()];
                for range in random_cuts(&mut random, input.len()) {
                    unary(level, Unary::Activation(activation), Source::Slice(&input), range, Output::new(&mut output));
                }
                assert_near(level, &activation, &output, &expected, 1e-6);
            }
        }
    }

    #[test]
    fn binary_functions_broadcast_by_strides() {
        let definitions: Vec<(Binary, fn(f64, f64) -> f64)> = vec![
            (Binary::Add, |a, b| a + b),
            (Binary::Sub, |a, b| a - b),
            (Binary::Mul, |a, b| a * b),
            (Binary::Div, |a, b| a / b),
            (Binary::Min, f64::min),
            (Binary::Max, f64::max),
            (Binary::Pow, f64::powf),
            (Binary::PRelu, |a, b| if a < 0.0 { a * b } else { a }),
            (Binary::SquaredDifference, |a, b| (a - b) * (a - b)),
        ];
        for level in levels() {
            let mut random = Random::new(11);
            for round in rounds(180) {
                let rank = random.between(0, 5);
                let shape: Vec<usize> = (0..rank).map(|_| random.pick(&[1, 2, 3, 16, 17])).collect();
                // Contiguous operands of which some axes are repeated, sometimes with their axes reversed in memory.
                let operand = |random: &mut Random| {
                    let mut strides = vec![0; rank];
                    let mut len = 1;
                    let reversed = random.between(0, 5) == 0;
                    let axes: Vec<usize> = if reversed { (0..rank).collect() } else { (0..rank).rev().collect() };
                    for axis in axes {
                        if random.between(0, 2) > 0 {
                            strides[axis] = len;
                            len *= shape[axis];
                        }
                    }
                    let low = if matches!(definitions[round % 9].0, Binary::Pow) { 0.0 } else { 1.0 };
                    let values: Vec<f32> =
                        (0..len).map(|_| (random.unit() * 0.5 + 0.6) * random.unit().signum().powf(low)).collect();
                    (values, strides)
                };
                let ((a, a_strides), (b, b_strides)) = (operand(&mut random), operand(&mut random));
                let (op, definition) = definitions[round % 9];
                let activation = if round % 2 == 0 { Activation::Identity } else { random.pick(&ACTIVATIONS) };
                let count = shape.iter().product();
                let expected: Vec<f64> = (0..count)
                    .map(|element| {
                        let (mut rest, mut at) = (element, [0, 0]);
                        for axis in (0..rank).rev() {
                            let index = rest % shape[axis];
                            rest /= shape[axis];
                            at[0] += index * a_strides[axis];
                            at[1] += index * b_strides[axis];
                        }
                        activate(activation, definition(a[at[0]].into(), b[at[1]].into()))
                    })
                    .collect();
                let mut output = vec![f32::NAN; count];
                for range in random_cuts(&mut random, count) {
                    let a = Operand { source: Source::Slice(&a), strides: &a_strides };
                    let b = Operand { source: Source::Slice(&b), strides: &b_strides };
                    binary(level, op, &shape, a, b, activation, range, Output::new(&mut output));
                }
                assert_near(level, &(op, &shape, activation), &output, &expected, 2e-6);
            }
        }
    }

    #[test]
    fn an_operand_may_be_the_output() {
        for level in levels() {
            let mut values: Vec<f32> = (0..33).map(|i| i as f32).collect();
            let one = [1.0];
            let a = Operand { source: Source::Output, strides: &[11, 1] };
            let b = Operand { source: Source::Slice(&one), strides: &[0, 0] };
            binary(level, Binary::Add, &[3, 11], a, b, Activation::Identity, 0..33, Output::new(&mut values));
            assert!(values.iter().enumerate().all(|(i, &v)| v == i as f32 + 1.0));
        }
    }

    #[test]
    fn extremes_pass_nan_on() {
        for level in levels() {
            for op in [Binary::Min, Binary::Max] {
                let (a, b) = ([f32::NAN, 1.0], [1.0, f32::NAN]);
                let mut output = [0.0; 2];
                let a = Operand { source: Source::Slice(&a), strides: &[1] };
                let b = Operand { source: Source::Slice(&b), strides: &[1] };
                binary(level, op, &[2], a, b, Activation::Identity, 0..2, Output::new(&mut output));
                assert!(output.iter().all(|x| x.is_nan()), "{} {op:?}", level.name());
            }
        }
    }

    #[test]
    fn channels_are_scaled_and_shifted() {
        for level in levels() {
            let mut random = Random::new(12);
            for (round, (channels, pixels)) in [(1usize, 1), (20, 49), (32, 5)].into_iter().enumerate() {
                let blocks = channels.div_ceil(BLOCK);
                let image = random.units(blocks * pixels * BLOCK);
                let (scale, shift) = (random.units(channels), random.units(channels));
                let activation = [Activation::Relu, Activation::Silu, Activation::Identity][round];
                let problem = ChannelAffine {
                    channels,
                    pixels,
                    input: Source::Slice(&image),
                    scale: Some(&scale),
                    shift: Some(&shift),
                    activation,
                };
                let mut output = vec![f32::NAN; image.len()];
                for range in random_cuts(&mut random, blocks) {
                    channel_affine_blocked(level, &problem, range, Output::new(&mut output));
                }
                for (at, &value) in output.iter().enumerate() {
                    let channel = at / BLOCK / pixels * BLOCK + at % BLOCK;
                    if channel < channels {
                        let x = f64::from(image[at]) * f64::from(scale[channel]) + f64::from(shift[channel]);
                        assert_near(level, &at, &[value], &[activate(activation, x)], 1e-6);
                    }
                }
            }
        }
    }
}
