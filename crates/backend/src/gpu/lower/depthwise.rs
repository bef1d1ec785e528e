//! Convolutions of one input channel a group where a load costs as much as many multiplications: what four neighbouring results of a row read
//! of a row of the input is loaded once, by fours where it lies so.

use super::{
    super::{
        code::{Operand, Text},
        plan::{Builder, Unable},
    },
    conv::{Problem, rows_by_fours},
    product::{element, group_size, store_row},
};
use cutover_graph::{Constant, ops::WindowAxis};
use cutover_tensor::DType;
use std::fmt::Write;

/// Taps that are written out at most.
const MOST_TAPS: usize = 64;

/// Whether there is such a kernel for `p`.
pub(super) fn fits(p: &Problem) -> bool {
    p.inner == 1 && p.vertical.kernel * p.horizontal.kernel <= MOST_TAPS
}

/// Four pixels of a row of one channel an invocation.
pub(super) fn convolve(b: &mut Builder<'_>, p: &Problem, constant: &Constant) -> Result<(), Unable> {
    let (vertical, horizontal, channels) = (&p.vertical, &p.horizontal, p.channels());
    let taps = vertical.kernel * horizontal.kernel;
    let filters = b.upload(constant, "rows by fours", |filters| rows_by_fours(filters, channels))?;
    let Operand::Buffer(filters, _) = filters else { return Err("filters in memory".into()) };
    let mut text = Text::default();
    let load = text.function(&p.x);
    let quad = if is_aligned(horizontal) { text.quads(&p.x) } else { None };
    let weight = text.quads(&Operand::Buffer(filters, DType::F32)).ok_or("filters in memory")?;
    let (height, width) = (vertical.output, horizontal.output);
    let mut kernel = element(&mut text, p.dtype, &p.epilogue);
    let store = store_row(&mut text, p.to, p.dtype, width, 4, ["x", "sums"]);
    let of_row = width.div_ceil(4);
    let group = group_size(b, height * of_row);
    // What lies above or left of the input wraps around and is beyond its other edge.
    let _ = write!(
        kernel,
        "fn finish(row: u32, y: u32, x: u32, sums: vec4<f32>) {{\nlet i = (row * {height}u + y) * {width}u + x;\n{store}}}
@compute @workgroup_size({group})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {{
let quad = group.x * {group}u + lane;
if (quad >= {}u) {{ return; }}
let plane = (group.z * {}u + group.y / {}u) * {}u;
let y = quad / {of_row}u;
let x = quad % {of_row}u * 4u;
let top = y * {}u - {}u;
let left = x * {}u - {}u;
var t = vec4<f32>(0.0);\n",
        height * of_row,
        p.groups,
        p.per_group,
        vertical.input * horizontal.input,
        vertical.stride,
        vertical.pad_begin,
        horizontal.stride,
        horizontal.pad_begin,
    );
    let quads = taps.div_ceil(4);
    for at in 0..quads {
        let _ = writeln!(kernel, "let w{at} = {weight}(group.y * {quads}u + {at}u);");
    }
    for row in 0..vertical.kernel {
        let _ = writeln!(
            kernel,
            "{{\nlet row = top + {}u;\nlet is_row = row < {}u;\nlet begin = plane + row * {}u;",
            row * vertical.dilation,
            vertical.input,
            horizontal.input
        );
        kernel += &columns(horizontal, &load, quad.as_deref());
        for tap in 0..horizontal.kernel {
            let term = row * horizontal.kernel + tap;
            let of = |pixel: usize| format!("c{}", pixel * horizontal.stride + tap * horizontal.dilation);
            let met = (0..4).map(of).collect::<Vec<_>>().join(", ");
            let _ = writeln!(kernel, "t = t + w{}[{}] * vec4<f32>({met});", term / 4, term % 4);
        }
        kernel += "}\n";
    }
    let _ = writeln!(kernel, "finish(group.z * {channels}u + group.y, y, x, t);\n}}");
    let groups = [(height * of_row).div_ceil(group), channels, p.samples].map(|n| n as u32);
    b.push(text, &kernel, groups, "depthwise convolution", p.work)
}

/// Whether a row's first pixel of four meets what begins, but for the padding, where a four of the input does.
fn is_aligned(axis: &WindowAxis) -> bool {
    axis.input.is_multiple_of(4) && axis.output.is_multiple_of(4)
}

/// Statements that load the columns `c{n}` from `left` on that four pixels meet, by `load` or, four at once, by `quad`.
fn columns(axis: &WindowAxis, load: &str, quad: Option<&str>) -> String {
    let is_met = |column: usize| {
        (0..4).any(|pixel| (0..axis.kernel).any(|tap| pixel * axis.stride + tap * axis.dilation == column))
    };
    let count = 3 * axis.stride + (axis.kernel - 1) * axis.dilation + 1;
    let (mut text, mut at) = (String::new(), 0);
    while at < count {
        let is_inside = format!("is_row && left + {at}u < {}u", axis.input);
        let begins = at >= axis.pad_begin && (at - axis.pad_begin).is_multiple_of(4) && at + 3 < count;
        if let Some(quad) = quad.filter(|_| begins) {
            let _ = writeln!(
                text,
                "let is{at} = {is_inside};\nlet q{at} = select(vec4<f32>(0.0), {quad}(select(0u, begin + left + {at}u, is{at}) / 4u), is{at});"
            );
            for j in 0..4 {
                let _ = writeln!(text, "let c{} = q{at}[{j}];", at + j);
            }
            at += 4;
            continue;
        }
        if is_met(at) {
            let _ = writeln!(
                text,
                "let is{at} = {is_inside};\nlet c{at} = select(0.0, {load}(select(0u, begin + left + {at}u, is{at})), is{at});"
            );
        }
        at += 1;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fours_are_loaded_as_such_where_they_lie_so() {
        let axis = |input, output, stride| WindowAxis {
            input,
            output,
            kernel: 3,
            stride,
            dilation: 1,
            pad_begin: 1,
            pad_end: 1,
        };
        let loads = |axis: &WindowAxis| {
            let text = columns(axis, "one", is_aligned(axis).then_some("four"));
            (text.matches("one(").count(), text.matches("four(").count())
        };
        assert_eq!(loads(&axis(28, 28, 1)), (2, 1));
        assert_eq!(loads(&axis(28, 14, 2)), (9, 0));
        assert_eq!(loads(&axis(56, 28, 2)), (1, 2));
        assert_eq!(loads(&axis(7, 7, 1)), (6, 0));
    }
}
