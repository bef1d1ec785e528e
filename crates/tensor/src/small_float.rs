//! Floats of eight bits and fewer: what each code means, and the nearest code of a number.
//!
//! The formats are those of the ONNX specification ("Float stored in 8 bits", "Float stored in 4 bits"): no more than 256 codes, so that
//! each is a table.

use crate::DType;
use std::sync::OnceLock;

/// How a number becomes a power of two (`f8e8m0`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RoundMode {
    #[default]
    Up,
    Down,
    Nearest,
}

struct Format {
    exponent_bits: u32,
    mantissa_bits: u32,
    bias: i32,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// With infinities and NaNs, as IEEE 754 has them.
    Ieee,
    /// No infinity; all ones is NaN.
    Finite,
    /// No infinity and no negative zero, whose code is NaN.
    FiniteUnsignedZero,
    /// Numbers only.
    NumbersOnly,
}

fn format(dtype: DType) -> Option<Format> {
    let (exponent_bits, mantissa_bits, bias, kind) = match dtype {
        DType::F8E4M3FN => (4, 3, 7, Kind::Finite),
        DType::F8E4M3FNUZ => (4, 3, 8, Kind::FiniteUnsignedZero),
        DType::F8E5M2 => (5, 2, 15, Kind::Ieee),
        DType::F8E5M2FNUZ => (5, 2, 16, Kind::FiniteUnsignedZero),
        DType::F4E2M1 => (2, 1, 1, Kind::NumbersOnly),
        _ => return None,
    };
    Some(Format { exponent_bits, mantissa_bits, bias, kind })
}

/// Whether `dtype` is one of the types here.
pub fn is_small_float(dtype: DType) -> bool {
    dtype == DType::F8E8M0 || format(dtype).is_some()
}

/// The number that `code` stands for.
///
/// # Panics
/// If `dtype` is no small float.
pub fn decode(dtype: DType, code: u8) -> f64 {
    if dtype == DType::F8E8M0 {
        return if code == 0xff { f64::NAN } else { 2f64.powi(i32::from(code) - 127) };
    }
    let format = format(dtype).expect("a small float");
    let sign_bit = format.exponent_bits + format.mantissa_bits;
    let magnitude = code & ((1u8 << sign_bit) - 1);
    let is_negative = code >> sign_bit & 1 == 1;
    let ones = (1u8 << sign_bit) - 1;
    match format.kind {
        Kind::FiniteUnsignedZero if is_negative && magnitude == 0 => return f64::NAN,
        Kind::Finite if magnitude == ones => return f64::NAN,
        Kind::Ieee if magnitude > infinity(&format) => return f64::NAN,
        Kind::Ieee if magnitude == infinity(&format) => {
            return if is_negative { -f64::INFINITY } else { f64::INFINITY };
        }
        _ => {}
    }
    let value = positive(&format, magnitude);
    if is_negative { -value } else { value }
}

fn infinity(format: &Format) -> u8 {
    ((1u8 << format.exponent_bits) - 1) << format.mantissa_bits
}

/// The number of a code without sign, as if no code were special.
fn positive(format: &Format, magnitude: u8) -> f64 {
    let exponent = i32::from(magnitude >> format.mantissa_bits);
    let mantissa = f64::from(magnitude & ((1 << format.mantissa_bits) - 1)) / f64::from(1u32 << format.mantissa_bits);
    match exponent {
        0 => mantissa * 2f64.powi(1 - format.bias),
        _ => (1.0 + mantissa) * 2f64.powi(exponent - format.bias),
    }
}

/// The code nearest to `value`, ties to even. Beyond the largest number: that number if `saturate`, else infinity or NaN, whichever the
/// format has.
///
/// # Panics
/// If `dtype` is no small float.
pub fn encode(dtype: DType, value: f64, saturate: bool, round_mode: RoundMode) -> u8 {
    if dtype == DType::F8E8M0 {
        return power_of_two(value as f32, saturate, round_mode);
    }
    let Format { exponent_bits, mantissa_bits, kind, .. } = format(dtype).expect("a small float");
    let sign_bit = exponent_bits + mantissa_bits;
    let ones = (1u8 << sign_bit) - 1;
    let sign = u8::from(value.is_sign_negative()) << sign_bit;
    let nan = match kind {
        Kind::FiniteUnsignedZero => 1 << sign_bit,
        Kind::NumbersOnly => 1 << sign_bit,
        Kind::Ieee | Kind::Finite => sign | ones,
    };
    if value.is_nan() {
        return nan;
    }
    let numbers = numbers(dtype);
    let largest = numbers.len() as u8 - 1;
    let above = numbers.partition_point(|&n| n < value.abs());
    let code = if above == 0 {
        0
    } else {
        // Where the number beyond the largest would be, had the format one more.
        let step = numbers[numbers.len() - 1] - numbers[numbers.len() - 2];
        let upper = numbers.get(above).copied().unwrap_or(numbers[numbers.len() - 1] + step);
        let (to_lower, to_upper) = (value.abs() - numbers[above - 1], upper - value.abs());
        let is_upper = to_upper < to_lower || (to_upper == to_lower && above % 2 == 0);
        (above - usize::from(!is_upper)) as u8
    };
    match (code > largest, saturate, kind) {
        (false, _, Kind::FiniteUnsignedZero) if code == 0 => 0,
        (false, ..) => sign | code,
        (true, true, _) | (true, _, Kind::NumbersOnly) => sign | largest,
        (true, false, Kind::Ieee) => sign | (largest + 1),
        (true, false, _) => nan,
    }
}

