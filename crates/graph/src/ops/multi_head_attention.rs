//! Attention of queries, keys and values that are projected already, as ONNX Runtime fuses it.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    heads::{Bias, HeadDims, Heads, Row, attend, softmax},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Tensor, Value};

/// `softmax(scale · Q · Kᵀ + mask + bias) · V` by head, with biases added to `Q`, `K` and `V` before.
///
/// Inputs: queries `[b, s, n·h]`, keys `[b, l, n·h]` and values `[b, l, n·v]`; or keys and values by head, `[b, n, l, h]`, which get no
/// bias; or keys and values as `[b, l, n, 2, h]`; or all three as `[b, s, n, 3, h]`. Then the biases `[n·h + n·h + n·v]`, a [`Padding`],
/// what is added to the scores `[b or 1, n or 1, s, t]`, and keys and values that come before `[b, n, p, h]`. Outputs: `[b, s, n·v]`, all
/// keys and values `[b, n, t, h]`, and the scores `[b, n, s, t]`.
#[derive(Clone, Debug, PartialEq)]
pub struct MultiHeadAttention {
    pub heads: usize,
    pub masked: Masked,
}

/// How scores are scaled and masked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Masked {
    /// `1 / √h` without it.
    pub scale: Option<f32>,
    /// What is added to the score of a key that is padding.
    pub filter: f32,
    /// A query sees no key after it.
    pub is_causal: bool,
}

impl Masked {
    pub(super) fn read(node: &mut NodeReader) -> Result<Masked, ImportError> {
        let scale = Some(node.float("scale", 0.0)?).filter(|&scale| scale != 0.0);
        let filter = node.float("mask_filter_value", -10000.0)?;
        Ok(Masked { scale, filter, is_causal: node.flag("unidirectional", false)? })
    }

    pub(super) fn spell(self, spelling: Spelling) -> Spelling {
        let spelling =
            spelling.with("mask_filter_value", self.filter).with("unidirectional", i64::from(self.is_causal));
        match self.scale {
            Some(scale) => spelling.with("scale", scale),
            None => spelling,
        }
    }

    /// What `attend` weighs with. `scores`, where there are such, get those before the softmax.
    pub(super) fn weigh<'a>(
        self,
        (past, size): (usize, usize),
        padding: &'a Padding,
        bias: Option<&'a Bias>,
        mut scores: Option<&'a mut Vec<f64>>,
    ) -> impl FnMut(Row, &mut [f64]) -> Result<(), OpError> + 'a {
        let scale = self.scale.map_or_else(|| 1.0 / (size as f64).sqrt(), f64::from);
        move |row, weights| {
            for (key, x) in weights.iter_mut().enumerate() {
                let mask = match () {
                    // Padding or not: so ONNX Runtime has it.
                    () if self.is_causal && key > past + row.query => f32::MIN,
                    () if padding.hides(row, key) => self.filter,
                    () => 0.0,
                };
                *x = *x * scale + f64::from(mask) + bias.map_or(0.0, |bias| bias.at(row, key));
            }
            if let Some(scores) = &mut scores {
                scores.extend_from_slice(weights);
            }
            softmax(weights, None);
            Ok(())
        }
    }
}

/// Which keys are padding: those from an end on, `[b]`, and those before a start, `[2·b]` (ends, then starts), `[3·b + 2]` (of which
/// only ends matter here); or those where there is no positive number, `[b, t]` or `[b, s, t]`.
pub(super) enum Padding {
    None,
    Outside { ends: Vec<i64>, starts: Vec<i64> },
    Keys { shown: Vec<bool>, keys: usize },
    Pairs { shown: Vec<bool>, queries: usize, keys: usize },
}

impl Padding {
    pub fn of(inputs: Inputs<'_>, index: usize, [batch, queries, keys]: [usize; 3]) -> Result<Padding, OpError> {
        let Some(mask) = inputs.optional_tensor(index)? else { return Ok(Padding::None) };
        let values = inputs.integers(index)?;
        let shown = |values: Vec<i64>| values.iter().map(|&v| v > 0).collect();
        match *mask.shape().dims() {
            [n] if n == batch => Ok(Padding::Outside { ends: values, starts: vec![0; batch] }),
            [n] if Some(n) == batch.checked_mul(2) => {
                Ok(Padding::Outside { starts: values[batch..].to_vec(), ends: values })
            }
            [n] if Some(n) == batch.checked_mul(3).and_then(|n| n.checked_add(2)) => {
                Ok(Padding::Outside { ends: values, starts: vec![0; batch] })
            }
            [n, t] if n == batch && t == keys => Ok(Padding::Keys { shown: shown(values), keys }),
            [n, s, t] if n == batch && s == queries && t == keys => {
                Ok(Padding::Pairs { shown: shown(values), queries, keys })
            }
            [_, _, _, _] => Err(OpError::unsupported("a mask of four axes")),
            _ => Err(OpError::input(format!("a mask {} for [{batch}, {queries}, {keys}]", mask.shape()))),
        }
    }

