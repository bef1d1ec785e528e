//! GPTQ: rounding errors of a weight are made up for by the weights that are not rounded yet.
//!
//! Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR 2023), algorithm 1 with the
//! Cholesky form of the inverse Hessian.

/// Rounds the rows of `weights [k, n]` in order. `gram [k, k]` is `Σ xᵀ·x` over the inputs seen. `round(row, weights)` rounds one row in
/// place, having seen all rows as they are then: the scales of a block are chosen when its first row comes.
///
/// Where the Gram matrix can't be factored although it was damped, rows are only rounded; `false` then.
pub(super) fn round_rows(
    weights: &mut [f32],
    n: usize,
    gram: &[f32],
    mut round: impl FnMut(usize, &mut [f32]),
) -> bool {
    let k = weights.len().checked_div(n).unwrap_or(0);
    let factor = inverse_factor(gram, k);
    for row in 0..k {
        let before = weights[row * n..][..n].to_vec();
        round(row, weights);
        let Some(factor) = &factor else { continue };
        let diagonal = factor[row * k + row];
        let (done, rest) = weights.split_at_mut((row + 1) * n);
        let errors: Vec<f32> = before.iter().zip(&done[row * n..]).map(|(b, a)| (b - a) / diagonal).collect();
        for (other, weights) in rest.chunks_exact_mut(n).enumerate() {
            let share = factor[row * k + row + 1 + other];
            if share != 0.0 {
                weights.iter_mut().zip(&errors).for_each(|(w, e)| *w -= e * share);
            }
        }
    }
    factor.is_some()
}

/// The upper triangular `U` with `Uᵀ·U = (H + λ)⁻¹`, where λ is a hundredth of the mean of H's diagonal.
fn inverse_factor(gram: &[f32], k: usize) -> Option<Vec<f32>> {
    if k == 0 || gram.len() != k * k {
        return None;
    }
    let damping = 0.01 * (0..k).map(|i| f64::from(gram[i * k + i])).sum::<f64>() / k as f64;
    let mut h: Vec<f64> = gram.iter().map(|&x| f64::from(x)).collect();
    for i in 0..k {
        // An input that is always 0 has nothing to say of its weights.
        let dead = h[i * k + i] == 0.0;
        h[i * k + i] += if dead { 1.0 } else { damping };
    }
    let lower = cholesky(&h, k)?;
    let inverse = invert_lower(&lower, k);
    // (L·Lᵀ)⁻¹ = L⁻ᵀ·L⁻¹: entry (i, j) sums over rows from the later of both on.
    let mut whole = vec![0f64; k * k];
    for row in inverse.chunks_exact(k) {
        for (i, &x) in row.iter().enumerate().filter(|(_, x)| **x != 0.0) {
            whole[i * k..][..k].iter_mut().zip(row).for_each(|(sum, y)| *sum += x * y);
        }
    }
    let lower = cholesky(&whole, k)?;
    Some((0..k).flat_map(|i| (0..k).map(move |j| (i, j))).map(|(i, j)| lower[j * k + i] as f32).collect())
}

/// The lower triangular `L` with `L·Lᵀ = a`.
fn cholesky(a: &[f64], k: usize) -> Option<Vec<f64>> {
    let mut l = vec![0f64; k * k];
    for i in 0..k {
        for j in 0..=i {
            let (x, y) = (&l[i * k..][..j], &l[j * k..][..j]);
            let rest = a[i * k + j] - dot(x, y);
            if i == j {
                if !(rest > 0.0 && rest.is_finite()) {
                    return None;
                }
                l[i * k + i] = rest.sqrt();
            } else {
                l[i * k + j] = rest / l[j * k + j];
            }
        }
    }
    Some(l)
}

/// `L⁻¹`, row by row.
fn invert_lower(l: &[f64], k: usize) -> Vec<f64> {
    let mut inverse = vec![0f64; k * k];
    for i in 0..k {
        let (done, row) = inverse.split_at_mut(i * k);
        let row = &mut row[..k];
        row[i] = 1.0;
        for (j, earlier) in done.chunks_exact(k).enumerate() {
            let factor = l[i * k + j];
            if factor != 0.0 {
                row[..=j].iter_mut().zip(earlier).for_each(|(x, y)| *x -= factor * y);
            }
        }
        let diagonal = l[i * k + i];
        row[..=i].iter_mut().for_each(|x| *x /= diagonal);
    }
    inverse
}

/// Four sums, so that the additions need not wait for one another.
fn dot(x: &[f64], y: &[f64]) -> f64 {
    let mut sums = [0f64; 4];
    let (xs, ys) = (x.chunks_exact(4), y.chunks_exact(4));
    let rest: f64 = xs.remainder().iter().zip(ys.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in xs.zip(ys) {
        (0..4).for_each(|i| sums[i] += a[i] * b[i]);
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: usize, count: usize) -> Vec<f32> {
        (0..count).map(|i| (((i + 1) * (2 * seed + 7919) * 31 + i * i * 17) % 1021) as f32 / 1021.0 - 0.5).collect()
    }

    #[test]
    fn the_factor_inverts_the_damped_matrix() {
        let (k, x) = (7, noise(1, 7 * 20));
        let mut gram = vec![0f32; k * k];
        for row in x.chunks_exact(k) {
            (0..k * k).for_each(|i| gram[i] += row[i / k] * row[i % k]);
        }
        let u = inverse_factor(&gram, k).unwrap();
        let damping = 0.01 * (0..k).map(|i| gram[i * k + i]).sum::<f32>() / k as f32;
        (0..k).for_each(|i| gram[i * k + i] += damping);
        for i in 0..k {
            for j in 0..k {
                let inverse = |a: usize, b: usize| (0..k).map(|r| u[r * k + a] * u[r * k + b]).sum::<f32>();
                let product: f32 = (0..k).map(|m| gram[i * k + m] * inverse(m, j)).sum();
                assert!((product - f32::from(u8::from(i == j))).abs() < 1e-3, "({i}, {j}): {product}");
            }
        }
    }

    #[test]
    fn the_output_errs_less_than_by_rounding_alone() {
        let (k, n, rows) = (32, 8, 200);
        // Inputs that go together, as those of real layers do.
        let base = noise(3, rows * 4);
        let own = noise(5, rows * k);
        let x: Vec<f32> = (0..rows * k).map(|i| base[i / k * 4 + i % 4] + 0.2 * own[i]).collect();
        let mut gram = vec![0f32; k * k];
        for row in x.chunks_exact(k) {
            (0..k * k).for_each(|i| gram[i] += row[i / k] * row[i % k]);
        }
        let weights = noise(9, k * n);
        let error = |rounded: &[f32]| {
            let output = |r: usize, c: usize| {
                (0..k).map(|i| x[r * k + i] * (weights[i * n + c] - rounded[i * n + c])).sum::<f32>()
            };
            (0..rows * n).map(|i| output(i / n, i % n).powi(2)).sum::<f32>()
        };
        let coarse =
            |row: usize, w: &mut [f32]| w[row * n..][..n].iter_mut().for_each(|w| *w = (*w * 8.0).round() / 8.0);
        let (mut alone, mut together) = (weights.clone(), weights.clone());
        assert!(!round_rows(&mut alone, n, &[], coarse));
        assert!(round_rows(&mut together, n, &gram, coarse));
        assert!(error(&together) < 0.5 * error(&alone), "{} against {}", error(&together), error(&alone));
    }
}
