//! Which indices of which axes belong together, found by unification.
//!
//! Every axis of every value is an [`AxisId`]. Two axes that must lose the same indices are unified; one that a reshape splits becomes a
//! product (the first factor slowest), one that a concatenation joins a sum of parts one behind the other. What is neither is an *atom*: to
//! remove index `i` of an atom is to remove all that lies at `i` wherever the atom is a factor or a part. So heads × width, channels × rows ×
//! columns, groups × channels and concatenated features need no case of their own. This is the dependency graph of DepGraph (Fang et al.,
//! CVPR 2023), held as the classes it comes to.

use cutover_graph::Dim;
use std::collections::HashMap;

/// An axis of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AxisId(u32);

#[derive(Clone, Debug)]
enum Form {
    Atom,
    Same(AxisId),
    Product(Vec<AxisId>),
    Sum(Vec<AxisId>),
}

#[derive(Clone, Debug)]
struct Entry {
    extent: Dim,
    form: Form,
    /// Why nothing of it may be removed.
    frozen: Option<String>,
}

/// All axes of a graph.
#[derive(Clone, Debug, Default)]
pub struct Axes {
    entries: Vec<Entry>,
}

/// For atoms that lose indices, those that stay, ascending.
pub type KeptIndices = HashMap<AxisId, Vec<usize>>;

impl Axes {
    pub fn add(&mut self, extent: Dim) -> AxisId {
        self.push(extent, Form::Atom)
    }

    fn push(&mut self, extent: Dim, form: Form) -> AxisId {
        self.entries.push(Entry { extent, form, frozen: None });
        AxisId(self.entries.len() as u32 - 1)
    }

    /// An axis of the factors, the first slowest.
    pub fn product(&mut self, factors: &[AxisId]) -> AxisId {
        let factors: Vec<AxisId> = factors.iter().copied().filter(|&f| self.extent(f).as_const() != Some(1)).collect();
        match factors[..] {
            [] => self.add(Dim::Const(1)),
            [one] => one,
            _ => {
                let extent = factors.iter().fold(Dim::Const(1), |n, &f| n * self.extent(f).clone());
                self.push(extent, Form::Product(factors))
            }
        }
    }

    /// An axis of the parts, one behind the other.
    pub fn sum(&mut self, parts: &[AxisId]) -> AxisId {
        let parts: Vec<AxisId> = parts.iter().copied().filter(|&p| self.extent(p).as_const() != Some(0)).collect();
        match parts[..] {
            [] => self.add(Dim::Const(0)),
            [one] => one,
            _ => {
                let extent = parts.iter().fold(Dim::Const(0), |n, &p| n + self.extent(p).clone());
                self.push(extent, Form::Sum(parts))
            }
        }
    }

    pub fn extent(&self, id: AxisId) -> &Dim {
        &self.entries[id.0 as usize].extent
    }

    fn root(&self, mut id: AxisId) -> AxisId {
        while let Form::Same(other) = self.entries[id.0 as usize].form {
            id = other;
        }
        id
    }

    fn form(&self, root: AxisId) -> &Form {
        &self.entries[root.0 as usize].form
    }

    /// Nothing of `id` may be removed, because of `reason`; the first reason stays.
    pub fn freeze(&mut self, id: AxisId, reason: &str) {
        let root = self.root(id);
        let entry = &mut self.entries[root.0 as usize];
        if entry.frozen.is_none() {
            entry.frozen = Some(reason.to_string());
        }
        if let Form::Product(parts) | Form::Sum(parts) = entry.form.clone() {
            parts.into_iter().for_each(|part| self.freeze(part, reason));
        }
    }

    pub fn frozen(&self, id: AxisId) -> Option<&str> {
        self.entries[self.root(id).0 as usize].frozen.as_deref()
    }