    fn hides(&self, row: Row, key: usize) -> bool {
        match self {
            Padding::None => false,
            Padding::Outside { ends, starts } => {
                let key = key as i64;
                key >= ends[row.batch] || key < starts[row.batch]
            }
            Padding::Keys { shown, keys } => !shown[row.batch * keys + key],
            Padding::Pairs { shown, queries, keys } => !shown[(row.batch * queries + row.query) * keys + key],
        }
    }
}

impl Operator for MultiHeadAttention {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(1..=10)?;
        if node.has_input(8) || node.has_input(9) {
            return Err(node.unsupported("past_sequence_length and cache_indirection, of buffers that are shared"));
        }
        if node.has_input(6) != node.has_input(7) || (node.has_input(2) && !node.has_input(1)) {
            return Err(node.corrupt("expected values with their keys"));
        }
        let heads = node.count("num_heads", 0)?;
        if heads == 0 {
            return Err(node.corrupt("attribute 'num_heads' is missing"));
        }
        Ok(MultiHeadAttention { heads, masked: Masked::read(node)? }.into())
    }

    fn export(&self) -> Spelling {
        let spelling = Spelling::new("MultiHeadAttention").in_domain("com.microsoft");
        self.masked.spell(spelling.with("num_heads", self.heads as i64))
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let q = inputs.tensor(0)?;
        let (k, v) = (inputs.optional_tensor(1)?, inputs.optional_tensor(2)?);
        for index in 3..inputs.len() {
            inputs.optional_tensor(index)?;
        }
        let dims = |fact: &TensorFact, parts: usize| match (fact.shape.as_deref(), parts) {
            (_, 1) => HeadDims::of(fact, Some(self.heads)),
            (None, _) => Ok(None),
            (Some([batch, length, n, p, size]), _) => {
                let wrong = |dim: &Dim, expected: usize| dim.as_const().is_some_and(|n| n != expected as i64);
                if wrong(n, self.heads) || wrong(p, parts) {
                    return Err(OpError::input(format!("expected [b, s, {}, {parts}, h], got {fact}", self.heads)));
                }
                let (batch, length, size) = (batch.clone(), length.clone(), size.clone());
                Ok(Some(HeadDims { batch, heads: Dim::from(self.heads), length, size }))
            }
            _ => Err(OpError::input(format!("expected [b, s, {}, {parts}, h], got {fact}", self.heads))),
        };
        let (qs, ks, vs) = match (k, v) {
            (None, _) => (dims(q, 3)?, dims(q, 3)?, dims(q, 3)?),
            (Some(k), None) => (dims(q, 1)?, dims(k, 2)?, dims(k, 2)?),
            (Some(k), Some(v)) => (dims(q, 1)?, dims(k, 1)?, dims(v, 1)?),
        };
        let past = match inputs.optional_tensor(6)? {
            None => Some(Dim::Const(0)),
            Some(past) => HeadDims::of(past, Some(self.heads))?.map(|past| past.length),
        };
        let dtype = q.dtype;
        let unknown = || TensorFact::unknown_rank(dtype);
        let after = |dims: &Option<HeadDims>| {
            let dims = dims.clone()?;
            Some(HeadDims { length: past.clone()? + dims.length.clone(), ..dims })
        };
        let (keys, values) = (after(&ks), after(&vs));
        let y = qs.clone().zip(vs).map(|(q, v)| HeadDims { size: v.size, ..q }.by_position(dtype));
        let scores = qs.zip(keys.clone()).map(|(q, k)| HeadDims { size: k.length, ..q }.by_head(dtype));
        let by_head = |dims: Option<HeadDims>| dims.map_or_else(unknown, |dims| dims.by_head(dtype)).into();
        let (y, scores) = (y.unwrap_or_else(unknown).into(), scores.unwrap_or_else(unknown).into());
        Ok(vec![y, by_head(keys), by_head(values), scores])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let query = inputs.tensor(0)?;
        let (key, value) = (inputs.optional_tensor(1)?, inputs.optional_tensor(2)?);
        let n = self.heads;
        let packed = |tensor: &Tensor| match tensor.shape().rank() {
            3 => Heads::of(tensor, Some(n)),
            _ => Err(OpError::input(format!("expected [b, s, d], got {}", tensor.shape()))),
        };
        let (mut q, mut k, mut v) = match (key, value) {
            (None, _) => (Heads::part(query, n, 3, 0)?, Heads::part(query, n, 3, 1)?, Heads::part(query, n, 3, 2)?),
            (Some(key), None) => (packed(query)?, Heads::part(key, n, 2, 0)?, Heads::part(key, n, 2, 1)?),
            (Some(key), Some(value)) => (packed(query)?, Heads::of(key, Some(n))?, Heads::of(value, Some(n))?),
        };
        if let Some(bias) = inputs.optional_tensor(3)? {
            let bias = Wide::floats(bias)?;
            let parts = [q.size, k.size, v.size].map(|size| size.saturating_mul(n));
            if Some(bias.len()) != parts.iter().try_fold(0usize, |sum, &part| sum.checked_add(part)) {
                return Err(OpError::input(format!("a bias of {}, expected {parts:?}", bias.len())));
            }
            let (of_q, rest) = bias.split_at(parts[0]);
            let (of_k, of_v) = rest.split_at(parts[1]);
            q.add_bias(of_q)?;
            if key.is_none_or(|key| key.shape().rank() != 4) {
                k.add_bias(of_k)?;
                v.add_bias(of_v)?;
            }
        }
        let past = match (inputs.optional_tensor(6)?, inputs.optional_tensor(7)?) {
            (Some(past_key), Some(past_value)) => {
                let past = Heads::of(past_key, Some(n))?;
                k = past.followed_by(&k)?;
                v = Heads::of(past_value, Some(n))?.followed_by(&v)?;
                past.length
            }
            _ => 0,
        };
        if self.masked.is_causal && k.length - past != q.length {
            let (queries, keys) = (q.length, k.length - past);
            return Err(OpError::unsupported(format!("unidirectional with {queries} queries and {keys} new keys")));
        }
        let all = [q.batch, n, q.length, k.length];
        let padding = Padding::of(inputs, 4, [q.batch, q.length, k.length])?;
        let bias = inputs.optional_tensor(5)?.map(|bias| Bias::of(bias, all, false)).transpose()?;
        let mut scores = Vec::new();
        let kept = (context.outputs > 3).then_some(&mut scores);
        let weigh = self.masked.weigh((past, q.size), &padding, bias.as_ref(), kept);
        let y = attend((&q, &k, &v), context, weigh)?;
        let dtype: DType = query.dtype();
        let mut outputs = vec![y.by_position(dtype)?, k.by_head(dtype)?, v.by_head(dtype)?];
        if context.outputs > 3 {
            outputs.push(Wide::Float(scores).narrow(dtype, all)?.into());
        }
        Ok(outputs)
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.MultiHeadAttention", 1)
            .with("num_heads", 1)
            .with("unidirectional", 1)
            .with("mask_filter_value", -3.0f32)
            .wave(&[1, 2, 2])
            .wave(&[1, 2, 2])
            .wave(&[1, 2, 2])
            .wave(&[6])
            .input(tensor::<i32>(&[1, 3], &[1, 0, 1]))
            .wave(&[1, 1, 2, 3])
            .wave(&[1, 1, 1, 2])
            .wave(&[1, 1, 1, 2])
            .gives([
                f32s(&[1, 2, 2], &[1.17577, 0.116393, 0.644303, -1.12865]),
                f32s(&[1, 1, 3, 2], &[0.5, -0.5, -1.5, 2.0, -0.75, 0.0]),
                f32s(&[1, 1, 3, 2], &[1.25, 0.25, 0.0, -2.0, 0.75, -1.25]),
                f32s(&[1, 1, 2, 3], &[-0.515165, -3.27773, -3.40282e+38, -0.765165, -0.512563, -0.015165]),
            ]);
        case("com.microsoft.MultiHeadAttention", 1)
            .with("num_heads", 1)
            .wave(&[1, 2, 2])
            .wave(&[1, 1, 2, 2])
            .wave(&[1, 1, 2, 2])
            .wave(&[6])
            .input(tensor::<i32>(&[1, 2, 2], &[1, 0, 1, 1]))
            .gives([f32s(&[1, 2, 2], &[0.25, -0.75, 0.386528, -0.613472])]);
    }

    #[test]
    fn what_is_packed_is_as_what_is_not() {
        // One head of two: queries and keys of zeros, so that values are averaged.
        let values = [1.0, 2.0, 3.0, 6.0];
        let expected = || f32s(&[1, 2, 2], &[2.0, 4.0, 2.0, 4.0]);
        let of = || case("com.microsoft.MultiHeadAttention", 1).with("num_heads", 1);
        let packed = |parts: usize| {
            let rows = values.chunks(2).flat_map(|row| [vec![0.0; 2 * parts - 2], row.to_vec()].concat());
            f32s(&[1, 2, 1, parts, 2], &rows.collect::<Vec<_>>())
        };
        of().input(packed(3)).gives([expected()]);
        of().input(f32s(&[1, 2, 2], &[0.0; 4])).input(packed(2)).gives([expected()]);
        of().wave(&[1, 2, 6]).fails("[b, s, 1, 3, h]");
    }

    #[test]
    fn a_causal_query_stands_at_its_key() {
        let of = case("com.microsoft.MultiHeadAttention", 1).with("num_heads", 1).with("unidirectional", 1);
        of.wave(&[1, 2, 2]).wave(&[1, 3, 2]).wave(&[1, 3, 2]).fails("unidirectional with 2 queries and 3 new keys");
    }
}
