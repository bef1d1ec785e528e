//! Inputs for models whose own are not at hand: random values of the declared types, extents assumed for what varies.
//!
//! Nothing here knows what a model means. Extents are tried in turn until the model takes one, and whoever asks is told which.

use crate::tensors::Named;
use anyhow::{Context, Result, bail};
use cutover::{
    DType, Tensor,
    backend::Binding,
    graph::{Bindings, Dim, TensorFact},
};
use std::collections::{BTreeMap, BTreeSet};

/// What is assumed for dimensions that vary.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extents {
    /// Of a first axis.
    pub batch: usize,
    /// Height and width of an image, `[n, c, h, w]`; videos and volumes have [`VOLUME_EXTENT`].
    pub spatial: usize,
    /// Of every other axis: tokens, samples of audio.
    pub sequence: usize,
}

const VOLUME_EXTENT: usize = 32;
/// All inputs together: a shape that claims more is refused before anything is allocated.
const BYTES_MAX: usize = 1 << 30;
/// Integers below this, unless the model refuses them: they may be indices into something smaller.
const INTEGERS_BELOW: u64 = 1000;

/// Inputs that a model took, and what was assumed to make them.
pub(crate) struct MadeUp {
    pub inputs: Named,
    /// Extents by symbol, of those that nobody gave.
    pub assumed: BTreeMap<String, usize>,
    /// 1 where the model refused larger ones; `None` where it takes no integers.
    pub integers_below: Option<u64>,
}