    /// From here on `a` and `b` lose the same indices. Where that can't be expressed, both are frozen, because of `reason`.
    pub fn unify(&mut self, a: AxisId, b: AxisId, reason: &str) {
        let (a, b) = (self.root(a), self.root(b));
        if a == b {
            return;
        }
        for (from, to) in [(a, b), (b, a)] {
            if let Some(frozen) = self.frozen(from).map(str::to_string) {
                self.freeze(to, &frozen);
            }
        }
        let fits = self.extent(a) == self.extent(b)
            && match (self.form(a).clone(), self.form(b).clone()) {
                (Form::Atom, _) => return self.entries[a.0 as usize].form = Form::Same(b),
                (_, Form::Atom) => return self.entries[b.0 as usize].form = Form::Same(a),
                (Form::Sum(x), Form::Sum(y)) => self.align_parts(x, y, reason),
                (Form::Sum(x), Form::Product(_)) => {
                    self.align_factors(vec![a], vec![b], reason) || self.align_parts(x, vec![b], reason)
                }
                (Form::Product(_), Form::Sum(y)) => {
                    self.align_factors(vec![a], vec![b], reason) || self.align_parts(vec![a], y, reason)
                }
                _ => self.align_factors(vec![a], vec![b], reason),
            };
        if fits {
            // Aligning may have made one of them of the other already.
            let (a, b) = (self.root(a), self.root(b));
            if a != b {
                self.entries[a.0 as usize].form = Form::Same(b);
            }
        } else {
            self.freeze(a, reason);
            self.freeze(b, reason);
        }
    }

    /// A tensor with axes `from` is read as one with axes `to`, in the same order of elements. What can't be matched is frozen.
    pub fn reshape(&mut self, from: &[AxisId], to: &[AxisId], reason: &str) {
        if !self.align_factors(from.to_vec(), to.to_vec(), reason) {
            from.iter().chain(to).for_each(|&axis| self.freeze(axis, reason));
        }
    }

    /// Unifies two lists of factors of one extent, splitting where they do not match. Atoms that were split before a failure stay so.
    fn align_factors(&mut self, x: Vec<AxisId>, y: Vec<AxisId>, reason: &str) -> bool {
        let (mut x, mut y) = (self.factors(x), self.factors(y));
        x.reverse();
        y.reverse();
        while let (Some(&a), Some(&b)) = (x.last(), y.last()) {
            let (a, b) = (self.root(a), self.root(b));
            let (left, right) = (self.extent(a).clone(), self.extent(b).clone());
            if a == b || left == right {
                self.unify(a, b, reason);
                x.pop();
                y.pop();
                continue;
            }
            let (larger, by, of) = match (divided(&left, &right), divided(&right, &left)) {
                (Some(rest), _) => (a, (right, rest), &mut x),
                (None, Some(rest)) => (b, (left, rest), &mut y),
                (None, None) => return false,
            };
            let Some((outer, inner)) = self.split(larger, by.0, by.1, reason) else { return false };
            of.pop();
            of.extend([inner, outer]);
            (x, y) = (self.reversed_factors(x), self.reversed_factors(y));
        }
        x.is_empty() && y.is_empty()
    }

    fn reversed_factors(&self, mut list: Vec<AxisId>) -> Vec<AxisId> {
        list.reverse();
        let mut list = self.factors(list);
        list.reverse();
        list
    }

    /// The list with products replaced by their factors, without those of one index.
    fn factors(&self, list: Vec<AxisId>) -> Vec<AxisId> {
        let mut flat = Vec::new();
        for id in list {
            let root = self.root(id);
            match self.form(root) {
                Form::Product(factors) => flat.extend(self.factors(factors.clone())),
                _ if self.extent(root).as_const() == Some(1) => {}
                _ => flat.push(root),
            }
        }
        flat
    }

