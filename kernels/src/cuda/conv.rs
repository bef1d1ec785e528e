//! Convolutions over two axes (one: a height of 1).
//!
//! # Layouts
//!
//! A convolution is a product whose windows are gathered while they are read, so it has the kernels and the cost model of
//! [`super::product`]. In [`Layout::Channels`] (`[n, h, w, c]`) neighbours along k are channels of one pixel: 16 bytes go to shared memory
//! asynchronously, which is what tensor cores need to be busy. In [`Layout::Planes`] (`[n, c, h, w]`) neighbours are pixels, which a window
//! shifts by one element, so elements are read one by one: enough for f32 without tensor cores, where a product of 128 × 128 has 64
//! multiplications for each element it reads, and about half of what tensor cores can do. Who has chains of convolutions on tensor cores
//! holds them by channels, and turns at the ends with [`super::Transpose`].
//!
//! Filters: by planes as ONNX has them, `[out, in / groups, kernel_y, kernel_x]`; by channels `[out, kernel_y, kernel_x, in / groups]`.
//! Depthwise ones by channels are `[kernel_y, kernel_x, out]`, of bytes too.

use super::{
    Argument, Device, Element, Functions, Kernel, Launch, Precision, Refused,
    product::{Core, Factor, Order, Tile, aligned},
    text::{begin, check_count, check_grid, constant},
};
use std::fmt::Write;

/// How pictures lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[images, channels, height, width]`.
    Planes,
    /// `[images, height, width, channels]`.
    Channels,
}

/// A convolution. Its inputs are pictures (0) and filters (1), both aligned to 16 bytes.
#[derive(Clone, Debug)]
pub struct Conv {
    pub images: usize,
    pub channels: usize,
    pub out_channels: usize,
    pub groups: usize,
    /// Height and width, as all pairs here.
    pub input: [usize; 2],
    pub output: [usize; 2],
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    pub dilation: [usize; 2],
    pub pad_begin: [usize; 2],
    pub layout: Layout,
    /// Of pictures and filters; of bytes, by channels, filters are [`Element::I8`].
    pub element: Element,
    /// The same, or of 16 bits [`Element::F32`] where it isn't depthwise, or of bytes [`Element::I32`], `I8` or `U8`.
    pub result: Element,
    /// Whether input 2 holds the zero point of pictures of bytes, 16 times, which then is what lies around them.
    pub has_zero_point: bool,
    pub precision: Precision,
    /// Whether pictures are not an array but `float x_at(const Operands& o, u32 i)` of [`Functions`].
    pub x_is_function: bool,
    /// `finish` gets the output channel.
    pub functions: Functions,
}

impl Conv {
    pub fn kernel(&self, device: Device) -> Result<Kernel, Refused> {
        if self.is_depthwise() {
            return self.depthwise();
        }
        let core = self.core()?;
        let (tile, _) = core.candidates(device)?.remove(0);
        core.kernel(device, tile)
    }

    /// Tiles that a tuner may try with the clocks that are predicted of them, best first; of a depthwise one none.
    pub fn candidates(&self, device: Device) -> Result<Vec<(Tile, f64)>, Refused> {
        if self.is_depthwise() { Ok(Vec::new()) } else { self.core()?.candidates(device) }
    }

    pub fn kernel_of(&self, device: Device, tile: Tile) -> Result<Kernel, Refused> {
        self.core()?.kernel(device, tile)
    }

    /// Each input channel has results of its own, and by channels those of 16 bytes, or four of bytes, are computed together.
    fn is_depthwise(&self) -> bool {
        let wide = self.together();
        let fits = self.layout == Layout::Planes
            || (self.out_channels == self.channels && self.channels.is_multiple_of(wide) && !self.x_is_function);
        let taps: usize = self.kernel.iter().product();
        self.groups == self.channels && self.groups > 1 && fits && taps <= 49
    }

    /// Channels that a depthwise kernel computes together where neighbours in memory are channels.
    fn together(&self) -> usize {
        match self.element.bytes() {
            1 => 4,
            bytes => 16 / bytes,
        }
    }

    fn check(&self) -> Result<(), Refused> {
        let is_bytes = self.element.bytes() == 1 && self.layout == Layout::Channels && !self.x_is_function;
        let is_known = match self.element {
            Element::F32 | Element::F16 | Element::BF16 => {
                let is_widened = self.result == Element::F32 && !self.is_depthwise();
                (self.result == self.element || is_widened) && !self.has_zero_point
            }
            _ => is_bytes,
        };
        let divides =
            self.groups > 0 && [self.channels, self.out_channels].iter().all(|n| n.is_multiple_of(self.groups));
        if !is_known || !divides {
            return Err(Refused(format!("no convolution of {} in {} groups", self.element.name(), self.groups)));
        }
        let images = self.images * self.input[0] * self.input[1] * self.channels;
        check_count("pictures", images)?;
        check_count("a convolution", self.images * self.output[0] * self.output[1] * self.out_channels)
    }