impl MadeUp {
    /// E.g. `assumed N = 1, H = 224; give --shape image=Nx3xHxW for others`, nothing where all was given.
    pub fn note(&self, bindings: &[Binding]) -> Option<String> {
        let zero =
            (self.integers_below == Some(1)).then(|| "integers are 0, the model refuses larger ones".to_string());
        let extents = (!self.assumed.is_empty()).then(|| assumption(&self.assumed, bindings));
        let parts: Vec<String> = extents.into_iter().chain(zero).collect();
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

/// Calls `run` on inputs of each of `ladder` in turn until it succeeds. `given` are shapes by input, which stay.
///
/// # Errors
/// That of the first try, with what it assumed and what would say otherwise.
pub(crate) fn first_that_runs<T>(
    bindings: &[Binding],
    given: &BTreeMap<String, Vec<usize>>,
    seed: u64,
    ladder: &[Extents],
    mut run: impl FnMut(&Named) -> Result<T>,
) -> Result<(MadeUp, T)> {
    let mut first: Option<anyhow::Error> = None;
    let mut tried = BTreeSet::new();
    for extents in ladder {
        let (shapes, assumed) = shapes(bindings, given, extents)?;
        if !tried.insert(shapes.clone()) {
            continue;
        }
        for integers_below in [INTEGERS_BELOW, 1] {
            let (inputs, integers) = fill(bindings, &shapes, integers_below, seed)?;
            match run(&inputs) {
                Ok(done) => {
                    let integers_below = integers.then_some(integers_below);
                    return Ok((MadeUp { inputs, assumed, integers_below }, done));
                }
                Err(error) if first.is_none() && assumed.is_empty() => first = Some(error),
                Err(error) if first.is_none() => first = Some(error.context(assumption(&assumed, bindings))),
                Err(_) => (),
            }
            if !integers {
                break;
            }
        }
    }
    Err(first.context("no extents to try")?)
}

/// `assumed N = 1, H = 224; give --shape image=Nx3xHxW for others`.
fn assumption(assumed: &BTreeMap<String, usize>, bindings: &[Binding]) -> String {
    let extents: Vec<String> = assumed.iter().map(|(symbol, extent)| format!("{symbol} = {extent}")).collect();
    let varies = |dims: &[Dim]| symbols(dims).iter().any(|s| assumed.contains_key(s.as_str()));
    let spelled = bindings.iter().filter_map(|b| {
        let dims = b.fact.as_tensor()?.shape.as_deref()?;
        let dims = varies(dims).then(|| dims.iter().map(Dim::to_string).collect::<Vec<_>>().join("x"))?;
        Some(format!("--shape {}={dims}", b.name))
    });
    format!("assumed {}; give {} for others", extents.join(", "), spelled.collect::<Vec<_>>().join(" "))
}

/// Reads `NAME=1x3x224x224`, for inputs that the model has.
pub(crate) fn parse_shapes(texts: &[String], bindings: &[Binding]) -> Result<BTreeMap<String, Vec<usize>>> {
    let mut shapes = BTreeMap::new();
    for text in texts {
        let malformed = || format!("--shape {text}: expected NAME=1x3x224x224");
        // A name may hold '=', an extent can't.
        let (name, dims) = text.rsplit_once('=').with_context(malformed)?;
        let dims = match dims {
            "" => Vec::new(),
            dims => dims.split('x').map(str::parse).collect::<Result<Vec<usize>, _>>().with_context(malformed)?,
        };
        let Some(binding) = bindings.iter().find(|b| b.name == name) else {
            let names: Vec<_> = bindings.iter().map(|b| b.name.as_str()).collect();
            bail!("--shape {text}: the model has no input '{name}'; it has {}", names.join(", "));
        };
        if let Some(declared) = binding.fact.as_tensor().and_then(|f| f.shape.as_ref())
            && declared.len() != dims.len()
        {
            bail!("--shape {text}: {} axes, expected {} as in {}", dims.len(), declared.len(), binding.fact);
        }
        if shapes.insert(name.to_string(), dims).is_some() {
            bail!("--shape {text}: '{name}' has a shape already");
        }
    }
    Ok(shapes)
}

fn symbols(dims: &[Dim]) -> BTreeSet<String> {
    let mut symbols = BTreeSet::new();
    dims.iter().for_each(|d| d.collect_symbols(&mut symbols));
    symbols.into_iter().map(|s| s.to_string()).collect()
}

fn tensor_fact(binding: &Binding) -> Result<&TensorFact> {
    let fact = binding.fact.as_tensor();
    fact.with_context(|| format!("input '{}' is a {}: only tensors can be made up", binding.name, binding.fact))
}

/// The shape of every input, and the extents assumed for that.
fn shapes(
    bindings: &[Binding],
    given: &BTreeMap<String, Vec<usize>>,
    extents: &Extents,
) -> Result<(Vec<Vec<usize>>, BTreeMap<String, usize>)> {
    // A symbol means the same in every input: what one shape says of it holds for those not given.
    let mut bound = Bindings::new();
    for binding in bindings {
        let declared = tensor_fact(binding)?.shape.as_deref().unwrap_or_default();
        for (dim, &extent) in declared.iter().zip(given.get(&binding.name).into_iter().flatten()) {
            if let Some(symbol) = dim.as_symbol() {
                bound.insert(symbol.clone(), extent as i64);
            }
        }
    }
    let mut assumed = BTreeMap::new();
    // Of a symbol in several places, the place that says most of it comes first.
    let mut places: Vec<(usize, String, usize)> = Vec::new();
    for binding in bindings.iter().filter(|b| !given.contains_key(&b.name)) {
        let dims = tensor_fact(binding)?.shape.as_deref().unwrap_or_default();
        for (axis, dim) in dims.iter().enumerate() {
            for symbol in symbols(std::slice::from_ref(dim)) {
                let (rank, extent) = match (dims.len(), axis) {
                    _ if is_batch(&symbol) => (0, extents.batch),
                    (2.., 0) => (0, extents.batch),
                    (4, _) => (1, extents.spatial),
                    (5.., _) => (1, VOLUME_EXTENT),
                    _ => (2, extents.sequence),
                };
                places.push((rank, symbol, extent));
            }
        }
    }
    places.sort();
    for (_, symbol, extent) in places {
        if !bound.contains_key(symbol.as_str()) {
            bound.insert(symbol.as_str().into(), extent as i64);
            assumed.insert(symbol, extent);
        }
    }
    let mut shapes = Vec::with_capacity(bindings.len());
    let mut bytes = 0usize;
    for binding in bindings {
        let fact = tensor_fact(binding)?;
        let shape: Vec<usize> = match (given.get(&binding.name), &fact.shape) {
            (Some(shape), _) => shape.clone(),
            (None, Some(dims)) => {
                let extent = |d: &Dim| d.eval(&bound).and_then(|v| usize::try_from(v).ok());
                let shape = dims.iter().map(extent).collect::<Option<_>>();
                shape.with_context(|| format!("input '{}' ({}): its shape is needed", binding.name, binding.fact))?
            }
            (None, None) => bail!("input '{}' has no declared rank: its shape is needed", binding.name),
        };
        let size = shape.iter().try_fold(fact.dtype.bits().div_ceil(8), |n, &d| n.checked_mul(d));
        bytes = match size.and_then(|size| bytes.checked_add(size)) {
            Some(bytes) if bytes <= BYTES_MAX => bytes,
            _ => {
                bail!("input '{}' of shape {shape:?}: more than {BYTES_MAX} bytes in all are not made up", binding.name)
            }
        };
        shapes.push(shape);
    }
    Ok((shapes, assumed))
}

/// The batch that inputs of `bindings` have where `wanted` is asked for: that one where a first axis varies, a fixed one where that is it or nothing else is asked for.
///
/// # Errors
/// The input with another fixed one.
pub(crate) fn batch_of(bindings: &[Binding], wanted: Option<usize>) -> Result<usize> {
    let mut fixed = None;
    for binding in bindings {
        let dims = tensor_fact(binding)?.shape.as_deref().unwrap_or_default();
        if dims.iter().any(|dim| symbols(std::slice::from_ref(dim)).iter().any(|s| is_batch(s))) {
            return Ok(wanted.unwrap_or(1));
        }
        let Some(first) = dims.first().filter(|_| dims.len() >= 2) else { continue };
        match first.as_const() {
            Some(extent) if fixed.is_none() => fixed = usize::try_from(extent).ok().map(|extent| (extent, binding)),
            Some(_) => {}
            None => return Ok(wanted.unwrap_or(1)),
        }
    }
    match (fixed, wanted) {
        (Some((extent, binding)), Some(wanted)) if extent != wanted => {
            bail!("input '{}' ({}) has a fixed batch of {extent}", binding.name, binding.fact)
        }
        (None, Some(wanted)) if wanted != 1 => bail!("no input has a batch"),
        (Some((extent, _)), _) => Ok(extent),
        (None, _) => Ok(1),
    }
}

/// Whether a symbol is called as batches are.
fn is_batch(symbol: &str) -> bool {
    let symbol = symbol.to_lowercase();
    symbol == "n" || symbol.contains("batch")
}

/// Inputs of these shapes, and whether any of them holds integers that the limit is for.
fn fill(bindings: &[Binding], shapes: &[Vec<usize>], integers_below: u64, seed: u64) -> Result<(Named, bool)> {
    let mut random = Random::new(seed);
    let mut inputs = Vec::with_capacity(bindings.len());
    let mut integers = false;
    for (binding, shape) in bindings.iter().zip(shapes) {
        let dtype = tensor_fact(binding)?.dtype;
        integers |= !dtype.is_float() && dtype != DType::Bool;
        inputs.push((binding.name.clone(), random_tensor(&binding.name, dtype, shape, integers_below, &mut random)?));
    }
    Ok((inputs, integers))
}

/// Floats within -1 and 1, integers below the limit; ones where the name holds `mask`, zeros where it holds `type`.
fn random_tensor(
    name: &str,
    dtype: DType,
    shape: &[usize],
    integers_below: u64,
    random: &mut Random,
) -> Result<Tensor> {
    let mut tensor = Tensor::zeros(dtype, shape)?;
    let count = tensor.element_count();
    let lower = name.to_lowercase();
    let fixed = if lower.contains("mask") {
        Some(1u64)
    } else if lower.contains("type") {
        Some(0)
    } else {
        None
    };
    macro_rules! fill {
        ($make:expr) => {{
            let values: Vec<u8> = (0..count).flat_map(|_| $make(random).to_le_bytes()).collect();
            tensor.bytes_mut().copy_from_slice(&values);
        }};
    }
    macro_rules! whole {
        ($t:ty) => {
            fill!(|r: &mut Random| {
                fixed.unwrap_or_else(|| r.next() % integers_below.min((<$t>::MAX as u64).saturating_add(1))) as $t
            })
        };
    }
    let float = |random: &mut Random| fixed.map_or_else(|| 2.0 * random.unit() - 1.0, |v| v as f64);
    match dtype {
        DType::F32 => fill!(|r: &mut Random| float(r) as f32),
        DType::F64 => fill!(float),
        DType::F16 => fill!(|r: &mut Random| cutover::tensor::f16::from_f64(float(r))),
        DType::BF16 => fill!(|r: &mut Random| cutover::tensor::bf16::from_f64(float(r))),
        DType::I8 => whole!(i8),
        DType::U8 => whole!(u8),
        DType::I16 => whole!(i16),
        DType::U16 => whole!(u16),
        DType::I32 => whole!(i32),
        DType::U32 => whole!(u32),
        DType::I64 => whole!(i64),
        DType::U64 => whole!(u64),
        DType::Bool => fill!(|r: &mut Random| (fixed.unwrap_or_else(|| r.next() & 1) & 1) as u8),
        other => bail!("input '{name}' is of type {other}, for which none is made up"),
    }
    Ok(tensor)
}

/// xorshift64*: fast, seeded, and all that made-up inputs and the order of measurements need.
pub(crate) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// An integer below `end`, which is at least 1.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11
    }

    /// From 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        self.next() as f64 / (1u64 << 53) as f64
    }
}