    /// Makes `id` a product of `outer` and `inner` indices.
    fn split(&mut self, id: AxisId, outer: Dim, inner: Dim, reason: &str) -> Option<(AxisId, AxisId)> {
        let root = self.root(id);
        let frozen = self.frozen(root).map(str::to_string);
        let (first, second) = match self.form(root).clone() {
            Form::Atom => (self.add(outer), self.add(inner)),
            Form::Sum(parts) => {
                let rests: Option<Vec<Dim>> = parts.iter().map(|&p| divided(self.extent(p), &inner)).collect();
                let (second, mut firsts) = (self.add(inner.clone()), Vec::new());
                for (&part, rest) in parts.iter().zip(rests?) {
                    let (first, own) = if rest.as_const() == Some(1) {
                        (self.add(Dim::Const(1)), part)
                    } else if inner.as_const() == Some(1) {
                        (part, self.add(Dim::Const(1)))
                    } else {
                        self.split(part, rest, inner.clone(), reason)?
                    };
                    self.unify(own, second, reason);
                    firsts.push(first);
                }
                (self.sum(&firsts), second)
            }
            Form::Product(_) => {
                let (first, second) = (self.add(outer), self.add(inner));
                return self.align_factors(vec![root], vec![first, second], reason).then_some((first, second));
            }
            Form::Same(_) => return None,
        };
        if let Some(frozen) = frozen {
            self.freeze(first, &frozen);
            self.freeze(second, &frozen);
        }
        self.entries[root.0 as usize].form = Form::Product(vec![first, second]);
        Some((first, second))
    }

    /// Unifies two lists of parts, cutting where they do not match.
    fn align_parts(&mut self, x: Vec<AxisId>, y: Vec<AxisId>, reason: &str) -> bool {
        let (mut x, mut y) = (self.parts(x), self.parts(y));
        x.reverse();
        y.reverse();
        while let (Some(&a), Some(&b)) = (x.last(), y.last()) {
            let (a, b) = (self.root(a), self.root(b));
            if a == b || self.extent(a) == self.extent(b) {
                self.unify(a, b, reason);
                x.pop();
                y.pop();
                continue;
            }
            let (Some(left), Some(right)) = (self.extent(a).as_const(), self.extent(b).as_const()) else {
                return false;
            };
            let (larger, at, of) = if left > right { (a, right, &mut x) } else { (b, left, &mut y) };
            let Some((head, tail)) = self.cut(larger, at, reason) else { return false };
            of.pop();
            of.extend([tail, head]);
        }
        x.is_empty() && y.is_empty()
    }

    /// The list with sums replaced by their parts.
    fn parts(&self, list: Vec<AxisId>) -> Vec<AxisId> {
        let mut flat = Vec::new();
        for id in list {
            let root = self.root(id);
            match self.form(root) {
                Form::Sum(parts) => flat.extend(self.parts(parts.clone())),
                _ if self.extent(root).as_const() == Some(0) => {}
                _ => flat.push(root),
            }
        }
        flat
    }

    /// Makes `id`, no sum, one of its first `at` indices and the others.
    fn cut(&mut self, id: AxisId, at: i64, reason: &str) -> Option<(AxisId, AxisId)> {
        let root = self.root(id);
        let extent = self.extent(root).as_const()?;
        let frozen = self.frozen(root).map(str::to_string);
        let (head, tail) = match self.form(root).clone() {
            Form::Atom => (self.add(Dim::Const(at)), self.add(Dim::Const(extent - at))),
            Form::Product(_) => {
                let factors = self.factors(vec![root]);
                let (&outer, inner) = factors.split_first()?;
                let width = inner.iter().try_fold(1i64, |n, &f| n.checked_mul(self.extent(f).as_const()?))?;
                if at % width != 0 {
                    return None;
                }
                let outer = self.root(outer);
                let all = self.extent(outer).as_const()?;
                // The first factor becomes a sum, of which each part has the same inner factors.
                let parts = [self.add(Dim::Const(at / width)), self.add(Dim::Const(all - at / width))];
                let sum = self.sum(&parts);
                self.unify(outer, sum, reason);
                let [head, tail] = parts.map(|part| self.product(&[&[part], inner].concat()));
                (head, tail)
            }
            _ => return None,
        };
        if let Some(frozen) = frozen {
            self.freeze(head, &frozen);
            self.freeze(tail, &frozen);
        }
        self.entries[root.0 as usize].form = Form::Sum(vec![head, tail]);
        Some((head, tail))
    }

