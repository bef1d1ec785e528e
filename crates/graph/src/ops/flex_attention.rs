//! Attention whose scores and weights graphs may change.

use super::{
    EvalContext, Facts, InferContext, Inputs, NodeReader, Op, Operator, Spelling, Subgraph, Wide,
    attention::softmax_precision,
    heads::{HeadDims, Heads, attend, softmax},
    subgraph::{captured, own_inputs},
};
use crate::{Fact, ImportError, OpError, TensorFact};
use cutover_tensor::{DType, Value};

/// `Y = prob(softmax(score(scale · Q · Kᵀ))) · V` by head. Inputs: `Q [b, n, s, h]`, `K [b, m, t, h]`, `V [b, m, t, v]`, then what the
/// graphs capture. Each graph takes and gives `[b, n, s, t]` of the precision's type, f64 of f64 and otherwise f32 without one.
#[derive(Clone, Debug, PartialEq)]
pub struct FlexAttention {
    /// `1 / √h` without it.
    pub scale: Option<f32>,
    pub score: Option<Subgraph>,
    pub prob: Option<Subgraph>,
    pub precision: Option<DType>,
}

impl FlexAttention {
    /// The graphs, each with the first input of what it captures.
    fn graphs(&self) -> (Option<(&Subgraph, usize)>, Option<(&Subgraph, usize)>) {
        let after = 3 + self.score.as_ref().map_or(0, Subgraph::captured);
        (self.score.as_ref().map(|graph| (graph, 3)), self.prob.as_ref().map(|graph| (graph, after)))
    }
}

impl Operator for FlexAttention {
    fn import(node: &mut NodeReader) -> Result<Op, ImportError> {
        node.expect_inputs(3..=3)?;
        let mut graph = |name: &str| {
            if !node.has_attribute(name) {
                return Ok(None);
            }
            let graph = node.subgraph(name)?;
            match (graph.formal(), graph.graph().outputs().len()) {
                (1, 1) => Ok(Some(graph)),
                (inputs, outputs) => {
                    Err(node.corrupt(format!("'{name}' has {inputs} inputs and {outputs} outputs, one each expected")))
                }
            }
        };
        let (score, prob) = (graph("score_mod")?, graph("prob_mod")?);
        Ok(FlexAttention { scale: node.optional_float("scale")?, score, prob, precision: softmax_precision(node)? }
            .into())
    }

    fn export(&self) -> Spelling {
        let mut spelling = Spelling::new("FlexAttention").in_domain("ai.onnx.preview");
        if let Some(scale) = self.scale {
            spelling = spelling.with("scale", scale);
        }
        if let Some(dtype) = self.precision {
            spelling = spelling.with("softmax_precision", i64::from(dtype.onnx_code()));
        }
        for (name, graph) in [("score_mod", &self.score), ("prob_mod", &self.prob)] {
            if let Some(graph) = graph {
                spelling = spelling.with(name, graph.clone());
            }
        }
        spelling
    }

    fn infer(&self, inputs: Facts<'_>, _: &InferContext<'_>) -> Result<Vec<Fact>, OpError> {
        let graphs: Vec<&Subgraph> = [&self.score, &self.prob].into_iter().flatten().collect();
        if own_inputs(&inputs, &graphs)? != 3 {
            return Err(OpError::input("queries, keys and values expected"));
        }
        let (q, k, v) = (inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?);
        inputs.same_dtype(0, 1)?;
        inputs.same_dtype(0, 2)?;
        HeadDims::of(k, None)?;
        let y = match (HeadDims::of(q, None)?, HeadDims::of(v, None)?) {
            (Some(q_dims), Some(v)) => HeadDims { size: v.size, ..q_dims }.by_head(q.dtype),
            _ => TensorFact::unknown_rank(q.dtype),
        };
        Ok(vec![y.into()])
    }

