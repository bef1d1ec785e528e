//! Convolutions in both layouts, with groups, strides, dilation and padding, against `f64`.

use crate::harness::{Case, Random, near, numbers, rounding, run};
use cutover_kernels::cuda::{Conv, Device, Element, Functions, Layout, Precision, Winograd};

/// With a bias for each channel, a residual for each element and a ReLU; by Winograd's windows of a tile, or not.
fn case(random: &mut Random, device: Device, mut conv: Conv, tile: Option<usize>) -> Case {
    let ([in_h, in_w], [out_h, out_w], [kernel_y, kernel_x]) = (conv.input, conv.output, conv.kernel);
    let (inner, outer) = (conv.channels / conv.groups, conv.out_channels / conv.groups);
    let is_planes = conv.layout == Layout::Planes;
    let is_depthwise = conv.groups == conv.channels && conv.groups > 1 && outer == 1 && !is_planes;
    let (x_bytes, x) = random.elements(conv.element, conv.images * conv.channels * in_h * in_w);
    let (w_bytes, w) = random.elements(conv.element, conv.out_channels * inner * kernel_y * kernel_x);
    let (bias_bytes, bias) = random.elements(Element::F32, conv.out_channels);
    let count = conv.images * conv.out_channels * out_h * out_w;
    let (residual_bytes, residual) = random.elements(Element::F32, count);
    let mut extras = vec![bias_bytes, residual_bytes];
    let pointer = |of: &str, name: &str| (format!("const {of}*"), name.to_string());
    conv.functions.pointers = vec![pointer("float", "bias"), pointer("float", "residual")];
    conv.functions.text = "__device__ Sum finish(const Operands& o, u32 i, u32 channel, Sum x) { return fmaxf(x + o.bias[channel] + o.residual[i], 0.0f); }\n".to_string();
    if conv.x_is_function {
        conv.functions.pointers.push(pointer(conv.element.name(), "pictures"));
        conv.functions.text += "__device__ float x_at(const Operands& o, u32 i) { return widen(o.pictures[i]); }\n";
        extras.push(x_bytes.clone());
    }
    let winograd = tile.map(|tile| Winograd { conv: conv.clone(), tile });
    let (kernel, w_bytes) = match &winograd {
        None => (conv.kernel(device).unwrap(), w_bytes),
        Some(winograd) => {
            let weights: Vec<f32> = w.iter().map(|&x| x as f32).collect();
            let filters = winograd.filters(&weights).into_iter().flat_map(f32::to_le_bytes).collect();
            (winograd.kernel(device).unwrap(), filters)
        }
    };
    let name = format!("{tile:?} {:?} sm_{}", Conv { functions: Functions::default(), ..conv.clone() }, device.sm);
    Case {
        name,
        kernel,
        inputs: vec![x_bytes, w_bytes],
        extras,
        outputs: vec![count * conv.result.bytes()],
        check: Box::new(move |outputs| {
            let mut expected = vec![0.0; count];
            let mut sizes = vec![0.0; count];
            let pixel =
                |h: usize, w: usize, image: usize, channels: usize, c: usize, y: usize, x: usize| match conv.layout {
                    Layout::Planes => ((image * channels + c) * h + y) * w + x,
                    Layout::Channels => ((image * h + y) * w + x) * channels + c,
                };
            for i in 0..count {
                let (image, c, at) = (
                    i / (conv.out_channels * out_h * out_w),
                    i / (out_h * out_w) % conv.out_channels,
                    i % (out_h * out_w),
                );
                let to = pixel(out_h, out_w, image, conv.out_channels, c, at / out_w, at % out_w);
                let (mut sum, mut size) = (bias[c] + residual[to], 1.0);
                for (of, r, s) in
                    (0..inner).flat_map(|of| (0..kernel_y).flat_map(move |r| (0..kernel_x).map(move |s| (of, r, s))))
                {
                    let y = (at / out_w * conv.stride[0] + r * conv.dilation[0]).wrapping_sub(conv.pad_begin[0]);
                    let z = (at % out_w * conv.stride[1] + s * conv.dilation[1]).wrapping_sub(conv.pad_begin[1]);
                    if y >= in_h || z >= in_w {
                        continue;
                    }
                    let filter = match (conv.layout, is_depthwise) {
                        (Layout::Planes, _) => ((c * inner + of) * kernel_y + r) * kernel_x + s,
                        (Layout::Channels, false) => ((c * kernel_y + r) * kernel_x + s) * inner + of,
                        (Layout::Channels, true) => (r * kernel_x + s) * conv.out_channels + c,
                    };
                    let term = w[filter] * x[pixel(in_h, in_w, image, conv.channels, c / outer * inner + of, y, z)];
                    (sum, size) = (sum + term, size + term.abs());
                }
                (expected[to], sizes[to]) = (sum.max(0.0), size);
            }
            let is_tf32 = conv.precision == Precision::Tf32;
            let inexact = match tile {
                _ if is_tf32 => 2f64.powi(-10),
                Some(4) => 1e-5,
                _ => 1e-6,
            };
            near(&numbers(conv.result, &outputs[0]), &expected, |i| {
                inexact * sizes[i] + rounding(conv.result) * 1.01 * expected[i].abs() + 6e-8
            })
        }),
    }
}

