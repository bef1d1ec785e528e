//! Scaled dot-product attention.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    heads::{Bias, HeadDims, Heads, attend, soft_cap, softmax},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// ONNX's `Attention`: `Y = softmax(cap(scale · Q · Kᵀ) + bias) · V` by head (Vaswani et al., "Attention Is All You Need", 2017).
///
/// Inputs: `Q [b, n, s, h]`, `K [b, m, l, h]`, `V [b, m, l, v]`, or `[b, s, n·h]`, `[b, l, m·h]`, `[b, l, m·v]` with both numbers of
/// heads; a mask that broadcasts to `[b, n, s, t]`, false or −∞ where a key takes no part, with fewer keys than there are where the
/// last take none; past keys and values `[b, m, p, h]`, which come before the new ones (`t = p + l`); of each sample, how many keys
/// there are. Outputs: `Y`, of the form of `Q`; keys and values `[b, m, t, h]`; the scores `[b, n, s, t]` at some stage.
///
/// Query `i` stands at `i + offset`: of `p`, or of the number of keys less `s` where that is given. A query without any key gives zeros.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Of queries, then of keys and values, where these are `[b, s, n·h]`.
    pub heads: Option<(usize, usize)>,
    /// `1 / √h` without it.
    pub scale: Option<f32>,
    /// Scores are `cap · tanh(score / cap)` where it is above 0.
    pub soft_cap: f32,
    /// No key after the query takes part.
    pub is_causal: bool,
    /// How far before and after the query a key may stand.
    pub window: (Option<usize>, Option<usize>),
    pub scores: Scores,
    /// The type that ONNX rounds to before the softmax; here that is always computed wider.
    pub softmax_precision: Option<DType>,
}

/// The stage of the scores that are an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    Products,
    Capped,
    Biased,
    Weights,
}

