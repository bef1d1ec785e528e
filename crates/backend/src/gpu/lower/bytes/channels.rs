//! Convolutions of bytes by kernels that were written by hand. They read and leave pictures by channels, `[samples, pixels, channels]`: signed bytes,
//! four channels a word, the last word filled up with zeros. Where all that reads a result is a quantization of one scale, the kernel's
//! epilogue is that too, so bytes follow bytes from one convolution to the next; others see such a picture by planes, as a function.

use super::{
    super::{
        super::{
            code::{self, Function, Operand, Text},
            plan::{BufferId, Builder, Unable},
        },
        product::element,
        quantized::{given, is_byte, quantized_text},
        reduce::computed,
        written,
    },
    Bytes, Finish, Given, value_text, zero_text,
};
use crate::{Work, attention::Known};
use cutover_graph::{Constant, NodeId, Op, ValueId, ops::WindowAxis};
use cutover_kernels::cuda::{Conv, Element, Layout};
use cutover_tensor::{DType, Tensor};

/// A convolution's sizes.
pub(super) struct Windows {
    pub samples: usize,
    pub groups: usize,
    /// Channels of a group, in and out.
    pub inner: usize,
    pub per_group: usize,
    pub down: WindowAxis,
    pub right: WindowAxis,
}

impl Windows {
    fn channels(&self) -> usize {
        self.inner * self.groups
    }

    /// With those that fill the last word.
    fn padded(&self) -> usize {
        self.channels().next_multiple_of(4)
    }

    fn out(&self) -> usize {
        self.per_group * self.groups
    }

    fn taps(&self) -> usize {
        self.down.kernel * self.right.kernel
    }

    fn plane(&self) -> usize {
        self.down.input * self.right.input
    }

    fn pixels(&self) -> usize {
        self.down.output * self.right.output
    }

    fn is_depthwise(&self) -> bool {
        self.groups > 1 && self.inner == 1 && self.per_group == 1
    }

    /// Whether no window reaches beyond its picture.
    fn is_inside(&self) -> bool {
        [&self.down, &self.right].into_iter().all(|axis| {
            axis.pad_begin == 0 && (axis.output - 1) * axis.stride + (axis.kernel - 1) * axis.dilation < axis.input
        })
    }

    fn conv(&self, result: Element, has_zero_point: bool) -> Conv {
        let counts = [self.samples, self.padded(), self.out(), self.groups];
        let of = written::of_windows(counts, [&self.down, &self.right], Element::I8);
        Conv { layout: Layout::Channels, result, has_zero_point, ..of }
    }
}

/// Whether there is a kernel for such a convolution, whose result is of `dtype`.
pub(super) fn is_there(b: &Builder<'_>, of: &Windows, dtype: DType) -> bool {
    // Channels of a group are whole words.
    let fits = of.groups == 1 || of.inner.is_multiple_of(4) || of.is_depthwise() && of.groups.is_multiple_of(4);
    let conv = of.conv(Element::I32, false);
    let is_word = code::storage_bytes(dtype) == 4;
    is_word && fits && b.gpu.written.is_some_and(|device| written::has_convolution_of_bytes(&conv, device))
}

/// As [`super::convolve`].
pub(super) fn convolve<'a>(
    b: &mut Builder<'_>,
    [image, filters]: [&Bytes; 2],
    [x, w]: [ValueId; 2],
    of: &Windows,
    (output, work): (ValueId, Work),
    finish: impl FnOnce(&mut Builder<'_>, &mut Text) -> Result<Finish<'a>, Unable>,
) -> Result<bool, Unable> {
    let mut text = Text::default();
    // Sums of what a window meets would be sums for every pixel.
    if zero_text(b, &mut text, filters, "0u")?.is_some() {
        return Ok(false);
    }
    let constant = b.constant(w).ok_or("filters that a run computes")?;
    let zero = zero_text(b, &mut text, image, "0u")?;
    let (buffer, sums) = (filters_of(b, &constant, of)?, sums_of(b, &constant, of)?);
    let mut inputs = vec![picture(b, x, [of.samples, of.channels(), of.plane()])?, buffer];
    let has_zero_point = zero.is_some() && !of.is_inside();
    if has_zero_point {
        inputs.push(outside(b, image)?);
    }
    let corrected = match &zero {
        Some(zero) => format!("sum - {zero} * {}(channel)", text.function(&sums)),
        None => "sum".to_string(),
    };
    let finish = finish(b, &mut text)?;
    let mut functions = match &finish {
        Finish::Floats { epilogue, .. } => element(&mut text, b.dtype(output), epilogue),
        _ => String::new(),
    };
    let mut value = value_text(&finish, b.dtype(output))?;
    let whole_words = of.out().is_multiple_of(4);
    let quantizer = match &finish {
        Finish::Floats { .. } if whole_words => quantizer(b, output),
        _ => None,
    };
    let mut result = output;
    if let Some(Quantizer { node, to, scale, zero }) = quantizer {
        let (scale, zero) = (b.operand(scale)?, zero.map(|zero| b.operand(zero)).transpose()?);
        let scale = format!("f32({}(0u))", text.function(&scale));
        let zero = zero.map_or("0".to_string(), |zero| format!("i32({}(0u))", text.function(&zero)));
        functions += &format!(
            "fn quantized(x: f32) -> {} {{\n{}\n}}\n",
            code::value_type(b.dtype(to)).unwrap_or("i32"),
            quantized_text(b.dtype(to), "x", &scale, &zero)?
        );
        value = format!("quantized({value})");
        result = to;
        b.fuse([node]);
    }
    let dtype = b.dtype(result);
    let is_bytes = is_byte(dtype) && whole_words;
    let bits = match (is_bytes, dtype) {
        (true, DType::U8) => format!("i32({value} ^ 0x80u)"),
        (true, _) => value,
        (false, _) => format!("bitcast<i32>({value})"),
    };
    let (out, pixels, per_group) = (of.out(), of.pixels(), of.per_group);
    functions += &format!(
        "fn value_of(i: u32, row: u32, channel: u32, sum: i32) -> i32 {{
let z = row / {per_group}u;
let m = row % {per_group}u;
let n = i % {pixels}u;
let total = {corrected};
return {bits};
}}
fn finish(at: u32, channel: u32, sum: i32) -> i32 {{
let pixel = at / {out}u;
let row = pixel / {pixels}u * {out}u + channel;
return value_of(row * {pixels}u + pixel % {pixels}u, row, channel, sum);
}}
"
    );
    let count = of.samples * pixels * out;
    let to = b.scratch(if is_bytes { count / 4 } else { count });
    let conv = of.conv(if is_bytes { Element::I8 } else { Element::I32 }, has_zero_point);
    written::convolution_of_bytes(b, text, &functions, conv, (&inputs, to, work))?;
    hold(b, result, to, [of.samples, out, pixels], is_bytes)?;
    Ok(true)
}

