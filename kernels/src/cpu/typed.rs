//! Elements of any type: widened to the widest of their class, combined, narrowed once.
//!
//! This is the one way for every type that has no kernel of its own: what a function of the elements is, the caller says on [`Wide`]
//! values, and types cost nothing but their widening. Integers wrap when they are narrowed, floats round to nearest even.

use std::ops::Range;

use super::IsaLevel;
use super::dispatch::{Kernel, dispatch};
use super::elementwise::Odometer;
use super::epilogue::Output;
use super::isa::Isa;

/// The type of elements in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// A byte, true unless 0.
    Bool,
    I8,
    U8,
    I16,
    U16,
    I32,
    U32,
    I64,
    U64,
    F16,
    Bf16,
    F32,
    F64,
}

impl ElementType {
    pub const ALL: [ElementType; 13] = {
        use ElementType::*;
        [Bool, I8, U8, I16, U16, I32, U32, I64, U64, F16, Bf16, F32, F64]
    };

    /// Bytes.
    pub fn size(self) -> usize {
        use ElementType::*;
        match self {
            Bool | I8 | U8 => 1,
            I16 | U16 | F16 | Bf16 => 2,
            I32 | U32 | F32 => 4,
            I64 | U64 | F64 => 8,
        }
    }
}

/// A class of elements, in its widest type: `f64`; `i64`, for integers (of `u64` the same bits) and truths (0 and 1); `i128`, where the value of a
/// `u64` matters.
pub trait Wide: Copy + Send + Sync + 'static {
    const ZERO: Self;

    fn of_float(x: f64) -> Self;
    fn of_integer(x: i64) -> Self;
    fn of_unsigned(x: u64) -> Self;
    fn float(self) -> f64;
    /// The lowest 64 bits.
    fn integer(self) -> i64;
    fn is_true(self) -> bool;
}

impl Wide for f64 {
    const ZERO: f64 = 0.0;

    #[inline(always)]
    fn of_float(x: f64) -> f64 {
        x
    }
    #[inline(always)]
    fn of_integer(x: i64) -> f64 {
        x as f64
    }
    #[inline(always)]
    fn of_unsigned(x: u64) -> f64 {
        x as f64
    }
    #[inline(always)]
    fn float(self) -> f64 {
        self
    }
    #[inline(always)]
    fn integer(self) -> i64 {
        low_bits(self)
    }
    #[inline(always)]
    fn is_true(self) -> bool {
        self != 0.0
    }
}

impl Wide for i64 {
    const ZERO: i64 = 0;

    #[inline(always)]
    fn of_float(x: f64) -> i64 {
        low_bits(x)
    }
    #[inline(always)]
    fn of_integer(x: i64) -> i64 {
        x
    }
    #[inline(always)]
    fn of_unsigned(x: u64) -> i64 {
        x as i64
    }
    #[inline(always)]
    fn float(self) -> f64 {
        self as f64
    }
    #[inline(always)]
    fn integer(self) -> i64 {
        self
    }
    #[inline(always)]
    fn is_true(self) -> bool {
        self != 0
    }
}

impl Wide for i128 {
    const ZERO: i128 = 0;

    #[inline(always)]
    fn of_float(x: f64) -> i128 {
        x as i128
    }
    #[inline(always)]
    fn of_integer(x: i64) -> i128 {
        x.into()
    }
    #[inline(always)]
    fn of_unsigned(x: u64) -> i128 {
        x.into()
    }
    #[inline(always)]
    fn float(self) -> f64 {
        self as f64
    }
    #[inline(always)]
    fn integer(self) -> i64 {
        self as i64
    }
    #[inline(always)]
    fn is_true(self) -> bool {
        self != 0
    }
}

/// The lowest 64 bits of a float cut to an integer of 128.
#[inline(always)]
fn low_bits(x: f64) -> i64 {
    const END: f64 = 9_223_372_036_854_775_808.0;
    if x.abs() < END { x as i64 } else { x as i128 as i64 }
}