impl Operator for Attention {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=if node.opset < 24 { 6 } else { 7 })?;
        if node.has_input(4) != node.has_input(5) || (node.has_input(4) && node.has_input(6)) {
            return Err(node.corrupt("expected past keys with past values, or else a number of keys"));
        }
        let heads = match (node.count("q_num_heads", 0)?, node.count("kv_num_heads", 0)?) {
            (0, 0) => None,
            (q, kv) if q == 0 || kv == 0 => return Err(node.corrupt("expected both numbers of heads, or none")),
            both => Some(both),
        };
        let scores = match node.int("qk_matmul_output_mode", 0)? {
            0 => Scores::Products,
            1 => Scores::Capped,
            2 => Scores::Biased,
            3 => Scores::Weights,
            other => return Err(node.corrupt(format!("qk_matmul_output_mode {other}, expected 0 to 3"))),
        };
        let mut side = |name: &str| match node.int(name, -1)? {
            -1 => Ok(None),
            width => usize::try_from(width)
                .map(Some)
                .map_err(|_| node.corrupt(format!("attribute '{name}' is {width}, expected -1 or more"))),
        };
        let window = (side("left_window_size")?, side("right_window_size")?);
        let softmax_precision = softmax_precision(node)?;
        let scale = node.optional_float("scale")?;
        let (soft_cap, is_causal) = (node.float("softcap", 0.0)?, node.flag("is_causal", false)?);
        Ok(Attention { heads, scale, soft_cap, is_causal, window, scores, softmax_precision }.into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = Spelling::new("Attention").since(if self.window == (None, None) { 24 } else { 25 });
        if let Some((q, kv)) = self.heads {
            spelling = spelling.with("q_num_heads", q as i64).with("kv_num_heads", kv as i64);
        }
        if let Some(scale) = self.scale {
            spelling = spelling.with("scale", scale);
        }
        for (name, side) in [("left_window_size", self.window.0), ("right_window_size", self.window.1)] {
            if let Some(width) = side {
                spelling = spelling.with(name, width as i64);
            }
        }
        if let Some(dtype) = self.softmax_precision {
            spelling = spelling.with("softmax_precision", i64::from(dtype.onnx_code()));
        }
        spelling
            .with("softcap", self.soft_cap)
            .with("is_causal", i64::from(self.is_causal))
            .with("qk_matmul_output_mode", self.scores as i64)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (q, k, v) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        for index in 3..inputs.len() {
            inputs.optional_tensor(index)?;
        }
        inputs.same_dtype(0, 1)?;
        inputs.same_dtype(0, 4)?;
        inputs.same_dtype(2, 5)?;
        let (q_heads, kv_heads) = (self.heads.map(|h| h.0), self.heads.map(|h| h.1));
        // Of 4 axes or of 3 together, or the output would be of neither form.
        let ranks: Vec<usize> = [q, k, v].iter().filter_map(|fact| fact.rank()).collect();
        if ranks.iter().any(|&rank| rank != ranks[0]) {
            return Err(OpError::input(format!("queries, keys and values of one rank expected, got {q}, {k}, {v}")));
        }
        let (qs, ks, vs) = (HeadDims::of(q, q_heads)?, HeadDims::of(k, kv_heads)?, HeadDims::of(v, kv_heads)?);
        let past = match inputs.optional_tensor(4)? {
            None => Some(Dim::Const(0)),
            Some(past) => HeadDims::of(past, None)?.map(|past| past.length),
        };
        let unknown = |dtype| TensorFact::unknown_rank(dtype);
        let y = match (&qs, &vs) {
            (Some(qs), Some(vs)) => {
                let y = HeadDims { size: vs.size.clone(), ..qs.clone() };
                if q.rank() == Some(3) { y.by_position(q.dtype) } else { y.by_head(q.dtype) }
            }
            _ => unknown(q.dtype),
        };
        let present = |dims: &Option<HeadDims>, dtype: DType| match (dims, &past) {
            (Some(dims), Some(past)) => {
                HeadDims { length: past.clone() + dims.length.clone(), ..dims.clone() }.by_head(dtype)
            }
            _ => unknown(dtype),
        };
        let scores = match (&qs, &ks, &past) {
            (Some(qs), Some(ks), Some(past)) => {
                HeadDims { size: past.clone() + ks.length.clone(), ..qs.clone() }.by_head(q.dtype)
            }
            _ => unknown(q.dtype),
        };
        Ok(vec![y.into(), present(&ks, k.dtype).into(), present(&vs, v.dtype).into(), scores.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (query, key, value) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        let (q_heads, kv_heads) = (self.heads.map(|h| h.0), self.heads.map(|h| h.1));
        let q = Heads::of(query, q_heads)?;
        let with_past = |new: Heads, past: usize| match inputs.optional_tensor(past)? {
            None => Ok::<_, OpError>((0, new)),
            Some(past) => {
                let past = Heads::of(past, None)?;
                Ok((past.length, past.followed_by(&new)?))
            }
        };
        let (past, k) = with_past(Heads::of(key, kv_heads)?, 4)?;
        let (past_of_v, v) = with_past(Heads::of(value, kv_heads)?, 5)?;
        if past != past_of_v {
            return Err(OpError::input(format!("{past} past keys and {past_of_v} past values")));
        }
        let all = [q.batch, q.heads, q.length, k.length];
        let bias = inputs.optional_tensor(3)?.map(|mask| Bias::of(mask, all, true)).transpose()?;
        if bias.as_ref().is_some_and(|bias| bias.keys == 1 && k.length > 1) {
            // ONNX says of such a mask both that it is broadcast and that it is padded.
            return Err(OpError::unsupported(format!("a mask of one key, where there are {}", k.length)));
        }
        let counts = inputs.get(6).map(|_| inputs.integers(6)).transpose()?;
        if counts.as_ref().is_some_and(|counts| counts.len() != q.batch) {
            return Err(OpError::input(format!("a number of keys for each of {} samples expected", q.batch)));
        }
        let scale = self.scale.map_or_else(|| 1.0 / (q.size as f64).sqrt(), f64::from);
        let with_scores = context.outputs > 3;
        let mut scores = Vec::with_capacity(if with_scores { context.bounded_len(&all)? } else { 0 });
        let mut biases = vec![0.0; k.length];
        let y = attend((&q, &k, &v), context, |row, weights| {
            let count = counts.as_ref().map(|counts| counts[row.batch]);
            let offset = count.map_or(past as i64, |count| count.saturating_sub(q.length as i64));
            let at = offset.saturating_add(row.query as i64);
            for (key, to) in biases.iter_mut().enumerate() {
                let hidden = self.hides(at, key as i64) || count.is_some_and(|count| key as i64 >= count);
                let given = bias.as_ref().map_or(0.0, |bias| bias.at(row, key));
                *to = if hidden { f64::NEG_INFINITY } else { given };
            }
            let mut keep = |stage: Scores, values: &[f64]| {
                if with_scores && stage == self.scores {
                    scores.extend_from_slice(values);
                }
            };
            weights.iter_mut().for_each(|x| *x *= scale);
            keep(Scores::Products, weights);
            weights.iter_mut().for_each(|x| *x = soft_cap(*x, self.soft_cap));
            keep(Scores::Capped, weights);
            weights.iter_mut().zip(&biases).for_each(|(x, bias)| *x += bias);
            keep(Scores::Biased, weights);
            match biases.iter().all(|&bias| bias == f64::NEG_INFINITY) {
                true => weights.fill(0.0),
                false => softmax(weights, None),
            }
            keep(Scores::Weights, weights);
            Ok(())
        })?;
        let dtype = query.dtype();
        let y = if query.shape().rank() == 3 { y.by_position(dtype)? } else { y.by_head(dtype)? };
        let mut outputs = vec![y, k.by_head(key.dtype())?, v.by_head(value.dtype())?];
        if with_scores {
            outputs.push(Wide::Float(scores).narrow(dtype, all)?.into());
        }
        Ok(outputs)
    }
}

impl Attention {
    /// Whether a query at position `at` does not see `key`, as far as their positions tell.
    fn hides(&self, at: i64, key: i64) -> bool {
        let behind = at.saturating_sub(key);
        let beyond = |width: Option<usize>, distance: i64| width.is_some_and(|width| distance > width as i64);
        (self.is_causal && behind < 0) || beyond(self.window.0, behind) || beyond(self.window.1, -behind)
    }
}

/// The attribute of that name: one of the floating-point types that ONNX names for it.
pub(super) fn softmax_precision(node: &mut NodeReader) -> Result<Option<DType>, ImportError> {
    let code = node.optional_int("softmax_precision")?;
    let dtype = |code: i64| match i32::try_from(code).ok().and_then(DType::from_onnx_code) {
        Some(dtype @ (DType::F32 | DType::F64 | DType::F16 | DType::BF16)) => Ok(dtype),
        _ => Err(node.corrupt(format!("softmax_precision {code} is no floating-point type that ONNX names for it"))),
    };
    code.map(dtype).transpose()
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn hidden_keys_take_no_part() {
        // Of equal scores, values are averaged.
        let zeros = || f32s(&[1, 1, 2, 1], &[0.0, 0.0]);
        let values = || f32s(&[1, 1, 3, 1], &[1.0, 2.0, 6.0]);
        let keys = || f32s(&[1, 1, 3, 1], &[0.0, 5.0, -5.0]);
        let of = || case("Attention", 25).input(zeros()).input(keys()).input(values());
        of().gives([f32s(&[1, 1, 2, 1], &[3.0, 3.0])]);
        of().with("is_causal", 1).gives([f32s(&[1, 1, 2, 1], &[1.0, 1.5])]);
        of().with("left_window_size", 0).with("right_window_size", 1).gives([f32s(&[1, 1, 2, 1], &[1.5, 4.0])]);
        let mask = tensor::<u8>(&[2, 2], &[0; 4]);
        of().input(mask).gives([f32s(&[1, 1, 2, 1], &[1.5, 1.5])]);
        let bools = cutover_tensor::Tensor::from_bools([2, 3], &[false, false, false, true, false, true]).unwrap();
        of().input(bools).gives([f32s(&[1, 1, 2, 1], &[0.0, 3.5])]);
        let counted = of().with("is_causal", 1).omitted().omitted().omitted().input(tensor::<i64>(&[1], &[1]));
        counted.gives([f32s(&[1, 1, 2, 1], &[0.0, 1.0])]);
    }

    #[test]
    fn past_keys_come_first_and_queries_share_heads() {
        let y = case("Attention", 23)
            .with("q_num_heads", 2)
            .with("kv_num_heads", 1)
            .with("is_causal", 1)
            .with("scale", 1.0f32)
            .with("qk_matmul_output_mode", 3)
            .input(f32s(&[1, 1, 2], &[0.0, 100.0]))
            .input(f32s(&[1, 1, 1], &[1.0]))
            .input(f32s(&[1, 1, 1], &[8.0]))
            .omitted()
            .input(f32s(&[1, 1, 1, 1], &[0.0]))
            .input(f32s(&[1, 1, 1, 1], &[4.0]));
        y.gives([
            f32s(&[1, 1, 2], &[6.0, 8.0]),
            f32s(&[1, 1, 2, 1], &[0.0, 1.0]),
            f32s(&[1, 1, 2, 1], &[4.0, 8.0]),
            f32s(&[1, 2, 1, 2], &[0.5, 0.5, 0.0, 1.0]),
        ]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let of = |q: &[usize], k: &[usize]| case("Attention", 23).wave(q).wave(k).wave(k);
        of(&[1, 3, 1, 2], &[1, 2, 1, 2]).fails("don't fit together");
        of(&[1, 1, 2], &[1, 1, 2]).fails("expected [b, n, s, h]");
        of(&[1, 1, 2], &[1, 1, 2]).with("q_num_heads", 2).fails("both numbers of heads");
        of(&[1, 1, 3], &[1, 1, 2]).with("q_num_heads", 2).with("kv_num_heads", 1).fails("into 2 heads");
        of(&[1, 1, 2, 2], &[1, 1, 2, 2]).wave(&[3, 2]).fails("a bias of [3, 2]");
        of(&[1, 1, 2, 2], &[1, 1, 2, 2]).wave(&[2, 1]).fails("a mask of one key");
    }
}