    /// The atoms of `id` that may lose indices, and how many indices of `id` go with one of theirs where they are a factor.
    pub fn atoms(&self, id: AxisId) -> Vec<(AxisId, usize)> {
        let root = self.root(id);
        match self.form(root) {
            Form::Atom => {
                let prunable = self.frozen(root).is_none() && self.extent(root).as_const().is_some_and(|n| n > 1);
                if prunable { vec![(root, 1)] } else { Vec::new() }
            }
            Form::Sum(parts) => parts.iter().flat_map(|&part| self.atoms(part)).collect(),
            Form::Product(factors) => {
                let extent = |id: AxisId| self.extent(id).as_const().unwrap_or(1).max(1) as usize;
                let whole = extent(root);
                let of = |&f: &AxisId| {
                    let others = whole / extent(f);
                    self.atoms(f).into_iter().map(move |(atom, width)| (atom, width * others))
                };
                factors.iter().flat_map(of).collect()
            }
            Form::Same(_) => Vec::new(),
        }
    }

    /// Of every product, all atoms behind the first that may lose indices stay whole: heads go, not a part of each.
    pub fn keep_inner_factors(&mut self, reason: &str) {
        for index in 0..self.entries.len() {
            let id = AxisId(index as u32);
            let mut first = true;
            if !matches!(self.form(id), Form::Product(_)) {
                continue;
            }
            for factor in self.factors(vec![id]) {
                let prunable = !self.atoms(factor).is_empty();
                if prunable && !first {
                    self.freeze(factor, reason);
                }
                first &= !prunable;
            }
        }
    }

    /// For every index of `id`, whose extent is known, the atoms it belongs to and its index in each.
    pub fn places(&self, id: AxisId) -> Vec<Vec<(AxisId, usize)>> {
        let root = self.root(id);
        match self.form(root) {
            Form::Sum(parts) => parts.iter().flat_map(|&part| self.places(part)).collect(),
            Form::Product(factors) => factors.iter().fold(vec![Vec::new()], |outer, &factor| {
                let inner = self.places(factor);
                let with = |o: &Vec<_>| inner.iter().map(|i| [&o[..], &i[..]].concat()).collect::<Vec<_>>();
                outer.iter().flat_map(with).collect()
            }),
            _ => (0..self.extent(root).as_const().unwrap_or(0).max(0) as usize).map(|i| vec![(root, i)]).collect(),
        }
    }

    /// The indices of `id`, whose extent is known, that stay.
    pub fn kept(&self, id: AxisId, kept: &KeptIndices) -> Vec<usize> {
        let stays = |place: &Vec<(AxisId, usize)>| {
            place.iter().all(|(atom, index)| kept.get(atom).is_none_or(|kept| kept.binary_search(index).is_ok()))
        };
        let places = self.places(id);
        places.iter().enumerate().filter(|(_, place)| stays(place)).map(|(index, _)| index).collect()
    }

    /// The extent of `id` where each atom has `extents` indices, if that says.
    pub fn extent_with(&self, id: AxisId, extents: &dyn Fn(AxisId) -> Option<usize>) -> Dim {
        let root = self.root(id);
        match self.form(root) {
            Form::Product(parts) => parts.iter().fold(Dim::Const(1), |n, &p| n * self.extent_with(p, extents)),
            Form::Sum(parts) => parts.iter().fold(Dim::Const(0), |n, &p| n + self.extent_with(p, extents)),
            _ => extents(root).map_or_else(|| self.extent(root).clone(), Dim::from),
        }
    }
}

