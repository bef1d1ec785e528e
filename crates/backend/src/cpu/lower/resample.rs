//! Images at other sizes.

use crate::cpu::{
    frame::{Buffer, Frame, Worker},
    lower::Lowered,
    plan::{Builder, NoPlan},
};
use cutover_graph::{
    Node, ValueId,
    ops::{CoordinateMode, Inputs, Resize},
};
use cutover_tensor::{Tensor, Value};

/// Every plane's rows, then their elements, as weighted sums of rows and elements of the input.
pub(in crate::cpu) struct ResampleStep {
    planes: usize,
    height: usize,
    width: usize,
    rows: Filter,
    columns: Filter,
    input: Buffer,
    output: Buffer,
}

/// What the elements of an axis are made of: element `i` of those from `starts[i]` to `starts[i + 1]`.
struct Filter {
    starts: Vec<u32>,
    indices: Vec<u32>,
    weights: Vec<f32>,
    /// Every element is one of the input.
    selects: bool,
}

impl Filter {
    /// `None` where the axis is too long for 32 bits.
    fn new(of: Option<&Vec<Vec<(usize, f64)>>>, extent: usize) -> Option<Filter> {
        let kept: Vec<Vec<(usize, f64)>>;
        let taps = match of {
            Some(taps) => taps,
            None => {
                kept = (0..extent).map(|i| vec![(i, 1.0)]).collect();
                &kept
            }
        };
        u32::try_from(extent).ok()?;
        let mut filter = Filter { starts: vec![0], indices: Vec::new(), weights: Vec::new(), selects: true };
        for taps in taps {
            filter.selects &= matches!(taps.as_slice(), [(_, 1.0)]);
            for &(index, weight) in taps {
                filter.indices.push(index as u32);
                filter.weights.push(weight as f32);
            }
            filter.starts.push(u32::try_from(filter.indices.len()).ok()?);
        }
        Some(filter)
    }

    fn count(&self) -> usize {
        self.starts.len() - 1
    }

    fn taps(&self, at: usize) -> (&[u32], &[f32]) {
        let range = self.starts[at] as usize..self.starts[at + 1] as usize;
        (&self.indices[range.clone()], &self.weights[range])
    }
}

pub(in crate::cpu) fn lower(builder: &mut Builder<'_>, node: &Node, op: &Resize) -> Result<bool, NoPlan> {
    let (Some(&Some(x)), output) = (node.inputs.first(), node.outputs[0]) else { return Ok(false) };
    let (shape, to) = (builder.shape(x), builder.shape(output));
    if !builder.is_float(x) || shape.element_count() == 0 || to.element_count() == 0 || shape.rank() == 0 {
        return Ok(false);
    }
    if op.coordinates == CoordinateMode::TfCropAndResize {
        return Ok(false);
    }
    let mut given: Vec<Option<Value>> = Vec::with_capacity(node.inputs.len());
    for (at, id) in node.inputs.iter().enumerate() {
        let tensor = match id.filter(|_| at > 1) {
            None => None,
            Some(id) => match known(builder, id) {
                Some(tensor) => Some(Value::Tensor(tensor)),
                None => return Ok(false),
            },
        };
        given.push(tensor);
    }
    let borrowed: Vec<Option<&Value>> = given.iter().map(Option::as_ref).collect();
    let Ok(weights) = op.weights(&shape, Inputs(&borrowed)) else { return Ok(false) };
    let (lead, last) = weights.split_at(shape.rank().saturating_sub(2));
    if lead.iter().any(Option::is_some) {
        return Ok(false);
    }
    let (of_rows, of_columns) = match last {
        [rows, columns] => (rows.as_ref(), columns.as_ref()),
        [columns] => (None, columns.as_ref()),
        _ => return Ok(false),
    };
    let width = shape[shape.rank() - 1];
    let height = if shape.rank() > 1 { shape[shape.rank() - 2] } else { 1 };
    let (Some(rows), Some(columns)) = (Filter::new(of_rows, height), Filter::new(of_columns, width)) else {
        return Ok(false);
    };
    let planes = shape.element_count() / (height * width);
    if planes * rows.count() * columns.count() != to.element_count() {
        return Ok(false);
    }
    let (input, to) = (builder.plain(x)?, builder.new_plain(output)?);
    builder.need_workspace(width + columns.count());
    let step = ResampleStep { planes, height, width, rows, columns, input, output: to };
    builder.push(Lowered::Resample(step), &[input], &[to]);
    Ok(true)
}

/// The tensor that `id` is known to be.
fn known(builder: &Builder<'_>, id: ValueId) -> Option<Tensor> {
    if let Some(constant) = builder.graph.constant(id) {
        return Some(constant.tensor.clone());
    }
    let values = builder.integers(id)?;
    match builder.is_float(id) {
        true => Tensor::from_vec([values.len()], values.into_iter().map(|v| v as f32).collect()).ok(),
        false => Tensor::from_vec([values.len()], values).ok(),
    }
}

impl ResampleStep {
    pub fn run(&self, frame: &Frame<'_>, worker: &mut Worker<'_>) {
        let input = frame.floats(self.input);
        let (rows, columns) = (self.rows.count(), self.columns.count());
        for unit in worker.share(self.planes * rows) {
            let (plane, row) = (unit / rows, unit % rows);
            let from = &input[plane * self.height * self.width..][..self.height * self.width];
            let (mixed, made) = worker.workspace.split_at_mut(self.width);
            let (indices, weights) = self.rows.taps(row);
            let source = |index: u32| &from[index as usize * self.width..][..self.width];
            let line: &[f32] = match (indices, self.rows.selects) {
                (&[index], true) => source(index),
                _ => {
                    mixed.fill(0.0);
                    for (&index, weight) in indices.iter().zip(weights) {
                        mixed.iter_mut().zip(source(index)).for_each(|(to, from)| *to += from * weight);
                    }
                    mixed
                }
            };
            let made = &mut made[..columns];
            if self.columns.selects {
                made.iter_mut().zip(&self.columns.indices).for_each(|(to, &index)| *to = line[index as usize]);
            } else {
                for (at, to) in made.iter_mut().enumerate() {
                    let (indices, weights) = self.columns.taps(at);
                    *to = indices.iter().zip(weights).map(|(&index, weight)| line[index as usize] * weight).sum();
                }
            }
            frame.write_floats(self.output, unit * columns, made);
        }
    }
}
