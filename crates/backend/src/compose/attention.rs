//! Attention by products and a softmax.

use super::{Composing, known};
use cutover_graph::{
    Dim, Patch, PatchValue,
    ops::{
        Attention, Binary, BinaryFunction, Cast, MultiHeadAttention, Predicate, ProjectedAttention, Range, Reduce,
        ReduceFunction, Shape, UnaryFunction, Variadic, VariadicFunction, Where,
    },
};
use cutover_tensor::{DType, Tensor};

/// Vectors `[b, n, s, h]`.
#[derive(Clone)]
struct Heads {
    value: PatchValue,
    count: i64,
    length: Dim,
    size: i64,
}

/// What scores are made with.
struct Scoring {
    scale: f32,
    soft_cap: f32,
    /// Added to `[b, n, s, t]`, or to `[b, m, n / m, s, t]` where heads are shared.
    biases: Vec<PatchValue>,
}

pub(super) fn attention(mut composing: Composing<'_>, op: &Attention) -> Option<Patch> {
    if composing.is_wanted(3) || composing.input(6).is_some() || op.window != (None, None) {
        return None;
    }
    let packed = composing.floats(0)?.1.len() == 3;
    let (q_heads, kv_heads) = (op.heads.map(|h| h.0 as i64), op.heads.map(|h| h.1 as i64));
    let q = heads(&mut composing, 0, q_heads)?;
    let (k, v) = (heads(&mut composing, 1, kv_heads)?, heads(&mut composing, 2, kv_heads)?);
    let (k, past) = after(&mut composing, 4, k)?;
    let (v, _) = after(&mut composing, 5, v)?;
    let group = q.count.checked_div(k.count)?;
    if group * k.count != q.count || k.count != v.count || k.size != q.size {
        return None;
    }
    let mut mask = match composing.input(3) {
        None => None,
        Some(mask) => {
            let shape = composing.subject.shape(mask)?.to_vec();
            // Fewer keys than there are, and biases by head of heads in groups, are left to the operator.
            let by_head = shape.len().checked_sub(3).is_some_and(|axis| shape[axis].as_const() != Some(1));
            if shape.is_empty() || shape.len() > 4 || *shape.last()? != k.length || (group > 1 && by_head) {
                return None;
            }
            Some(match composing.subject.dtype(mask)? {
                DType::F32 => mask.into(),
                DType::Bool => hide_unless(&mut composing, mask.into(), f32::NEG_INFINITY),
                _ => return None,
            })
        }
    };
    if op.is_causal {
        let hidden = if mask.is_some() { f32::NEG_INFINITY } else { f32::MIN };
        let causal = causal(&mut composing, &q, &k, &past, hidden)?;
        mask = Some(match mask {
            Some(mask) => composing.add(mask, causal),
            None => causal,
        });
    }
    // A query of which every key is hidden gives zeros, which no softmax does.
    let seen = match (mask, composing.input(3)) {
        (Some(mask), Some(_)) => Some(seen(&mut composing, mask)),
        _ => None,
    };
    if let (Some(value), Some(_)) = (mask, seen) {
        let least = composing.number(f32::MIN);
        mask = Some(composing.op(Variadic { function: VariadicFunction::Max }, &[value, least]));
    }
    let is_by_sample =
        composing.input(3).is_some_and(|mask| composing.subject.shape(mask).is_some_and(|s| s.len() == 4));
    if group > 1 && is_by_sample {
        mask = mask.map(|mask| composing.unsqueeze(mask, &[1]));
    }
    let scale = op.scale.unwrap_or(1.0 / (q.size as f32).sqrt());
    let scoring = Scoring { scale, soft_cap: op.soft_cap, biases: mask.into_iter().collect() };
    let mut y = attend(&mut composing, &q, &k, &v, scoring);
    if let Some(seen) = seen {
        y = composing.mul(y, seen);
    }
    let y = if packed { together(&mut composing, y, q.count * v.size) } else { y };
    composing.finish(&[Some(y), Some(k.value), Some(v.value), None])
}