/// A half-precision float's value.
#[inline(always)]
pub(crate) fn half_to_float(bits: u16) -> f32 {
    let (sign, exponent, mantissa) = (u32::from(bits >> 15) << 31, u32::from(bits >> 10 & 31), u32::from(bits & 1023));
    match exponent {
        // Exact: 24 bits hold any subnormal.
        0 => f32::from_bits((mantissa as f32 * f32::from_bits((127 - 24) << 23)).to_bits() | sign),
        31 => f32::from_bits(sign | 0x7f80_0000 | mantissa << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
    }
}

/// The nearest value with `mantissa` bits of mantissa and the exponents from `least` to `bias` that a 16-bit float has; as its bits.
#[inline(always)]
pub(crate) fn narrow(x: f64, mantissa: u32, bias: i64) -> u16 {
    let bits = x.to_bits();
    let sign = ((bits >> 48) as u16) & 0x8000;
    let magnitude = bits & !(1 << 63);
    let infinity = ((2 * bias + 1) as u16) << mantissa;
    if magnitude > 0x7ff0_0000_0000_0000 {
        return sign | infinity | 1 << (mantissa - 1);
    }
    let exponent = (magnitude >> 52) as i64 - 1023;
    if exponent > bias {
        return sign | infinity;
    }
    // Below the least normal exponent there are fewer bits of mantissa.
    let least = 1 - bias;
    let shift = 52 - i64::from(mantissa) + (least - exponent).max(0);
    if shift > 54 {
        return sign;
    }
    let full = (magnitude & ((1 << 52) - 1)) | 1 << 52;
    let (kept, rest, half) = (full >> shift, full & ((1 << shift) - 1), 1u64 << (shift - 1));
    let rounded = kept + u64::from(rest > half || (rest == half && kept & 1 == 1));
    // A carry goes on into the exponent, as it should.
    let biased = (exponent - least).max(-1) + 1;
    let base = if biased > 0 { ((biased - 1) as u64) << mantissa } else { 0 };
    sign | ((base + rounded) as u16).min(infinity)
}

/// Widens `to.len()` elements, `stride` elements apart.
///
/// # Safety
/// They are readable at `from`, which is aligned for them.
#[inline(always)]
unsafe fn load<W: Wide>(ty: ElementType, from: *const u8, stride: usize, to: &mut [W]) {
    macro_rules! each {
        ($t:ty, $widen:expr) => {{
            let from = from.cast::<$t>();
            // SAFETY: the caller.
            unsafe {
                match stride {
                    0 => to.fill($widen(from.read())),
                    1 => to.iter_mut().enumerate().for_each(|(i, to)| *to = $widen(from.add(i).read())),
                    _ => to.iter_mut().enumerate().for_each(|(i, to)| *to = $widen(from.add(i * stride).read())),
                }
            }
        }};
    }
    match ty {
        ElementType::Bool => each!(u8, |x: u8| W::of_integer(i64::from(x != 0))),
        ElementType::I8 => each!(i8, |x: i8| W::of_integer(x.into())),
        ElementType::U8 => each!(u8, |x: u8| W::of_integer(x.into())),
        ElementType::I16 => each!(i16, |x: i16| W::of_integer(x.into())),
        ElementType::U16 => each!(u16, |x: u16| W::of_integer(x.into())),
        ElementType::I32 => each!(i32, |x: i32| W::of_integer(x.into())),
        ElementType::U32 => each!(u32, |x: u32| W::of_integer(x.into())),
        ElementType::I64 => each!(i64, W::of_integer),
        ElementType::U64 => each!(u64, W::of_unsigned),
        ElementType::F16 => each!(u16, |x: u16| W::of_float(half_to_float(x).into())),
        ElementType::Bf16 => each!(u16, |x: u16| W::of_float(f32::from_bits(u32::from(x) << 16).into())),
        ElementType::F32 => each!(f32, |x: f32| W::of_float(x.into())),
        ElementType::F64 => each!(f64, W::of_float),
    }
}

/// Narrows every value.
///
/// # Safety
/// As many elements are writable at `to`, which is aligned for them.
#[inline(always)]
unsafe fn store<W: Wide>(ty: ElementType, from: &[W], to: *mut u8) {
    macro_rules! each {
        ($t:ty, $narrow:expr) => {{
            let to = to.cast::<$t>();
            // SAFETY: the caller.
            unsafe { from.iter().enumerate().for_each(|(i, &x)| to.add(i).write($narrow(x))) }
        }};
    }
    match ty {
        ElementType::Bool => each!(u8, |x: W| u8::from(x.is_true())),
        ElementType::I8 => each!(i8, |x: W| x.integer() as i8),
        ElementType::U8 => each!(u8, |x: W| x.integer() as u8),
        ElementType::I16 => each!(i16, |x: W| x.integer() as i16),
        ElementType::U16 => each!(u16, |x: W| x.integer() as u16),
        ElementType::I32 => each!(i32, |x: W| x.integer() as i32),
        ElementType::U32 => each!(u32, |x: W| x.integer() as u32),
        ElementType::I64 => each!(i64, |x: W| x.integer()),
        ElementType::U64 => each!(u64, |x: W| x.integer() as u64),
        ElementType::F16 => each!(u16, |x: W| narrow(x.float(), 10, 15)),
        ElementType::Bf16 => each!(u16, |x: W| narrow(x.float(), 7, 127)),
        ElementType::F32 => each!(f32, |x: W| x.float() as f32),
        ElementType::F64 => each!(f64, |x: W| x.float()),
    }
}

/// An operand: elements in memory, and how many of them a step along each axis is.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    pub ty: ElementType,
    pub bytes: &'a [u8],
    pub strides: &'a [usize],
}

