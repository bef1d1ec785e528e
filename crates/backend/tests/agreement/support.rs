//! What the suites share: seeded numbers, and how a backend is asked.

use cutover_backend::{Backend, CompileOptions, Executable, Input, Output, RunContext, SessionMemory};
use cutover_graph::Plan;
use cutover_tensor::{DType, Tensor, Value};
use std::{ops::Range, sync::Arc};

/// The seeds to run of a sample of `count`: as many times that as `CUTOVER_SOAK` says, or of each `CUTOVER_SAMPLE` of them one.
pub fn seeds(count: u64) -> Range<u64> {
    let variable = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let (times, share) = (variable("CUTOVER_SOAK").unwrap_or(1), variable("CUTOVER_SAMPLE").unwrap_or(1));
    0..(count * times).div_ceil(share)
}

/// The rungs of the dispatch ladder on every kind of machine; those that `CUTOVER_LEVELS` names, by commas, if it does.
pub fn rungs() -> Vec<&'static str> {
    let known = ["scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "neon", "neondot", "neonbf16"];
    let Ok(names) = std::env::var("CUTOVER_LEVELS") else { return known.into() };
    let rungs: Vec<_> = known.into_iter().filter(|rung| names.split(',').any(|name| name == *rung)).collect();
    assert!(!rungs.is_empty(), "CUTOVER_LEVELS names no rung: {names}");
    rungs
}

/// A linear congruential generator (Knuth's MMIX), its better bits: seeded, and the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) ^ (self.0 >> 17 & 0xffff)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }

    /// From 1 to `n`.
    pub fn upto(&mut self, n: usize) -> usize {
        1 + self.below(n)
    }

    pub fn coin(&mut self) -> bool {
        self.upto(2) == 1
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// From -1 to 1.
    pub fn unit(&mut self) -> f32 {
        (self.next() & 0xffff) as f32 / 32768.0 - 1.0
    }

    pub fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let values = (0..shape.iter().product()).map(|_| self.unit()).collect();
        Tensor::from_vec(shape, values).unwrap()
    }
}

/// What `backend` answers to `inputs`.
pub fn run(backend: &Arc<dyn Backend>, plan: &Plan, inputs: &[Value], said: &str) -> Vec<Tensor> {
    answers(backend.compile(plan, &CompileOptions::default()).unwrap(), inputs, said)
}

/// As [`run`], compiled. It is asked twice, since the second run finds its memory used.
pub fn answers(executable: Arc<dyn Executable>, inputs: &[Value], said: &str) -> Vec<Tensor> {
    let count = executable.signature().outputs.len();
    let mut session = executable.session(SessionMemory::default()).unwrap();
    let given: Vec<Input<'_>> = inputs.iter().map(Input::Value).collect();
    let mut ask = || -> Vec<Tensor> {
        let mut outputs: Vec<Output<'_>> = (0..count).map(|_| Output::Allocate(None)).collect();
        session.run(&given, &mut outputs, &RunContext::default()).unwrap_or_else(|e| panic!("{said}: {e}"));
        let tensor = |output| match output {
            Output::Allocate(Some(Value::Tensor(tensor))) => tensor,
            other => panic!("{said}: a tensor expected, got {other:?}"),
        };
        outputs.into_iter().map(tensor).collect()
    };
    let (first, second) = (ask(), ask());
    assert!(first.iter().zip(&second).all(|(a, b)| same_bits(a, b)), "a second run gives other bits: {said}");
    first
}

/// Whether both are the same to the last bit, NaN included.
pub fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    let same = (a.dtype(), a.shape()) == (b.dtype(), b.shape());
    same && if a.dtype() == DType::String { a == b } else { a.bytes() == b.bytes() }
}