/// `whole / part` where that is a whole number above 1, of positive ones.
fn divided(whole: &Dim, part: &Dim) -> Option<Dim> {
    match (whole, part) {
        (Dim::Const(a), Dim::Const(b)) => (*b > 0 && a % b == 0 && a / b > 1).then(|| Dim::Const(a / b)),
        _ => whole.exact_div(part).filter(|rest| rest.as_const() != Some(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(axes: &mut Axes, extent: i64) -> AxisId {
        axes.add(Dim::Const(extent))
    }

    #[test]
    fn a_head_is_all_of_its_columns() {
        let mut axes = Axes::default();
        let [hidden, heads, width] = [12, 3, 4].map(|n| axis(&mut axes, n));
        axes.reshape(&[hidden], &[heads, width], "");
        let kept = KeptIndices::from([(axes.atoms(heads)[0].0, vec![0, 2])]);
        assert_eq!(axes.kept(hidden, &kept), [0, 1, 2, 3, 8, 9, 10, 11]);
        let kept = KeptIndices::from([(axes.atoms(width)[0].0, vec![1])]);
        assert_eq!(axes.kept(hidden, &kept), [1, 5, 9]);
    }

    #[test]
    fn sums_and_products_meet() {
        let mut axes = Axes::default();
        // Two branches are joined, flattened with 2 places each, shuffled as 2 groups and cut in halves.
        let [a, b, places, flat] = [4, 8, 2, 24].map(|n| axis(&mut axes, n));
        let joined = axes.sum(&[a, b]);
        axes.freeze(places, "spatial");
        axes.reshape(&[joined, places], &[flat], "");
        assert_eq!(axes.atoms(flat).len(), 2, "a and b, not the places");
        let [groups, inner] = [2, 6].map(|n| axis(&mut axes, n));
        axes.reshape(&[joined], &[groups, inner], "do not divide");
        // A row of 6 begins in one branch and ends in the other.
        assert_eq!(axes.frozen(groups), Some("do not divide"));
        let [c, d] = [3, 9].map(|n| axis(&mut axes, n));
        let other = axes.sum(&[c, d]);
        let [e, f] = [5, 7].map(|n| axis(&mut axes, n));
        let another = axes.sum(&[e, f]);
        axes.unify(other, another, "");
        let kept = KeptIndices::from([(axes.atoms(c)[0].0, vec![1])]);
        assert_eq!(axes.kept(another, &kept), [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(axes.kept(e, &kept), [1, 3, 4]);
    }

    #[test]
    fn what_is_frozen_stays_so() {
        let mut axes = Axes::default();
        let [whole, outer, inner, other] = [6, 2, 3, 6].map(|n| axis(&mut axes, n));
        axes.freeze(whole, "an output");
        axes.reshape(&[whole], &[outer, inner], "");
        axes.unify(other, whole, "");
        for id in [outer, inner, other] {
            assert_eq!(axes.frozen(id), Some("an output"));
            assert!(axes.atoms(id).is_empty());
        }
    }

    #[test]
    fn batch_and_heads_are_one_axis() {
        let mut axes = Axes::default();
        let batch = axes.add(Dim::symbol("n"));
        let [heads, hidden, width] = [3, 12, 4].map(|n| axis(&mut axes, n));
        let both = axes.add(Dim::symbol("n") * Dim::Const(3));
        axes.reshape(&[batch, hidden], &[both, width], "");
        let again = axes.add(Dim::symbol("n"));
        axes.reshape(&[both], &[again, heads], "");
        assert_eq!(axes.atoms(heads), axes.atoms(both).iter().map(|&(a, _)| (a, 1)).collect::<Vec<_>>());
        assert_eq!(axes.atoms(hidden)[0], (axes.atoms(heads)[0].0, 4));
    }
}