    fn core(&self) -> Result<Core, Refused> {
        self.check()?;
        let (inner, outer) = (self.channels / self.groups, self.out_channels / self.groups);
        let [kernel_y, kernel_x] = self.kernel;
        let ([in_h, in_w], [out_h, out_w]) = (self.input, self.output);
        let pixels = out_h * out_w;
        let (taps, k) = (kernel_y * kernel_x, inner * kernel_y * kernel_x);
        let [stride_y, stride_x] = self.stride;
        let [dilation_y, dilation_x] = self.dilation;
        let [pad_y, pad_x] = self.pad_begin;
        // What lies above or left of the input wraps around and is beyond its other edge.
        let window = |pixel: &str| {
            format!(
                "const u32 y = {pixel} % {pixels}u / {out_w}u * {stride_y}u + row * {dilation_y}u - {pad_y}u;
const u32 x = {pixel} % {out_w}u * {stride_x}u + column * {dilation_x}u - {pad_x}u;\n"
            )
        };
        let last = |axis: usize| {
            (self.output[axis].max(1) - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis]
        };
        let is_whole = (0..2).all(|axis| self.pad_begin[axis] == 0 && last(axis) < self.input[axis]);
        let inside = if is_whole { "" } else { &format!(" && y < {in_h}u && x < {in_w}u") };
        let channels = self.channels;
        let is_pointwise = is_whole && taps == 1 && self.stride == [1, 1] && self.input == self.output;
        let all = self.images * pixels;
        let size = self.element.bytes();
        let (a, b, result_place, channel, result_aligned, m, n);
        match self.layout {
            Layout::Planes => {
                (m, n) = (outer, all);
                let place = format!("at = (z * {outer}u + m) * {k}u + k;\nreturn m < {outer}u && k < {k}u;");
                a = Factor { order: Order::ByK, copy: aligned(&[k], self.element), place };
                let plane = format!("n / {pixels}u * {channels}u + z * {inner}u + k");
                let place = if is_pointwise {
                    format!("at = ({plane}) * {pixels}u + n % {pixels}u;\nreturn n < {all}u && k < {k}u;")
                } else {
                    format!(
                        "const u32 row = k % {taps}u / {kernel_x}u, column = k % {kernel_x}u;\n{}at = (({plane} / {taps}u) * {in_h}u + y) * {in_w}u + x;\nreturn n < {all}u && k < {k}u{inside};",
                        window("n")
                    )
                };
                let copy = if is_pointwise { aligned(&[pixels], self.element) } else { size };
                b = Factor { order: Order::ByOuter, copy, place };
                let out = self.out_channels;
                result_place = format!("(n / {pixels}u * {out}u + z * {outer}u + m) * {pixels}u + n % {pixels}u");
                channel = format!("z * {outer}u + m");
                result_aligned = pixels;
            }
            Layout::Channels => {
                (m, n) = (all, outer);
                let place = if is_pointwise {
                    format!("at = m * {channels}u + z * {inner}u + k;\nreturn m < {all}u && k < {k}u;")
                } else {
                    format!(
                        "const u32 row = k / {}u, column = k / {inner}u % {kernel_x}u;\n{}at = ((m / {pixels}u * {in_h}u + y) * {in_w}u + x) * {channels}u + z * {inner}u + k % {inner}u;\nreturn m < {all}u && k < {k}u{inside};",
                        inner * kernel_x,
                        window("m")
                    )
                };
                a = Factor { order: Order::ByK, copy: aligned(&[inner], self.element), place };
                let place = format!("at = (z * {outer}u + n) * {k}u + k;\nreturn n < {outer}u && k < {k}u;");
                b = Factor { order: Order::ByK, copy: aligned(&[k], self.element), place };
                result_place = format!("m * {}u + z * {outer}u + n", self.out_channels);
                channel = format!("z * {outer}u + n");
                result_aligned = outer;
            }
        }
        let mut core = Core {
            m,
            n,
            k,
            z: self.groups,
            a,
            b,
            inputs: [0, 1],
            elements: [self.element, if self.element == Element::U8 { Element::I8 } else { self.element }],
            result: self.result,
            precision: self.precision,
            result_place,
            result_aligned,
            channel,
            functions: self.functions.clone(),
            outside: self.has_zero_point.then_some(2),
            inner: None,
            name: "conv",
        };
        let (name, axes, pictures) = match self.layout {
            Layout::Planes => {
                core.inputs = [1, 0];
                ("b", "u32 k, u32 n", &mut core.b)
            }
            Layout::Channels => ("a", "u32 m, u32 k", &mut core.a),
        };
        if self.x_is_function {
            pictures.copy = 0;
            let _ = write!(
                core.functions.text,
                "__device__ __forceinline__ bool {name}_place(u32 z, {axes}, u32& at);
__device__ __forceinline__ float {name}_at(const Operands& o, u32 z, {axes}) {{ u32 at = 0; {name}_place(z, {}, at); return x_at(o, at); }}\n",
                axes.replace("u32 ", "")
            );
        }
        Ok(core)
    }

