//! Attention of language models with a cache, as ONNX Runtime fuses it.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    heads::{Bias, HeadDims, Heads, attend, soft_cap, softmax},
    movement,
    rotary_embedding::{Angles, Rotation},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// ONNX Runtime's `GroupQueryAttention`: `softmax(cap(scale · Q · Kᵀ) + bias) · V` by head, where query heads share those of keys and
/// values in groups, and these come from a cache that the new ones are written into.
///
/// Inputs: queries `[b, s, n·h]`, keys and values `[b, s, m·h]`, or all three side by side `[b, s, (n + 2·m)·h]`; caches of keys and
/// values `[b, m, c, h]`; of each sample, how many keys there are with the new ones, less 1; the largest of these numbers, not less 1;
/// cosines and sines `[max, r / 2]`; positions `[b, s]`; what is added to scores `[b or 1, n or 1, s, t]`; sinks `[n]`; of each sample,
/// how many of the `s` there are (14 is the input's index). Outputs: `[b, s, n·h]`, the caches with what is new, as long as they were or
/// as `t`, and the scores `[b, n, s, t]`, 0 of keys that take no part.
///
/// The last of `k` keys stands at `k − 1`, and so does the last query. Queries past the number of a sample give zeros.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupQueryAttention {
    /// Of queries, then of keys and values.
    pub heads: (usize, usize),
    /// `1 / √h` without it.
    pub scale: Option<f32>,
    pub soft_cap: f32,
    /// No key after the query takes part.
    pub is_causal: bool,
    /// How many keys a query sees, itself included.
    pub window: Option<usize>,
    /// Queries and keys are rotated; neighbours pair up where it is so.
    pub rotary: Option<bool>,
    /// A sink of score 0 where there is no input of such.
    pub smooth: bool,
    /// 0, or 1 for scores before the softmax, 2 for those after.
    pub scores: i64,
}

impl GroupQueryAttention {
    const QUERY_COUNTS: usize = 16;
}

impl Operator for GroupQueryAttention {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(7..=17)?;
        let heads = (node.count("num_heads", 0)?, node.count("kv_num_heads", 0)?);
        if heads.0 == 0 || heads.1 == 0 || heads.0 % heads.1 != 0 {
            let (q, kv) = heads;
            return Err(node.corrupt(format!("{q} heads of queries, a multiple of the {kv} of keys expected")));
        }
        if node.has_input(1) != node.has_input(2) || node.has_input(3) != node.has_input(4) {
            return Err(node.corrupt("expected values with their keys"));
        }
        for (name, kept) in [("k_quant_type", "NONE"), ("v_quant_type", "NONE")] {
            let value = node.string(name, kept)?;
            if value != kept {
                return Err(node.unsupported(format!("{name} {value} (only {kept})")));
            }
        }
        // Of quantized caches and of norms alone.
        for name in ["kv_cache_bit_width", "cache_indirection"] {
            node.optional_int(name)?;
        }
        for name in ["qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon"] {
            node.optional_float(name)?;
        }
        for (index, name) in [(12, "k_scale"), (13, "v_scale"), (14, "q_norm_weight"), (15, "k_norm_weight")] {
            if node.has_input(index) {
                return Err(node.unsupported(name));
            }
        }
        if node.flag("sliding_window_cache", false)? {
            return Err(node.unsupported("sliding_window_cache 1"));
        }
        let is_causal = node.flag("causal", true)?;
        let window = match node.int("local_window_size", -1)? {
            -1 | 0 => None,
            width => Some(usize::try_from(width).map_err(|_| node.corrupt(format!("local_window_size {width}")))?),
        };
        if window.is_some() && !is_causal {
            return Err(node.corrupt("has a local_window_size, and is not causal"));
        }
        let interleaved = node.flag("rotary_interleaved", false)?;
        let rotary = node.flag("do_rotary", false)?.then_some(interleaved);
        if rotary.is_some() && !(node.has_input(7) && node.has_input(8)) {
            return Err(node.corrupt("rotates without cosines and sines"));
        }
        let scores = node.int("qk_output", 0)?;
        if !(0..=2).contains(&scores) || (scores == 0 && node.outputs > 3) {
            return Err(node.corrupt(format!("qk_output {scores} with {} outputs", node.outputs)));
        }
        let scale = Some(node.float("scale", 0.0)?).filter(|&scale| scale != 0.0);
        let (soft_cap, smooth) = (node.float("softcap", 0.0)?, node.int("smooth_softmax", -1)? == 1);
        Ok(GroupQueryAttention { heads, scale, soft_cap, is_causal, window, rotary, smooth, scores }.into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = Spelling::new("GroupQueryAttention").in_domain("com.microsoft");
        if let Some(scale) = self.scale {
            spelling = spelling.with("scale", scale);
        }
        if !self.is_causal {
            spelling = spelling.with("causal", 0);
        }
        spelling
            .with("num_heads", self.heads.0 as i64)
            .with("kv_num_heads", self.heads.1 as i64)
            .with("softcap", self.soft_cap)
            .with("local_window_size", self.window.map_or(-1, |width| width as i64))
            .with("do_rotary", i64::from(self.rotary.is_some()))
            .with("rotary_interleaved", i64::from(self.rotary == Some(true)))
            .with("smooth_softmax", if self.smooth { 1 } else { -1 })
            .with("qk_output", self.scores)
    }

