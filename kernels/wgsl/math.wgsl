// Functions that WGSL lacks, or whose precision it leaves to the driver. For f32.

// A driver may take it for granted that a constant is no NaN and no infinity: these are no constants.
var<private> infinity_bits: u32 = 0x7f800000u;
var<private> nan_bits: u32 = 0x7fc00000u;
fn infinity() -> f32 { return bitcast<f32>(infinity_bits); }
fn not_a_number() -> f32 { return bitcast<f32>(nan_bits); }
fn is_nan(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u; }
fn is_infinite(x: f32) -> bool { return (bitcast<u32>(x) & 0x7fffffffu) == 0x7f800000u; }

// Cephes' expf: 2^n times a polynomial within half an octave.
fn exp_of(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    if (x > 88.72284) { return infinity(); }
    if (x < -103.972) { return 0.0; }
    let n = floor(fma(x, 1.44269504, 0.5));
    let r = fma(n, 2.12194440e-4, fma(n, -0.693359375, x));
    var p = fma(r, 1.9875691500e-4, 1.3981999507e-3);
    p = fma(p, r, 8.3334519073e-3);
    p = fma(p, r, 4.1665795894e-2);
    p = fma(p, r, 1.6666665459e-1);
    p = fma(p, r, 5.0000001201e-1);
    let y = fma(p, r * r, r) + 1.0;
    // In two steps: 2^128 and what is below 2^-126 have no bits of their own.
    let half_n = i32(n) / 2;
    let rest = i32(n) - half_n;
    return y * bitcast<f32>(u32(half_n + 127) << 23u) * bitcast<f32>(u32(rest + 127) << 23u);
}

// e^x − 1, without the loss near 0.
fn expm1_of(x: f32) -> f32 {
    if (abs(x) > 0.35) { return exp_of(x) - 1.0; }
    var p = fma(x, 1.9875691500e-4, 1.3981999507e-3);
    p = fma(p, x, 8.3334519073e-3);
    p = fma(p, x, 4.1665795894e-2);
    p = fma(p, x, 1.6666665459e-1);
    p = fma(p, x, 5.0000001201e-1);
    return fma(p, x * x, x);
}

// Cephes' logf.
fn log_of(x: f32) -> f32 {
    if (is_nan(x) || x < 0.0) { return not_a_number(); }
    if (x == 0.0) { return -infinity(); }
    if (is_infinite(x)) { return x; }
    var bits = bitcast<u32>(x);
    var e = 0.0;
    if (bits < 0x00800000u) {
        bits = bitcast<u32>(x * 8388608.0);
        e = -23.0;
    }
    e = e + f32(i32(bits >> 23u) - 126);
    var m = bitcast<f32>((bits & 0x007fffffu) | 0x3f000000u);
    if (m < 0.70710678) {
        e = e - 1.0;
        m = m + m - 1.0;
    } else {
        m = m - 1.0;
    }
    let z = m * m;
    var p = fma(m, 7.0376836292e-2, -1.1514610310e-1);
    p = fma(p, m, 1.1676998740e-1);
    p = fma(p, m, -1.2420140846e-1);
    p = fma(p, m, 1.4249322787e-1);
    p = fma(p, m, -1.6668057665e-1);
    p = fma(p, m, 2.0000714765e-1);
    p = fma(p, m, -2.4999993993e-1);
    p = fma(p, m, 3.3333331174e-1);
    var y = p * m * z;
    y = fma(e, -2.12194440e-4, y);
    y = fma(z, -0.5, y);
    return fma(e, 0.693359375, m + y);
}

// log(1 + x), without the loss near 0.
fn log1p_of(x: f32) -> f32 {
    let u = 1.0 + x;
    if (u == 1.0) { return x; }
    if (is_infinite(u)) { return u; }
    return log_of(u) * (x / (u - 1.0));
}

fn tanh_of(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    let a = abs(x);
    var y = 1.0;
    if (a < 0.625) {
        let z = x * x;
        var p = fma(z, -5.70498872745e-3, 2.06390887954e-2);
        p = fma(p, z, -5.37397155531e-2);
        p = fma(p, z, 1.33314422036e-1);
        p = fma(p, z, -3.33332819422e-1);
        return fma(p * z, x, x);
    }
    if (a < 10.0) { y = 1.0 - 2.0 / (exp_of(a + a) + 1.0); }
    return select(y, -y, x < 0.0);
}

fn sigmoid_of(x: f32) -> f32 { return 1.0 / (1.0 + exp_of(-x)); }

fn softplus_of(x: f32) -> f32 {
    if (x > 30.0) { return x; }
    return log1p_of(exp_of(x));
}