    fn depthwise(&self) -> Result<Kernel, Refused> {
        self.check()?;
        let is_planes = self.layout == Layout::Planes;
        let element = self.element.name();
        let mut members = Vec::new();
        if !self.x_is_function {
            members.push(("x", format!("const {element}*"), Argument::Input(0)));
        }
        let is_bytes = self.element.bytes() == 1;
        let (of_filters, sum) = if is_bytes { ("i8", "i32") } else { (element, "float") };
        members.push(("w", format!("const {of_filters}*"), Argument::Input(1)));
        if self.has_zero_point {
            members.push(("outside", format!("const {element}*"), Argument::Input(2)));
        }
        members.push(("output", format!("{}*", self.result.name()), Argument::Output(0)));
        let (mut text, arguments) = begin(&members, &self.functions, sum);
        // Beyond a few rows more are read for a strip than its outputs share.
        let axis = if is_planes { 0 } else { 1 };
        let strip = if self.stride[axis] > 2 || self.dilation[axis] > 1 || self.kernel[axis] > 5 { 1 } else { 4 };
        let strip = strip.min(self.output[axis].max(1));
        let numbers = [
            ("CHANNELS", self.out_channels),
            ("EACH_CHANNEL", self.out_channels / self.channels),
            ("IMAGES", self.images),
            ("IN_H", self.input[0]),
            ("IN_W", self.input[1]),
            ("OUT_H", self.output[0]),
            ("OUT_W", self.output[1]),
            ("KERNEL_Y", self.kernel[0]),
            ("KERNEL_X", self.kernel[1]),
            ("STRIDE_Y", self.stride[0]),
            ("STRIDE_X", self.stride[1]),
            ("DILATION_Y", self.dilation[0]),
            ("DILATION_X", self.dilation[1]),
            ("PAD_Y", self.pad_begin[0]),
            ("PAD_X", self.pad_begin[1]),
            ("STRIP", strip),
        ];
        text.extend(numbers.map(|(name, value)| constant(name, value)));
        let _ = writeln!(text, "using Element = {element};");
        if is_bytes {
            let outside = if self.has_zero_point { "o.outside" } else { "nullptr" };
            let _ = writeln!(
                text,
                "constexpr bool HAS_OUTSIDE = {};\n__device__ __forceinline__ const Element* x_outside(const Operands& o) {{ return {outside}; }}",
                self.has_zero_point
            );
        } else {
            let value = if self.x_is_function { "x_at(o, i)" } else { "widen(o.x[i])" };
            let _ = writeln!(
                text,
                "__device__ __forceinline__ float x_value(const Operands& o, u32 i) {{ return {value}; }}"
            );
        }
        text += match self.layout {
            Layout::Planes => include_str!("../../cuda/depthwise_planes.cu"),
            Layout::Channels if is_bytes => include_str!("../../cuda/depthwise_bytes.cu"),
            Layout::Channels => include_str!("../../cuda/depthwise_channels.cu"),
        };
        let [out_h, out_w] = self.output;
        let threads = match self.layout {
            Layout::Planes => self.images * self.out_channels * out_h.div_ceil(strip) * out_w,
            Layout::Channels => self.images * out_h * out_w.div_ceil(strip) * self.channels / self.together(),
        };
        let entry = format!("depthwise_{element}_{}x{}", self.kernel[0], self.kernel[1]);
        let mut launches = Vec::new();
        if threads > 0 {
            let grid = check_grid([threads.div_ceil(128), 1, 1])?;
            launches.push(Launch { entry: entry.clone(), grid, block: 128, shared_bytes: 0 });
        }
        Ok(Kernel { source: text.replace("ENTRY", &entry), launches, arguments, workspace_bytes: 0 })
    }
}