pub(super) fn multi_head(mut composing: Composing<'_>, op: &MultiHeadAttention) -> Option<Patch> {
    if composing.is_wanted(3) || composing.floats(0)?.1.len() != 3 {
        return None;
    }
    let n = op.heads as i64;
    let mut parts = Vec::with_capacity(3);
    let mut start = 0;
    for index in 0..3 {
        let (mut x, shape) = composing.floats(index)?;
        if let Some(bias) = composing.input(3).filter(|_| shape.len() == 3) {
            let width = known(&shape[2])?;
            let bias = composing.slice(bias.into(), 0, start, start + width);
            x = composing.add(x, bias);
            start += width;
        }
        parts.push(split(&mut composing, x, &shape, Some(n))?);
    }
    let (q, k, v) = (parts[0].clone(), parts[1].clone(), parts[2].clone());
    let new = k.length.clone();
    let (k, past) = after(&mut composing, 6, k)?;
    let (v, _) = after(&mut composing, 7, v)?;
    if [k.count, v.count] != [n; 2] || k.size != q.size || (op.masked.is_causal && new != q.length) {
        return None;
    }
    let causal = match op.masked.is_causal {
        true => Some(causal(&mut composing, &q, &k, &past, f32::MIN)?),
        false => None,
    };
    let padding = padding(&mut composing, 4, &k, op.masked.filter)?;
    let biases = masks(&mut composing, causal, padding).into_iter();
    let biases = biases.chain(composing.input(5).map(PatchValue::from)).collect();
    let scale = op.masked.scale.unwrap_or(1.0 / (q.size as f32).sqrt());
    let y = attend(&mut composing, &q, &k, &v, Scoring { scale, soft_cap: 0.0, biases });
    let y = together(&mut composing, y, n * v.size);
    composing.finish(&[Some(y), Some(k.value), Some(v.value), None])
}

pub(super) fn projected(mut composing: Composing<'_>, op: &ProjectedAttention) -> Option<Patch> {
    let ((x, x_shape), (weight, shape)) = (composing.floats(0)?, composing.floats(1)?);
    if x_shape.len() != 3 || shape.len() != 2 {
        return None;
    }
    let (n, columns) = (op.heads as i64, known(&shape[1])?);
    let (width, v_width) = op.sizes.map_or((columns / 3, columns / 3), |(q, v)| (q as i64, v as i64));
    if 2 * width + v_width != columns || width % n != 0 || v_width % n != 0 {
        return None;
    }
    let mut projected = composing.matmul(x, weight);
    if let Some(bias) = composing.input(2) {
        projected = composing.add(projected, bias.into());
    }
    let part = |composing: &mut Composing<'_>, start: i64, width: i64| {
        let slice = composing.slice(projected, -1, start, start + width);
        let shape = [x_shape[0].clone(), x_shape[1].clone(), Dim::from(width)];
        split(composing, slice, &shape, Some(n))
    };
    let q = part(&mut composing, 0, width)?;
    let (mut k, mut v) = (part(&mut composing, width, width)?, part(&mut composing, 2 * width, v_width)?);
    let mut past = Dim::Const(0);
    if let Some(both) = composing.input(4) {
        let [_, _, _, length, _] = composing.subject.shape(both)? else { return None };
        past = length.clone();
        for (at, new) in [&mut k, &mut v].into_iter().enumerate() {
            let old = composing.slice(both.into(), 0, at as i64, at as i64 + 1);
            let axes = composing.integers(&[0]);
            let old = composing.op(cutover_graph::ops::Squeeze, &[old, axes]);
            new.value = composing.concat(&[old, new.value], 2);
            new.length = past.clone() + new.length.clone();
        }
    }
    let causal = match op.masked.is_causal {
        true => Some(causal(&mut composing, &q, &k, &past, f32::MIN)?),
        false => None,
    };
    let padding = padding(&mut composing, 3, &k, op.masked.filter)?;
    let biases = masks(&mut composing, causal, padding).into_iter();
    let biases = biases.chain(composing.input(5).map(PatchValue::from)).collect();
    let scale = op.masked.scale.unwrap_or(1.0 / (q.size as f32).sqrt());
    let y = attend(&mut composing, &q, &k, &v, Scoring { scale, soft_cap: 0.0, biases });
    let y = together(&mut composing, y, n * v.size);
    let present = composing.is_wanted(1).then(|| {
        let both = [&k, &v].map(|heads| composing.unsqueeze(heads.value, &[0]));
        composing.concat(&both, 0)
    });
    composing.finish(&[Some(y), present])
}

