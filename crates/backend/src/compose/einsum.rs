//! Sums of products in Einstein's notation: matrix products of transposes, input by input.

use super::{Composing, known};
use cutover_graph::{
    Dim, Patch, PatchValue,
    ops::{BinaryFunction, Einsum, Reduce, ReduceFunction},
};
use std::collections::VecDeque;

/// A value, and the label of each of its axes.
struct Term {
    value: PatchValue,
    labels: Vec<usize>,
}

/// The composition, and the extent of every label.
struct Sum<'a> {
    composing: Composing<'a>,
    extents: Vec<Dim>,
}

pub(super) fn einsum(composing: Composing<'_>, op: &Einsum) -> Option<Patch> {
    let inputs = (0..composing.node.inputs.len()).map(|i| composing.floats(i)).collect::<Option<Vec<_>>>()?;
    let ranks: Vec<usize> = inputs.iter().map(|(_, shape)| shape.len()).collect();
    let (labels, output) = op.labels(&ranks).ok()?;
    let mut extents: Vec<Option<Dim>> = vec![None; labels.iter().flatten().map(|label| label + 1).max().unwrap_or(0)];
    for (label, extent) in labels.iter().flatten().zip(inputs.iter().flat_map(|(_, shape)| shape)) {
        // An axis that broadcasts, and one that may, are left to the operator.
        if extents[*label].get_or_insert_with(|| extent.clone()) != extent {
            return None;
        }
    }
    let mut sum = Sum { composing, extents: extents.into_iter().collect::<Option<_>>()? };
    let is_diagonal = |labels: &Vec<usize>| (1..labels.len()).any(|i| labels[..i].contains(&labels[i]));
    if labels.iter().any(is_diagonal) {
        return None;
    }
    let mut terms: VecDeque<Term> =
        inputs.into_iter().zip(labels).map(|((value, _), labels)| Term { value, labels }).collect();
    let mut all = terms.pop_front()?;
    while let Some(next) = terms.pop_front() {
        let later = |label: &usize| output.contains(label) || terms.iter().any(|term| term.labels.contains(label));
        all = sum.product(all, next, &later)?;
    }
    let all = sum.summed(all, &|label| output.contains(label));
    let y = sum.ordered(&all, &output);
    sum.composing.finish(&[Some(y)])
}

