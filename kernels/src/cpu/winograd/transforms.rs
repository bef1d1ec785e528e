//! The transforms of tiles along one side, by their points of interpolation.

use super::super::isa::Isa;

/// The three transforms of F(`M`×`M`, 3×3), along one side.
///
/// With points `a_i`, `N_i = Π_{j≠i} (a_i − a_j)` and the point at infinity last: row i of `G` is `(1, a_i, a_i²) / N_i`, row i of `Bᵀ` the coefficients
/// of `Π_{j≠i} (x − a_j)`, and column i of `Aᵀ` is `(1, a_i, …, a_i^{M−1})`.
pub(super) trait Transform<const M: usize, const A: usize>: Copy {
    /// `G`.
    const FILTER: [[f64; 3]; A];
    /// `G g`.
    #[inline(always)]
    fn filter<I: Isa>(self, isa: I, g: [I::V; 3]) -> [I::V; A] {
        std::array::from_fn(|i| {
            let [a, b, c] = Self::FILTER[i].map(|x| isa.splat(x as f32));
            isa.fma(c, g[2], isa.fma(b, g[1], isa.mul(a, g[0])))
        })
    }
    /// `Bᵀ d`.
    fn input<I: Isa>(self, isa: I, d: [I::V; A]) -> [I::V; A];
    /// `Aᵀ m`.
    fn output<I: Isa>(self, isa: I, m: [I::V; A]) -> [I::V; M];
}

/// Points 0, ±1, ∞.
#[derive(Clone, Copy)]
pub(super) struct F2;

impl Transform<2, 4> for F2 {
    const FILTER: [[f64; 3]; 4] = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];

    #[inline(always)]
    fn filter<I: Isa>(self, isa: I, g: [I::V; 3]) -> [I::V; 4] {
        let (half, ends) = (isa.splat(0.5), isa.add(g[0], g[2]));
        [g[0], isa.mul(half, isa.add(ends, g[1])), isa.mul(half, isa.sub(ends, g[1])), g[2]]
    }

    #[inline(always)]
    fn input<I: Isa>(self, isa: I, d: [I::V; 4]) -> [I::V; 4] {
        [isa.sub(d[0], d[2]), isa.add(d[2], d[1]), isa.sub(d[2], d[1]), isa.sub(d[3], d[1])]
    }

    #[inline(always)]
    fn output<I: Isa>(self, isa: I, m: [I::V; 4]) -> [I::V; 2] {
        [isa.add(m[0], isa.add(m[1], m[2])), isa.add(m[3], isa.sub(m[1], m[2]))]
    }
}

/// Points 0, ±√½, ±√2, ∞.
#[derive(Clone, Copy)]
pub(super) struct F4;

const ROOT: f64 = std::f64::consts::SQRT_2;
const HALF_ROOT: f64 = std::f64::consts::FRAC_1_SQRT_2;

impl Transform<4, 6> for F4 {
    const FILTER: [[f64; 3]; 6] = [
        [1.0, 0.0, 0.0],
        [-2.0 / 3.0, -2.0 / 3.0 * HALF_ROOT, -1.0 / 3.0],
        [-2.0 / 3.0, 2.0 / 3.0 * HALF_ROOT, -1.0 / 3.0],
        [1.0 / 6.0, ROOT / 6.0, 1.0 / 3.0],
        [1.0 / 6.0, -ROOT / 6.0, 1.0 / 3.0],
        [0.0, 0.0, 1.0],
    ];

    #[inline(always)]
    fn input<I: Isa>(self, isa: I, d: [I::V; 6]) -> [I::V; 6] {
        let (low, high) = (isa.splat(HALF_ROOT as f32), isa.splat(ROOT as f32));
        let (half, two, middle) = (isa.splat(0.5), isa.splat(2.0), isa.splat(2.5));
        let near_even = isa.fnma(two, d[2], d[4]);
        let near_odd = isa.mul(low, isa.fnma(two, d[1], d[3]));
        let far_even = isa.fnma(half, d[2], d[4]);
        let far_odd = isa.mul(high, isa.fnma(half, d[1], d[3]));
        [
            isa.fnma(middle, d[2], isa.add(d[0], d[4])),
            isa.add(near_even, near_odd),
            isa.sub(near_even, near_odd),
            isa.add(far_even, far_odd),
            isa.sub(far_even, far_odd),
            isa.fnma(middle, d[3], isa.add(d[1], d[5])),
        ]
    }

