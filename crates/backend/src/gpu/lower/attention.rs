//! Attention as one kernel that never holds all scores; what it is found by is [`crate::attention`].

use super::{
    super::{
        code::{self, Operand, Text, coordinates, float, position, stored},
        plan::{Builder, Unable},
    },
    elementwise::is_float,
    product::batch_of,
    written::{self, AttentionRows},
};
use crate::{
    Work,
    attention::{self, Attention, Known},
};
use cutover_graph::{Node, Op, ValueId};
use cutover_kernels::wgsl;
use cutover_tensor::{DType, Shape};

/// Columns of the result that an invocation has registers for.
const WIDEST: usize = 128;

/// Lowers a product that begins or ends an attention that there is a kernel for; `false` for every other node. What is between the two
/// is in no memory, however large.
pub(in crate::gpu) fn lower(b: &mut Builder<'_>, node: &Node) -> Result<bool, Unable> {
    let Op::MatMul(op) = &node.op else { return Ok(false) };
    if let Some(begun) = b.take_attention() {
        return end(b, node, &begun).map(|()| true);
    }
    let Some(found) = attention::find(b, node, op) else { return Ok(false) };
    let dtype = b.dtype(found.queries);
    let read = [Some(found.queries), Some(found.keys), Some(found.values), found.mask];
    let output = b.graph.node(found.last).outputs[0];
    let [rows, columns] = rows_and_columns(&b.shape(output));
    let fits = columns <= WIDEST
        && b.count(output) / (rows * columns) <= b.gpu.groups as usize
        && read.into_iter().flatten().all(|id| b.dtype(id) == dtype && b.check_size(id).is_ok())
        && b.check_size(output).is_ok()
        && is_float(dtype);
    if fits {
        b.fuse(found.between.clone());
        b.defer_attention(found);
    }
    Ok(fits)
}

fn rows_and_columns(shape: &Shape) -> [usize; 2] {
    [shape[shape.rank() - 2], shape[shape.rank() - 1]]
}

/// A tensor as matrices: where in memory row and column of which of them are.
struct Matrices {
    operand: Operand,
    /// By axis of the batch.
    batch: Vec<usize>,
    row: usize,
    column: usize,
}

impl Matrices {
    /// The matrices that the last two axes of `id` are, those before them broadcast to `batch`.
    fn of(b: &mut Builder<'_>, id: ValueId, batch: &[usize]) -> Result<Matrices, Unable> {
        let (operand, strides) = view(b, id)?;
        let shape = b.shape(id);
        let lead = shape.rank() - 2;
        let mut of_batch = vec![0; batch.len() - lead];
        of_batch.extend((0..lead).map(|axis| if shape[axis] == 1 { 0 } else { strides[axis] }));
        Ok(Matrices { operand, batch: of_batch, row: strides[lead], column: strides[lead + 1] })
    }

    /// As kernels written by hand take them, whose rows lie together.
    fn rows(&self) -> AttentionRows<'_> {
        AttentionRows { operand: &self.operand, batch: &self.batch, row: self.row }
    }

    fn transposed(self) -> Matrices {
        Matrices { row: self.column, column: self.row, ..self }
    }

    /// Whether four neighbours of a row lie as one of the fours that memory can be read in.
    fn has_quads(&self) -> bool {
        let strides = self.batch.iter().chain([&self.row]);
        let is_aligned = strides.copied().all(|stride| stride.is_multiple_of(4));
        self.column == 1 && is_aligned && matches!(self.operand, Operand::Buffer(_, DType::F32))
    }

    /// `{name}_of(z)`, where matrix `z` begins.
    fn begin(&self, name: &str, batch: &[usize]) -> String {
        begin_text(name, batch, &self.batch)
    }

    /// `{name}_at(i)`, an element.
    fn element(&self, text: &mut Text, name: &str) -> String {
        format!("fn {name}_at(i: u32) -> f32 {{ return {}(i); }}\n", text.function(&self.operand))
    }

    /// `{name}_quad(i)`, four neighbours of a row.
    fn quads(&self, text: &mut Text, name: &str) -> String {
        let quads = if self.has_quads() { text.quads(&self.operand) } else { None };
        let value = quads.map_or_else(
            || {
                let at = |j: usize| format!("{name}_at(i + {}u)", j * self.column);
                format!("vec4<f32>({})", (0..4).map(at).collect::<Vec<_>>().join(", "))
            },
            |quad| format!("{quad}(i / 4u)"),
        );
        format!("fn {name}_quad(i: u32) -> vec4<f32> {{ return {value}; }}\n")
    }
}

