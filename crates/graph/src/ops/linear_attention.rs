//! Attention by a state that every position updates.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    heads::{HeadDims, Heads},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// ONNX's `LinearAttention`: position by position `S ← decay · S + k ⊗ u` and `y = scale · Sᵀ q`, with `S [h, v]` of every sample and
/// head of keys, and `decay` 1 or `exp(g)`. `u` is `v`, or `beta · (v − (decay · S)ᵀ k)` where the state is corrected.
///
/// Inputs: queries `[b, t, n·h]`, keys `[b, t, m·h]`, values `[b, t, m·v]`, the state before `[b, m, h, v]` (zeros without it), `g`
/// `[b, t, m·h]` or `[b, t, m]`, `beta` `[b, t, m]` or `[b, t, 1]`. Outputs: `[b, t, n·v]` and the state after.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearAttention {
    /// Of queries, then of keys and values.
    pub heads: (usize, usize),
    /// `1 / √h` without it.
    pub scale: Option<f32>,
    pub is_gated: bool,
    pub is_corrected: bool,
    /// How an engine may cut the positions; no result depends on it.
    pub chunk: i64,
}

impl LinearAttention {
    fn rule(&self) -> &'static str {
        match (self.is_gated, self.is_corrected) {
            (false, false) => "linear",
            (true, false) => "gated",
            (false, true) => "delta",
            (true, true) => "gated_delta",
        }
    }
}

