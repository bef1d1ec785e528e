//! What the CPU backend writes as other operators, against the reference's evaluation of the operator: over seeded random shapes, once
//! known when the plan is compiled and once not.

use super::support::{Random, answers, seeds};
use cutover_backend::{Backend, CompileOptions, CpuOptions, cpu, reference};
use cutover_graph::{
    Dim, Graph, Op, Plan, TensorFact,
    ops::{
        Attention, BiasGelu, BiasSplitGelu, Einsum, InstanceNorm, Masked, MultiHeadAttention, ProjectedAttention,
        RotaryEmbedding, Rotation, Scores, SkipLayerNorm, SwiGlu, Unary, UnaryFunction,
    },
};
use cutover_tensor::{DType, Tensor, Value};
use std::sync::Arc;

/// An extent that a symbol stands for where shapes are not known, and one that is always known.
#[derive(Clone, Copy)]
enum Extent {
    Of(&'static str, usize),
    Known(usize),
}
use Extent::{Known, Of};

impl Extent {
    fn get(self) -> usize {
        match self {
            Of(_, n) | Known(n) => n,
        }
    }
}

struct Case {
    random: Random,
    op: Op,
    inputs: Vec<Option<(Vec<Extent>, Tensor)>>,
    outputs: usize,
}

impl Case {
    fn new(seed: u64, op: impl Into<Op>) -> Case {
        let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
        Case { random, op: op.into(), inputs: Vec::new(), outputs: 1 }
    }

    fn floats(&mut self, extents: &[Extent]) -> &mut Case {
        let shape: Vec<usize> = extents.iter().map(|e| e.get()).collect();
        let values = (0..shape.iter().product()).map(|_| self.random.unit());
        let tensor = Tensor::from_vec(shape, values.collect()).unwrap();
        self.given(extents, tensor)
    }

    fn given(&mut self, extents: &[Extent], tensor: Tensor) -> &mut Case {
        self.inputs.push(Some((extents.to_vec(), tensor)));
        self
    }

    fn integers(&mut self, extents: &[Extent], mut value: impl FnMut(&mut Random, usize) -> i64, dtype: DType) {
        let shape: Vec<usize> = extents.iter().map(|e| e.get()).collect();
        let values: Vec<i64> = (0..shape.iter().product()).map(|i| value(&mut self.random, i)).collect();
        let tensor = match dtype {
            DType::I32 => Tensor::from_vec(shape, values.iter().map(|&v| v as i32).collect()),
            DType::Bool => Tensor::from_bools(shape, &values.iter().map(|&v| v != 0).collect::<Vec<_>>()),
            _ => Tensor::from_vec(shape, values),
        };
        self.given(extents, tensor.unwrap());
    }

    fn omit(&mut self) -> &mut Case {
        self.inputs.push(None);
        self
    }

    /// Both backends agree, and the CPU runs no node of the operator.
    fn check(&self, what: &str) {
        for is_known in [true, false] {
            let mut graph = Graph::new("composed");
            let mut ids = Vec::new();
            for (index, input) in self.inputs.iter().enumerate() {
                ids.push(input.as_ref().map(|(extents, tensor)| {
                    let dim = |extent: &Extent| match extent {
                        Of(name, _) if !is_known => Dim::symbol(*name),
                        other => Dim::from(other.get()),
                    };
                    let fact = TensorFact::new(tensor.dtype(), extents.iter().map(dim).collect::<Vec<_>>());
                    graph.add_input(format!("x{index}"), fact)
                }));
            }
            let names = (0..self.outputs).map(|i| format!("y{i}")).collect();
            let node = graph.add_node("node", self.op.clone(), ids, names).unwrap();
            graph.set_outputs(graph.node(node).outputs.clone());
            let plan = Plan::new(graph).unwrap();
            let place = format!("{what}, shapes known: {is_known}, {:?}", self.op);
            let expected = self.run(&reference(), &plan, None);
            let options = CpuOptions { threads: 2, isa: None, ..CpuOptions::default() };
            let actual = self.run(&cpu(options).unwrap(), &plan, Some(&self.op.name()));
            for (output, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
                assert_eq!(actual.shape(), expected.shape(), "{place}");
                let (a, e) = (actual.to_vec::<f32>().unwrap(), expected.to_vec::<f32>().unwrap());
                let scale = e.iter().fold(1.0f32, |m, v| m.max(v.abs()));
                for (at, (a, e)) in a.iter().zip(&e).enumerate() {
                    // Sums of a few hundred products in f32.
                    assert!((a - e).abs() <= 1e-4 * scale, "{place}: output {output}[{at}] is {a}, expected {e}");
                }
            }
        }
    }