fn begin_text(name: &str, batch: &[usize], strides: &[usize]) -> String {
    format!(
        "fn {name}_of(z: u32) -> u32 {{\n{}return {};\n}}\n",
        coordinates(batch, "z", "z"),
        position(strides, 0, "z")
    )
}

/// `id` in memory and the strides of its axes: transpositions and axes of one that nobody has computed are looked through.
fn view(b: &mut Builder<'_>, id: ValueId) -> Result<(Operand, Vec<usize>), Unable> {
    let producer = b.graph.producer(id).map(|(producer, _)| b.graph.node(producer));
    let of = producer.and_then(|node| node.inputs.first().copied().flatten());
    if let (Some(node), Some(of), false) = (producer, of, b.is_in_memory(id)) {
        let rank = b.shape(id).rank();
        match &node.op {
            Op::Transpose(op) => {
                let (operand, strides) = view(b, of)?;
                let order = op.permutation.clone().unwrap_or_else(|| (0..rank).rev().collect());
                return Ok((operand, order.into_iter().map(|axis| strides[axis]).collect()));
            }
            Op::Unsqueeze(_) => {
                let (operand, strides) = view(b, of)?;
                // What follows the shape of `of` from the end has its strides, what is left has one element.
                let (from, to) = (b.shape(of), b.shape(id));
                let mut left = (0..from.rank()).filter(|&axis| from[axis] != 1);
                let axis = |&extent: &usize| if extent == 1 { 0 } else { left.next().map_or(0, |axis| strides[axis]) };
                return Ok((operand, to.iter().map(axis).collect()));
            }
            _ => {}
        }
    }
    let strides = code::strides(&b.shape(id));
    Ok((b.reread(id)?, strides))
}