    fn eval(&self, inputs: Inputs<'_>, context: &EvalContext) -> Result<Vec<Value>, OpError> {
        let [query, key, value] = [inputs.tensor(0)?, inputs.tensor(1)?, inputs.tensor(2)?];
        let (q, k, v) = (Heads::of(query, None)?, Heads::of(key, None)?, Heads::of(value, None)?);
        let wider = if query.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let dtype = self.precision.unwrap_or(wider);
        let shape = [q.batch, q.heads, q.length, k.length];
        let scale = self.scale.map_or_else(|| 1.0 / (q.size as f64).sqrt(), f64::from);
        let mut all = Vec::with_capacity(context.bounded_len(&shape)?);
        // The graphs see all scores at once: they are made first, and the values are summed after.
        let heads = |heads: &Heads| Heads { size: 0, values: Vec::new(), ..*heads };
        attend((&q, &k, &heads(&v)), context, |_, scores| {
            all.extend(scores.iter().map(|score| score * scale));
            Ok(())
        })?;
        let changed = |graph: Option<(&Subgraph, usize)>, values: Vec<f64>| -> Result<Vec<f64>, OpError> {
            let Some((graph, from)) = graph else { return Ok(values) };
            let mut given = vec![Value::from(Wide::Float(values).narrow(dtype, shape)?)];
            given.extend(captured(graph, &inputs, from)?);
            let result = graph.eval(given, context)?.into_iter().next().and_then(Value::into_tensor);
            match result {
                Some(result) if result.dtype() == dtype && result.shape().dims() == shape => Wide::floats(&result),
                _ => Err(OpError::input(format!("'{}' must give {dtype} {shape:?}", graph.graph().name))),
            }
        };
        let (score, prob) = self.graphs();
        let mut weights = changed(score, all)?;
        weights.chunks_exact_mut(k.length.max(1)).for_each(|row| softmax(row, None));
        let weights = changed(prob, weights)?;
        let mut rows = weights.chunks_exact(k.length.max(1));
        let y = attend((&heads(&q), &heads(&k), &v), context, |_, scores| {
            scores.copy_from_slice(rows.next().unwrap_or(&[]));
            Ok(())
        })?;
        Ok(vec![y.by_head(query.dtype())?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Constant, Dim, Graph,
        ops::{
            Binary, BinaryFunction,
            cases::{Case, case, f32s},
        },
    };

    fn equal_scores() -> Case {
        let query = f32s(&[1, 1, 1, 2], &[0.0, 0.0]);
        case("ai.onnx.preview.FlexAttention", 1)
            .input(query)
            .wave(&[1, 1, 2, 2])
            .input(f32s(&[1, 1, 2, 1], &[2.0, 4.0]))
    }

    /// Adds the wave `[1, 1, 1, 2]` of 1, 0.
    fn graph() -> Subgraph {
        let mut graph = Graph::new("add");
        let extents: Vec<Dim> = ["b", "n", "s", "t"].into_iter().map(Dim::symbol).collect();
        let scores = graph.add_input("scores", TensorFact::new(DType::F32, extents));
        let more = graph.add_constant("more", Constant::new(f32s(&[2], &[1.0, 0.0])));
        let add = Binary { function: BinaryFunction::Add };
        let node = graph.add_node("add", add.into(), vec![Some(scores), Some(more)], vec!["y".into()]).unwrap();
        graph.set_outputs(graph.node(node).outputs.clone());
        Subgraph::new(graph, 0).unwrap()
    }

    #[test]
    fn graphs_change_scores_and_weights() {
        equal_scores().gives([f32s(&[1, 1, 1, 1], &[3.0])]);
        equal_scores().with("prob_mod", graph()).gives([f32s(&[1, 1, 1, 1], &[5.0])]);
        let e = 1f32.exp();
        let weighted = (2.0 * e + 4.0) / (e + 1.0);
        equal_scores().with("score_mod", graph()).gives([f32s(&[1, 1, 1, 1], &[weighted])]);
        equal_scores().with("softmax_precision", 7).fails("softmax_precision 7");
    }
}