/// Input `index` by head.
fn heads(composing: &mut Composing<'_>, index: usize, count: Option<i64>) -> Option<Heads> {
    let (value, shape) = composing.floats(index)?;
    split(composing, value, &shape, count)
}

/// `[b, n, s, h]` as it is, `[b, s, n·h]` with the number of heads.
fn split(composing: &mut Composing<'_>, value: PatchValue, shape: &[Dim], count: Option<i64>) -> Option<Heads> {
    match (shape, count) {
        ([_, n, length, size], given) => {
            let count = known(n).filter(|&n| given.is_none_or(|given| given == n))?;
            Some(Heads { value, count, length: length.clone(), size: known(size)? })
        }
        ([_, length, hidden], Some(count)) => {
            let size = known(hidden)? / count;
            if size * count != known(hidden)? || size == 0 {
                return None;
            }
            let apart = composing.reshape(value, &[0, 0, count, size]);
            let value = composing.transpose(apart, &[0, 2, 1, 3]);
            Some(Heads { value, count, length: length.clone(), size })
        }
        _ => None,
    }
}

/// `[b, n, s, h]` as `[b, s, n·h]`.
fn together(composing: &mut Composing<'_>, value: PatchValue, width: i64) -> PatchValue {
    let by_position = composing.transpose(value, &[0, 2, 1, 3]);
    composing.reshape(by_position, &[0, 0, width])
}

/// `new` after those of input `index`, and how many these are.
fn after(composing: &mut Composing<'_>, index: usize, new: Heads) -> Option<(Heads, Dim)> {
    let Some(past) = composing.input(index) else { return Some((new, Dim::Const(0))) };
    let [_, _, length, _] = composing.subject.shape(past)? else { return None };
    let length = length.clone();
    let value = composing.concat(&[past.into(), new.value], 2);
    Some((Heads { value, length: length.clone() + new.length.clone(), ..new }, length))
}

fn attend(composing: &mut Composing<'_>, q: &Heads, k: &Heads, v: &Heads, scoring: Scoring) -> PatchValue {
    let group = q.count / k.count;
    let mut queries = composing.times(q.value, scoring.scale);
    let mut keys = composing.transpose(k.value, &[0, 1, 3, 2]);
    let mut values = v.value;
    if group > 1 {
        // `[b, m, g, s, h]`, and one more axis for all that is shared.
        queries = composing.reshape(queries, &[0, k.count, group, -1, q.size]);
        (keys, values) = (composing.unsqueeze(keys, &[2]), composing.unsqueeze(values, &[2]));
    }
    let mut scores = composing.matmul(queries, keys);
    if scoring.soft_cap > 0.0 {
        scores = composing.times(scores, 1.0 / scoring.soft_cap);
        scores = composing.unary(UnaryFunction::Tanh, scores);
        scores = composing.times(scores, scoring.soft_cap);
    }
    for bias in scoring.biases {
        scores = composing.add(scores, bias);
    }
    let weights = composing.softmax(scores);
    let y = composing.matmul(weights, values);
    if group > 1 { composing.reshape(y, &[0, q.count, -1, v.size]) } else { y }
}

/// 0 where `condition` holds, `hidden` elsewhere.
fn hide_unless(composing: &mut Composing<'_>, condition: PatchValue, hidden: f32) -> PatchValue {
    let (zero, hidden) = (composing.number(0.0), composing.number(hidden));
    composing.op(Where, &[condition, zero, hidden])
}