    fn infer(&self, inputs: Facts<'_>, context: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (q, dtype) = (inputs.tensor(0)?, inputs.tensor(0)?.dtype);
        let is_packed = inputs.get(1).is_none();
        for index in 1..inputs.len() {
            inputs.optional_tensor(index)?;
        }
        (1..5).try_for_each(|index| inputs.same_dtype(0, index))?;
        let (heads, kv_heads) = self.heads;
        let total = inputs.tensor(6)?.value.as_ref().and_then(|v| v.first().cloned());
        let total = total.unwrap_or_else(|| context.fresh("keys"));
        let unknown = || TensorFact::unknown_rank(dtype);
        let of_queries = if is_packed { heads + 2 * kv_heads } else { heads };
        let [y, cache, scores] = match (q.rank(), HeadDims::of(q, Some(of_queries))?) {
            (Some(3), Some(q)) => {
                let q = HeadDims { heads: Dim::from(heads), ..q };
                let length = match inputs.optional_tensor(3)? {
                    None => Some(total.clone()),
                    Some(cache) => HeadDims::of(cache, Some(kv_heads))?.map(|cache| cache.length.maximum(&total)),
                };
                let cache = length.map(|length| HeadDims { heads: Dim::from(kv_heads), length, ..q.clone() });
                let scores = HeadDims { size: total, ..q.clone() }.by_head(dtype);
                [q.by_position(dtype), cache.map_or_else(unknown, |cache| cache.by_head(dtype)), scores]
            }
            (None, _) => [unknown(), unknown(), unknown()],
            _ => return Err(OpError::input(format!("expected queries [b, s, d], got {q}"))),
        };
        Ok(vec![y.into(), cache.clone().into(), cache.into(), scores.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let query = inputs.tensor(0)?;
        let dtype = query.dtype();
        let (n, m) = self.heads;
        if query.shape().rank() != 3 {
            return Err(OpError::input(format!("expected queries [b, s, d], got {}", query.shape())));
        }
        let (mut q, mut k, v) = match (inputs.optional_tensor(1)?, inputs.optional_tensor(2)?) {
            (Some(key), Some(value)) => {
                (Heads::of(query, Some(n))?, Heads::of(key, Some(m))?, Heads::of(value, Some(m))?)
            }
            _ => {
                let all = Heads::of(query, Some(n + 2 * m))?;
                (all.slice(0, n), all.slice(n, m), all.slice(n + m, m))
            }
        };
        let (batch, length) = (q.batch, q.length);
        if [k.batch, v.batch] != [batch; 2] || [k.length, v.length] != [length; 2] || [k.size, v.size] != [q.size; 2] {
            return Err(OpError::input("queries, keys and values don't fit together"));
        }
        let total = movement::integer(inputs, 6)?;
        let total = usize::try_from(total).map_err(|_| OpError::input(format!("{total} keys in all")))?;
        let counts = self.counts(inputs, [batch, length, total])?;
        if let Some(interleaved) = self.rotary {
            let angles = Angles::new(inputs.tensor(7)?, inputs.tensor(8)?)?;
            let rotation = Rotation { size: angles.width.checked_mul(2), interleaved };
            let given = inputs.get(9).map(|_| inputs.integers(9)).transpose()?;
            if given.as_ref().is_some_and(|given| given.len() != batch * length) {
                return Err(OpError::input(format!("positions [{batch}, {length}] expected")));
            }
            let position = |sample: usize, at: usize| {
                let count = &counts[sample];
                Ok(match &given {
                    // Nobody reads what is rotated past the number there is.
                    _ if at >= count.queries => 0,
                    // So ONNX Runtime has it of a first prompt.
                    Some(given) if length == total => given[0].saturating_add(at as i64),
                    Some(given) => given[sample * length + at],
                    None => (count.before + at) as i64,
                })
            };
            rotation.apply(&mut q, &angles, position)?;
            rotation.apply(&mut k, &angles, position)?;
        }
        let cache = |index: usize, new: &Heads| -> Result<Heads, OpError> {
            let old = inputs.optional_tensor(index)?.map(|old| Heads::of(old, Some(m))).transpose()?;
            let long = old.as_ref().map_or(0, |old| old.length);
            let capacity = long.max(total);
            let mut cache = Heads { length: capacity, values: Vec::new(), ..*new };
            cache.values = vec![0.0; context.bounded_len(&[batch, m, capacity, new.size])?];
            for (row, to) in cache.values.chunks_exact_mut(capacity.saturating_mul(new.size).max(1)).enumerate() {
                let (sample, head) = (row / m, row % m);
                let Counts { before, queries, .. } = counts[sample];
                let mut vectors = to.chunks_exact_mut(new.size.max(1));
                if let Some(old) = &old {
                    if old.batch != batch || old.size != new.size || old.length < before {
                        return Err(OpError::input(format!("a cache of {} keys, {before} expected", old.length)));
                    }
                    vectors
                        .by_ref()
                        .take(before)
                        .enumerate()
                        .for_each(|(at, to)| to.copy_from_slice(old.vector(sample, head, at)));
                } else if before > 0 {
                    return Err(OpError::input(format!("{before} keys from no cache")));
                }
                vectors.take(queries).enumerate().for_each(|(at, to)| to.copy_from_slice(new.vector(sample, head, at)));
            }
            Ok(cache)
        };
        let (keys, values) = (cache(3, &k)?, cache(4, &v)?);
        let all = [batch, n, length, total];
        let bias = inputs.optional_tensor(10)?.map(|bias| Bias::of(bias, all, false)).transpose()?;
        let sinks = inputs.optional_tensor(11)?.map(Wide::floats).transpose()?;
        if sinks.as_ref().is_some_and(|sinks| sinks.len() != n) {
            return Err(OpError::input(format!("sinks [{n}] expected")));
        }
        let scale = self.scale.map_or_else(|| 1.0 / (q.size as f64).sqrt(), f64::from);
        let with_scores = context.outputs > 3;
        let mut scores = Vec::with_capacity(if with_scores { context.bounded_len(&all)? } else { 0 });
        let y = attend((&q, &keys, &values), context, |row, weights| {
            let count = &counts[row.batch];
            let position = count.before + row.query;
            let last = if self.is_causal { count.keys.min(position + 1) } else { count.keys };
            let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window)).min(last);
            let (first, last) = if row.query < count.queries { (first, last) } else { (0, 0) };
            weights[..first].fill(f64::NEG_INFINITY);
            weights[last..].fill(f64::NEG_INFINITY);
            for (key, x) in weights.iter_mut().enumerate().take(last).skip(first) {
                *x = soft_cap(*x * scale, self.soft_cap) + bias.as_ref().map_or(0.0, |bias| bias.at(row, key));
            }
            if with_scores && self.scores == 1 {
                // 0, not −∞, of keys that take no part.
                scores.extend(weights[..total].iter().map(|&x| if x == f64::NEG_INFINITY { 0.0 } else { x }));
            }
            softmax(weights, sinks.as_ref().map(|sinks| sinks[row.head]).or(self.smooth.then_some(0.0)));
            if with_scores && self.scores == 2 {
                scores.extend_from_slice(&weights[..total]);
            }
            Ok(())
        })?;
        let mut outputs = vec![y.by_position(dtype)?, keys.by_head(dtype)?, values.by_head(dtype)?];
        if with_scores {
            outputs.push(Wide::Float(scores).narrow(dtype, all)?.into());
        }
        Ok(outputs)
    }
}

