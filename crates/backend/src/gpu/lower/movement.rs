//! What only moves elements: views, selections, gathers, joins.

use super::super::{
    code::{self, Function, coordinates, position, strides},
    plan::{Builder, Unable},
};
use crate::known;
use cutover_graph::{
    Constant, Node, Op, ValueId,
    ops::{Concat, Gather, GatherElements, GatherNd, Split, Transpose},
};
use cutover_tensor::{DType, Tensor, Value};

/// Elements of a selection that a plan lists the sources of.
const SELECTED: usize = 1 << 22;

/// Elements of what is computed while planning.
const KNOWN: usize = 1 << 20;

pub(super) fn lower_view(b: &mut Builder<'_>, node: &Node) -> Result<(), Unable> {
    b.alias(node.outputs[0], super::input(node, 0)?)
}

pub(super) fn lower_transpose(b: &mut Builder<'_>, node: &Node, op: &Transpose) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let shape = b.shape(x);
    let permutation = op.permutation(shape.rank()).map_err(|error| error.to_string())?;
    let from = strides(&shape);
    let moved: Vec<usize> = permutation.iter().map(|&axis| from[axis]).collect();
    let (statements, index) = code::strided(&moved, &b.shape(output), 0);
    let operands = b.operands(&[x])?;
    let mut function = Function::new(b.dtype(output), format!("{statements}return $0({index});"), operands);
    function.transposes = transposed(&shape, &permutation);
    b.define_function(output, function)
}

/// `[batch, rows, columns]` of a tensor of `shape` whose axes in the order of `permutation` are its matrices with rows and columns exchanged.
fn transposed(shape: &[usize], permutation: &[usize]) -> Option<[usize; 3]> {
    let counted: Vec<usize> = (0..shape.len()).filter(|&axis| shape[axis] != 1).collect();
    let order = permutation.iter().filter_map(|axis| counted.binary_search(axis).ok());
    // Runs of axes that stay together: the first of each, and how many.
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for axis in order {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == axis => *count += 1,
            _ => runs.push((axis, 1)),
        }
    }
    let extent =
        |(first, count): (usize, usize)| counted[first..first + count].iter().map(|&axis| shape[axis]).product();
    match runs.as_slice() {
        [columns, rows] => Some([1, extent(*rows), extent(*columns)]),
        [batch @ (0, _), columns, rows] if rows.0 == batch.1 => Some([*batch, *rows, *columns].map(extent)),
        _ => None,
    }
}

pub(super) fn lower_expand(b: &mut Builder<'_>, node: &Node) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (statements, index) = code::broadcast(&b.shape(x), &b.shape(output));
    let operands = b.operands(&[x])?;
    b.define(output, format!("{statements}return $0({index});"), operands)
}

pub(super) fn lower_concat(b: &mut Builder<'_>, node: &Node, op: &Concat) -> Result<(), Unable> {
    let output = node.outputs[0];
    let shape = b.shape(output);
    let axis = cutover_graph::ops::normalize_axis(op.axis, shape.rank()).map_err(|error| error.to_string())?;
    let ids: Vec<ValueId> = node.inputs.iter().flatten().copied().filter(|&id| b.count(id) > 0).collect();
    let inner: usize = shape[axis + 1..].iter().product();
    let most = b.gpu.bindings.saturating_sub(3);
    let join = |shapes: &[usize], base: usize| {
        let block: usize = shapes.iter().sum::<usize>() * inner;
        let mut body = format!("let outer = i / {block}u;\nlet rest = i % {block}u;\n");
        let mut before = 0;
        for (at, extent) in shapes.iter().enumerate() {
            let size = extent * inner;
            let index = format!("outer * {size}u + rest - {before}u");
            before += size;
            match at + 1 == shapes.len() {
                true => body += &format!("return ${}({index});", base + at),
                false => body += &format!("if (rest < {before}u) {{ return ${}({index}); }}\n", base + at),
            }
        }
        body
    };
    let extents: Vec<usize> = ids.iter().map(|&id| b.shape(id)[axis]).collect();
    if ids.len() <= most {
        let operands = b.operands(&ids)?;
        return b.define(output, join(&extents, 0), operands);
    }
    // More than a kernel reads at once: part by part into one buffer.
    let to = b.output(output)?;
    let dtype = b.dtype(output);
    let mut before = 0;
    for (&id, &extent) in ids.iter().zip(&extents) {
        let operand = b.operand(id)?;
        let mut text = code::Text::default();
        let function = text.function(&operand);
        let store = text.store(to, code::storage_type(dtype));
        let (count, size) = (b.count(id), extent * inner);
        let (groups, index) = code::grid(count, code::GROUP);
        let (whole, begin) = (shape[axis] * inner, before * inner);
        let element = code::stored(dtype, &format!("{function}(i)"));
        let kernel = format!(
            "@compute @workgroup_size({})\nfn main(@builtin(global_invocation_id) at: vec3<u32>) {{\n{index}\n{store}(i / {size}u * {whole}u + {begin}u + i % {size}u, {element});\n}}\n",
            code::GROUP
        );
        b.push(text, &kernel, groups, "copy", Default::default())?;
        before += extent;
    }
    Ok(())
}