impl Operator for LinearAttention {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=6)?;
        let heads = (node.count("q_num_heads", 0)?, node.count("kv_num_heads", 0)?);
        if heads.1 == 0 || heads.0 == 0 || heads.0 % heads.1 != 0 {
            let (q, kv) = heads;
            return Err(node.corrupt(format!("{q} heads of queries, a multiple of the {kv} of keys expected")));
        }
        let (is_gated, is_corrected) = match node.string("update_rule", "gated_delta")?.as_str() {
            "linear" => (false, false),
            "gated" => (true, false),
            "delta" => (false, true),
            "gated_delta" => (true, true),
            other => return Err(node.corrupt(format!("update_rule '{other}' is none that ONNX names"))),
        };
        if node.has_input(4) != is_gated || node.has_input(5) != is_corrected {
            return Err(
                node.corrupt("has a decay or beta that its update_rule does not use, or lacks one that it does")
            );
        }
        let scale = Some(node.float("scale", 0.0)?).filter(|&scale| scale != 0.0);
        Ok(LinearAttention { heads, scale, is_gated, is_corrected, chunk: node.int("chunk_size", 64)? }.into())
    }

    fn export(&self) -> Spelling {
        Spelling::new("LinearAttention")
            .since(27)
            .with("q_num_heads", self.heads.0 as i64)
            .with("kv_num_heads", self.heads.1 as i64)
            .with("update_rule", self.rule())
            .with("scale", self.scale.unwrap_or(0.0))
            .with("chunk_size", self.chunk)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (q, k, v) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        inputs.same_dtype(0, 1)?;
        inputs.same_dtype(0, 2)?;
        let past = inputs.optional_tensor(3)?;
        let packed = |fact: &TensorFact, heads| match fact.rank() {
            None | Some(3) => HeadDims::of(fact, Some(heads)),
            Some(_) => Err(OpError::input(format!("expected [b, t, d], got {fact}"))),
        };
        let (qs, _, vs) = (packed(q, self.heads.0)?, packed(k, self.heads.1)?, packed(v, self.heads.1)?);
        let dtype = past.map_or(q.dtype, |past| past.dtype);
        let (mut y, mut state) = (TensorFact::unknown_rank(q.dtype), TensorFact::unknown_rank(dtype));
        if let (Some(qs), Some(vs)) = (qs, vs) {
            let heads = Dim::from(self.heads.1);
            let after = HeadDims { heads, length: qs.size.clone(), size: vs.size.clone(), batch: qs.batch.clone() };
            state = after.by_head(dtype);
            y = HeadDims { size: vs.size, ..qs }.by_position(q.dtype);
        }
        Ok(vec![y.into(), state.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let [query, key, value] = [inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?];
        if let Some(other) = [query, key, value].iter().find(|t| t.shape().rank() != 3) {
            return Err(OpError::input(format!("expected [b, t, d], got {}", other.shape())));
        }
        let (q_heads, heads) = self.heads;
        let q = Heads::of(query, Some(q_heads))?;
        let (k, v) = (Heads::of(key, Some(heads))?, Heads::of(value, Some(heads))?);
        let (batch, length, size, width) = (q.batch, q.length, q.size, v.size);
        if [k.batch, v.batch] != [batch; 2] || [k.length, v.length] != [length; 2] || k.size != size {
            let shapes = [query, key, value].map(|t| t.shape().to_string()).join(", ");
            return Err(OpError::input(format!("queries, keys and values {shapes} don't fit together")));
        }
        let mut state = match inputs.optional_tensor(3)? {
            None => vec![0.0; context.bounded_len(&[batch, heads, size, width])?],
            Some(past) if past.shape().dims() == [batch, heads, size, width] => Wide::floats(past)?,
            Some(past) => {
                let message = format!("a state {}, expected [{batch}, {heads}, {size}, {width}]", past.shape());
                return Err(OpError::input(message));
            }
        };
        // Of each position and head: one number, or one for each row of the state.
        let of_positions = |index: usize, widths: [usize; 2]| -> Result<Option<(usize, Vec<f64>)>, OpError> {
            let Some(tensor) = inputs.optional_tensor(index)? else { return Ok(None) };
            match *tensor.shape().dims() {
                [b, t, d] if b == batch && t == length && widths.contains(&d) => Ok(Some((d, Wide::floats(tensor)?))),
                _ => Err(OpError::input(format!("input {index} is {}, of width {widths:?} expected", tensor.shape()))),
            }
        };
        let decay = of_positions(4, [heads, heads.saturating_mul(size)])?;
        let beta = of_positions(5, [heads, 1])?;
        let scale = self.scale.map_or_else(|| 1.0 / (size as f64).sqrt(), f64::from);
        let mut y = vec![0.0; context.bounded_len(&[batch, length, q_heads, width])?];
        context.bounded_len(&[batch, heads, length])?;
        let mut update = vec![0.0; width];
        for (sample, head, at) in
            (0..batch).flat_map(|b| (0..heads).flat_map(move |n| (0..length).map(move |t| (b, n, t))))
        {
            let start = (sample * heads + head) * size * width;
            let state = &mut state[start..start + size * width];
            let (k, position) = (k.vector(sample, head, at), sample * length + at);
            if let Some((d, decay)) = &decay {
                for (row, x) in state.chunks_exact_mut(width.max(1)).enumerate() {
                    let of_row = if *d == heads { head } else { head * size + row };
                    let factor = decay[position * d + of_row].exp();
                    x.iter_mut().for_each(|x| *x *= factor);
                }
            }
            update.copy_from_slice(v.vector(sample, head, at));
            if let Some((d, beta)) = &beta {
                let beta = beta[position * d + if *d == 1 { 0 } else { head }];
                for (k, row) in k.iter().zip(state.chunks_exact(width.max(1))) {
                    update.iter_mut().zip(row).for_each(|(u, x)| *u -= k * x);
                }
                update.iter_mut().for_each(|u| *u *= beta);
            }
            for (k, row) in k.iter().zip(state.chunks_exact_mut(width.max(1))) {
                row.iter_mut().zip(&update).for_each(|(x, u)| *x += k * u);
            }
            let group = q_heads / heads;
            for q_head in head * group..(head + 1) * group {
                let start = (position * q_heads + q_head) * width;
                let y = &mut y[start..start + width];
                for (q, row) in q.vector(sample, q_head, at).iter().zip(state.chunks_exact(width.max(1))) {
                    y.iter_mut().zip(row).for_each(|(y, x)| *y += scale * q * x);
                }
            }
        }
        let dtype = inputs.optional_tensor(3)?.map_or(query.dtype(), |past| past.dtype());
        let y = Wide::Float(y).narrow(query.dtype(), [batch, length, q_heads.saturating_mul(width)])?;
        let state = Wide::Float(state).narrow(dtype, [batch, heads, size, width])?;
        Ok(vec![y.into(), state.into()])
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{Case, case, f32s};

    fn of(rule: &str) -> Case {
        let heads = case("LinearAttention", 27).with("q_num_heads", 2).with("kv_num_heads", 1);
        heads.with("update_rule", rule).with("scale", 1.0f32)
    }

    fn two_positions(rule: &str) -> Case {
        let q = f32s(&[1, 2, 2], &[1.0, 10.0, 1.0, 10.0]);
        of(rule).input(q).input(f32s(&[1, 2, 1], &[1.0, 2.0])).input(f32s(&[1, 2, 1], &[3.0, 5.0]))
    }

    #[test]
    fn states_follow_their_rule() {
        let halves = || f32s(&[1, 2, 1], &[0.5f32.ln(), 0.5f32.ln()]);
        let past = || f32s(&[1, 1, 1, 1], &[4.0]);
        let gives = |case: Case, y: [f32; 2]| {
            case.gives([f32s(&[1, 2, 2], &[y[0], 10.0 * y[0], y[1], 10.0 * y[1]]), f32s(&[1, 1, 1, 1], &[y[1]])]);
        };
        gives(two_positions("linear"), [3.0, 13.0]);
        gives(two_positions("linear").input(past()), [7.0, 17.0]);
        gives(two_positions("gated").input(past()).input(halves()), [5.0, 12.5]);
        // 4 + 0.5 · (3 − 4) = 3.5, then 3.5 + 2 · 0.5 · (5 − 7).
        let beta = || f32s(&[1, 2, 1], &[0.5, 0.5]);
        gives(two_positions("delta").input(past()).omitted().input(beta()), [3.5, 1.5]);
        // 2 + 0.5 · (3 − 2) = 2.5, then 1.25 + (5 − 2.5).
        gives(two_positions("gated_delta").input(past()).input(halves()).input(beta()), [2.5, 3.75]);
    }

    #[test]
    fn a_rule_has_its_inputs() {
        two_positions("gated").fails("its update_rule");
        two_positions("other").fails("update_rule 'other'");
        of("linear").wave(&[1, 2, 2]).wave(&[1, 3, 1]).wave(&[1, 2, 1]).fails("don't fit together");
    }
}