/// Values that are widened at a time: small enough for the stack and the first-level cache.
const CHUNK: usize = 128;

/// `output = f(operands)` for a range of the elements of `shape`, every operand of class `A`, the result of class `R`.
///
/// # Errors
/// The first of `f`; what the output holds is not defined then.
pub fn map<A: Wide, R: Wide, E, const N: usize>(
    level: IsaLevel,
    shape: &[usize],
    operands: [Operand<'_>; N],
    range: Range<usize>,
    ty: ElementType,
    output: Output<'_, u8>,
    f: impl Fn([A; N]) -> Result<R, E>,
) -> Result<(), E> {
    assert!(range.start <= range.end && range.end * ty.size() <= output.len(), "{range:?} in {} bytes", output.len());
    assert!((output.pointer() as usize).is_multiple_of(ty.size()), "an output that is not aligned for {ty:?}");
    if range.is_empty() {
        return Ok(());
    }
    let odometer = Odometer::new(shape, operands.map(|o| o.strides));
    assert!(range.end <= odometer.count(), "{range:?} of {shape:?}");
    for operand in &operands {
        let last: usize = shape.iter().zip(operand.strides).map(|(n, stride)| (n - 1) * stride).sum();
        let size = operand.ty.size();
        assert!((last + 1) * size <= operand.bytes.len(), "{} bytes are read at element {last}", operand.bytes.len());
        assert!((operand.bytes.as_ptr() as usize).is_multiple_of(size), "not aligned for {:?}", operand.ty);
    }
    let operands = operands.map(|o| (o.ty, o.bytes.as_ptr()));
    dispatch(level, Map { odometer, operands, range, ty, to: output.pointer(), f, classes: std::marker::PhantomData })
}

struct Map<F, A, R, E, const N: usize> {
    odometer: Odometer<N>,
    operands: [(ElementType, *const u8); N],
    range: Range<usize>,
    ty: ElementType,
    to: *mut u8,
    f: F,
    classes: std::marker::PhantomData<(A, R, E)>,
}

impl<A: Wide, R: Wide, E, F: Fn([A; N]) -> Result<R, E>, const N: usize> Kernel for Map<F, A, R, E, N> {
    type Output = Result<(), E>;

    #[inline(always)]
    fn eval<I: Isa>(self, _: I) -> Result<(), E> {
        let Map { mut odometer, operands, range, ty, to, f, .. } = self;
        let (row, strides) = (odometer.row(), odometer.row_strides());
        let mut position = odometer.seek(range.start);
        let mut element = range.start;
        let (mut wide, mut results) = ([[A::ZERO; CHUNK]; N], [R::ZERO; CHUNK]);
        // Of short rows several are gathered before they are combined.
        let mut filled = 0;
        while element < range.end {
            let count = (row - position).min(range.end - element).min(CHUNK - filled);
            for n in 0..N {
                let (ty, from) = operands[n];
                // SAFETY: the entry checked the largest offset of every operand, and its alignment.
                unsafe {
                    let from = from.add((odometer.offsets[n] + position * strides[n]) * ty.size());
                    load(ty, from, strides[n], &mut wide[n][filled..filled + count]);
                }
            }
            (element, position, filled) = (element + count, position + count, filled + count);
            if position == row {
                position = 0;
                odometer.next_row();
            }
            if filled == CHUNK || element == range.end {
                for (i, result) in results[..filled].iter_mut().enumerate() {
                    *result = f(std::array::from_fn(|n| wide[n][i]))?;
                }
                // SAFETY: the entry checked the range against the output, and its alignment.
                unsafe { store(ty, &results[..filled], to.add((element - filled) * ty.size())) };
                filled = 0;
            }
        }
        Ok(())
    }
}

/// One result for each line of an axis: `[outer][axis][inner]` to `[outer][inner]`, for a range of lines. `f` is given a line's elements
/// and how many they are. Lines are read twice or more where `f` does so.
///
/// # Errors
/// The first of `f`.
pub fn fold_lines<A: Wide, R: Wide, E>(
    level: IsaLevel,
    (axis, inner): (usize, usize),
    (ty, input): (ElementType, &[u8]),
    lines: Range<usize>,
    result: ElementType,
    output: Output<'_, u8>,
    f: impl Fn(Line<'_, A>) -> Result<R, E>,
) -> Result<(), E> {
    assert!(lines.end * result.size() <= output.len(), "lines {lines:?} into {} bytes", output.len());
    assert!((output.pointer() as usize).is_multiple_of(result.size()), "an output that is not aligned for {result:?}");
    if lines.is_empty() {
        return Ok(());
    }
    // Of lines without an element nothing is read.
    let last = (lines.end - 1) / inner * axis * inner + axis.saturating_sub(1) * inner + (lines.end - 1) % inner;
    let needed = if axis == 0 { 0 } else { (last + 1).max(((lines.end - 1) / inner * axis + axis) * inner) };
    assert!(needed * ty.size() <= input.len(), "lines {lines:?} of {} bytes", input.len());
    assert!((input.as_ptr() as usize).is_multiple_of(ty.size()), "not aligned for {ty:?}");
    dispatch(
        level,
        FoldLines { axis, inner, ty, input, lines, result, to: output.pointer(), f, classes: std::marker::PhantomData },
    )
}

/// The elements of a line.
pub struct Line<'a, A> {
    ty: ElementType,
    from: *const u8,
    count: usize,
    stride: usize,
    memory: std::marker::PhantomData<(&'a [u8], A)>,
}

impl<A: Wide> Line<'_, A> {
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Each element in turn.
    #[inline(always)]
    pub fn for_each(&self, mut f: impl FnMut(usize, A)) {
        let mut chunk = [A::ZERO; CHUNK];
        for start in (0..self.count).step_by(CHUNK) {
            let count = CHUNK.min(self.count - start);
            // SAFETY: the entry checked every line.
            unsafe {
                let from = self.from.add(start * self.stride * self.ty.size());
                load(self.ty, from, self.stride, &mut chunk[..count]);
            }
            chunk[..count].iter().enumerate().for_each(|(i, &x)| f(start + i, x));
        }
    }

    #[inline(always)]
    pub fn fold<T>(&self, start: T, f: impl Fn(T, A) -> T) -> T
    where
        T: Copy,
    {
        let mut total = start;
        self.for_each(|_, x| total = f(total, x));
        total
    }
}

struct FoldLines<'a, F, A, R, E> {
    axis: usize,
    inner: usize,
    ty: ElementType,
    input: &'a [u8],
    lines: Range<usize>,
    result: ElementType,
    to: *mut u8,
    f: F,
    classes: std::marker::PhantomData<(A, R, E)>,
}

