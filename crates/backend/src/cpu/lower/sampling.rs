//! Images sampled between their pixels: regions, on blocked maps, and places of a grid.

use super::layout::per_image;
use crate::{
    RunError,
    cpu::{
        frame::{Buffer, Frame, Worker},
        lower::Lowered,
        plan::{Builder, NoPlan},
    },
};
use cutover_graph::{
    Node, OpError,
    ops::{GridSample, GridSampleMode, GridSamplePadding, RoiAlign},
};
use cutover_kernels::cpu::{
    IsaLevel,
    layout::blocked_len,
    sampling::{self, Filter, Grid, Outside, Region, Side},
};
use cutover_tensor::DType;

/// More samples per side of a bin than any detector takes: the operator's own evaluation bounds what they cost.
const SAMPLES_MAX: usize = 64;

pub(in crate::cpu) struct RegionsStep {
    node: String,
    op: RoiAlign,
    index_type: DType,
    images: usize,
    channels: usize,
    height: usize,
    width: usize,
    count: usize,
    map: Buffer,
    regions: Buffer,
    batches: Buffer,
    output: Buffer,
}

pub(in crate::cpu) struct GridStep {
    filter: Filter,
    outside: Outside,
    align_corners: bool,
    images: usize,
    channels: usize,
    height: usize,
    width: usize,
    places: usize,
    input: Buffer,
    grid: Buffer,
    output: Buffer,
}

pub(in crate::cpu) fn lower_regions(builder: &mut Builder<'_>, node: &Node, op: &RoiAlign) -> Result<bool, NoPlan> {
    let (&[Some(x), Some(regions), Some(batches)], output) = (&node.inputs[..], node.outputs[0]) else {
        return Ok(false);
    };
    let (shape, index_type) = (builder.shape(x), builder.fact(batches).dtype);
    let (&[images, channels, height, width], &[count, 4]) = (&shape[..], &builder.shape(regions)[..]) else {
        return Ok(false);
    };
    if !builder.is_float(x)
        || !builder.is_float(regions)
        || op.maximum
        || op.sampling_ratio > SAMPLES_MAX
        || !matches!(index_type, DType::I64 | DType::I32)
        || builder.shape(batches)[..] != [count]
        || [x, output].iter().any(|&id| builder.shape(id).element_count() == 0)
    {
        return Ok(false);
    }
    let (map, regions, batches) = (builder.blocked(x)?, builder.plain(regions)?, builder.plain(batches)?);
    let to = builder.new_blocked(output)?;
    let (node, op) = (node.name.clone(), op.clone());
    let step =
        RegionsStep { node, op, index_type, images, channels, height, width, count, map, regions, batches, output: to };
    builder.push(Lowered::Regions(step), &[map, regions, batches], &[to]);
    Ok(true)
}

pub(in crate::cpu) fn lower_grid(builder: &mut Builder<'_>, node: &Node, op: &GridSample) -> Result<bool, NoPlan> {
    let (&[Some(x), Some(grid)], output) = (&node.inputs[..], node.outputs[0]) else { return Ok(false) };
    let (shape, grid_shape) = (builder.shape(x), builder.shape(grid));
    let (&[images, channels, height, width], &[grids, rows, columns, 2]) = (&shape[..], &grid_shape[..]) else {
        return Ok(false);
    };
    if !builder.is_float(x)
        || !builder.is_float(grid)
        || grids != images
        || [x, output].iter().any(|&id| builder.shape(id).element_count() == 0)
    {
        return Ok(false);
    }
    let filter = match op.mode {
        GridSampleMode::Nearest => Filter::Nearest,
        GridSampleMode::Linear => Filter::Linear,
        GridSampleMode::Cubic => Filter::Cubic,
    };
    let outside = match op.padding {
        GridSamplePadding::Zeros => Outside::Zeros,
        GridSamplePadding::Border => Outside::Border,
        GridSamplePadding::Reflection => Outside::Reflection,
    };
    let (input, grid) = (builder.plain(x)?, builder.plain(grid)?);
    let to = builder.new_plain(output)?;
    let align_corners = op.align_corners;
    let places = rows * columns;
    let step =
        GridStep { filter, outside, align_corners, images, channels, height, width, places, input, grid, output: to };
    builder.push(Lowered::Grid(step), &[input, grid], &[to]);
    Ok(true)
}

impl RegionsStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) -> Result<(), RunError> {
        let RegionsStep { channels, height, width, .. } = *self;
        let (from, to) = (blocked_len(channels, height * width), blocked_len(channels, self.op.height * self.op.width));
        let (map, corners) = (frame.floats(self.map), frame.floats(self.regions));
        for region in worker.share(self.count) {
            let batch = match self.index_type {
                DType::I64 => frame.words::<u64>(self.batches)[region] as i64,
                _ => i64::from(frame.words::<u32>(self.batches)[region] as i32),
            };
            let Some(image) = usize::try_from(batch).ok().filter(|&image| image < self.images) else {
                let source = OpError::input(format!("region {region} is of an image outside 0 to {}", self.images));
                return Err(RunError::Op { node: self.node.clone(), op: "RoiAlign".to_string(), source });
            };
            let side = |start: usize, bins: usize| {
                let corner = |at: usize| f64::from(corners[4 * region + at]);
                let (start, bin, samples) = self.op.side(corner(start), corner(start + 2), bins);
                Side { start, bin, samples }
            };
            let (rows, columns) = (side(1, self.op.height), side(0, self.op.width));
            let bins = [self.op.height, self.op.width];
            let region_of = Region { channels, height, width, map: &map[image * from..][..from], rows, columns, bins };
            sampling::align_region(level, &region_of, frame.output_at(self.output, region * to, to));
        }
        Ok(())
    }
}

impl GridStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &Worker<'_>, level: IsaLevel) {
        let GridStep { filter, outside, align_corners, images, channels, height, width, places, .. } = *self;
        let (from, to) = (channels * height * width, channels * places);
        for (image, range) in per_image(images, places, worker) {
            let grid = Grid {
                channels,
                height,
                width,
                image: &frame.floats(self.input)[image * from..][..from],
                places: &frame.floats(self.grid)[image * 2 * places..][..2 * places],
                filter,
                outside,
                align_corners,
            };
            sampling::sample_grid(level, &grid, range, frame.output_at(self.output, image * to, to));
        }
    }
}