pub(super) fn lower_split(b: &mut Builder<'_>, node: &Node, op: &Split) -> Result<(), Unable> {
    let x = super::input(node, 0)?;
    let shape = b.shape(x);
    let axis = cutover_graph::ops::normalize_axis(op.axis, shape.rank()).map_err(|error| error.to_string())?;
    let inner: usize = shape[axis + 1..].iter().product();
    let whole = shape[axis] * inner;
    let operand = b.reread(x)?;
    let mut before = 0;
    for &output in &node.outputs {
        let size = b.shape(output)[axis] * inner;
        if size > 0 {
            let body = format!("return $0(i / {size}u * {whole}u + {}u + i % {size}u);", before * inner);
            b.define(output, body, vec![operand.clone()])?;
        } else {
            b.output(output)?;
        }
        before += b.shape(output)[axis];
    }
    Ok(())
}

/// A statement that makes `name` the position along `extent` that the index `name` means, and fails the run where it is out of range.
fn checked_index(b: &Builder<'_>, name: &str, load: &str, dtype: DType, extent: usize) -> Result<String, Unable> {
    let (extent_text, zero) = (code::integer(dtype, extent as i128), code::integer(dtype, 0));
    if !matches!(dtype, DType::I64 | DType::I32) {
        return Err(format!("indices of {dtype}").into());
    }
    let fault = b.fault();
    Ok(format!(
        "var {name}_given = {load};\nif ({name}_given < {zero}) {{ {name}_given = {name}_given + {extent_text}; }}\nif ({name}_given < {zero} || {name}_given >= {extent_text}) {{ {fault} {name}_given = {zero}; }}\nlet {name} = u32({name}_given);\n"
    ))
}

pub(super) fn lower_gather(b: &mut Builder<'_>, node: &Node, op: &Gather) -> Result<(), Unable> {
    let (x, indices, output) = (super::input(node, 0)?, super::input(node, 1)?, node.outputs[0]);
    let shape = b.shape(x);
    let axis = cutover_graph::ops::normalize_axis(op.axis, shape.rank()).map_err(|error| error.to_string())?;
    let inner: usize = shape[axis + 1..].iter().product();
    let (count, extent) = (b.count(indices), shape[axis]);
    if extent == 0 {
        return Err("nothing to gather from".into());
    }
    let at = checked_index(b, "at", &format!("$1(i / {inner}u % {count}u)"), b.dtype(indices), extent)?;
    let operands = b.operands(&[x, indices])?;
    let block = count * inner;
    let body = format!("{at}return $0((i / {block}u * {extent}u + at) * {inner}u + i % {inner}u);");
    b.define(output, body, operands)
}

pub(super) fn lower_gather_elements(b: &mut Builder<'_>, node: &Node, op: &GatherElements) -> Result<(), Unable> {
    let (x, indices, output) = (super::input(node, 0)?, super::input(node, 1)?, node.outputs[0]);
    let (shape, to) = (b.shape(x), b.shape(output));
    let axis = cutover_graph::ops::normalize_axis(op.axis, shape.rank()).map_err(|error| error.to_string())?;
    let at = checked_index(b, "at", "$1(i)", b.dtype(indices), shape[axis])?;
    let mut from = strides(&shape);
    let stride = std::mem::take(&mut from[axis]);
    let operands = b.operands(&[x, indices])?;
    let body = format!("{at}{}return $0({} + at * {stride}u);", coordinates(&to, "i", "c"), position(&from, 0, "c"));
    b.define(output, body, operands)
}

pub(super) fn lower_gather_nd(b: &mut Builder<'_>, node: &Node, op: &GatherNd) -> Result<(), Unable> {
    let (x, indices, output) = (super::input(node, 0)?, super::input(node, 1)?, node.outputs[0]);
    let (shape, index_shape) = (b.shape(x), b.shape(indices));
    let tuple = index_shape[index_shape.rank() - 1];
    let rest = &shape[op.batch_dims..];
    let slice: usize = rest[tuple..].iter().product();
    let batch: usize = rest.iter().product();
    let tuples: usize = index_shape[op.batch_dims..index_shape.rank() - 1].iter().product();
    let from = strides(rest);
    let mut body = format!("let n = i / {slice}u;\nvar start = n / {tuples}u * {batch}u;\n");
    for axis in 0..tuple {
        let load = format!("$1(n * {tuple}u + {axis}u)");
        body += &checked_index(b, &format!("at{axis}"), &load, b.dtype(indices), rest[axis])?;
        body += &format!("start = start + at{axis} * {}u;\n", from[axis]);
    }
    let operands = b.operands(&[x, indices])?;
    b.define(output, body + &format!("return $0(start + i % {slice}u);"), operands)
}

/// Whether the operator only moves elements of its first input, as its other inputs say.
pub(super) fn moves(op: &Op) -> bool {
    matches!(
        op,
        Op::Pad(_)
            | Op::Tile(_)
            | Op::Slice(_)
            | Op::DepthSpace(_)
            | Op::ReverseSequence(_)
            | Op::Trilu(_)
            | Op::CenterCropPad(_)
    )
}