impl<A: Wide, R: Wide, E, F: Fn(Line<'_, A>) -> Result<R, E>> Kernel for FoldLines<'_, F, A, R, E> {
    type Output = Result<(), E>;

    #[inline(always)]
    fn eval<I: Isa>(self, _: I) -> Result<(), E> {
        let FoldLines { axis, inner, ty, .. } = self;
        for line in self.lines {
            let start = line / inner * axis * inner + line % inner;
            // SAFETY: the entry checked the last line against the input, and the range against the output.
            unsafe {
                let from = self.input.as_ptr().add(start * ty.size());
                let line_of = Line { ty, from, count: axis, stride: inner, memory: std::marker::PhantomData };
                store(self.result, &[(self.f)(line_of)?], self.to.add(line * self.result.size()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    /// Memory aligned for any element.
    fn bytes_of(ty: ElementType, values: &[f64]) -> Vec<u64> {
        let mut memory = vec![0u64; values.len() + 1];
        // SAFETY: eight bytes for each element.
        unsafe { store(ty, values, memory.as_mut_ptr().cast()) };
        memory
    }

    fn as_bytes(memory: &[u64]) -> &[u8] {
        // SAFETY: any bytes.
        unsafe { std::slice::from_raw_parts(memory.as_ptr().cast(), memory.len() * 8) }
    }

    #[test]
    fn halves_round_to_nearest_even_and_come_back() {
        for bits in 0..=u16::MAX {
            let value = half_to_float(bits);
            let back = narrow(value.into(), 10, 15);
            assert!(back == bits || (value.is_nan() && half_to_float(back).is_nan()), "{bits:04x} {value} {back:04x}");
            let brain = f32::from_bits(u32::from(bits) << 16);
            assert!(narrow(brain.into(), 7, 127) == bits || brain.is_nan(), "{bits:04x}");
        }
        for (x, bits) in [(1.0, 0x3c00), (1.0 + 1.0 / 2048.0, 0x3c00), (1.0 + 3.0 / 2048.0, 0x3c02), (65519.9, 0x7bff)]
        {
            assert_eq!(narrow(x, 10, 15), bits, "{x}");
        }
        for (x, bits) in [
            (65520.0, 0x7c00),
            (-1e300, 0xfc00),
            (3e-8, 0x0001),
            (2.9e-8, 0x0000),
            (6.1e-5, 0x03ff),
            (f64::NAN, 0x7e00),
        ] {
            assert_eq!(narrow(x, 10, 15), bits, "{x}");
        }
    }

    #[test]
    fn every_type_is_widened_broadcast_and_narrowed() {
        for level in levels() {
            let mut random = Random::new(40);
            for ty in ElementType::ALL {
                for (rows, columns) in [(1, 1), (3, 5), (7, 300), (260, 2)] {
                    let values: Vec<f64> = (0..rows * columns).map(|_| random.between(0, 1) as f64).collect();
                    let (a, b) = (bytes_of(ty, &values), bytes_of(ty, &values[..columns]));
                    let mut output = vec![0u64; values.len() + 1];
                    for range in random_cuts(&mut random, values.len()) {
                        // SAFETY: the vector's own memory.
                        let to = unsafe { Output::from_raw(output.as_mut_ptr().cast::<u8>(), output.len() * 8) };
                        let strides = [[columns, 1], [0, 1]];
                        let operands = [
                            Operand { ty, bytes: as_bytes(&a), strides: &strides[0] },
                            Operand { ty, bytes: as_bytes(&b), strides: &strides[1] },
                        ];
                        let product = |[a, b]: [i64; 2]| Ok::<_, ()>(a & b);
                        map(level, &[rows, columns], operands, range, ty, to, product).unwrap();
                    }
                    let mut wide = vec![0f64; values.len()];
                    // SAFETY: written above.
                    unsafe { load(ty, output.as_ptr().cast(), 1, &mut wide) };
                    for (i, x) in wide.iter().enumerate() {
                        assert_eq!(*x, values[i] * values[i % columns], "{} {ty:?} {rows} x {columns}", level.name());
                    }
                }
            }
        }
    }

    #[test]
    fn floats_beyond_an_integer_wrap_and_lines_are_folded() {
        assert_eq!(
            [f64::of_float(-1.5).integer(), i64::of_float(1e30), low_bits(18446744073709551616.0 + 4096.0)],
            [-1, 1e30 as i128 as i64, 4096]
        );
        assert_eq!((f64::NAN.integer(), u8::MAX as i64), (0, 255));
        let input = bytes_of(ElementType::I16, &(0..24).map(f64::from).collect::<Vec<_>>());
        let mut output = [0i64; 8];
        for level in levels() {
            // SAFETY: the array's own memory.
            let to = unsafe { Output::from_raw(output.as_mut_ptr().cast::<u8>(), 64) };
            let sum = |line: Line<'_, i64>| Ok::<_, ()>(line.fold(0, |a, b| a + b));
            fold_lines(level, (3, 4), (ElementType::I16, as_bytes(&input)), 0..8, ElementType::I64, to, sum).unwrap();
            assert_eq!(output, [12, 15, 18, 21, 48, 51, 54, 57]);
        }
    }
}