/// The finite numbers that are not negative, by code.
fn numbers(dtype: DType) -> &'static [f64] {
    static TABLES: [OnceLock<Vec<f64>>; 5] = [const { OnceLock::new() }; 5];
    let table = match dtype {
        DType::F8E4M3FN => &TABLES[0],
        DType::F8E4M3FNUZ => &TABLES[1],
        DType::F8E5M2 => &TABLES[2],
        DType::F8E5M2FNUZ => &TABLES[3],
        _ => &TABLES[4],
    };
    let half = 1u16 << (dtype.bits() - 1);
    table.get_or_init(|| (0..half).map(|code| decode(dtype, code as u8)).take_while(|v| v.is_finite()).collect())
}

/// The exponent of an f32, which is all that `f8e8m0` keeps; the sign is lost.
fn power_of_two(value: f32, saturate: bool, round_mode: RoundMode) -> u8 {
    let bits = value.to_bits();
    let (exponent, fraction) = ((bits >> 23 & 0xff) as u8, bits & 0x7f_ffff);
    if exponent == 0xff {
        return 0xff;
    }
    let up = match round_mode {
        RoundMode::Down => false,
        RoundMode::Up => fraction > 0,
        // A tie is at one and a half; the exponent above is the even one, except below the smallest normal number.
        RoundMode::Nearest => fraction > 0x40_0000 || (fraction == 0x40_0000 && exponent > 0),
    };
    if up && !(saturate && exponent == 0xfe) { exponent + 1 } else { exponent }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [DType; 6] =
        [DType::F8E4M3FN, DType::F8E4M3FNUZ, DType::F8E5M2, DType::F8E5M2FNUZ, DType::F4E2M1, DType::F8E8M0];

    #[test]
    fn every_code_comes_back_from_its_number() {
        for dtype in ALL {
            for code in 0..=((1u16 << dtype.bits()) - 1) as u8 {
                let value = decode(dtype, code);
                let back = encode(dtype, value, false, RoundMode::Nearest);
                match value.is_nan() {
                    true => assert!(decode(dtype, back).is_nan(), "{dtype} {code:#x}"),
                    false => assert_eq!(back, code, "{dtype} {code:#x} is {value}"),
                }
            }
        }
    }

    #[test]
    fn numbers_round_to_nearest_even_and_stop_at_the_largest() {
        let check = |dtype, value: f64, saturate, expected: f64| {
            let code = encode(dtype, value, saturate, RoundMode::Up);
            let actual = decode(dtype, code);
            assert!(actual == expected || (actual.is_nan() && expected.is_nan()), "{dtype} {value}: {actual}");
        };
        check(DType::F8E4M3FN, 464.0, false, 448.0);
        check(DType::F8E4M3FN, 465.0, false, f64::NAN);
        check(DType::F8E4M3FN, -1e9, true, -448.0);
        check(DType::F8E4M3FN, f64::INFINITY, true, 448.0);
        check(DType::F8E4M3FNUZ, 1e9, true, 240.0);
        check(DType::F8E5M2, 1e9, false, f64::INFINITY);
        check(DType::F8E5M2, 1e9, true, 57344.0);
        check(DType::F8E5M2FNUZ, -1e9, false, f64::NAN);
        check(DType::F8E4M3FN, 17.0, true, 16.0);
        check(DType::F8E4M3FN, 19.0, true, 20.0);
        check(DType::F4E2M1, 2.5, true, 2.0);
        check(DType::F4E2M1, 5.0, true, 4.0);
        check(DType::F4E2M1, 100.0, false, 6.0);
        assert_eq!(encode(DType::F8E4M3FNUZ, -1e-9, true, RoundMode::Up), 0);
        assert_eq!(encode(DType::F8E4M3FN, -1e-9, true, RoundMode::Up), 0x80);
    }

    #[test]
    fn powers_of_two_round_as_asked() {
        let check = |value: f64, mode, expected: f64| {
            assert_eq!(decode(DType::F8E8M0, encode(DType::F8E8M0, value, true, mode)), expected, "{value} {mode:?}");
        };
        check(3.0, RoundMode::Up, 4.0);
        check(3.0, RoundMode::Down, 2.0);
        check(3.0, RoundMode::Nearest, 4.0);
        check(2.9, RoundMode::Nearest, 2.0);
        check(f64::from(f32::MAX), RoundMode::Up, 2f64.powi(127));
    }
}