/// `[s, t]`: 0 where the key is none after the query, which stands after `past` keys.
fn causal(composing: &mut Composing<'_>, q: &Heads, k: &Heads, past: &Dim, hidden: f32) -> Option<PatchValue> {
    if let (Some(s), Some(t), Some(past)) = (q.length.as_const(), k.length.as_const(), past.as_const()) {
        let count = s.checked_mul(t).filter(|&count| count < 1 << 28)?;
        let (s, t) = (usize::try_from(s).ok()?, usize::try_from(t).ok()?);
        let mut mask = Vec::with_capacity(usize::try_from(count).ok()?);
        for at in 0..s as i64 {
            mask.extend((0..t as i64).map(|key| if key <= at.saturating_add(past) { 0.0 } else { hidden }));
        }
        return Some(composing.constant(Tensor::from_vec([s, t], mask).ok()?));
    }
    let (queries, keys) = (positions(composing, q.value), positions(composing, k.value));
    let mut at = queries;
    if past.as_const() != Some(0) {
        // What comes before are the keys that are no new ones: as many as there are queries less.
        let index = if composing.input(6).is_some() { 6 } else { 4 };
        let (axis, source) = match composing.subject.shape(composing.input(index)?)?.len() {
            5 => (3, composing.input(index)?),
            _ => (2, composing.input(index)?),
        };
        let count = composing.op(Shape { start: axis, end: Some(axis + 1) }, &[source.into()]);
        at = composing.add(at, count);
    }
    let at = composing.unsqueeze(at, &[1]);
    let seen = composing.op(Binary { function: BinaryFunction::LessOrEqual }, &[keys, at]);
    Some(hide_unless(composing, seen, hidden))
}

/// 0, 1, … of the length of `[b, n, s, h]`.
fn positions(composing: &mut Composing<'_>, vectors: PatchValue) -> PatchValue {
    let length = composing.op(Shape { start: 2, end: Some(3) }, &[vectors]);
    let length = composing.reshape(length, &[]);
    let (zero, one) = (composing.constant(Tensor::scalar(0i64)), composing.constant(Tensor::scalar(1i64)));
    composing.op(Range, &[zero, length, one])
}

/// What a mask of padding adds to scores: nothing without one, `None` where it is none of the two forms that are common.
fn padding(composing: &mut Composing<'_>, index: usize, k: &Heads, filter: f32) -> Option<Option<PatchValue>> {
    let Some(mask) = composing.input(index) else { return Some(None) };
    if composing.subject.dtype(mask)? != DType::I32 {
        return None;
    }
    let batch = composing.floats(0)?.1.first()?.clone();
    let shown = match composing.subject.shape(mask)? {
        [rows, columns] if *rows == batch && *columns == k.length => {
            let zero = composing.constant(Tensor::scalar(0i32));
            let shown = composing.binary(BinaryFunction::Greater, mask.into(), zero);
            composing.unsqueeze(shown, &[1, 2])
        }
        [ends] if *ends == batch => {
            let keys = positions(composing, k.value);
            let keys = composing.op(Cast::to(DType::I32), &[keys]);
            let ends = composing.unsqueeze(mask.into(), &[1, 2, 3]);
            composing.binary(BinaryFunction::Less, keys, ends)
        }
        _ => return None,
    };
    Some(Some(hide_unless(composing, shown, filter)))
}

/// Both masks in one: a key that both hide is not hidden twice.
fn masks(composing: &mut Composing<'_>, a: Option<PatchValue>, b: Option<PatchValue>) -> Option<PatchValue> {
    match (a, b) {
        (Some(a), Some(b)) => Some(composing.op(Variadic { function: VariadicFunction::Min }, &[a, b])),
        (a, b) => a.or(b),
    }
}

/// `[.., s, 1]`: 1 of queries that see a key, 0 of others.
fn seen(composing: &mut Composing<'_>, mask: PatchValue) -> PatchValue {
    let axes = composing.integers(&[-1]);
    let largest = Reduce { function: ReduceFunction::Max, keep_dims: true, noop_with_empty_axes: false };
    let largest = composing.op(largest, &[mask, axes]);
    let none = composing.number(f32::NEG_INFINITY);
    let hidden = composing.binary(BinaryFunction::Equal, largest, none);
    let seen = composing.op(Predicate::Not, &[hidden]);
    composing.op(Cast::to(DType::F32), &[seen])
}