// Within 2e-7 of the true value: near 0 the series, elsewhere 1 − t·exp(−x² + polynomial(t)) (W. J. Cody's form as in Numerical Recipes, erfc).
fn erf_of(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    let a = abs(x);
    if (a < 0.9) {
        let z = x * x;
        var p = fma(z, 8.1e-7, -9.0e-6);
        p = fma(p, z, 8.5480e-5);
        p = fma(p, z, -8.35490e-4);
        p = fma(p, z, 5.22379e-3);
        p = fma(p, z, -2.686614e-2);
        p = fma(p, z, 1.1283791e-1);
        p = fma(p, z, -3.7612638903e-1);
        p = fma(p, z, 1.1283791670955);
        return p * x;
    }
    if (a > 4.0) { return select(1.0, -1.0, x < 0.0); }
    let t = 1.0 / fma(a, 0.5, 1.0);
    var p = fma(t, 0.17087277, -0.82215223);
    p = fma(p, t, 1.48851587);
    p = fma(p, t, -1.13520398);
    p = fma(p, t, 0.27886807);
    p = fma(p, t, -0.18628806);
    p = fma(p, t, 0.09678418);
    p = fma(p, t, 0.37409196);
    p = fma(p, t, 1.00002368);
    p = fma(p, t, -1.26551223);
    let y = 1.0 - t * exp_of(fma(-a, a, p));
    return select(y, -y, x < 0.0);
}

// Cody and Waite's reduction to a quarter turn, then Cephes' polynomials; for what is within some ten thousand turns.
fn sin_cos_of(x: f32, quarter: i32) -> f32 {
    if (is_nan(x) || is_infinite(x)) { return not_a_number(); }
    let n = round(x * 0.636619772);
    var r = fma(n, -1.5703125, x);
    r = fma(n, -4.837512969970703125e-4, r);
    r = fma(n, -7.54978995489188216e-8, r);
    let z = r * r;
    let q = (i32(n) + quarter) & 3;
    var y: f32;
    if ((q & 1) == 0) {
        var p = fma(z, -1.9515295891e-4, 8.3321608736e-3);
        p = fma(p, z, -1.6666654611e-1);
        y = fma(p * z, r, r);
    } else {
        var p = fma(z, 2.443315711809948e-5, -1.388731625493765e-3);
        p = fma(p, z, 4.166664568298827e-2);
        y = fma(p, z * z, fma(z, -0.5, 1.0));
    }
    return select(y, -y, (q & 2) != 0);
}
fn sin_of(x: f32) -> f32 { return sin_cos_of(x, 0); }
fn cos_of(x: f32) -> f32 { return sin_cos_of(x, 1); }

fn atan_of(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    let a = abs(x);
    var base = 0.0;
    var t = a;
    if (a > 2.414213562) {
        base = 1.5707963268;
        t = -1.0 / a;
    } else if (a > 0.4142135624) {
        base = 0.7853981634;
        t = (a - 1.0) / (a + 1.0);
    }
    let z = t * t;
    var p = fma(z, 8.05374449538e-2, -1.38776856032e-1);
    p = fma(p, z, 1.99777106478e-1);
    p = fma(p, z, -3.33329491539e-1);
    let y = base + fma(p * z, t, t);
    return select(y, -y, x < 0.0);
}

fn asin_of(x: f32) -> f32 {
    let a = abs(x);
    if (is_nan(x) || a > 1.0) { return not_a_number(); }
    var t = a;
    if (a > 0.5) { t = sqrt(0.5 * (1.0 - a)); }
    let z = t * t;
    var p = fma(z, 4.2163199048e-2, 2.4181311049e-2);
    p = fma(p, z, 4.5470025998e-2);
    p = fma(p, z, 7.4953002686e-2);
    p = fma(p, z, 1.6666752422e-1);
    var y = fma(p * z, t, t);
    if (a > 0.5) { y = 1.5707963268 - 2.0 * y; }
    return select(y, -y, x < 0.0);
}

// π/2 − asin x loses what is near 1.
fn acos_of(x: f32) -> f32 {
    if (x > 0.5) { return 2.0 * asin_of(sqrt(0.5 * (1.0 - x))); }
    if (x < -0.5) { return 3.1415926536 - 2.0 * asin_of(sqrt(0.5 * (1.0 + x))); }
    return 1.5707963268 - asin_of(x);
}

