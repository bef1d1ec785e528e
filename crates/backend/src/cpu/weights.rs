//! Weights as kernels want them, each in a mapping of its own, shared by what they were made from.
//!
//! What was packed is found by a few bytes of its source first. Only where these agree are the sources digested and compared, so that
//! loading a model alone reads its weights once, to pack them.

use cutover_graph::{Constant, Identity};
use memmap2::{Advice, MmapMut};
use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// Zero bytes from the system, all of them in place at once: faults one page at a time cost more than the pages do. Where they fill some
/// and `huge` says so, in huge ones.
pub(super) fn pages(len: usize, huge: bool) -> io::Result<MmapMut> {
    const HUGE_PAGE: usize = 2 << 20;
    /// What is larger may be meant to be used in part.
    const IN_PLACE_UP_TO: usize = 64 << 20;
    // A mapping has at least one byte.
    let map = MmapMut::map_anon(len.max(1))?;
    // Systems that know neither do without.
    if huge && len >= HUGE_PAGE {
        let _ = map.advise(Advice::HugePage);
    }
    if len <= IN_PLACE_UP_TO {
        let _ = map.advise(Advice::PopulateWrite);
    }
    Ok(map)
}

/// Packed weights. Dropping the last reference returns the mapping to the system.
pub(super) struct Packed {
    map: MmapMut,
    len: usize,
    source: Mutex<Source>,
}

/// What weights were packed from: the constants, until their identities had to be known.
enum Source {
    Constants(Vec<Constant>),
    Identities(Vec<Identity>),
}

impl Packed {
    fn new(len: usize, huge: bool, source: Source, fill: impl FnOnce(&mut [f32])) -> io::Result<Packed> {
        let mut map = pages(len * size_of::<f32>(), huge)?;
        // SAFETY: the mapping is page-aligned, zeroed, `len` floats long, and borrowed mutably here alone.
        fill(unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), len) });
        Ok(Packed { map, len, source: Mutex::new(source) })
    }

    pub fn as_slice(&self) -> &[f32] {
        // SAFETY: as above; nobody writes after `new`.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.len) }
    }

    pub fn bytes(&self) -> u64 {
        (self.len * size_of::<f32>()) as u64
    }

    /// Whether these weights were packed from `constants`, or from others with the same elements.
    fn is_of(&self, constants: &[Constant]) -> bool {
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        if let Source::Constants(own) = &*source {
            if own.len() == constants.len() && own.iter().zip(constants).all(|(a, b)| a.is_clone_of(b)) {
                return true;
            }
            // From here on the constants, and the file that they may be a part of, are of no use.
            let identities = own.iter().map(Constant::identity).collect();
            *source = Source::Identities(identities);
        }
        match &*source {
            Source::Identities(own) => own.iter().copied().eq(constants.iter().map(Constant::identity)),
            Source::Constants(_) => unreachable!("resolved above"),
        }
    }
}

/// What is packed, and how.
#[derive(Clone, Debug)]
pub(super) struct Recipe {
    pub constants: Vec<Constant>,
    /// Kernel and sizes, spelled out; the instruction set too where the layout depends on it.
    pub how: String,
}

impl Recipe {
    /// Equal for equal recipes, and for few others: a digest of what the constants are and of some of their bytes.
    fn sample(&self) -> u64 {
        const PARTS: usize = 4;
        const PART_BYTES: usize = 64;
        let mut hasher = DefaultHasher::new();
        self.how.hash(&mut hasher);
        for Constant { tensor, .. } in &self.constants {
            let bytes = tensor.bytes();
            (tensor.dtype(), tensor.shape().dims()).hash(&mut hasher);
            for part in 0..PARTS {
                let start = bytes.len().saturating_sub(PART_BYTES) / (PARTS - 1) * part;
                bytes[start..].iter().take(PART_BYTES).for_each(|byte| byte.hash(&mut hasher));
            }
        }
        hasher.finish()
    }
}

/// Packed weights that some executable holds, by [`Recipe::sample`].
#[derive(Default)]
pub(super) struct Cache(Mutex<HashMap<u64, Vec<(String, Weak<Packed>)>>>);

impl Cache {
    /// What `recipe` names: the packed weights there are, or new ones of `len` floats that `fill` writes.
    pub fn get(
        &self,
        recipe: Recipe,
        len: usize,
        huge: bool,
        fill: impl FnOnce(&mut [f32]),
    ) -> io::Result<Arc<Packed>> {
        let Recipe { constants, how } = &recipe;
        let sample = recipe.sample();
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let alike = cache.get(&sample).into_iter().flatten().filter(|(other, _)| other == how);
        if let Some(packed) = alike.filter_map(|(_, packed)| packed.upgrade()).find(|packed| packed.is_of(constants)) {
            return Ok(packed);
        }
        let packed = Arc::new(Packed::new(len, huge, Source::Constants(recipe.constants), fill)?);
        cache.retain(|_, alike| {
            alike.retain(|(_, packed)| packed.strong_count() > 0);
            !alike.is_empty()
        });
        cache.entry(sample).or_default().push((recipe.how, Arc::downgrade(&packed)));
        Ok(packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cutover_tensor::Tensor;

    #[test]
    fn one_recipe_is_packed_once_and_dropped_with_its_last_user() {
        let cache = Cache::default();
        let recipe = |how: &str, changed: usize| {
            let mut values = vec![1f32; 1000];
            values[changed] = 2.0;
            let constants = vec![Constant::new(Tensor::from_vec([1000], values).unwrap())];
            Recipe { constants, how: how.to_string() }
        };
        let first = recipe("a", 500);
        let a = cache.get(first.clone(), 2, true, |p| p.copy_from_slice(&[1.0, 2.0])).unwrap();
        for again in [first, recipe("a", 500)] {
            let again = cache.get(again, 2, true, |_| panic!("it is there")).unwrap();
            assert!(Arc::ptr_eq(&a, &again));
        }
        // Others may differ in nothing but what no sample sees.
        let differing: Vec<_> = [100, 501, 999].map(|at| cache.get(recipe("a", at), 2, true, |_| {}).unwrap()).into();
        assert!(differing.iter().all(|other| !Arc::ptr_eq(&a, other)));
        drop((a, differing));
        let b = cache.get(recipe("b", 500), 0, true, |_| {}).unwrap();
        assert_eq!((b.as_slice().len(), cache.0.lock().unwrap().len()), (0, 1));
    }
}
