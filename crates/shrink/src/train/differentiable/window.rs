//! Convolutions, their transposes and pooling: three linear maps that are each other's derivatives, and the places of maxima.

use super::{
    elementwise::{dot, sum},
    product::{Scratch, multiply_here},
    tape::{Function, View, apply},
};
use candle_core::{Result, Tensor};
use cutover_graph::ops::WindowAxis;
use cutover_kernels::cpu::gemm::Matrix;
use rayon::prelude::*;
use std::ops::Range;

/// Parts that a sum over samples is cut into, on any machine: the order of the sum is that of the parts.
const PARTS: usize = 4;

/// Where a window lies over images `[n, groups · image_channels, image…]`, and the values `[n, groups · value_channels, values…]` that it gives.
#[derive(Clone, Debug)]
pub(crate) struct Geometry {
    pub groups: usize,
    /// Of a group.
    pub image_channels: usize,
    /// Of a group.
    pub value_channels: usize,
    /// The three spatial axes, those in front of extent 1 where there are fewer.
    pub axes: [WindowAxis; 3],
}

/// What the axes of a window are over fewer than three.
pub(crate) fn three(axes: &[WindowAxis]) -> Option<[WindowAxis; 3]> {
    let unit = WindowAxis { input: 1, output: 1, kernel: 1, stride: 1, dilation: 1, pad_begin: 0, pad_end: 0 };
    let mut three = [unit; 3];
    three.get_mut(3usize.checked_sub(axes.len())?..)?.copy_from_slice(axes);
    Some(three)
}

impl Geometry {
    fn image(&self) -> usize {
        self.axes.iter().map(|a| a.input).product()
    }

    fn values(&self) -> usize {
        self.axes.iter().map(|a| a.output).product()
    }

    fn taps(&self) -> usize {
        self.axes.iter().map(|a| a.kernel).product()
    }

    /// Whether the windows of a group are the group's image itself.
    fn is_pointwise(&self) -> bool {
        self.axes.iter().all(|a| a.kernel == 1 && a.stride == 1 && a.input == a.output && a.pad_begin == 0)
    }

    fn is_depthwise(&self) -> bool {
        self.image_channels == 1 && self.value_channels == 1
    }

    /// Rows in which a tap moves along the last axis: `(first value, first image element, values)` of each, for values that `tap` reaches.
    fn rows(&self, tap: usize) -> impl Iterator<Item = (usize, usize, usize)> + use<'_> {
        let [z, y, x] = &self.axes;
        let (tz, ty, tx) = (tap / (y.kernel * x.kernel), tap / x.kernel % y.kernel, tap % x.kernel);
        let along: Range<usize> = x.outputs_at(tx);
        let from = if along.is_empty() { 0 } else { x.input_at(along.start, tx) };
        z.outputs_at(tz).flat_map(move |oz| {
            let along = along.clone();
            y.outputs_at(ty).map(move |oy| {
                let value = (oz * y.output + oy) * x.output + along.start;
                let row = z.input_at(oz, tz) * y.input + y.input_at(oy, ty);
                (value, row * x.input + from, along.len())
            })
        })
    }

    /// The windows of `image`, a row for every channel and tap and a column for every value.
    fn unfold(&self, image: &[f32], columns: &mut [f32]) {
        let (plane, values, stride) = (self.image(), self.values(), self.axes[2].stride);
        for (row, columns) in columns.chunks_exact_mut(values).enumerate() {
            let (channel, tap) = (row / self.taps(), row % self.taps());
            let image = &image[channel * plane..][..plane];
            let mut written = 0;
            for (value, from, count) in self.rows(tap) {
                columns[written..value].fill(0.0);
                let to = &mut columns[value..value + count];
                match stride {
                    1 => to.copy_from_slice(&image[from..from + count]),
                    _ => to.iter_mut().zip(image[from..].iter().step_by(stride)).for_each(|(to, from)| *to = *from),
                }
                written = value + count;
            }
            columns[written..].fill(0.0);
        }
    }

    /// Adds every window's elements to the places of `image` they come from.
    fn fold(&self, columns: &[f32], image: &mut [f32]) {
        let (plane, values, stride) = (self.image(), self.values(), self.axes[2].stride);
        for (row, columns) in columns.chunks_exact(values).enumerate() {
            let (channel, tap) = (row / self.taps(), row % self.taps());
            let image = &mut image[channel * plane..][..plane];
            for (value, to, count) in self.rows(tap) {
                let from = &columns[value..value + count];
                match stride {
                    1 => image[to..to + count].iter_mut().zip(from).for_each(|(to, from)| *to += from),
                    _ => image[to..].iter_mut().step_by(stride).zip(from).for_each(|(to, from)| *to += from),
                }
            }
        }
    }
}