fn sinh_of(x: f32) -> f32 {
    let a = abs(x);
    if (a < 1.0) {
        let z = x * x;
        var p = fma(z, 2.03721912945e-4, 8.33028376239e-3);
        p = fma(p, z, 1.66667160211e-1);
        return fma(p * z, x, x);
    }
    let e = exp_of(0.5 * a);
    let y = 0.5 * e * e - 0.5 / (e * e);
    return select(y, -y, x < 0.0);
}
fn cosh_of(x: f32) -> f32 {
    let e = exp_of(0.5 * abs(x));
    return 0.5 * e * e + 0.5 / (e * e);
}
fn asinh_of(x: f32) -> f32 {
    if (is_nan(x) || is_infinite(x)) { return x; }
    let a = abs(x);
    var y: f32;
    if (a > 1e8) { y = log_of(a) + 0.69314718; } else { y = log1p_of(a + a * a / (1.0 + sqrt(fma(a, a, 1.0)))); }
    return select(y, -y, x < 0.0);
}
fn acosh_of(x: f32) -> f32 {
    if (is_nan(x) || x < 1.0) { return not_a_number(); }
    if (x > 1e8) { return log_of(x) + 0.69314718; }
    let t = x - 1.0;
    return log1p_of(t + sqrt(fma(t, t, 2.0 * t)));
}
fn atanh_of(x: f32) -> f32 {
    let a = abs(x);
    if (is_nan(x) || a > 1.0) { return not_a_number(); }
    if (a == 1.0) { return select(infinity(), -infinity(), x < 0.0); }
    let y = 0.5 * log1p_of(2.0 * a / (1.0 - a));
    return select(y, -y, x < 0.0);
}

fn powi_of(x: f32, n: u32) -> f32 {
    var y = 1.0;
    var base = x;
    var left = n;
    while (left != 0u) {
        if ((left & 1u) != 0u) { y = y * base; }
        base = base * base;
        left = left >> 1u;
    }
    return y;
}

// As C's powf. Small whole exponents by products.
fn pow_of(x: f32, e: f32) -> f32 {
    if (e == 0.0 || x == 1.0) { return 1.0; }
    if (is_nan(x) || is_nan(e)) { return not_a_number(); }
    let is_whole = floor(e) == e;
    let is_odd = is_whole && abs(e) < 16777216.0 && (i32(e) & 1) != 0;
    if (is_whole && abs(e) <= 64.0 && !is_infinite(x)) {
        let y = powi_of(x, u32(abs(e)));
        return select(y, 1.0 / y, e < 0.0);
    }
    let a = abs(x);
    if (is_infinite(e)) {
        if (a == 1.0) { return 1.0; }
        return select(0.0, infinity(), (a > 1.0) == (e > 0.0));
    }
    if (x < 0.0 && !is_whole && !is_infinite(x)) { return not_a_number(); }
    var y: f32;
    if (a == 0.0) {
        y = select(0.0, infinity(), e < 0.0);
    } else if (is_infinite(a)) {
        y = select(infinity(), 0.0, e < 0.0);
    } else if (e == 0.5) {
        y = sqrt(a);
    } else {
        y = exp_of(e * log_of(a));
    }
    return select(y, -y, is_odd && (bitcast<u32>(x) >> 31u) != 0u);
}

fn max_of(a: f32, b: f32) -> f32 {
    if (is_nan(a)) { return a; }
    if (is_nan(b)) { return b; }
    return select(b, a, a > b);
}
fn min_of(a: f32, b: f32) -> f32 {
    if (is_nan(a)) { return a; }
    if (is_nan(b)) { return b; }
    return select(b, a, a < b);
}

// The remainder that has the sign of the dividend, and the one that has the sign of the divisor.
fn fmod_of(a: f32, b: f32) -> f32 {
    if (b == 0.0 || is_nan(a) || is_nan(b) || is_infinite(a)) { return not_a_number(); }
    if (is_infinite(b)) { return a; }
    let r = abs(a) - abs(b) * floor(abs(a) / abs(b));
    let kept = select(r, 0.0, r >= abs(b));
    return select(kept, -kept, a < 0.0);
}
fn mod_of(a: f32, b: f32) -> f32 {
    let r = fmod_of(a, b);
    if (r == 0.0) { return select(0.0, -0.0, b < 0.0); }
    return select(r, r + b, (r < 0.0) != (b < 0.0));
}

// The nearest quotient, where a driver multiplies by the inverse: what decides between two steps of a quantization.
fn quotient_of(x: f32, y: f32) -> f32 {
    let q = x / y;
    let nearer = fma(fma(-q, y, x), 1.0 / y, q);
    return select(nearer, q, is_nan(nearer) || is_infinite(q));
}

// The steps of a quantization that `y`, a quotient, is: far beyond any bound they end.
fn steps_of(y: f32) -> f32 { return clamp(round(select(y, 0.0, is_nan(y))), -1000000000.0, 1000000000.0); }

// To the nearest of bfloat16.
fn to_bf16(x: f32) -> f32 {
    if (is_nan(x)) { return x; }
    let bits = bitcast<u32>(x);
    return bitcast<f32>((bits + 0x7fffu + ((bits >> 16u) & 1u)) & 0xffff0000u);
}