/// `id` is `[samples, channels, pixels]`, in bytes or words that lie by channels in `buffer`.
fn hold(
    b: &mut Builder<'_>,
    id: ValueId,
    buffer: BufferId,
    [samples, channels, pixels]: [usize; 3],
    is_bytes: bool,
) -> Result<(), Unable> {
    let (dtype, whole) = (b.dtype(id), channels * pixels);
    let at =
        format!("let at = (i / {whole}u * {pixels}u + i % {pixels}u) * {channels}u + i / {pixels}u % {channels}u;\n");
    if !is_bytes {
        let mut function = Function::new(dtype, at + "return $0(at);", vec![Operand::Buffer(buffer, dtype)]);
        function.transposes = Some([samples, pixels, channels]);
        return b.define_function(id, function);
    }
    let value = match dtype {
        DType::U8 => "(word >> (at % 4u * 8u) & 0xffu) ^ 0x80u",
        _ => "bitcast<i32>(word << (24u - at % 4u * 8u)) >> 24u",
    };
    let body = format!("{at}let word = $0(at / 4u);\nreturn {value};");
    b.define(id, body, vec![Operand::Buffer(buffer, DType::U32)])?;
    b.keep_by_channels(id, buffer);
    Ok(())
}

/// All that reads a value.
struct Quantizer {
    node: NodeId,
    to: ValueId,
    scale: ValueId,
    zero: Option<ValueId>,
}

/// The quantization to bytes, of one scale, that is the only reader of `id`.
fn quantizer(b: &Builder<'_>, id: ValueId) -> Option<Quantizer> {
    let (at, node) = b.only_reader(id)?;
    let Op::QuantizeLinear(op) = &node.op else { return None };
    let (scale, zero, to) = (given(node, 1)?, given(node, 2), node.outputs[0]);
    let is_one = [Some(scale), zero].into_iter().flatten().all(|of| b.count(of) == 1 && of != id);
    let is_known = matches!(op.precision, None | Some(DType::F32)) && b.dtype(scale) == DType::F32;
    let is_float = b.dtype(id) == DType::F32;
    (is_one && is_known && is_float && is_byte(b.dtype(to))).then_some(Quantizer { node: at, to, scale, zero })
}

/// Packs the quantized picture `id` now, where a convolution reads it and others do too: once for all, who else see it by planes.
pub(in super::super) fn keep_picture(b: &mut Builder<'_>, id: ValueId) -> Result<(), Unable> {
    let shape = b.shape(id);
    if b.gpu.written.is_none() || shape.rank() != 4 || !shape[1].is_multiple_of(4) || !is_byte(b.dtype(id)) {
        return Ok(());
    }
    let widened: Vec<ValueId> =
        b.readers(id).filter(|node| matches!(node.op, Op::DequantizeLinear(_))).map(|node| node.outputs[0]).collect();
    let is_convolved =
        |&of: &ValueId| b.readers(of).any(|node| matches!(node.op, Op::Conv(_)) && given(node, 0) == Some(of));
    let readers = widened.iter().map(|&of| b.readers(of).count()).sum::<usize>();
    if readers < 2 || !widened.iter().any(is_convolved) {
        return Ok(());
    }
    let sizes = [shape[0], shape[1], shape[2] * shape[3]];
    let buffer = picture(b, id, sizes)?;
    hold(b, id, buffer, sizes, true)
}

