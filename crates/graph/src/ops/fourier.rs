//! The discrete Fourier transform of one length, in `f64`.

/// Real and imaginary part.
pub(super) type Complex = (f64, f64);

/// Above this prime factor a length is transformed as a convolution (Bluestein, 1970).
const FACTOR_MAX: usize = 31;

/// Factors of one length and its roots of unity: `O(n · Σ factors)` for a length whose factors are small, `O(n log n)` for others.
pub(super) struct Fourier {
    /// `e^(-2πi·k/n)`
    roots: Vec<Complex>,
    factors: Vec<usize>,
    bluestein: Option<Box<Bluestein>>,
}

/// A transform as the convolution of the signal with `chirp`, over the next convenient length.
struct Bluestein {
    /// `e^(-πi·k²/n)`
    chirp: Vec<Complex>,
    /// The transform of the conjugate chirp, repeated round the convolution's length.
    kernel: Vec<Complex>,
    convolution: Fourier,
}

fn mul(a: Complex, b: Complex) -> Complex {
    (a.0 * b.0 - a.1 * b.1, a.0 * b.1 + a.1 * b.0)
}

fn root(numerator: usize, denominator: usize) -> Complex {
    let (sin, cos) = (-2.0 * std::f64::consts::PI * numerator as f64 / denominator as f64).sin_cos();
    (cos, sin)
}

impl Fourier {
    /// `length` must not be 0.
    pub fn new(length: usize) -> Fourier {
        let mut factors = Vec::new();
        let (mut rest, mut factor) = (length, 2);
        while rest > 1 && factor <= FACTOR_MAX {
            match rest % factor {
                0 => {
                    factors.push(factor);
                    rest /= factor;
                }
                _ => factor += 1,
            }
        }
        if rest == 1 {
            return Fourier { roots: (0..length).map(|k| root(k, length)).collect(), factors, bluestein: None };
        }
        // k² / 2 of a length, without the part that is whole turns.
        let chirp = |k: usize| root((k as u128 * k as u128 % (2 * length as u128)) as usize, 2 * length);
        let chirp: Vec<Complex> = (0..length).map(chirp).collect();
        let convolution = Fourier::new((2 * length - 1).next_power_of_two());
        let mut repeated = vec![(0.0, 0.0); convolution.roots.len()];
        for (k, &(re, im)) in chirp.iter().enumerate() {
            repeated[k] = (re, -im);
            if k > 0 {
                let back = repeated.len() - k;
                repeated[back] = (re, -im);
            }
        }
        let kernel = convolution.forward(&repeated);
        Fourier { roots: Vec::new(), factors, bluestein: Some(Box::new(Bluestein { chirp, kernel, convolution })) }
    }

    /// `y[k] = Σ x[n] · e^(-2πi·kn/N)`; `x` has as many elements as the transform.
    pub fn forward(&self, x: &[Complex]) -> Vec<Complex> {
        if let Some(bluestein) = &self.bluestein {
            return bluestein.forward(x);
        }
        let mut y = vec![(0.0, 0.0); x.len()];
        self.step(x, 1, &mut y, &self.factors);
        y
    }

    /// `y[k] = 1/N · Σ x[n] · e^(2πi·kn/N)`
    pub fn inverse(&self, x: &[Complex]) -> Vec<Complex> {
        let swapped: Vec<Complex> = x.iter().map(|&(re, im)| (im, re)).collect();
        let count = x.len() as f64;
        self.forward(&swapped).into_iter().map(|(re, im)| (im / count, re / count)).collect()
    }

    /// The transform of every `stride`-th element of `x`, as many as `y` has: of its residues by the first factor, then of those.
    fn step(&self, x: &[Complex], stride: usize, y: &mut [Complex], factors: &[usize]) {
        let Some((&factor, factors)) = factors.split_first() else {
            y[0] = x[0];
            return;
        };
        let part = y.len() / factor;
        for (residue, y) in y.chunks_exact_mut(part).enumerate() {
            self.step(&x[residue * stride..], stride * factor, y, factors);
        }
        let count = self.roots.len();
        let mut terms = [(0.0, 0.0); FACTOR_MAX];
        for k in 0..part {
            for (residue, term) in terms[..factor].iter_mut().enumerate() {
                *term = mul(y[residue * part + k], self.roots[residue * k * stride]);
            }
            for quotient in 0..factor {
                let turn = quotient * part * stride;
                let mut sum = terms[0];
                for (residue, term) in terms[..factor].iter().enumerate().skip(1) {
                    let (re, im) = mul(*term, self.roots[residue * turn % count]);
                    sum = (sum.0 + re, sum.1 + im);
                }
                y[quotient * part + k] = sum;
            }
        }
    }
}

impl Bluestein {
    fn forward(&self, x: &[Complex]) -> Vec<Complex> {
        let mut chirped: Vec<Complex> = x.iter().zip(&self.chirp).map(|(&x, &c)| mul(x, c)).collect();
        chirped.resize(self.kernel.len(), (0.0, 0.0));
        let mut product = self.convolution.forward(&chirped);
        product.iter_mut().zip(&self.kernel).for_each(|(y, &k)| *y = mul(*y, k));
        let product = self.convolution.inverse(&product);
        product.into_iter().zip(&self.chirp).map(|(y, &c)| mul(y, c)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_sum() {
        for length in [1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 31, 37, 64, 74, 97, 360, 400, 401, 1009, 1024] {
            let signal: Vec<Complex> = (0..length).map(|i| ((i * 7 % 11) as f64 - 5.0, (i * 5 % 13) as f64)).collect();
            let fourier = Fourier::new(length);
            let transformed = fourier.forward(&signal);
            for (k, got) in transformed.iter().enumerate() {
                let terms = signal.iter().enumerate().map(|(n, &x)| mul(x, root(k * n % length, length)));
                let sum = terms.fold((0.0, 0.0), |sum: Complex, term| (sum.0 + term.0, sum.1 + term.1));
                let error = (got.0 - sum.0).abs().max((got.1 - sum.1).abs());
                assert!(error < 1e-10 * length as f64, "element {k} of {length}: {got:?} instead of {sum:?}");
            }
            for (got, x) in fourier.inverse(&transformed).iter().zip(&signal) {
                assert!((got.0 - x.0).abs().max((got.1 - x.1).abs()) < 1e-11, "{length}: {got:?} instead of {x:?}");
            }
        }
    }
}
