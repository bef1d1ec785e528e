//! Weights as kernels want them, each in a mapping of its own, shared by what they were made from.

use cutover_graph::Identity;
use memmap2::MmapMut;
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// Packed weights. Dropping the last reference returns the mapping to the system.
pub(super) struct Packed {
    map: MmapMut,
    len: usize,
}

impl Packed {
    fn new(len: usize, fill: impl FnOnce(&mut [f32])) -> io::Result<Packed> {
        // A mapping has at least one byte.
        let mut map = MmapMut::map_anon((len * size_of::<f32>()).max(1))?;
        // SAFETY: the mapping is page-aligned, zeroed, `len` floats long, and borrowed mutably here alone.
        fill(unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), len) });
        Ok(Packed { map, len })
    }

    pub fn as_slice(&self) -> &[f32] {
        // SAFETY: as above; nobody writes after `new`.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.len) }
    }

    pub fn bytes(&self) -> u64 {
        (self.len * size_of::<f32>()) as u64
    }
}

/// What was packed: by the identities it was made from and how.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Recipe {
    pub identities: Vec<Identity>,
    /// Kernel and sizes, spelled out; the instruction set too where the layout depends on it.
    pub how: String,
}

/// Packed weights that some executable holds.
#[derive(Default)]
pub(super) struct Cache(Mutex<HashMap<Recipe, Weak<Packed>>>);

impl Cache {
    /// What `recipe` names: the packed weights there are, or new ones of `len` floats that `fill` writes.
    pub fn get(&self, recipe: Recipe, len: usize, fill: impl FnOnce(&mut [f32])) -> io::Result<Arc<Packed>> {
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(packed) = cache.get(&recipe).and_then(Weak::upgrade) {
            return Ok(packed);
        }
        let packed = Arc::new(Packed::new(len, fill)?);
        cache.retain(|_, packed| packed.strong_count() > 0);
        cache.insert(recipe, Arc::downgrade(&packed));
        Ok(packed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_recipe_is_packed_once_and_dropped_with_its_last_user() {
        let cache = Cache::default();
        let recipe = |how: &str| Recipe { identities: vec![Identity([1; 32])], how: how.to_string() };
        let a = cache.get(recipe("a"), 2, |p| p.copy_from_slice(&[1.0, 2.0])).unwrap();
        let again = cache.get(recipe("a"), 2, |_| panic!("it is there")).unwrap();
        assert!(Arc::ptr_eq(&a, &again));
        drop((a, again));
        let b = cache.get(recipe("b"), 0, |_| {}).unwrap();
        assert_eq!((b.as_slice().len(), cache.0.lock().unwrap().len()), (0, 1));
    }
}