/// Runs the attention that the product `node` ends.
fn end(b: &mut Builder<'_>, node: &Node, attention: &Attention) -> Result<(), Unable> {
    let &Attention { queries, keys, values, scale, mask, .. } = attention;
    let output = node.outputs[0];
    let lead = |id: ValueId| {
        let shape = b.shape(id);
        shape[..shape.rank() - 2].to_vec()
    };
    let batch = batch_of(&batch_of(&lead(queries), &lead(keys)), &lead(values));
    let ([s, width], [depth, t]) = (rows_and_columns(&b.shape(output)), rows_and_columns(&b.shape(keys)));
    let q = Matrices::of(b, queries, &batch)?;
    let k = Matrices::of(b, keys, &batch)?.transposed();
    let v = Matrices::of(b, values, &batch)?;
    let mask = mask.map(|id| mask_of(b, id, &batch, s, t)).transpose()?;
    // Where all that follows is a transposition to `[b, s, n, v]`, the result is written there.
    let turned = match b.only_reader(output) {
        Some((id, Node { op: Op::Transpose(op), outputs, .. })) => {
            (op.permutation.as_deref() == Some(&[0, 2, 1, 3])).then(|| (id, outputs[0]))
        }
        _ => None,
    };
    let ((to, dtype), of_batch, y_row) = match turned {
        Some((id, turned)) => {
            b.fuse([id]);
            (b.output_stored(turned)?, vec![s * batch[1] * width, width], batch[1] * width)
        }
        None => {
            (b.output_stored(output)?, code::strides(&batch).iter().map(|stride| stride * s * width).collect(), width)
        }
    };
    let heads = batch.iter().product::<usize>();
    let bytes =
        [queries, keys, values, output].map(|id| b.count(id) * code::storage_bytes(dtype)).iter().sum::<usize>();
    let work =
        Work { operations: 2 * (heads * s * t * (depth + width)) as u64, bytes: bytes as u64, ..Work::default() };
    let is_by_hand = [&q, &k, &v].iter().all(|matrices| matrices.column == 1) && {
        // A mask's rows are as long as the scores'.
        let of = written::Attention {
            batch: &batch,
            queries: s,
            keys: t,
            depth,
            width,
            scale,
            factors: [q.rows(), k.rows(), v.rows()],
            mask: mask.as_ref().map(Matrices::rows),
            to,
            strides: (&of_batch, y_row),
            dtype,
            work,
        };
        written::attention(b, &of)
    };
    if is_by_hand {
        return Ok(());
    }
    let mut text = Text::default();
    let mut kernel = begin_text("y", &batch, &of_batch);
    for (name, matrices) in [("q", &q), ("k", &k), ("v", &v)] {
        kernel += &matrices.begin(name, &batch);
        // What is read by fours alone has no other binding.
        let has_rest = name != "v" && !depth.is_multiple_of(4);
        if !b.gpu.has_lanes || !matrices.has_quads() || has_rest {
            kernel += &matrices.element(&mut text, name);
        }
    }
    kernel += &match &mask {
        Some(mask) => mask.begin("mask", &batch) + &mask.element(&mut text, "mask"),
        None => "fn mask_of(z: u32) -> u32 { return 0u; }\nfn mask_at(i: u32) -> f32 { return 0.0; }\n".to_string(),
    };
    let mut numbers = vec![("QUERIES", s), ("KEYS", t), ("DEPTH", depth), ("WIDTH", width), ("Y_ROW", y_row)];
    numbers.extend([("Q_ROW", q.row), ("K_ROW", k.row), ("V_ROW", v.row), ("MASK_ROW", mask.map_or(0, |m| m.row))]);
    numbers.extend([("Q_COLUMN", q.column), ("K_COLUMN", k.column), ("V_COLUMN", v.column)]);
    let (template, queries_each) = if b.gpu.has_lanes {
        for (name, matrices) in [("q", &q), ("k", &k), ("v", &v)] {
            kernel += &matrices.quads(&mut text, name);
        }
        numbers.extend([("COLUMNS", width.div_ceil(32)), ("WHOLE", depth / 4 * 4), ("REST", depth % 4)]);
        let is_aligned = of_batch.iter().chain([&y_row, &width]).all(|extent| extent.is_multiple_of(4));
        let store = if dtype == DType::F32 && is_aligned {
            format!("{}(i / 4u, x);\n", text.store(to, "vec4<f32>"))
        } else {
            let store = text.store(to, code::storage_type(dtype));
            let one = |j: usize| {
                format!("if (d + {j}u < {width}u) {{ {store}(i + {j}u, {}); }}\n", stored(dtype, &format!("x[{j}]")))
            };
            (0..4).map(one).collect()
        };
        kernel += &format!("fn finish(i: u32, d: u32, x: vec4<f32>) {{\n{store}}}\n");
        (wgsl::ATTENTION_LANES, 8)
    } else {
        let held = width.next_multiple_of(8);
        numbers.extend([("COLUMNS", held / 8), ("WIDTH_HELD", held), ("VALUES", 8 * held)]);
        let store = text.store(to, code::storage_type(dtype));
        kernel += &format!("fn finish(i: u32, x: f32) {{ {store}(i, {}); }}\n", stored(dtype, "x"));
        (wgsl::ATTENTION, 32)
    };
    let mut parameters = vec![("SCALE", float(scale)), ("LEAST", float(f32::MIN))];
    parameters.extend(numbers.into_iter().map(|(name, value)| (name, value.to_string())));
    kernel += &wgsl::expand(template, &parameters);
    b.push(text, &kernel, [s.div_ceil(queries_each) as u32, heads as u32, 1], "attention", work)
}

/// The mask, whose rows are as long as the scores'. What is read for every row, or head by head, is computed once.
fn mask_of(b: &mut Builder<'_>, id: ValueId, batch: &[usize], s: usize, t: usize) -> Result<Matrices, Unable> {
    let shape = b.shape(id);
    let strides = code::strides(&shape);
    let at = |back: usize| shape.rank().checked_sub(back).map_or((1, 0), |axis| (shape[axis], strides[axis]));
    let row = if at(2).0 == s && s > 1 { t } else { 0 };
    let rank = batch.len() + 2;
    let of_batch = (0..batch.len()).map(|axis| match at(rank - axis) {
        (1, _) => 0,
        (_, stride) => stride,
    });
    Ok(Matrices { operand: b.reread(id)?, batch: of_batch.collect(), row, column: 1 })
}
