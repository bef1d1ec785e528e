//! Convolutions: implicit products, Winograd's, depthwise.

use super::{
    super::{
        super::{
            code::{Operand, Text},
            device::Solution,
            plan::{BufferId, Builder, Unable, Written},
            stock::Solutions,
        },
        conv::{Problem, floats},
        product::element,
    },
    LEAST_ELEMENTS, Names,
    channels::Channels,
    half_of, narrowed, only, precision, stored, upload_half, worth_trying,
};
use crate::Numerics;
use cutover_graph::{ValueId, ops::WindowAxis};
use cutover_kernels::cuda::{self, Conv, Element, Functions, Layout, Precision, Refused, Winograd};
use cutover_tensor::DType;

const CONVOLUTION: Names = Names {
    full: "convolution by hand",
    tf32: "convolution by hand, tf32",
    f16: "convolution by hand, f16",
    bf16: "convolution by hand, bf16",
};

/// The geometry of `p`, by planes, in the elements that the model has.
fn geometry(b: &Builder<'_>, p: &Problem, element: Element) -> Conv {
    let counts = [p.samples, p.inner * p.groups, p.channels(), p.groups];
    Conv { precision: precision(b), ..of_windows(counts, [&p.vertical, &p.horizontal], element) }
}

/// By planes: samples, channels in and out, groups; the windows down and across; what all of it is held in.
pub(in super::super) fn of_windows(
    [images, channels, out_channels, groups]: [usize; 4],
    windows: [&WindowAxis; 2],
    element: Element,
) -> Conv {
    let both = |of: fn(&WindowAxis) -> usize| windows.map(of);
    Conv {
        images,
        channels,
        out_channels,
        groups,
        input: both(|axis| axis.input),
        output: both(|axis| axis.output),
        kernel: both(|axis| axis.kernel),
        stride: both(|axis| axis.stride),
        dilation: both(|axis| axis.dilation),
        pad_begin: both(|axis| axis.pad_begin),
        layout: Layout::Planes,
        element,
        result: element,
        has_zero_point: false,
        precision: Precision::Full,
        x_is_function: false,
        functions: Functions::default(),
    }
}

/// The convolution, whose filters need not be constant.
pub(in super::super) fn convolution(b: &mut Builder<'_>, p: &Problem) -> Result<bool, Unable> {
    let (Some(device), Some(result)) = (b.gpu.written, stored(p.dtype)) else { return Ok(false) };
    let Operand::Buffer(x, of) = p.x else { return Ok(false) };
    if of != p.dtype {
        return Ok(false);
    }
    let conv = geometry(b, p, result);
    let is_depthwise = p.inner == 1 && p.groups > 1;
    let half = half_of(b, p.constant.clone(), LEAST_ELEMENTS).filter(|_| p.dtype == DType::F32 && !is_depthwise);
    if let Some((constant, element)) = half {
        let filters = upload_half(b, &constant, element)?;
        let name = |solution: &Solution| CONVOLUTION.of(element, solution);
        let conv = Conv { element, precision: cuda::Precision::Full, x_is_function: true, ..conv.clone() };
        let solutions = |mut functions: Functions, most: usize| {
            functions.pointers.push(("const float*".to_string(), "pictures".to_string()));
            functions.text +=
                "__device__ __forceinline__ float x_at(const Operands& o, u32 i) { return o.pictures[i]; }\n";
            solutions(&Conv { functions, ..conv.clone() }, device, most)
        };
        if push(b, p, [x, filters], &[x], &solutions, &name) {
            return Ok(true);
        }
    }
    if let Some((winograd, filters)) = by_windows(b, p, &conv, device)? {
        let solutions = |functions: Functions, _: usize| {
            let conv = Conv { functions, ..conv.clone() };
            only(Winograd { conv, ..winograd.clone() }.kernel(device))
        };
        if push(b, p, [x, filters], &[], &solutions, &|_| "Winograd convolution by hand") {
            return Ok(true);
        }
    }
    let filters = match &p.constant {
        Some(constant) => b.upload(constant, "plain", super::super::super::executable::to_device)?,
        None => b.reread(p.filters)?,
    };
    let Operand::Buffer(filters, _) = filters else { return Ok(false) };
    let solutions = |functions: Functions, most: usize| solutions(&Conv { functions, ..conv.clone() }, device, most);
    let name = |solution: &Solution| match is_depthwise {
        true => "depthwise convolution by hand",
        false => CONVOLUTION.of(conv.element, solution),
    };
    Ok(push(b, p, [x, filters], &[], &solutions, &name))
}

const DEPTHWISE: Names = Names {
    full: "depthwise convolution by hand",
    tf32: "depthwise convolution by hand",
    f16: "depthwise convolution by hand, f16",
    bf16: "depthwise convolution by hand, bf16",
};