/// The maps between images, weights `[groups · value_channels, image_channels, taps]` and values.
impl Geometry {
    /// Values of images: the convolution.
    fn convolve(&self, images: &[f32], weights: &[f32]) -> Vec<f32> {
        let (image, values, taps) = (self.image() * self.image_channels, self.values(), self.taps());
        let depth = self.image_channels * taps;
        let count = images.len() / (image * self.groups).max(1);
        let mut results = vec![0.0; count * self.groups * self.value_channels * values];
        if results.is_empty() {
            return results;
        }
        let group_values = self.value_channels * values;
        results.par_chunks_mut(group_values).enumerate().for_each_init(Scratch::default, |scratch, (at, result)| {
            let image = &images[at * image..][..image];
            let weights = &weights[at % self.groups * self.value_channels * depth..][..self.value_channels * depth];
            if self.is_depthwise() {
                return self.shift(image, weights, result);
            }
            let mut columns = std::mem::take(&mut scratch.columns);
            let columns_or_image = self.columns(image, &mut columns);
            let (a, b) = (Matrix::row_major(weights, depth), Matrix::row_major(columns_or_image, values));
            multiply_here(a, b, [self.value_channels, depth, values], false, result, scratch);
            scratch.columns = columns;
        });
        results
    }

    /// What every value adds to the images it came from: the transposed convolution.
    fn spread(&self, values: &[f32], weights: &[f32]) -> Vec<f32> {
        let (image, plane, taps) = (self.image() * self.image_channels, self.values(), self.taps());
        let depth = self.image_channels * taps;
        let count = values.len() / (plane * self.value_channels * self.groups).max(1);
        let mut images = vec![0.0; count * self.groups * image];
        if images.is_empty() {
            return images;
        }
        images.par_chunks_mut(image).enumerate().for_each_init(Scratch::default, |scratch, (at, image)| {
            let values = &values[at * self.value_channels * plane..][..self.value_channels * plane];
            let weights = &weights[at % self.groups * self.value_channels * depth..][..self.value_channels * depth];
            if self.is_depthwise() {
                return self.shift_back(values, weights, image);
            }
            let (a, b) = (Matrix::transposed(weights, depth), Matrix::row_major(values, plane));
            if self.is_pointwise() {
                return multiply_here(a, b, [depth, self.value_channels, plane], false, image, scratch);
            }
            let mut columns = std::mem::take(&mut scratch.columns);
            columns.resize(depth * plane, 0.0);
            multiply_here(a, b, [depth, self.value_channels, plane], false, &mut columns, scratch);
            self.fold(&columns, image);
            scratch.columns = columns;
        });
        images
    }