/// A selection whose sources are known: the operator's own evaluation, of the positions instead of the elements, says which.
pub(super) fn lower_selection(b: &mut Builder<'_>, node: &Node) -> Result<(), Unable> {
    let (x, output) = (super::input(node, 0)?, node.outputs[0]);
    let (count, from_count) = (b.count(output), b.count(x));
    if count.max(from_count) > SELECTED {
        return Err(format!("a selection of {count} elements out of {from_count}").into());
    }
    let mut others = Vec::with_capacity(node.inputs.len());
    let mut fill = None;
    for (index, input) in node.inputs.iter().enumerate().skip(1) {
        let Some(id) = *input else {
            others.push(None);
            continue;
        };
        if index == 2 && matches!(node.op, Op::Pad(_)) {
            if b.count(id) != 1 {
                return Err("a fill of several elements".into());
            }
            fill = Some(id);
            others.push(None);
            continue;
        }
        let Some(tensor) = b.known(id) else { return Err(super::unknown(&b.graph.value(id).name)) };
        others.push(Some(Value::Tensor(tensor)));
    }
    let sources = known::sources(node, b.shape(x), others, &b.shape(output))?;
    let mut ids = vec![x];
    ids.extend(fill);
    let mut operands = b.operands(&ids)?;
    if let Some(moved) = affine(&sources, &b.shape(output)) {
        let (offset, moved) = moved;
        let index = coordinates(&b.shape(output), "i", "c");
        return b.define(output, format!("{index}return $0({});", position(&moved, offset, "c")), operands);
    }
    let has_gaps = sources.contains(&0);
    let table = sources.iter().flat_map(|&source| (source as u32).to_le_bytes()).collect::<Vec<u8>>();
    let table = Tensor::from_bytes(DType::U32, [sources.len()], &table).map_err(|error| error.to_string())?;
    let at = operands.len();
    operands.push(b.upload(&Constant::new(table), "plain", super::super::executable::to_device)?);
    let zero = code::integer(b.dtype(output), 0);
    let gap = if fill.is_some() { "$1(0u)".to_string() } else { zero };
    let body = match has_gaps {
        true => format!("let at = ${at}(i);\nif (at == 0u) {{ return {gap}; }}\nreturn $0(at - 1u);"),
        false => format!("return $0(${at}(i) - 1u);"),
    };
    b.define(output, body, operands)
}

/// Offset and strides by which `sources`, counted from 1, follow from the coordinates of `shape`; strides may wrap around 32 bits.
fn affine(sources: &[i64], shape: &[usize]) -> Option<(usize, Vec<usize>)> {
    let own = strides(shape);
    let offset = sources.first()? - 1;
    let stride = |axis: usize| if shape[axis] > 1 { sources[own[axis]] - 1 - offset } else { 0 };
    let moved: Vec<i64> = (0..shape.len()).map(stride).collect();
    let at = |index: usize| {
        let term = |axis: usize| (index / own[axis] % shape[axis]) as i64 * moved[axis];
        offset + (0..shape.len()).map(term).sum::<i64>()
    };
    let fits = sources.iter().enumerate().all(|(index, &source)| source > 0 && at(index) == source - 1);
    fits.then(|| (offset as usize, moved.iter().map(|&stride| stride as u32 as usize).collect()))
}

/// What depends on constants and shapes alone, computed now.
pub(super) fn lower_known(b: &mut Builder<'_>, node: &Node) -> Result<bool, Unable> {
    let is_random = matches!(node.op, Op::Random(_) | Op::Bernoulli(_) | Op::Multinomial(_) | Op::Dropout(_));
    if is_random || !node.op.subgraphs().is_empty() || node.outputs.iter().any(|&output| b.count(output) > KNOWN) {
        return Ok(false);
    }
    let known = |id: ValueId| b.known(id).filter(|tensor| tensor.element_count() <= KNOWN);
    let Some(tensors) = known::outputs(node, KNOWN, |id| b.fact(id), known) else { return Ok(false) };
    for (tensor, &output) in tensors.into_iter().zip(&node.outputs) {
        b.define_constant(output, Constant::new(tensor));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_are_found_in_permutations() {
        for (shape, permutation, expected) in [
            (vec![3, 5], vec![1, 0], Some([1, 3, 5])),
            (vec![2, 3, 5], vec![0, 2, 1], Some([2, 3, 5])),
            (vec![2, 3, 5], vec![2, 0, 1], Some([1, 6, 5])),
            (vec![2, 3, 5, 7], vec![0, 2, 3, 1], Some([2, 3, 35])),
            (vec![2, 3, 5, 7], vec![0, 3, 1, 2], Some([2, 15, 7])),
            (vec![2, 1, 5, 7], vec![1, 0, 3, 2], Some([2, 5, 7])),
            (vec![2, 3, 5, 7], vec![0, 2, 1, 3], None),
            (vec![2, 3, 5], vec![0, 1, 2], None),
            (vec![2, 3, 5], vec![2, 1, 0], None),
        ] {
            assert_eq!(transposed(&shape, &permutation), expected, "{shape:?} by {permutation:?}");
        }
    }
}
