//! Winograd's convolution in f32: of 3 × 3 filters with stride 1, where tensor cores are not to be used and multiplications are the limit.
//!
//! F(2×2) has 4/9 of the multiplications, F(4×4) a fourth; both write and read windows and sums once more. F(4×4) loses two to three
//! decimal digits, so a strict numerics keeps to direct sums.

use super::{
    Argument, Conv, Device, Element, Kernel, Launch, Layout, Precision, Refused,
    product::{Core, Factor, Inner, Order, aligned},
    text::{check_count, check_grid, constant},
};
use std::fmt::Write;

/// A convolution by planes, of f32, 3 × 3, without groups, strides and dilation, by windows of `tile` × `tile` results.
///
/// Its inputs are pictures (0) and [`Winograd::filters`] (1).
#[derive(Clone, Debug)]
pub struct Winograd {
    pub conv: Conv,
    /// 2 or 4.
    pub tile: usize,
}

/// Bᵀ, G and Aᵀ of F(2×2, 3×3) and F(4×4, 3×3), row by row (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015).
type Matrices = (&'static [f64], &'static [f64], &'static [f64]);

const TWO: Matrices = (
    &[1., 0., -1., 0., 0., 1., 1., 0., 0., -1., 1., 0., 0., 1., 0., -1.],
    &[1., 0., 0., 0.5, 0.5, 0.5, 0.5, -0.5, 0.5, 0., 0., 1.],
    &[1., 1., 1., 0., 0., 1., -1., -1.],
);

const FOUR: Matrices = (
    &[
        4., 0., -5., 0., 1., 0., 0., -4., -4., 1., 1., 0., 0., 4., -4., -1., 1., 0., 0., -2., -1., 2., 1., 0., 0., 2.,
        -1., -2., 1., 0., 0., 4., 0., -5., 0., 1.,
    ],
    &[
        1. / 4.,
        0.,
        0.,
        -1. / 6.,
        -1. / 6.,
        -1. / 6.,
        -1. / 6.,
        1. / 6.,
        -1. / 6.,
        1. / 24.,
        1. / 12.,
        1. / 6.,
        1. / 24.,
        -1. / 12.,
        1. / 6.,
        0.,
        0.,
        1.,
    ],
    &[1., 1., 1., 1., 1., 0., 0., 1., -1., 2., -2., 0., 0., 1., 1., 4., 4., 0., 0., 1., -1., 8., -8., 1.],
);

impl Winograd {
    /// The tile that pays for `conv` on `device`, if one does: by multiplications at the speed of f32 and bytes at that of memory.
    pub fn choose(conv: &Conv, device: Device) -> Option<Winograd> {
        let direct = *conv.candidates(device).ok()?.first().map(|(_, clocks)| clocks)?;
        let of = |tile: usize| {
            let winograd = Winograd { conv: conv.clone(), tile };
            let (core, windows) = winograd.core().ok()?;
            let product = core.candidates(device).ok()?.first()?.1;
            let edge = (tile + 2) * (tile + 2);
            // Windows and sums are written once; what the level-2 cache does not hold comes from memory.
            let moved = 4 * windows * edge * (conv.channels + conv.out_channels);
            let clocks = 2.0 * 3000.0 + moved as f64 / (13.0 * f64::from(device.multiprocessors)) + product;
            Some((clocks, winograd))
        };
        let best = [2, 4].into_iter().filter_map(of).min_by(|(a, _), (b, _)| a.total_cmp(b))?;
        (best.0 < 0.9 * direct).then_some(best.1)
    }

    fn matrices(&self) -> Matrices {
        if self.tile == 2 { TWO } else { FOUR }
    }

    /// Filters `[out, in, 3, 3]` as `[edge², out, in]`, `edge = tile + 2`: `G · g · Gᵀ` of each, rounded once.
    ///
    /// # Panics
    /// On another number of weights than the convolution has.
    pub fn filters(&self, weights: &[f32]) -> Vec<f32> {
        let (edge, count) = (self.tile + 2, self.conv.out_channels * self.conv.channels);
        assert_eq!(weights.len(), count * 9, "filters of {:?}", self.conv);
        let g = self.matrices().1;
        let mut filters = vec![0.0; edge * edge * count];
        for (at, filter) in weights.chunks_exact(9).enumerate() {
            for (r, s) in (0..edge).flat_map(|r| (0..edge).map(move |s| (r, s))) {
                let term = |i: usize| g[r * 3 + i / 3] * f64::from(filter[i]) * g[s * 3 + i % 3];
                filters[(r * edge + s) * count + at] = (0..9).map(term).sum::<f64>() as f32;
            }
        }
        filters
    }

    fn check(&self) -> Result<(), Refused> {
        let of = &self.conv;
        let fits = of.element == Element::F32
            && of.result == Element::F32
            && of.precision == Precision::Full
            && of.layout == Layout::Planes
            && (of.groups, of.kernel, of.stride, of.dilation) == (1, [3, 3], [1, 1], [1, 1])
            && matches!(self.tile, 2 | 4);
        if fits { Ok(()) } else { Err(Refused("no convolution by Winograd's windows".to_string())) }
    }

    /// The products in the middle, and how many windows there are.
    fn core(&self) -> Result<(Core, usize), Refused> {
        self.check()?;
        let of = &self.conv;
        let windows = of.images * of.output[0].div_ceil(self.tile) * of.output[1].div_ceil(self.tile);
        let (m, n, k, z) = (of.out_channels, windows, of.channels, (self.tile + 2) * (self.tile + 2));
        check_count("windows", z * windows * k.max(m))?;
        let a = format!("at = (z * {m}u + m) * {k}u + k;\nreturn m < {m}u && k < {k}u;");
        let b = format!("at = (z * {k}u + k) * {n}u + n;\nreturn n < {n}u && k < {k}u;");
        // Parts of the workspace begin at multiples of 256 bytes.
        let output = (z * k * n).next_multiple_of(64);
        let parts = (output + z * m * n).next_multiple_of(64);
        let mut members = vec![
            ("output", "float*".to_string(), Argument::Output(0)),
            ("workspace", "float*".to_string(), Argument::Workspace),
        ];
        if !of.x_is_function {
            members.push(("x", "const float*".to_string(), Argument::Input(0)));
        }
        let core = Core {
            m,
            n,
            k,
            z,
            a: Factor { order: Order::ByK, copy: aligned(&[k], Element::F32), place: a },
            b: Factor { order: Order::ByOuter, copy: aligned(&[n], Element::F32), place: b },
            inputs: [1, 0],
            elements: [Element::F32; 2],
            result: Element::F32,
            precision: Precision::Full,
            result_place: format!("(z * {m}u + m) * {n}u + n"),
            result_aligned: n,
            channel: "m".to_string(),
            functions: of.functions.clone(),
            outside: None,
            inner: Some(Inner { b: 0, output, parts, members, text: String::new() }),
            name: "winograd",
        };
        Ok((core, windows))
    }

    pub fn kernel(&self, device: Device) -> Result<Kernel, Refused> {
        let (mut core, windows) = self.core()?;
        let of = &self.conv;
        let (edge, tile) = (self.tile + 2, self.tile);
        let mut text = String::new();
        let numbers = [
            ("CHANNELS", of.channels),
            ("OUT_CHANNELS", of.out_channels),
            ("IMAGES", of.images),
            ("IN_H", of.input[0]),
            ("IN_W", of.input[1]),
            ("OUT_H", of.output[0]),
            ("OUT_W", of.output[1]),
            ("PAD_Y", of.pad_begin[0]),
            ("PAD_X", of.pad_begin[1]),
            ("TILE", tile),
            ("EDGE", edge),
            ("V_BEGIN", 0),
            ("M_BEGIN", core.inner.as_ref().map_or(0, |inner| inner.output)),
        ];
        text.extend(numbers.map(|(name, value)| constant(name, value)));
        let (input, _, output) = self.matrices();
        for (name, rows, matrix) in [("INPUT", edge, input), ("OUTPUT", tile, output)] {
            let numbers: Vec<String> = matrix.iter().map(|x| format!("{x:?}f")).collect();
            let rows_text: Vec<String> = numbers.chunks(edge).map(|row| format!("{{{}}}", row.join(", "))).collect();
            let _ = writeln!(text, "__device__ constexpr float {name}[{rows}][{edge}] = {{{}}};", rows_text.join(", "));
        }
        let value = if of.x_is_function { "x_at(o, i)" } else { "o.x[i]" };
        let _ =
            writeln!(text, "__device__ __forceinline__ float x_value(const Operands& o, u32 i) {{ return {value}; }}");
        text += include_str!("../../cuda/winograd.cu");
        if let Some(inner) = &mut core.inner {
            inner.text = text;
        }
        let (best, _) = core.candidates(device)?.remove(0);
        let mut kernel = core.kernel(device, best)?;
        let Some(product) = kernel.launches.first().cloned() else { return Ok(kernel) };
        let launch = |name: &str, threads: usize| -> Result<Launch, Refused> {
            let grid = check_grid([threads.div_ceil(128), 1, 1])?;
            Ok(Launch { entry: format!("{}_{name}", product.entry), grid, block: 128, shared_bytes: 0 })
        };
        if of.channels > 0 {
            kernel.launches.insert(0, launch("windows", of.channels * windows)?);
        }
        kernel.launches.push(launch("results", of.out_channels * windows)?);
        Ok(kernel)
    }
}