    /// The gradient of the weights: products of windows and values, summed over samples.
    fn weigh(&self, images: &[f32], values: &[f32]) -> Vec<f32> {
        let (image, plane, taps) = (self.image() * self.image_channels, self.values(), self.taps());
        let (depth, groups, channels) = (self.image_channels * taps, self.groups, self.value_channels);
        let count = images.len() / (image * groups).max(1);
        let size = groups * channels * depth;
        let samples = count.div_ceil(PARTS).max(1);
        let parts: Vec<Vec<f32>> = (0..count.div_ceil(samples))
            .into_par_iter()
            .map_init(Scratch::default, |scratch, part| {
                // Of a group as `[depth, channels]`.
                let mut sums = vec![0.0; size];
                for at in part * samples * groups..((part + 1) * samples).min(count) * groups {
                    let sums = &mut sums[at % groups * channels * depth..][..channels * depth];
                    let values = &values[at * channels * plane..][..channels * plane];
                    let image = &images[at * image..][..image];
                    if self.is_depthwise() {
                        self.correlate(image, values, sums);
                        continue;
                    }
                    let mut columns = std::mem::take(&mut scratch.columns);
                    let columns_or_image = self.columns(image, &mut columns);
                    let (a, b) = (Matrix::row_major(columns_or_image, plane), Matrix::transposed(values, plane));
                    multiply_here(a, b, [depth, plane, channels], true, sums, scratch);
                    scratch.columns = columns;
                }
                sums
            })
            .collect();
        let mut sums = vec![0.0; size];
        for part in parts {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        let mut weights = vec![0.0; size];
        for (weights, sums) in
            weights.chunks_exact_mut((channels * depth).max(1)).zip(sums.chunks_exact(channels * depth))
        {
            for (channel, weights) in weights.chunks_exact_mut(depth).enumerate() {
                weights.iter_mut().enumerate().for_each(|(i, weight)| *weight = sums[i * channels + channel]);
            }
        }
        weights
    }

    fn columns<'a>(&self, image: &'a [f32], memory: &'a mut Vec<f32>) -> &'a [f32] {
        if self.is_pointwise() {
            return image;
        }
        memory.resize(self.image_channels * self.taps() * self.values(), 0.0);
        self.unfold(image, memory);
        memory
    }

    /// A convolution of one channel: the image shifted by every tap, scaled and summed.
    fn shift(&self, image: &[f32], weights: &[f32], values: &mut [f32]) {
        for (tap, &weight) in weights.iter().enumerate() {
            for (value, from, count) in self.rows(tap) {
                let values = &mut values[value..value + count];
                match self.axes[2].stride {
                    1 => values.iter_mut().zip(&image[from..from + count]).for_each(|(v, x)| *v += weight * x),
                    stride => {
                        values.iter_mut().zip(image[from..].iter().step_by(stride)).for_each(|(v, x)| *v += weight * x);
                    }
                }
            }
        }
    }

    fn shift_back(&self, values: &[f32], weights: &[f32], image: &mut [f32]) {
        for (tap, &weight) in weights.iter().enumerate() {
            for (value, to, count) in self.rows(tap) {
                let values = &values[value..value + count];
                match self.axes[2].stride {
                    1 => image[to..to + count].iter_mut().zip(values).for_each(|(x, v)| *x += weight * v),
                    stride => {
                        image[to..].iter_mut().step_by(stride).zip(values).for_each(|(x, v)| *x += weight * v);
                    }
                }
            }
        }
    }

    fn correlate(&self, image: &[f32], values: &[f32], sums: &mut [f32]) {
        for (tap, sum) in sums.iter_mut().enumerate() {
            for (value, from, count) in self.rows(tap) {
                let values = &values[value..value + count];
                *sum += match self.axes[2].stride {
                    1 => dot(values, &image[from..from + count]),
                    stride => values.iter().zip(image[from..].iter().step_by(stride)).map(|(v, x)| v * x).sum(),
                };
            }
        }
    }
}

/// `[n, c, …]` convolved with weights `[o, c / groups, …]`, and a bias `[o]`; `shape` is that of the result.
pub(crate) fn convolution(
    geometry: Geometry,
    shape: Vec<usize>,
    x: &Tensor,
    weights: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let arguments: Vec<&Tensor> = [x, weights].into_iter().chain(bias).collect();
    apply(Convolution { geometry, shape }, &arguments)
}

/// Its transpose, of weights `[c, o / groups, …]`: `x` are the values of `geometry`, the result its images.
pub(crate) fn transposed(
    geometry: Geometry,
    shape: Vec<usize>,
    x: &Tensor,
    weights: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let arguments: Vec<&Tensor> = [x, weights].into_iter().chain(bias).collect();
    apply(Transposed { geometry, shape }, &arguments)
}

/// Adds a channel's bias to its planes, which follow each other in `y`.
fn add_bias(y: &mut [f32], bias: Option<&View<'_>>, plane: usize) {
    let Some(bias) = bias.filter(|_| !y.is_empty()) else { return };
    y.par_chunks_mut(plane).enumerate().for_each(|(i, plane)| {
        let bias = bias.data[i % bias.data.len()];
        plane.iter_mut().for_each(|y| *y += bias);
    });
}

/// The gradient of a bias: the sums of the planes of `dy` by channel.
fn bias_gradient(dy: &[f32], bias: &View<'_>, plane: usize) -> Vec<f32> {
    let mut sums = vec![0.0; bias.data.len()];
    let count = sums.len();
    dy.chunks_exact(plane.max(1)).enumerate().for_each(|(i, plane)| sums[i % count] += sum(plane));
    sums
}

struct Convolution {
    geometry: Geometry,
    shape: Vec<usize>,
}

impl Function for Convolution {
    const NAME: &'static str = "convolution";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let mut y = self.geometry.convolve(args[0].data, args[1].data);
        add_bias(&mut y, args.get(2), self.geometry.values());
        (y, self.shape.clone())
    }

    fn backward(&self, args: &[View<'_>], _: View<'_>, dy: View<'_>, needs: &[bool]) -> Vec<Option<Vec<f32>>> {
        let geometry = &self.geometry;
        let mut gradients = vec![
            needs[0].then(|| geometry.spread(dy.data, args[1].data)),
            needs[1].then(|| geometry.weigh(args[0].data, dy.data)),
        ];
        gradients.extend(args.get(2).map(|bias| Some(bias_gradient(dy.data, bias, geometry.values()))));
        gradients
    }
}

struct Transposed {
    geometry: Geometry,
    shape: Vec<usize>,
}

impl Function for Transposed {
    const NAME: &'static str = "transposed convolution";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let mut y = self.geometry.spread(args[0].data, args[1].data);
        add_bias(&mut y, args.get(2), self.geometry.image());
        (y, self.shape.clone())
    }