    #[inline(always)]
    fn output<I: Isa>(self, isa: I, m: [I::V; 6]) -> [I::V; 4] {
        let splat = |x: f64| isa.splat(x as f32);
        let (near_sum, near_difference) = (isa.add(m[1], m[2]), isa.sub(m[1], m[2]));
        let (far_sum, far_difference) = (isa.add(m[3], m[4]), isa.sub(m[3], m[4]));
        [
            isa.add(m[0], isa.add(near_sum, far_sum)),
            isa.fma(splat(HALF_ROOT), near_difference, isa.mul(splat(ROOT), far_difference)),
            isa.fma(splat(0.5), near_sum, isa.mul(splat(2.0), far_sum)),
            isa.fma(splat(HALF_ROOT / 2.0), near_difference, isa.fma(splat(ROOT * 2.0), far_difference, m[5])),
        ]
    }
}

/// Points 0, ±1, ±½, ±2, ∞.
#[derive(Clone, Copy)]
pub(super) struct F6;

impl Transform<6, 8> for F6 {
    const FILTER: [[f64; 3]; 8] = [
        [-1.0, 0.0, 0.0],
        [-2.0 / 9.0, -2.0 / 9.0, -2.0 / 9.0],
        [-2.0 / 9.0, 2.0 / 9.0, -2.0 / 9.0],
        [32.0 / 45.0, 16.0 / 45.0, 8.0 / 45.0],
        [32.0 / 45.0, -16.0 / 45.0, 8.0 / 45.0],
        [1.0 / 90.0, 1.0 / 45.0, 2.0 / 45.0],
        [1.0 / 90.0, -1.0 / 45.0, 2.0 / 45.0],
        [0.0, 0.0, 1.0],
    ];

    #[inline(always)]
    fn input<I: Isa>(self, isa: I, d: [I::V; 8]) -> [I::V; 8] {
        let splat = |x: f32| isa.splat(x);
        // Of (x² − ¼)(x² − 4)(x² − 1) and its parts, by even and odd powers.
        let ends = |a: I::V, b: I::V, c: I::V, d: I::V| isa.fma(splat(5.25), isa.sub(b, c), isa.sub(d, a));
        let one_even = isa.fnma(splat(4.25), d[4], isa.add(d[2], d[6]));
        let one_odd = isa.fnma(splat(4.25), d[3], isa.add(d[1], d[5]));
        let half_even = isa.fma(splat(4.0), d[2], isa.fnma(splat(5.0), d[4], d[6]));
        let half_odd = isa.fma(splat(2.0), d[1], isa.fma(splat(0.5), d[5], isa.mul(splat(-2.5), d[3])));
        let two_even = isa.fma(splat(0.25), d[2], isa.fnma(splat(1.25), d[4], d[6]));
        let two_odd = isa.fma(splat(0.5), d[1], isa.fma(splat(2.0), d[5], isa.mul(splat(-2.5), d[3])));
        [
            ends(d[0], d[2], d[4], d[6]),
            isa.add(one_even, one_odd),
            isa.sub(one_even, one_odd),
            isa.add(half_even, half_odd),
            isa.sub(half_even, half_odd),
            isa.add(two_even, two_odd),
            isa.sub(two_even, two_odd),
            ends(d[1], d[3], d[5], d[7]),
        ]
    }

    #[inline(always)]
    fn output<I: Isa>(self, isa: I, m: [I::V; 8]) -> [I::V; 6] {
        let splat = |x: f32| isa.splat(x);
        let sums = [isa.add(m[1], m[2]), isa.add(m[3], m[4]), isa.add(m[5], m[6])];
        let differences = [isa.sub(m[1], m[2]), isa.sub(m[3], m[4]), isa.sub(m[5], m[6])];
        // Σ of the pairs by powers of 1, ½ and 2.
        let of = |pairs: [I::V; 3], half: f32, two: f32| {
            isa.fma(splat(two), pairs[2], isa.fma(splat(half), pairs[1], pairs[0]))
        };
        [
            isa.add(m[0], of(sums, 1.0, 1.0)),
            of(differences, 0.5, 2.0),
            of(sums, 0.25, 4.0),
            of(differences, 0.125, 8.0),
            of(sums, 0.0625, 16.0),
            isa.add(m[7], of(differences, 0.03125, 32.0)),
        ]
    }
}