/// Channels in, channels out and groups; kernel, stride, dilation and padding along both axes.
const SHAPES: [([usize; 3], [usize; 4]); 12] = [
    ([16, 24, 1], [3, 1, 1, 1]),
    ([3, 40, 1], [7, 2, 1, 3]),
    ([4, 16, 1], [3, 2, 1, 1]),
    ([32, 72, 1], [1, 1, 1, 0]),
    ([24, 16, 2], [3, 1, 2, 2]),
    ([10, 5, 1], [1, 2, 1, 0]),
    ([16, 16, 16], [3, 1, 1, 1]),
    ([8, 8, 8], [5, 2, 1, 2]),
    ([6, 12, 6], [3, 1, 2, 0]),
    ([64, 130, 1], [3, 1, 1, 1]),
    // Few rows: their kernel is another.
    ([5, 3, 1], [3, 1, 1, 1]),
    ([12, 6, 2], [3, 2, 1, 1]),
];

fn every_shape(test: &str, element: Element, precision: Precision, device: Device) {
    let mut random = Random::new(11);
    let mut cases = Vec::new();
    for (at, ([channels, out_channels, groups], [kernel, stride, dilation, pad])) in SHAPES.into_iter().enumerate() {
        for layout in [Layout::Planes, Layout::Channels] {
            let (images, input) = (1 + at % 2, [[9, 7], [8, 12], [7, 7]][at % 3]);
            let output = input.map(|extent| (extent + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1);
            // Of 16 bits, every other one comes out as f32.
            let is_widened = at % 2 == 1 && groups != channels;
            let conv = Conv {
                images,
                channels,
                out_channels,
                groups,
                input,
                output,
                kernel: [kernel; 2],
                stride: [stride; 2],
                dilation: [dilation; 2],
                pad_begin: [pad; 2],
                layout,
                element,
                result: if is_widened { Element::F32 } else { element },
                has_zero_point: false,
                precision,
                x_is_function: at % 4 == 0 && layout == Layout::Planes,
                functions: Functions::default(),
            };
            cases.push(case(&mut random, device, conv, None));
        }
    }
    run(test, &cases);
}

#[test]
fn convolutions_without_tensor_cores() {
    every_shape("conv_f32", Element::F32, Precision::Full, Device::H100);
}

#[test]
fn convolutions_of_f16() {
    every_shape("conv_f16", Element::F16, Precision::Full, Device::H100);
}

#[test]
fn convolutions_of_tf32() {
    every_shape("conv_tf32", Element::F32, Precision::Tf32, Device::ORIN);
}

#[test]
fn convolutions_by_winograd() {
    let mut random = Random::new(23);
    let mut cases = Vec::new();
    for (at, (input, pad)) in [([7, 9], 1), ([8, 8], 0), ([4, 3], 1), ([13, 6], 2)].into_iter().enumerate() {
        for tile in [2, 4] {
            let conv = Conv {
                images: 1 + at % 2,
                channels: [8, 5, 32, 17][at],
                out_channels: [12, 33, 6, 64][at],
                groups: 1,
                input,
                output: input.map(|extent| extent + 2 * pad - 2),
                kernel: [3; 2],
                stride: [1; 2],
                dilation: [1; 2],
                pad_begin: [pad; 2],
                layout: Layout::Planes,
                element: Element::F32,
                result: Element::F32,
                has_zero_point: false,
                precision: Precision::Full,
                x_is_function: at == 1,
                functions: Functions::default(),
            };
            cases.push(case(&mut random, Device::H100, conv, Some(tile)));
        }
    }
    run("winograd", &cases);
}

/// Bytes, whose zero point lies around the pictures: exact.
#[test]
fn convolutions_of_bytes() {
    let mut random = Random::new(25);
    let mut cases = Vec::new();
    for (at, ([channels, out_channels, groups], [kernel, stride, _, pad])) in SHAPES.into_iter().enumerate() {
        let (element, zero_point) = [(Element::U8, 113), (Element::I8, -7i8 as u8)][at % 2];
        let [in_h, in_w] = [9, 7];
        let output = [in_h, in_w].map(|extent: usize| (extent + 2 * pad - kernel) / stride + 1);
        // Every third comes out as bytes again.
        let requantizes = at % 3 == 0;
        let functions = Functions {
            pointers: vec![],
            text: "__device__ Sum finish(const Operands& o, u32 i, u32 channel, Sum x) { x = x >> 6; return x < -128 ? -128 : x > 127 ? 127 : x; }\n".to_string(),
        };
        let conv = Conv {
            images: 2,
            channels,
            out_channels,
            groups,
            input: [in_h, in_w],
            output,
            kernel: [kernel; 2],
            stride: [stride; 2],
            dilation: [1; 2],
            pad_begin: [pad; 2],
            layout: Layout::Channels,
            element,
            result: if requantizes { Element::I8 } else { Element::I32 },
            has_zero_point: true,
            precision: Precision::Full,
            x_is_function: false,
            functions: if requantizes { functions } else { Functions::default() },
        };
        let (inner, outer) = (channels / groups, out_channels / groups);
        let is_depthwise = groups == channels && groups > 1 && outer == 1 && channels % 4 == 0;
        let (x_bytes, x) = random.elements(element, 2 * channels * in_h * in_w);
        let (w_bytes, w) = random.elements(Element::I8, out_channels * inner * kernel * kernel);
        let outside = numbers(element, &[zero_point])[0];
        cases.push(Case {
            name: format!("{conv:?}"),
            kernel: conv.kernel(Device::H100).unwrap(),
            inputs: vec![x_bytes, w_bytes, vec![zero_point; 16]],
            extras: vec![],
            outputs: vec![2 * out_channels * output[0] * output[1] * conv.result.bytes()],
            check: Box::new(move |outputs| {
                let mut expected = Vec::new();
                for i in 0..2 * output[0] * output[1] * out_channels {
                    let (c, column, row) =
                        (i % out_channels, i / out_channels % output[1], i / out_channels / output[1] % output[0]);
                    let image = i / (out_channels * output[0] * output[1]);
                    let term = |at: usize| {
                        let (of, s, r) = (at % inner, at / inner % kernel, at / inner / kernel);
                        let (y, z) = ((row * stride + r).wrapping_sub(pad), (column * stride + s).wrapping_sub(pad));
                        let is_inside = y < in_h && z < in_w;
                        let from =
                            |y: usize, z: usize| ((image * in_h + y) * in_w + z) * channels + c / outer * inner + of;
                        let pixel = if is_inside { x[from(y, z)] } else { outside };
                        let filter = if is_depthwise { at * channels + c } else { c * inner * kernel * kernel + at };
                        pixel * w[filter]
                    };
                    let sum: f64 = (0..inner * kernel * kernel).map(term).sum();
                    expected.push(if requantizes { (sum / 64.0).floor().clamp(-128.0, 127.0) } else { sum });
                }
                near(&numbers(conv.result, &outputs[0]), &expected, |_| 0.0)
            }),
        });
    }
    run("conv_bytes", &cases);
}