impl Sum<'_> {
    /// Summed over the axes that are not kept.
    fn summed(&mut self, term: Term, keep: &dyn Fn(&usize) -> bool) -> Term {
        let axes = |kept: bool| term.labels.iter().enumerate().filter(move |(_, label)| keep(label) == kept);
        let gone: Vec<i64> = axes(false).map(|(axis, _)| axis as i64).collect();
        if gone.is_empty() {
            return term;
        }
        let labels = axes(true).map(|(_, &label)| label).collect();
        let axes = self.composing.integers(&gone);
        let op = Reduce { function: ReduceFunction::Sum, keep_dims: false, noop_with_empty_axes: false };
        Term { value: self.composing.op(op, &[term.value, axes]), labels }
    }

    /// With its axes in the order of `labels`.
    fn ordered(&mut self, term: &Term, labels: &[usize]) -> PatchValue {
        if term.labels == labels {
            return term.value;
        }
        let axis = |label: &usize| term.labels.iter().position(|l| l == label).expect("one of the term's");
        let permutation: Vec<usize> = labels.iter().map(axis).collect();
        self.composing.transpose(term.value, &permutation)
    }

    /// With an axis for each of `labels`, of extent 1 where the term lacks it.
    fn spread(&mut self, term: &Term, labels: &[usize]) -> PatchValue {
        let own: Vec<usize> = labels.iter().copied().filter(|label| term.labels.contains(label)).collect();
        let lacking = labels.iter().enumerate().filter(|(_, label)| !term.labels.contains(label));
        let lacking: Vec<i64> = lacking.map(|(axis, _)| axis as i64).collect();
        let value = self.ordered(term, &own);
        if lacking.is_empty() { value } else { self.composing.unsqueeze(value, &lacking) }
    }

    /// The product of two terms, summed over the axes that are not kept.
    fn product(&mut self, a: Term, b: Term, keep: &dyn Fn(&usize) -> bool) -> Option<Term> {
        let (in_a, in_b) = (a.labels.clone(), b.labels.clone());
        let a = self.summed(a, &|label| keep(label) || in_b.contains(label));
        let b = self.summed(b, &|label| keep(label) || in_a.contains(label));
        // What one of them alone has is kept now; what both have, and is not, is summed by the product.
        let (shared, rows): (Vec<usize>, Vec<usize>) = a.labels.iter().partition(|label| in_b.contains(label));
        let (batch, summed): (Vec<usize>, Vec<usize>) = shared.into_iter().partition(keep);
        let columns: Vec<usize> = b.labels.iter().filter(|label| !in_a.contains(label)).copied().collect();
        let labels = [&batch[..], &rows, &columns].concat();
        // Nothing to sum over, or nothing but that: no matrices.
        if summed.is_empty() || rows.is_empty() && columns.is_empty() {
            let all = [&labels[..], &summed].concat();
            let (x, y) = (self.spread(&a, &all), self.spread(&b, &all));
            let value = self.composing.binary(BinaryFunction::Mul, x, y);
            return Some(self.summed(Term { value, labels: all }, keep));
        }
        if batch.is_empty() && !rows.is_empty() {
            // One matrix for all rows, which stay as many axes as they are. What more is open is better there than among its columns.
            if self.open(&columns) > 1 {
                return if self.open(&rows) > 1 { None } else { self.product(b, a, keep) };
            }
            let x = self.matrices(&a, &rows, None, &summed)?;
            let y = self.matrices(&b, &[], Some(&summed), &columns)?;
            let value = self.composing.matmul(x, y);
            let extents = [vec![0; rows.len()], self.numbers(&columns)].concat();
            let value = if columns.len() == 1 { value } else { self.reshape(value, extents)? };
            return Some(Term { value, labels });
        }
        let x = self.matrices(&a, &batch, Some(&rows), &summed)?;
        let y = self.matrices(&b, &batch, Some(&summed), &columns)?;
        let mut value = self.composing.matmul(x, y);
        if rows.len() != 1 || columns.len() != 1 {
            let mut extents = vec![0; batch.len()];
            match rows[..] {
                [_] => extents.push(0),
                _ => extents.extend(self.numbers(&rows)),
            }
            extents.extend(self.numbers(&columns));
            value = self.reshape(value, extents)?;
        }
        Some(Term { value, labels })
    }

    /// `[batch…, rows, columns]`, the labels of either as one axis; without `rows` the last of the batch are these.
    fn matrices(
        &mut self,
        term: &Term,
        batch: &[usize],
        rows: Option<&[usize]>,
        columns: &[usize],
    ) -> Option<PatchValue> {
        let value = self.ordered(term, &[batch, rows.unwrap_or_default(), columns].concat());
        let merged = rows.into_iter().chain([columns]);
        if merged.clone().all(|labels| labels.len() == 1) {
            return Some(value);
        }
        let mut extents = vec![0; batch.len()];
        extents.extend(merged.map(|labels| match self.open(labels) {
            0 => self.numbers(labels).iter().product(),
            _ => -1,
        }));
        self.reshape(value, extents)
    }

    /// How many of the labels have extents that are not known.
    fn open(&self, labels: &[usize]) -> usize {
        self.numbers(labels).iter().filter(|&&extent| extent == -1).count()
    }

    /// The extents of labels, −1 where they are not known.
    fn numbers(&self, labels: &[usize]) -> Vec<i64> {
        labels.iter().map(|&label| known(&self.extents[label]).unwrap_or(-1)).collect()
    }

    /// `None` where more than one extent is left to be found.
    fn reshape(&mut self, value: PatchValue, extents: Vec<i64>) -> Option<PatchValue> {
        let open = extents.iter().filter(|&&extent| extent == -1).count();
        (open <= 1).then(|| self.composing.reshape(value, &extents))
    }
}