    fn run(&self, backend: &Arc<dyn Backend>, plan: &Plan, without: Option<&str>) -> Vec<Tensor> {
        let executable = backend.compile(plan, &CompileOptions::default()).unwrap();
        if let Some(op) = without {
            let left = executable.placement().nodes.iter().filter(|node| node.op == op && node.kernel == "reference");
            assert_eq!(left.count(), 0, "{op} is not composed: {:?} of {:?}", self.op, plan.graph());
        }
        let values: Vec<Value> = self.inputs.iter().flatten().map(|(_, t)| Value::Tensor(t.clone())).collect();
        answers(executable, &values, &format!("{:?}", self.op))
    }
}

const ROUNDS: u64 = 12;

#[test]
fn attention() {
    for seed in seeds(4 * ROUNDS) {
        let mut r = Random(seed + 100);
        let (b, s, l, p) = (r.upto(3), r.upto(9), r.upto(9), r.upto(4));
        let (m, g, h, v) = (r.upto(3), r.upto(3), 2 * r.upto(5), r.upto(9));
        let (packed, past, is_causal) = (r.coin(), r.coin(), r.coin());
        let l = if is_causal { s } else { l };
        let op = Attention {
            heads: packed.then_some((m * g, m)),
            scale: r.coin().then_some(0.4),
            soft_cap: if r.coin() { 1.5 } else { 0.0 },
            is_causal,
            window: (None, None),
            scores: Scores::Products,
            softmax_precision: None,
        };
        let mut case = Case::new(seed, op);
        let (b, s, l) = (Of("b", b), Of("s", s), Of(if is_causal { "s" } else { "l" }, l));
        match packed {
            true => {
                case.floats(&[b, s, Known(m * g * h)]).floats(&[b, l, Known(m * h)]).floats(&[b, l, Known(m * v)]);
            }
            false => {
                case.floats(&[b, Known(m * g), s, Known(h)]).floats(&[b, Known(m), l, Known(h)]);
                case.floats(&[b, Known(m), l, Known(v)]);
            }
        }
        let t = if past { None } else { Some(l) };
        match (r.upto(3), t) {
            (1, Some(t)) => drop(case.floats(&[s, t])),
            // Some queries see no key.
            (2, Some(t)) => case.integers(&[b, Known(1), s, t], |r, _| i64::from(r.coin()), DType::Bool),
            _ => drop(case.omit()),
        }
        if past {
            case.floats(&[b, Known(m), Of("p", p), Known(h)]).floats(&[b, Known(m), Of("p", p), Known(v)]);
            case.outputs = 3;
        }
        case.check(&format!("seed {seed}"));
    }
}

fn masked(r: &mut Random, is_causal: bool) -> Masked {
    Masked { scale: r.coin().then_some(0.4), filter: -5.0, is_causal }
}

#[test]
fn attention_as_onnx_runtime_has_it() {
    for seed in seeds(3 * ROUNDS) {
        let mut r = Random(seed + 200);
        let (b, s, l, p) = (r.upto(3), r.upto(9), r.upto(9), r.upto(4));
        let (n, h, v) = (r.upto(3), 2 * r.upto(5), r.upto(9));
        let (biased, past, is_causal) = (r.coin(), r.coin(), r.coin());
        let (name, l) = if is_causal { ("s", s) } else { ("l", l) };
        let op = MultiHeadAttention { heads: n, masked: masked(&mut r, is_causal) };
        let mut case = Case::new(seed, op);
        let (b, s, l) = (Of("b", b), Of("s", s), Of(name, l));
        case.floats(&[b, s, Known(n * h)]).floats(&[b, l, Known(n * h)]).floats(&[b, l, Known(n * v)]);
        if biased {
            case.floats(&[Known(n * (2 * h + v))])
        } else {
            case.omit()
        };
        match (r.upto(3), past) {
            (1, false) => case.integers(&[b, l], |r, _| i64::from(r.coin()), DType::I32),
            (2, _) => case.integers(&[b], |r, _| r.upto(4) as i64, DType::I32),
            _ => drop(case.omit()),
        }
        if !past && r.coin() {
            case.floats(&[Known(1), Known(n), s, l])
        } else {
            case.omit()
        };
        if past {
            case.floats(&[b, Known(n), Of("p", p), Known(h)]).floats(&[b, Known(n), Of("p", p), Known(v)]);
            case.outputs = 3;
        }
        case.check(&format!("seed {seed}"));
    }
}

#[test]
fn attention_that_projects() {
    for seed in seeds(3 * ROUNDS) {
        let mut r = Random(seed + 300);
        let (b, s, p, d) = (Of("b", r.upto(3)), Of("s", r.upto(9)), Of("p", r.upto(4)), r.upto(20));
        let (n, h, past) = (r.upto(3), 2 * r.upto(5), r.coin());
        let v = if past { h } else { r.upto(9) };
        let is_causal = r.coin();
        let sizes = (v != h).then_some((n * h, n * v));
        let mut case = Case::new(seed, ProjectedAttention { heads: n, sizes, masked: masked(&mut r, is_causal) });
        case.floats(&[b, s, Known(d)]).floats(&[Known(d), Known(n * (2 * h + v))]);
        if r.coin() {
            case.floats(&[Known(n * (2 * h + v))])
        } else {
            case.omit()
        };
        match (r.upto(3), past) {
            (1, false) => case.integers(&[b, s], |r, _| i64::from(r.coin()), DType::I32),
            (2, _) => case.integers(&[b], |r, _| r.upto(4) as i64, DType::I32),
            _ => drop(case.omit()),
        }
        if past {
            case.floats(&[Known(2), b, Known(n), p, Known(h)]);
            case.outputs = 2;
        }
        case.check(&format!("seed {seed}"));
    }
}

#[test]
fn rotation() {
    for seed in seeds(2 * ROUNDS) {
        let mut r = Random(seed + 400);
        let (b, s, n, half) = (Of("b", r.upto(3)), Of("s", r.upto(9)), r.upto(3), r.upto(6));
        let (packed, positions, rest) = (r.coin(), r.coin(), if r.coin() { 0 } else { 3 });
        let size = (rest > 0).then_some(2 * half);
        let rotation = Rotation { size, interleaved: r.coin() };
        let mut case =
            Case::new(seed, RotaryEmbedding { heads: packed.then_some(n), rotation, positions_second: false });
        let h = 2 * half + rest;
        match packed {
            true => case.floats(&[b, s, Known(n * h)]),
            false => case.floats(&[b, Known(n), s, Known(h)]),
        };
        match positions {
            true => {
                case.floats(&[Known(7), Known(half)]).floats(&[Known(7), Known(half)]);
                case.integers(&[b, s], |r, _| r.upto(7) as i64 - 1, DType::I64);
            }
            false => drop(case.floats(&[b, s, Known(half)]).floats(&[b, s, Known(half)])),
        }
        case.check(&format!("seed {seed}"));
    }
}

#[test]
fn normalisation() {
    for seed in seeds(ROUNDS) {
        let mut r = Random(seed + 500);
        let (b, s, d) = (Of("b", r.upto(3)), Of("s", r.upto(9)), Known(1 + r.upto(40)));
        let centred = r.coin();
        let mut case = Case::new(seed, SkipLayerNorm { epsilon: 1e-3, centred });
        case.floats(&[b, s, d]);
        if r.coin() {
            case.floats(&[b, s, d])
        } else {
            case.floats(&[Known(1), s, d])
        };
        case.floats(&[d]);
        if centred {
            case.floats(&[d]);
        }
        if r.coin() {
            case.floats(&[d]);
        }
        case.check(&format!("seed {seed}"));
        let (groups, width) = (r.upto(3), r.upto(4));
        let of_groups = r.coin().then_some(groups);
        let mut case = Case::new(seed, InstanceNorm { epsilon: 1e-2, groups: of_groups });
        let c = Known(groups * width);
        let image = [b, c, Of("h", 1 + r.upto(9)), Of("w", 1 + r.upto(9))];
        case.floats(&image[..2 + r.upto(2)]).floats(&[c]).floats(&[c]);
        case.check(&format!("seed {seed}"));
    }
}

#[test]
fn gates() {
    for seed in seeds(ROUNDS) {
        let mut r = Random(seed + 600);
        let (b, s, d) = (Of("b", r.upto(3)), Of("s", r.upto(9)), Known(2 * r.upto(20)));
        Case::new(seed, BiasGelu { tanh: r.coin() }).floats(&[b, s, d]).floats(&[d]).check("bias");
        Case::new(seed, BiasSplitGelu).floats(&[b, s, d]).floats(&[d]).check("split");
        Case::new(seed, SwiGlu { alpha: r.upto(3) as f32 }).floats(&[b, s, d]).floats(&[b, s, d]).check("swiglu");
        let function = UnaryFunction::Swish { alpha: 1.702 };
        Case::new(seed, Unary { function }).floats(&[b, s, d]).check("swish");
    }
}

#[test]
fn sums_of_products() {
    let equations = [
        "bij,bjk->bik",
        "bij,bkj->bik",
        "bhid,bhjd->bhij",
        "bsd,dhk->bhsk",
        "bshk,hkd->bsd",
        "...ij,...kj->...ik",
        "bij,bij->b",
        "i,j->ij",
        "bi,bj,ij->b",
        "ij,jk,kl->il",
        "ijk->kj",
        "bijd,bjd->bid",
        "abc,cd",
        "ab,ab->ba",
        "abij,ij->ab",
    ];
    for seed in 0..3u64 {
        for equation in equations {
            let mut r = Random(seed + 1200);
            let extents: Vec<usize> = (0..26).map(|_| r.upto(6)).collect();
            let mut case = Case::new(seed, Einsum { equation: equation.to_string() });
            for term in equation.split("->").next().unwrap().split(',') {
                let extent = |letter: char| {
                    let n = extents[(letter as u8 - b'a') as usize];
                    // What a model leaves open: its batch, and the length of its sequences.
                    match letter {
                        'b' => Of("b", n),
                        's' => Of("s", n),
                        _ => Known(n),
                    }
                };
                case.floats(&term.replace("...", "b").chars().map(extent).collect::<Vec<_>>());
            }
            case.check(equation);
        }
    }
}