/// The convolution of `x` in 16 bits, by channels, where its result stays: neighbours in memory are channels of one pixel, which tensor cores
/// are fed 16 bytes at a time. `false` where no such precision is asked for, or channels do not fill 16 bytes; depthwise ones only where the
/// picture is there so already.
pub(in super::super) fn convolution_by_channels(
    b: &mut Builder<'_>,
    p: &Problem,
    [x, output]: [ValueId; 2],
) -> Result<bool, Unable> {
    let Some(device) = b.gpu.written.filter(|_| p.dtype == DType::F32) else { return Ok(false) };
    let is_depthwise = p.inner == 1 && p.groups > 1;
    let is_there = b.by_channels(x).is_some();
    let least = if is_depthwise { 0 } else { LEAST_ELEMENTS };
    let Some((constant, half)) = half_of(b, p.constant.clone(), least) else { return Ok(false) };
    let fills = [p.inner * p.groups, p.channels()].iter().all(|channels| channels.is_multiple_of(8));
    let fits = if is_depthwise { is_there && p.per_group == 1 } else { p.groups == 1 };
    let conv = Conv { layout: Layout::Channels, precision: cuda::Precision::Full, ..geometry(b, p, half) };
    if !fills || !fits || solutions(&conv, device, 1).is_err() {
        return Ok(false);
    }
    let shape = [p.samples, conv.channels, conv.input[0] * conv.input[1]];
    let Some(pictures) = Channels::of(b, x, shape, half)? else { return Ok(false) };
    let (out, inner, taps) = (p.channels(), p.inner, conv.kernel[0] * conv.kernel[1]);
    let recipe = match (half, is_depthwise) {
        (Element::F16, false) => "f16 by channels",
        (Element::F16, true) => "f16 by channels, depthwise",
        (_, false) => "bf16 by channels",
        (_, true) => "bf16 by channels, depthwise",
    };
    let filters = b.upload(&constant, recipe, |filters| {
        // `[out, in, y, x]` as `[out, y, x, in]`, or `[out, 1, y, x]` as `[y, x, out]`.
        let (outer, middle, innermost) = if is_depthwise { (1, taps, out) } else { (out, taps, inner) };
        let from =
            |o: usize, tap: usize, i: usize| if is_depthwise { i * taps + tap } else { (o * inner + i) * taps + tap };
        let floats = floats(filters);
        let order =
            (0..outer).flat_map(|o| (0..middle).flat_map(move |tap| (0..innermost).map(move |i| from(o, tap, i))));
        order.flat_map(|at| narrowed(floats[at], half).to_le_bytes()).collect()
    })?;
    let Operand::Buffer(filters, _) = filters else { return Ok(false) };
    let pixels = p.pixels();
    let result = Channels::new(b, [p.samples, out, pixels], half);
    let mut text = Text::default();
    let functions = element(&mut text, p.dtype, &p.epilogue)
        + &format!(
            "fn finish(i: u32, channel: u32, sum: f32) -> f32 {{\nlet pixel = i / {out}u;\nlet at = (pixel / {pixels}u * {out}u + channel) * {pixels}u + pixel % {pixels}u;\nreturn element(at, bias_of(channel), sum);\n}}\n"
        );
    let solutions = |functions: Functions, most: usize| solutions(&Conv { functions, ..conv.clone() }, device, most);
    let names = if is_depthwise { &DEPTHWISE } else { &CONVOLUTION };
    let name = |solution: &Solution| names.of(half, solution);
    let (functions, inputs, solutions, work) = (&functions, &[pictures.buffer, filters], &solutions, p.work);
    let output_buffer = result.buffer;
    if !b.push_written(Written {
        text,
        functions,
        inputs,
        more: &[],
        output: output_buffer,
        solutions,
        name: &name,
        work,
    }) {
        return Ok(false);
    }
    result.hold(b, output)?;
    Ok(true)
}

/// The kernels that are worth a measurement, best first.
pub(super) fn solutions(conv: &Conv, device: cuda::Device, most: usize) -> Result<Vec<Solution>, Refused> {
    let candidates = conv.candidates(device)?;
    if candidates.is_empty() {
        return only(conv.kernel(device));
    }
    worth_trying(candidates, most).map(|tile| Ok(Solution::Written(conv.kernel_of(device, tile)?))).collect()
}

/// The windows that Winograd's filtering is estimated fastest with, and its filters.
fn by_windows(
    b: &mut Builder<'_>,
    p: &Problem,
    conv: &Conv,
    device: cuda::Device,
) -> Result<Option<(Winograd, BufferId)>, Unable> {
    if b.numerics == Numerics::Strict || p.dtype != DType::F32 || p.groups != 1 || conv.element != Element::F32 {
        return Ok(None);
    }
    let (Some(constant), Some(winograd)) = (&p.constant, Winograd::choose(conv, device)) else {
        return Ok(None);
    };
    let recipe = if winograd.tile == 2 { "windows of 2 × 2" } else { "windows of 4 × 4" };
    let filters =
        b.upload(constant, recipe, |filters| bytemuck::cast_slice(&winograd.filters(&floats(filters))).to_vec())?;
    Ok(match filters {
        Operand::Buffer(filters, _) => Some((winograd, filters)),
        _ => None,
    })
}

fn push(
    b: &mut Builder<'_>,
    p: &Problem,
    inputs: [BufferId; 2],
    more: &[BufferId],
    solutions: Solutions<'_>,
    name: &dyn Fn(&Solution) -> &'static str,
) -> bool {
    let mut text = Text::default();
    let functions = element(&mut text, p.dtype, &p.epilogue)
        + "fn finish(i: u32, channel: u32, sum: f32) -> f32 { return element(i, bias_of(channel), sum); }\n";
    let (functions, inputs) = (&functions, &inputs);
    b.push_written(Written { text, functions, inputs, more, output: p.to, solutions, name, work: p.work })
}
