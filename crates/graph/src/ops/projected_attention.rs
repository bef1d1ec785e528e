//! Attention that projects its input itself, as ONNX Runtime fuses it.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Wide,
    conv::differ,
    heads::{Bias, HeadDims, Heads, attend},
    matmul::Product,
    multi_head_attention::{Masked, Padding},
};
use crate::{Dim, Fact, ImportError, OpError, TensorFact};
use cutover_tensor::Value;

/// ONNX Runtime's `Attention`: of `Q, K, V = x · W + bias`, `softmax(scale · Q · Kᵀ + mask + attention bias) · V` by head.
///
/// Inputs: `x [b, s, d]`, `W [d, n·h + n·h + n·v]`, its bias, a [`Padding`] (that of one number for all keys is none), keys and values
/// that come before `[2, b, n, p, h]`, what is added to the scores `[b or 1, n or 1, s, t]`. Outputs: `[b, s, n·v]`, and all keys and
/// values `[2, b, n, t, h]`.
#[derive(Clone, Debug, PartialEq)]
pub struct ProjectedAttention {
    pub heads: usize,
    /// `n·h` and `n·v`; thirds of the projection without them.
    pub sizes: Option<(usize, usize)>,
    pub masked: Masked,
}

impl Operator for ProjectedAttention {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(2..=7)?;
        let heads = node.count("num_heads", 0)?;
        if heads == 0 {
            return Err(node.corrupt("attribute 'num_heads' is missing"));
        }
        if node.flag("do_rotary", false)? {
            return Err(node.unsupported("do_rotary 1"));
        }
        // Of the rotation alone.
        node.optional_int("rotary_embedding_dim")?;
        if node.flag("past_present_share_buffer", false)? || node.has_input(6) {
            return Err(node.unsupported("past_present_share_buffer 1"));
        }
        let sizes = node.optional_ints("qkv_hidden_sizes")?.filter(|sizes| !sizes.is_empty());
        let sizes = match sizes.as_deref() {
            None => None,
            Some(&[q, k, v]) if q == k && [q, v].iter().all(|size| (1..1 << 31).contains(size)) => {
                Some((q as usize, v as usize))
            }
            Some(other) => {
                return Err(node.corrupt(format!("qkv_hidden_sizes {other:?}, expected three, of [q, q, v]")));
            }
        };
        Ok(ProjectedAttention { heads, sizes, masked: Masked::read(node)? }.into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = Spelling::new("Attention").in_domain("com.microsoft").with("num_heads", self.heads as i64);
        if let Some((q, v)) = self.sizes {
            spelling = spelling.with("qkv_hidden_sizes", vec![q as i64, q as i64, v as i64]);
        }
        self.masked.spell(spelling)
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let (x, weight) = (inputs.tensor(0)?, inputs.tensor(1)?);
        for index in 2..inputs.len() {
            inputs.optional_tensor(index)?;
        }
        (1..3).chain(4..6).try_for_each(|index| inputs.same_dtype(0, index))?;
        let wrong = || OpError::input(format!("expected [b, s, d] and weights [d, e], got {x} and {weight}"));
        let (mut y, mut present) = (TensorFact::unknown_rank(x.dtype), TensorFact::unknown_rank(x.dtype));
        match (x.shape.as_deref(), weight.shape.as_deref()) {
            (Some([batch, length, inner]), Some([rows, columns])) => {
                if differ(inner, rows) {
                    return Err(wrong());
                }
                let third = columns.floor_div(&Dim::Const(3));
                let (qk, v) = self.sizes.map_or((third.clone(), third), |(q, v)| (Dim::from(q), Dim::from(v)));
                y = TensorFact::new(x.dtype, vec![batch.clone(), length.clone(), v]);
                let past = match inputs.optional_tensor(4)?.map(|past| past.shape.as_deref()) {
                    None => Some(Dim::Const(0)),
                    Some(Some([_, _, _, past, _])) => Some(past.clone()),
                    Some(Some(_)) => return Err(OpError::input("expected a past [2, b, n, p, h]")),
                    Some(None) => None,
                };
                if let Some(past) = past {
                    let heads = Dim::from(self.heads);
                    let (size, length) = (qk.floor_div(&heads), past + length.clone());
                    let dims = HeadDims { batch: batch.clone(), heads, length, size };
                    present = dims.by_head(x.dtype);
                    present.shape.iter_mut().for_each(|shape| shape.insert(0, Dim::Const(2)));
                }
            }
            (None | Some([_, _, _]), None | Some([_, _])) => {}
            _ => return Err(wrong()),
        }
        Ok(vec![y.into(), present.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let (x, weight) = (inputs.tensor(0)?, inputs.tensor(1)?);
        let (&[batch, length, _], &[_, columns]) = (x.shape().dims(), weight.shape().dims()) else {
            let (x, weight) = (x.shape(), weight.shape());
            return Err(OpError::input(format!("expected [b, s, d] and weights [d, e], got {x} and {weight}")));
        };
        let n = self.heads;
        let (qk, width) = self.sizes.unwrap_or((columns / 3, columns / 3));
        if qk.checked_mul(2).and_then(|sum| sum.checked_add(width)) != Some(columns) || qk % n != 0 || width % n != 0 {
            return Err(OpError::input(format!("{columns} columns are no two of {qk} and {width}, by {n} heads")));
        }
        let product = Product::new(x.shape(), weight.shape())?;
        context.bounded_len(&[batch, length, columns])?;
        let projected = product.apply(&Wide::floats(x)?, &Wide::floats(weight)?);
        let bias = inputs.optional_tensor(2)?.map(Wide::floats).transpose()?;
        let bias = bias.unwrap_or_else(|| vec![0.0; columns]);
        if bias.len() != columns {
            return Err(OpError::input(format!("a bias of {}, {columns} expected", bias.len())));
        }
        let part = |start: usize, width: usize| {
            let rows = projected.chunks_exact(columns.max(1));
            let values = rows.flat_map(|row| &row[start..start + width]).copied().collect();
            let mut heads = Heads::packed(values, batch, length, n, width / n)?;
            heads.add_bias(&bias[start..start + width])?;
            Ok::<_, OpError>(heads)
        };
        let (q, mut k, mut v) = (part(0, qk)?, part(qk, qk)?, part(2 * qk, width)?);
        let past = match inputs.optional_tensor(4)? {
            None => 0,
            Some(tensor) => {
                let &[2, b, heads, past, size] = tensor.shape().dims() else {
                    return Err(OpError::input(format!("expected a past [2, b, n, p, h], got {}", tensor.shape())));
                };
                let values = Wide::floats(tensor)?;
                let (keys, rest) = values.split_at(values.len() / 2);
                let of = |values: &[f64]| Heads { batch: b, heads, length: past, size, values: values.to_vec() };
                k = of(keys).followed_by(&k)?;
                v = of(rest).followed_by(&v)?;
                past
            }
        };
        let all = [batch, n, length, k.length];
        // One number for all keys hides all of them or none, which is the same to the softmax.
        let dummy = inputs.optional_tensor(3)?.is_some_and(|mask| {
            let dims = mask.shape().dims();
            (dims == [batch, 1] || dims == [1, 1]) && dims != [batch, k.length]
        });
        let padding = if dummy { Padding::None } else { Padding::of(inputs, 3, [batch, length, k.length])? };
        let bias = inputs.optional_tensor(5)?.map(|bias| Bias::of(bias, all, false)).transpose()?;
        let y = attend((&q, &k, &v), context, self.masked.weigh((past, q.size), &padding, bias.as_ref(), None))?;
        let mut outputs = vec![y.by_position(x.dtype())?];
        if context.outputs > 1 {
            if k.size != v.size {
                return Err(OpError::input(format!("keys of {} and values of {} in one output", k.size, v.size)));
            }
            let shape = [2, batch, n, k.length, k.size];
            let values = k.values.into_iter().chain(v.values).collect();
            outputs.push(Wide::Float(values).narrow(x.dtype(), shape)?.into());
        }
        Ok(outputs)
    }
}

#[cfg(test)]
mod tests {
    use crate::ops::cases::{case, f32s, tensor};

    #[test]
    fn agrees_with_onnx_runtime() {
        case("com.microsoft.Attention", 1)
            .with("num_heads", 1)
            .with("unidirectional", 1)
            .with("mask_filter_value", -2.0f32)
            .wave(&[1, 2, 2])
            .wave(&[2, 6])
            .wave(&[6])
            .input(tensor::<i32>(&[1], &[1]))
            .wave(&[2, 1, 1, 1, 2])
            .gives([
                f32s(&[1, 2, 2], &[-0.725377, -0.774622, -0.407969, -1.02336]),
                f32s(
                    &[2, 1, 1, 3, 2],
                    &[-1.0, 0.75, 0.5625, 0.3125, 0.5625, -1.1875, -0.25, -1.25, -2.0, 0.5, -0.875, 0.125],
                ),
            ]);
        case("com.microsoft.Attention", 1)
            .with("num_heads", 2)
            .with("qkv_hidden_sizes", vec![2i64, 2, 4])
            .with("scale", 0.5f32)
            .wave(&[1, 2, 2])
            .wave(&[2, 8])
            .wave(&[8])
            .input(tensor::<i32>(&[1, 2, 2], &[1, 0, 1, 1]))
            .omitted()
            .wave(&[1, 2, 2, 2])
            .gives([f32s(&[1, 2, 4], &[-1.625, 0.875, 0.625, -1.6875, -1.15345, 0.927394, -0.632363, -0.430137])]);
        case("com.microsoft.Attention", 1)
            .with("num_heads", 2)
            .wave(&[2, 2, 2])
            .wave(&[2, 6])
            .omitted()
            .input(tensor::<i32>(&[4], &[2, 2, 1, 0]))
            .gives([f32s(&[2, 2, 2], &[0.125, -0.625, 0.125, -0.625, 0.4375, 0.15275, 0.4375, 0.325138])]);
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let of = || case("com.microsoft.Attention", 1).with("num_heads", 1).wave(&[1, 2, 2]).wave(&[2, 6]);
        of().with("do_rotary", 1).fails("do_rotary 1");
        of().with("past_present_share_buffer", 1).fails("past_present_share_buffer 1");
        of().omitted().input(tensor::<i32>(&[1, 3], &[1; 3])).fails("a mask [1, 3]");
        of().omitted().input(tensor::<i32>(&[1, 1, 2, 2], &[1; 4])).fails("a mask of four axes");
    }
}