/// The bytes `id`, `[samples, channels, plane]`, by channels: as they lie there, or turned, once for all who read them so.
fn picture(b: &mut Builder<'_>, id: ValueId, [samples, channels, plane]: [usize; 3]) -> Result<BufferId, Unable> {
    if let Some(buffer) = b.by_channels(id) {
        return Ok(buffer);
    }
    let words = channels.div_ceil(4);
    let flip = if b.dtype(id) == DType::U8 { " ^ 0x80u" } else { "" };
    let mut body = format!(
        "let c = i % {words}u * 4u;\nlet begin = (i / {}u * {channels}u + c) * {plane}u + i / {words}u % {plane}u;\nvar packed = 0u;\n",
        words * plane
    );
    for j in 0..4 {
        let one = format!("packed = packed | ((u32($0(begin + {}u)){flip}) & 0xffu) << {}u;", j * plane, 8 * j);
        body += &match channels.is_multiple_of(4) || j == 0 {
            true => format!("{one}\n"),
            false => format!("if (c + {j}u < {channels}u) {{ {one} }}\n"),
        };
    }
    let operand = b.operand(id)?;
    let of_node = std::mem::replace(&mut b.kernel, "packing");
    let function = Function::new(DType::U32, body + "return packed;", vec![operand]);
    let packed = computed(b, function, samples * plane * words)?;
    b.kernel = of_node;
    let Operand::Buffer(buffer, _) = packed else { return Err("a picture in memory".into()) };
    b.keep_by_channels(id, buffer);
    Ok(buffer)
}

/// 16 bytes of the zero point, signed.
fn outside(b: &mut Builder<'_>, image: &Bytes) -> Result<BufferId, Unable> {
    let shift = image.shift();
    let operand = match &image.zero {
        Some(Given::Computed(operand)) => Some(operand.clone()),
        Some(Given::Value(id)) if b.known(*id).is_none() => Some(b.reread(*id)?),
        _ => None,
    };
    let words = match (operand, &image.zero) {
        (Some(operand), _) => {
            let body = format!("return (u32(i32($0(0u)) - {shift}) & 0xffu) * 0x01010101u;");
            computed(b, Function::new(DType::U32, body, vec![operand]), 4)?
        }
        (None, zero) => {
            let byte = match zero {
                Some(Given::Value(id)) => b.known(*id).and_then(|zero| zero.bytes().first().copied()),
                _ => None,
            };
            let signed = byte.unwrap_or_default() ^ if shift == 0 { 0 } else { 0x80 };
            let constant = Constant::new(Tensor::from_vec([16], vec![signed; 16]).map_err(|error| error.to_string())?);
            b.upload(&constant, "as it is", |tensor| tensor.bytes().to_vec())?
        }
    };
    match words {
        Operand::Buffer(buffer, _) => Ok(buffer),
        _ => Err("a zero point in memory".into()),
    }
}

/// Filters as the kernels read them: `[out, taps, inner]`, depthwise ones `[taps, channels]`; signed.
fn filters_of(b: &mut Builder<'_>, constant: &Constant, of: &Windows) -> Result<BufferId, Unable> {
    let (out, taps, inner) = (of.out(), of.taps(), of.inner);
    let is_depthwise = of.is_depthwise();
    let recipe = if is_depthwise { "bytes by taps" } else { "bytes by taps and channels" };
    let each = if is_depthwise { 1 } else { of.padded() / of.groups };
    let operand = b.upload(constant, recipe, |tensor| {
        let flip = flip(tensor);
        let mut packed = vec![0; out * taps * each];
        for (at, &byte) in tensor.bytes().iter().enumerate() {
            let (o, c, tap) = (at / (inner * taps), at / taps % inner, at % taps);
            let to = if is_depthwise { tap * out + o } else { (o * taps + tap) * each + c };
            packed[to] = byte ^ flip;
        }
        packed
    })?;
    match operand {
        Operand::Buffer(buffer, _) => Ok(buffer),
        _ => Err("filters in memory".into()),
    }
}

/// The sum of each channel's filter.
fn sums_of(b: &mut Builder<'_>, constant: &Constant, of: &Windows) -> Result<Operand, Unable> {
    let each = (of.inner * of.taps()).max(1);
    let operand = b.upload(constant, "sums of filters", |tensor| {
        let flip = flip(tensor);
        let sum = |filter: &[u8]| filter.iter().map(|&byte| i32::from((byte ^ flip) as i8)).sum::<i32>();
        tensor.bytes().chunks(each).flat_map(|filter| sum(filter).to_le_bytes()).collect()
    })?;
    match operand {
        Operand::Buffer(buffer, _) => Ok(Operand::Buffer(buffer, DType::I32)),
        _ => Err("sums in memory".into()),
    }
}

/// What makes signed bytes of a constant's.
fn flip(tensor: &Tensor) -> u8 {
    if tensor.dtype() == DType::U8 { 0x80 } else { 0 }
}