/// Of one sample: the keys there are in the end, those from the cache, and the queries.
struct Counts {
    keys: usize,
    before: usize,
    queries: usize,
}

impl GroupQueryAttention {
    fn counts(&self, inputs: Inputs<'_>, [batch, length, total]: [usize; 3]) -> Result<Vec<Counts>, OpError> {
        let keys = inputs.integers(5)?;
        let queries = inputs.get(Self::QUERY_COUNTS).map(|_| inputs.integers(Self::QUERY_COUNTS)).transpose()?;
        if keys.len() != batch || queries.as_ref().is_some_and(|queries| queries.len() != batch) {
            return Err(OpError::input(format!("a number of keys for each of {batch} samples expected")));
        }
        let count = |sample: usize| {
            let last = keys[sample];
            let keys = usize::try_from(last).ok().and_then(|last| last.checked_add(1)).filter(|&keys| keys <= total);
            let keys = keys.ok_or_else(|| OpError::input(format!("keys up to {last}, of {total} in all")))?;
            let queries = match &queries {
                None => keys.min(length),
                Some(queries) => {
                    let given = queries[sample];
                    let within = usize::try_from(given).ok().filter(|&given| given <= keys.min(length));
                    within.ok_or_else(|| OpError::input(format!("{given} queries of {length}, with {keys} keys")))?
                }
            };
            Ok(Counts { keys, before: keys - queries, queries })
        };
        (0..batch).map(count).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.GroupQueryAttention", 1)
            .with("softcap", 0.5f32)
            .with("local_window_size", 1)
            .with("num_heads", 2)
            .with("kv_num_heads", 1)
            .wave(&[1, 2, 16])
            .wave(&[1, 2, 8])
            .wave(&[1, 2, 8])
            .omitted()
            .omitted()
            .input(tensor::<i32>(&[1], &[1]))
            .input(tensor::<i32>(&[], &[2]))
            .gives([
                f32s(
                    &[1, 2, 16],
                    &[
                        0.25, -0.75, 1.0, 0.0, -1.0, 0.75, -0.25, -1.25, 0.25, -0.75, 1.0, 0.0, -1.0, 0.75, -0.25,
                        -1.25, 0.5, -0.5, 1.25, 0.25, -0.75, 1.0, 0.0, -1.0, 0.5, -0.5, 1.25, 0.25, -0.75, 1.0, 0.0,
                        -1.0,
                    ],
                ),
                f32s(
                    &[1, 1, 2, 8],
                    &[-0.5, 1.25, 0.25, -0.75, 1.0, 0.0, -1.0, 0.75, -0.25, -1.25, 0.5, -0.5, 1.25, 0.25, -0.75, 1.0],
                ),
                f32s(
                    &[1, 1, 2, 8],
                    &[0.25, -0.75, 1.0, 0.0, -1.0, 0.75, -0.25, -1.25, 0.5, -0.5, 1.25, 0.25, -0.75, 1.0, 0.0, -1.0],
                ),
            ]);
        case("com.microsoft.GroupQueryAttention", 1)
            .with("qk_output", 1)
            .with("scale", 0.25f32)
            .with("num_heads", 2)
            .with("kv_num_heads", 1)
            .wave(&[1, 1, 16])
            .wave(&[1, 1, 8])
            .wave(&[1, 1, 8])
            .wave(&[1, 1, 3, 8])
            .wave(&[1, 1, 3, 8])
            .input(tensor::<i32>(&[1], &[1]))
            .input(tensor::<i32>(&[], &[2]))
            .omitted()
            .omitted()
            .omitted()
            .wave(&[1, 2, 1, 2])
            .wave(&[2])
            .gives([
                f32s(
                    &[1, 1, 16],
                    &[
                        -0.723281, 0.449445, -0.0257944, -0.955776, 0.21695, -0.25829, 0.914436, -0.0155459, 0.0893732,
                        -0.390282, 0.561097, -0.067868, -0.547523, 0.403856, -0.0757996, -0.704764,
                    ],
                ),
                f32s(
                    &[1, 1, 3, 8],
                    &[
                        1.0, 0.0, -1.0, 0.75, -0.25, -1.25, 0.5, -0.5, -0.5, 1.25, 0.25, -0.75, 1.0, 0.0, -1.0, 0.75,
                        0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                    ],
                ),
                f32s(
                    &[1, 1, 3, 8],
                    &[
                        -1.0, 0.75, -0.25, -1.25, 0.5, -0.5, 1.25, 0.25, 0.25, -0.75, 1.0, 0.0, -1.0, 0.75, -0.25,
                        -1.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
                    ],
                ),
                f32s(&[1, 2, 1, 2], &[1.14062, -0.390625, -1.42188, 0.9375]),
            ]);
    }

    #[test]
    fn caches_hold_what_they_are_asked_for() {
        let of = |last: i32, total: i32| {
            let heads = case("com.microsoft.GroupQueryAttention", 1).with("num_heads", 1).with("kv_num_heads", 1);
            let new = heads.wave(&[1, 1, 2]).wave(&[1, 1, 2]).wave(&[1, 1, 2]).wave(&[1, 1, 2, 2]).wave(&[1, 1, 2, 2]);
            new.input(tensor::<i32>(&[1], &[last])).input(tensor::<i32>(&[], &[total]))
        };
        of(3, 4).fails("a cache of 2 keys, 3 expected");
        of(4, 4).fails("keys up to 4, of 4 in all");
        of(-1, 4).fails("keys up to -1");
        of(1, -1).fails("-1 keys in all");
        of(1, 2).with("k_quant_type", "PER_TENSOR").fails("k_quant_type PER_TENSOR");
        of(1, 2).with("sliding_window_cache", 1).fails("sliding_window_cache 1");
    }
}