    fn backward(&self, args: &[View<'_>], _: View<'_>, dy: View<'_>, needs: &[bool]) -> Vec<Option<Vec<f32>>> {
        let geometry = &self.geometry;
        let mut gradients = vec![
            needs[0].then(|| geometry.convolve(dy.data, args[1].data)),
            needs[1].then(|| geometry.weigh(dy.data, args[0].data)),
        ];
        gradients.extend(args.get(2).map(|bias| Some(bias_gradient(dy.data, bias, geometry.image()))));
        gradients
    }
}

/// The mean of every window; `count_padding` says whether padding counts as zeros.
pub(crate) fn average_pool(
    axes: [WindowAxis; 3],
    count_padding: bool,
    shape: Vec<usize>,
    x: &Tensor,
) -> Result<Tensor> {
    let geometry = Geometry { groups: 1, image_channels: 1, value_channels: 1, axes };
    let [z, y, x_axis] = axes.map(|axis| {
        let count = |output: usize| {
            let taps = 0..axis.kernel;
            if count_padding {
                let end = axis.input + axis.pad_begin + axis.pad_end;
                return taps.filter(|t| output * axis.stride + t * axis.dilation < end).count();
            }
            taps.filter(|&t| axis.outputs_at(t).contains(&output)).count()
        };
        (0..axis.output).map(count).collect::<Vec<_>>()
    });
    let rows = z.iter().flat_map(|z| y.iter().map(move |y| z * y));
    let shares = rows.flat_map(|row| x_axis.iter().map(move |x| 1.0 / (row * x).max(1) as f32)).collect();
    apply(AveragePool { ones: vec![1.0; geometry.taps()], geometry, shares, shape }, &[x])
}

struct AveragePool {
    geometry: Geometry,
    ones: Vec<f32>,
    /// What every value of a plane is multiplied by.
    shares: Vec<f32>,
    shape: Vec<usize>,
}

impl Function for AveragePool {
    const NAME: &'static str = "average pool";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let mut y = self.geometry.convolve(args[0].data, &self.ones);
        y.iter_mut().zip(self.shares.iter().cycle()).for_each(|(y, share)| *y *= share);
        (y, self.shape.clone())
    }

    fn backward(&self, _: &[View<'_>], _: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        let shares: Vec<f32> = dy.data.iter().zip(self.shares.iter().cycle()).map(|(dy, share)| dy * share).collect();
        vec![Some(self.geometry.spread(&shares, &self.ones))]
    }
}

/// The largest element of every window, padding left out.
pub(crate) fn max_pool(axes: [WindowAxis; 3], shape: Vec<usize>, x: &Tensor) -> Result<Tensor> {
    let geometry = Geometry { groups: 1, image_channels: 1, value_channels: 1, axes };
    apply(MaxPool { geometry, shape }, &[x])
}

struct MaxPool {
    geometry: Geometry,
    shape: Vec<usize>,
}

impl MaxPool {
    /// The largest element of every window of one plane and where the first such is.
    fn largest(&self, image: &[f32], values: &mut [f32], places: &mut [u32]) {
        values.fill(f32::NEG_INFINITY);
        let stride = self.geometry.axes[2].stride;
        for tap in 0..self.geometry.taps() {
            for (value, from, count) in self.geometry.rows(tap) {
                for i in 0..count {
                    let at = from + i * stride;
                    if image[at] > values[value + i] {
                        (values[value + i], places[value + i]) = (image[at], at as u32);
                    }
                }
            }
        }
    }
}

impl Function for MaxPool {
    const NAME: &'static str = "max pool";

    fn forward(&self, args: &[View<'_>]) -> (Vec<f32>, Vec<usize>) {
        let (image, plane) = (self.geometry.image(), self.geometry.values());
        let mut y = vec![0.0; self.shape.iter().product()];
        if !y.is_empty() {
            let planes = y.par_chunks_mut(plane).zip(args[0].data.par_chunks(image));
            planes.for_each_init(|| vec![0; plane], |places, (values, image)| self.largest(image, values, places));
        }
        (y, self.shape.clone())
    }

    fn backward(&self, args: &[View<'_>], _: View<'_>, dy: View<'_>, _: &[bool]) -> Vec<Option<Vec<f32>>> {
        let (image, plane) = (self.geometry.image(), self.geometry.values());
        let x = args[0].data;
        let mut dx = vec![0.0; x.len()];
        if !dy.data.is_empty() {
            let planes = dx.par_chunks_mut(image).zip(x.par_chunks(image)).zip(dy.data.par_chunks(plane));
            planes.for_each_init(
                || (vec![0.0; plane], vec![0; plane]),
                |(values, places), ((dx, x), dy)| {
                    self.largest(x, values, places);
                    places.iter().zip(dy).for_each(|(&place, dy)| dx[place as usize] += dy);
                },
            );
        }
        vec![Some(dx)]
    }
}
