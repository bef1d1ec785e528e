//! Symbolic extents: constants, named symbols and integer expressions of them, in one normal form.
//!
//! An expression is a polynomial with integer coefficients over *atoms*; an atom is a symbol (an integer ≥ 0) or a
//! division, minimum or maximum that does not simplify. Two expressions that are equal as polynomials are equal as values,
//! so `(N + 1) * 2 - 2` is `2 * N`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    hash::{Hash, Hasher},
    ops::{Add, Mul, Neg, Sub},
    sync::Arc,
};

/// A named unknown extent, ≥ 0. Two symbols of one name are the same.
pub type Symbol = Arc<str>;

/// Values of symbols.
pub type Bindings = BTreeMap<Symbol, i64>;

/// An integer: known, or an expression of symbols.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dim {
    Const(i64),
    /// Never a constant: [`Dim`]'s constructors turn those into [`Dim::Const`].
    Expr(Arc<Polynomial>),
}

/// Terms sorted by their atoms, no coefficient zero. The constant term has no atoms.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Polynomial(BTreeMap<Vec<Atom>, i64>);

#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Atom {
    Symbol(Symbol),
    FloorDiv(Dim, Dim),
    CeilDiv(Dim, Dim),
    Min(Dim, Dim),
    Max(Dim, Dim),
    /// `⌊extent · factor⌋` in f32, as a resized extent is defined. Floats are kept by their bits.
    Scaled(Dim, u32),
    /// A number that is no integer, by the bits of its f32: an element of a constant that extents are scaled by.
    Fraction(u32),
    /// An expression above [`WEIGHT_LIMIT`], of which a digest and a bound are kept: equal ones are still equal, and nothing
    /// can be evaluated.
    Opaque {
        digest: [u8; 16],
        lower_bound: Option<i64>,
    },
}

/// Atoms in an expression, those inside atoms and long names counted. A file may double, square or nest an expression with every
/// node it has; those of real models stay below a hundredth of this.
const WEIGHT_LIMIT: usize = 512;

impl Dim {
    pub fn symbol(name: impl Into<Symbol>) -> Dim {
        Dim::atom(Atom::Symbol(name.into()))
    }

    pub fn as_const(&self) -> Option<i64> {
        match self {
            Dim::Const(value) => Some(*value),
            Dim::Expr(_) => None,
        }
    }

    /// Itself, unless it is at an end of `i64`, where sums and products that overflow stop: tensors wrap there instead.
    pub fn unless_overflown(self) -> Option<Dim> {
        Some(self).filter(|dim| !matches!(dim, Dim::Const(i64::MIN | i64::MAX)))
    }

    /// `⌊self / divisor⌋`.
    pub fn floor_div(&self, divisor: &Dim) -> Dim {
        self.divide(divisor, false)
    }

    /// `⌈self / divisor⌉`.
    pub fn ceil_div(&self, divisor: &Dim) -> Dim {
        self.divide(divisor, true)
    }

    pub fn minimum(&self, other: &Dim) -> Dim {
        self.extremum(other, true)
    }

    pub fn maximum(&self, other: &Dim) -> Dim {
        self.extremum(other, false)
    }

    /// A float as an element of a fact: an integer where it is one, else a number that is good for [`Dim::scaled_by`] only. `None` of
    /// what is not finite or too large for a float to be exact.
    pub fn of_float(value: f32) -> Option<Dim> {
        if !value.is_finite() || value.abs() >= 16_777_216.0 {
            return None;
        }
        Some(if value.fract() == 0.0 { Dim::Const(value as i64) } else { Dim::atom(Atom::Fraction(value.to_bits())) })
    }

    /// `⌊self · factor⌋`, the product rounded to f32 as ONNX's shape inference does.
    pub fn scaled_by(&self, factor: &Dim) -> Dim {
        match (self, factor.as_fraction()) {
            (Dim::Const(extent), Some(factor)) => Dim::Const((*extent as f32 * factor).floor() as i64),
            (_, Some(factor)) => Dim::atom(Atom::Scaled(self.clone(), factor.to_bits())),
            _ => self.clone() * factor.clone(),
        }
    }

    fn as_fraction(&self) -> Option<f32> {
        let Dim::Expr(polynomial) = self else { return None };
        match polynomial.0.iter().next() {
            Some((atoms, 1)) if polynomial.0.len() == 1 => match atoms.as_slice() {
                [Atom::Fraction(bits)] => Some(f32::from_bits(*bits)),
                _ => None,
            },
            _ => None,
        }
    }

    /// A value this is never below, with every symbol ≥ 0; `None` where none is known.
    pub fn lower_bound(&self) -> Option<i64> {
        match self {
            Dim::Const(value) => Some(*value),
            Dim::Expr(polynomial) => polynomial.0.iter().try_fold(0i64, |sum, (atoms, &coefficient)| {
                let bound = if atoms.is_empty() {
                    coefficient
                } else if coefficient > 0 {
                    let lows = atoms.iter().map(Atom::lower_bound);
                    let product = lows.into_iter().try_fold(1i64, |p, low| low.filter(|&l| l >= 0)?.checked_mul(p))?;
                    product.checked_mul(coefficient)?
                } else {
                    return None;
                };
                sum.checked_add(bound)
            }),
        }
    }

    /// The value under `bindings`; `None` where a symbol is unbound, a divisor is zero, or the result does not fit.
    pub fn eval(&self, bindings: &Bindings) -> Option<i64> {
        match self {
            Dim::Const(value) => Some(*value),
            Dim::Expr(polynomial) => polynomial.0.iter().try_fold(0i64, |sum, (atoms, &coefficient)| {
                let term = atoms.iter().try_fold(coefficient, |p, atom| p.checked_mul(atom.eval(bindings)?))?;
                sum.checked_add(term)
            }),
        }
    }

    /// This expression with every symbol replaced by what `lookup` gives for it, where it gives anything.
    pub fn substitute(&self, lookup: &dyn Fn(&Symbol) -> Option<Dim>) -> Dim {
        let Dim::Expr(polynomial) = self else { return self.clone() };
        let mut sum = Dim::Const(0);
        for (atoms, &coefficient) in &polynomial.0 {
            let product = atoms.iter().fold(Dim::Const(coefficient), |p, atom| p * atom.substitute(lookup));
            sum = sum + product;
        }
        sum
    }

    /// Adds every symbol this depends on to `symbols`.
    pub fn collect_symbols(&self, symbols: &mut BTreeSet<Symbol>) {
        let Dim::Expr(polynomial) = self else { return };
        for atom in polynomial.0.keys().flatten() {
            match atom {
                Atom::Symbol(symbol) => {
                    symbols.insert(symbol.clone());
                }
                Atom::FloorDiv(a, b) | Atom::CeilDiv(a, b) | Atom::Min(a, b) | Atom::Max(a, b) => {
                    a.collect_symbols(symbols);
                    b.collect_symbols(symbols);
                }
                Atom::Scaled(a, _) => a.collect_symbols(symbols),
                Atom::Fraction(_) | Atom::Opaque { .. } => {}
            }
        }
    }

    /// The symbol, where this is one and nothing else.
    pub fn as_symbol(&self) -> Option<&Symbol> {
        let Dim::Expr(polynomial) = self else { return None };
        match polynomial.0.iter().next() {
            Some((atoms, 1)) if polynomial.0.len() == 1 => match atoms.as_slice() {
                [Atom::Symbol(symbol)] => Some(symbol),
                _ => None,
            },
            _ => None,
        }
    }

    /// `self / divisor` where that is exact for every value of the symbols (e.g. `4·N·S / (2·N) = 2·S`).
    pub fn exact_div(&self, divisor: &Dim) -> Option<Dim> {
        if let (Dim::Const(a), Dim::Const(b)) = (self, divisor) {
            return (a.checked_rem(*b) == Some(0)).then(|| Dim::Const(a / b));
        }
        let divisor = divisor.polynomial();
        // Division by one term is term by term; by a sum, only when it is the same sum times a term.
        if divisor.0.len() != 1 {
            return (self.polynomial() == divisor).then_some(Dim::Const(1));
        }
        let (by_atoms, by) = divisor.0.into_iter().next()?;
        let mut quotient = Polynomial::default();
        for (mut atoms, coefficient) in self.polynomial().0 {
            if coefficient.checked_rem(by) != Some(0) {
                return None;
            }
            for atom in &by_atoms {
                let position = atoms.iter().position(|a| a == atom)?;
                atoms.remove(position);
            }
            quotient.add_term(atoms, coefficient / by);
        }
        Some(Dim::from_polynomial(quotient))
    }

    fn divide(&self, divisor: &Dim, up: bool) -> Dim {
        if let Some(exact) = self.exact_div(divisor) {
            return exact;
        }
        match (self, divisor) {
            (Dim::Const(a), Dim::Const(b)) if *b != 0 => {
                let (a, b) = (i128::from(*a), i128::from(*b));
                let floor = a.div_euclid(b) - i128::from(b < 0 && a.rem_euclid(b) != 0);
                let rounded = if up && a % b != 0 { floor + 1 } else { floor };
                Dim::Const(i64::try_from(rounded).unwrap_or(i64::MAX))
            }
            _ if up => Dim::atom(Atom::CeilDiv(self.clone(), divisor.clone())),
            _ => {
                // Whole multiples leave the division: ⌊(2·N + r) / 2⌋ = N + ⌊r / 2⌋.
                if let Dim::Const(by @ 1..) = divisor {
                    let (mut whole, mut rest) = (Polynomial::default(), Polynomial::default());
                    for (atoms, coefficient) in self.polynomial().0 {
                        if !atoms.is_empty() && coefficient % by == 0 {
                            whole.add_term(atoms, coefficient / by);
                        } else {
                            rest.add_term(atoms, coefficient);
                        }
                    }
                    if !whole.0.is_empty() {
                        return Dim::from_polynomial(whole) + Dim::from_polynomial(rest).floor_div(divisor);
                    }
                }
                Dim::atom(Atom::FloorDiv(self.clone(), divisor.clone()))
            }
        }
    }

    fn extremum(&self, other: &Dim, least: bool) -> Dim {
        let difference = self.clone() - other.clone();
        let (self_is_above, other_is_above) =
            (difference.lower_bound().is_some_and(|b| b >= 0), (-difference).lower_bound().is_some_and(|b| b >= 0));
        match (self_is_above, other_is_above, least) {
            (true, _, true) | (_, true, false) => other.clone(),
            (true, _, false) | (_, true, true) => self.clone(),
            // max(a, min(a, b)) = a = min(a, max(a, b)).
            _ if other.is_extremum_of(self, !least) => self.clone(),
            _ if self.is_extremum_of(other, !least) => other.clone(),
            _ => {
                let (a, b) = if self <= other { (self, other) } else { (other, self) };
                Dim::atom(if least { Atom::Min(a.clone(), b.clone()) } else { Atom::Max(a.clone(), b.clone()) })
            }
        }
    }

    /// Whether this is the least (or greatest) of `part` and something else.
    fn is_extremum_of(&self, part: &Dim, least: bool) -> bool {
        let Dim::Expr(polynomial) = self else { return false };
        match polynomial.0.iter().next() {
            Some((atoms, 1)) if polynomial.0.len() == 1 => match atoms.as_slice() {
                [Atom::Min(a, b)] => least && (a == part || b == part),
                [Atom::Max(a, b)] => !least && (a == part || b == part),
                _ => false,
            },
            _ => false,
        }
    }

    fn atom(atom: Atom) -> Dim {
        let atom = if atom.weight() <= WEIGHT_LIMIT { atom } else { Atom::opaque(&atom, atom.lower_bound()) };
        Dim::Expr(Arc::new(Polynomial(BTreeMap::from([(vec![atom], 1)]))))
    }

    fn weight(&self) -> usize {
        match self {
            Dim::Const(_) => 1,
            Dim::Expr(polynomial) => polynomial.weight(),
        }
    }

    fn polynomial(&self) -> Polynomial {
        match self {
            Dim::Const(value) => {
                let mut polynomial = Polynomial::default();
                polynomial.add_term(Vec::new(), *value);
                polynomial
            }
            Dim::Expr(polynomial) => (**polynomial).clone(),
        }
    }

    fn from_polynomial(polynomial: Polynomial) -> Dim {
        match polynomial.0.len() {
            0 => Dim::Const(0),
            1 if polynomial.0.contains_key(&Vec::new()) => Dim::Const(polynomial.0[&Vec::new()]),
            _ if polynomial.weight() <= WEIGHT_LIMIT => Dim::Expr(Arc::new(polynomial)),
            _ => {
                let whole = Dim::Expr(Arc::new(polynomial));
                Dim::atom(Atom::opaque(&whole, whole.lower_bound()))
            }
        }
    }
}

impl Polynomial {
    fn weight(&self) -> usize {
        self.0.keys().map(|atoms| 1 + atoms.iter().map(Atom::weight).sum::<usize>()).sum()
    }

    fn add_term(&mut self, atoms: Vec<Atom>, coefficient: i64) {
        let entry = self.0.entry(atoms);
        let entry = entry.or_insert(0);
        *entry = entry.saturating_add(coefficient);
        if *entry == 0 {
            self.0.retain(|_, c| *c != 0);
        }
    }
}

impl Atom {
    fn opaque(expression: &impl Hash, lower_bound: Option<i64>) -> Atom {
        let mut hasher = Digest(blake3::Hasher::new());
        expression.hash(&mut hasher);
        let digest = *hasher.0.finalize().as_bytes().first_chunk().expect("32 bytes");
        Atom::Opaque { digest, lower_bound }
    }

    fn weight(&self) -> usize {
        match self {
            Atom::Symbol(symbol) => 1 + symbol.len() / 64,
            Atom::FloorDiv(a, b) | Atom::CeilDiv(a, b) | Atom::Min(a, b) | Atom::Max(a, b) => {
                1 + a.weight() + b.weight()
            }
            Atom::Scaled(a, _) => 1 + a.weight(),
            Atom::Fraction(_) | Atom::Opaque { .. } => 1,
        }
    }

    fn lower_bound(&self) -> Option<i64> {
        match self {
            Atom::Symbol(_) => Some(0),
            Atom::FloorDiv(a, b) => Some(a.lower_bound()?.div_euclid(b.as_const().filter(|&b| b > 0)?)),
            Atom::CeilDiv(a, b) => {
                let b = b.as_const().filter(|&b| b > 0)?;
                Some(a.lower_bound()?.checked_add(b - 1)?.div_euclid(b))
            }
            Atom::Min(a, b) => Some(a.lower_bound()?.min(b.lower_bound()?)),
            Atom::Max(a, b) => a.lower_bound().max(b.lower_bound()),
            // Factors are positive.
            Atom::Scaled(a, _) => a.lower_bound().filter(|&low| low >= 0).map(|_| 0),
            Atom::Fraction(_) => None,
            Atom::Opaque { lower_bound, .. } => *lower_bound,
        }
    }

    fn eval(&self, bindings: &Bindings) -> Option<i64> {
        let pair = |a: &Dim, b: &Dim| Some((a.eval(bindings)?, b.eval(bindings)?));
        match self {
            Atom::Symbol(symbol) => bindings.get(symbol).copied(),
            Atom::FloorDiv(a, b) | Atom::CeilDiv(a, b) => {
                let (a, b) = pair(a, b)?;
                let up = matches!(self, Atom::CeilDiv(..));
                (b != 0).then(|| Dim::Const(a).divide(&Dim::Const(b), up).as_const()).flatten()
            }
            Atom::Min(a, b) => pair(a, b).map(|(a, b)| a.min(b)),
            Atom::Max(a, b) => pair(a, b).map(|(a, b)| a.max(b)),
            Atom::Scaled(a, factor) => {
                Dim::Const(a.eval(bindings)?).scaled_by(&Dim::atom(Atom::Fraction(*factor))).as_const()
            }
            Atom::Fraction(_) | Atom::Opaque { .. } => None,
        }
    }

    fn substitute(&self, lookup: &dyn Fn(&Symbol) -> Option<Dim>) -> Dim {
        match self {
            Atom::Symbol(symbol) => lookup(symbol).unwrap_or_else(|| Dim::atom(self.clone())),
            Atom::FloorDiv(a, b) => a.substitute(lookup).floor_div(&b.substitute(lookup)),
            Atom::CeilDiv(a, b) => a.substitute(lookup).ceil_div(&b.substitute(lookup)),
            Atom::Min(a, b) => a.substitute(lookup).minimum(&b.substitute(lookup)),
            Atom::Max(a, b) => a.substitute(lookup).maximum(&b.substitute(lookup)),
            Atom::Scaled(a, factor) => a.substitute(lookup).scaled_by(&Dim::atom(Atom::Fraction(*factor))),
            Atom::Fraction(_) | Atom::Opaque { .. } => Dim::atom(self.clone()),
        }
    }
}

/// The derived hashes, into a digest that nobody can make two expressions share.
struct Digest(blake3::Hasher);

impl Hasher for Digest {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        u64::from_le_bytes(*self.0.finalize().as_bytes().first_chunk().expect("32 bytes"))
    }
}

impl Add for Dim {
    type Output = Dim;
    fn add(self, other: Dim) -> Dim {
        if let (Dim::Const(a), Dim::Const(b)) = (&self, &other) {
            return Dim::Const(a.saturating_add(*b));
        }
        let mut sum = self.polynomial();
        for (atoms, coefficient) in other.polynomial().0 {
            sum.add_term(atoms, coefficient);
        }
        Dim::from_polynomial(sum)
    }
}

impl Neg for Dim {
    type Output = Dim;
    fn neg(self) -> Dim {
        self * Dim::Const(-1)
    }
}

impl Sub for Dim {
    type Output = Dim;
    fn sub(self, other: Dim) -> Dim {
        self + -other
    }
}

impl Mul for Dim {
    type Output = Dim;
    fn mul(self, other: Dim) -> Dim {
        if let (Dim::Const(a), Dim::Const(b)) = (&self, &other) {
            return Dim::Const(a.saturating_mul(*b));
        }
        if self.weight().saturating_mul(other.weight()) > 32 * WEIGHT_LIMIT {
            let bounds = (self.lower_bound().filter(|&b| b >= 0), other.lower_bound().filter(|&b| b >= 0));
            let bound = if let (Some(a), Some(b)) = bounds { a.checked_mul(b) } else { None };
            let (a, b) = if self <= other { (&self, &other) } else { (&other, &self) };
            return Dim::atom(Atom::opaque(&("product", a, b), bound));
        }
        let (left, right) = (self.polynomial(), other.polynomial());
        let mut product = Polynomial::default();
        for (a, x) in &left.0 {
            for (b, y) in &right.0 {
                let mut atoms = [a.as_slice(), b.as_slice()].concat();
                atoms.sort();
                product.add_term(atoms, x.saturating_mul(*y));
            }
        }
        Dim::from_polynomial(product)
    }
}

impl From<i64> for Dim {
    fn from(value: i64) -> Dim {
        Dim::Const(value)
    }
}

impl From<i32> for Dim {
    fn from(value: i32) -> Dim {
        Dim::Const(value.into())
    }
}

impl From<usize> for Dim {
    fn from(value: usize) -> Dim {
        Dim::Const(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Dim::Expr(polynomial) = self else {
            return write!(f, "{}", self.as_const().expect("not an expression"));
        };
        // The constant term sorts first but reads best last.
        let (constant, terms): (Vec<_>, Vec<_>) = polynomial.0.iter().partition(|(atoms, _)| atoms.is_empty());
        for (i, (atoms, coefficient)) in terms.into_iter().chain(constant).enumerate() {
            match (i, *coefficient < 0) {
                (0, true) => f.write_str("-")?,
                (0, false) => {}
                (_, true) => f.write_str(" - ")?,
                (_, false) => f.write_str(" + ")?,
            }
            let magnitude = coefficient.unsigned_abs();
            if atoms.is_empty() || magnitude != 1 {
                write!(f, "{magnitude}")?;
            }
            for (j, atom) in atoms.iter().enumerate() {
                if j > 0 || magnitude != 1 {
                    f.write_str("*")?;
                }
                match atom {
                    Atom::Symbol(symbol) => f.write_str(symbol)?,
                    Atom::FloorDiv(a, b) => write!(f, "floor({a} / {b})")?,
                    Atom::CeilDiv(a, b) => write!(f, "ceil({a} / {b})")?,
                    Atom::Min(a, b) => write!(f, "min({a}, {b})")?,
                    Atom::Max(a, b) => write!(f, "max({a}, {b})")?,
                    Atom::Scaled(a, factor) => write!(f, "floor({a} * {})", f32::from_bits(*factor))?,
                    Atom::Fraction(bits) => write!(f, "{}", f32::from_bits(*bits))?,
                    Atom::Opaque { digest, .. } => write!(f, "expression:{:016x}", u128::from_be_bytes(*digest) >> 64)?,
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Polynomial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} terms", self.0.len())
    }
}

impl fmt::Debug for Atom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Dim::atom(self.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_expressions_are_equal_values() {
        let (n, s) = (Dim::symbol("N"), Dim::symbol("S"));
        let two = Dim::Const(2);
        assert_eq!((n.clone() + 1.into()) * two.clone() - two.clone(), n.clone() * two.clone());
        assert_eq!(
            (n.clone() * s.clone() * 4.into()).exact_div(&(n.clone() * two.clone())),
            Some(s.clone() * two.clone())
        );
        assert_eq!((n.clone() * two.clone() + 1.into()).floor_div(&two), n);
        assert_eq!(n.maximum(&Dim::Const(0)), n);
        assert_eq!((n.clone() + 1.into()).minimum(&n), n);
        assert_eq!(n.clone() - n.clone(), Dim::Const(0));
        assert_eq!((n.clone() * 3.into() - s.clone() + 1.into()).to_string(), "3*N - S + 1");
    }

    #[test]
    fn extents_are_scaled_by_floats() {
        let factor = |f: f32| Dim::of_float(f).unwrap();
        assert_eq!(Dim::of_float(3.0), Some(Dim::Const(3)));
        assert_eq!((Dim::of_float(f32::NAN), Dim::of_float(1e30)), (None, None));
        // As f32 gives it: 1.3 is stored as 1.29999995.
        assert_eq!(Dim::Const(10).scaled_by(&factor(1.3)), Dim::Const(13));
        let n = Dim::symbol("N");
        let scaled = n.scaled_by(&factor(1.5)) + 1.into();
        assert_eq!(scaled.to_string(), "floor(N * 1.5) + 1");
        assert_eq!(scaled.eval(&Bindings::from([("N".into(), 3)])), Some(5));
        assert_eq!(scaled.substitute(&|_| Some(7.into())), Dim::Const(11));
        assert_eq!(n.scaled_by(&factor(2.0)), n.clone() * 2.into());
        assert_eq!(factor(1.5).eval(&Bindings::new()), None);
    }

    #[test]
    fn division_rounds_as_named() {
        for a in -7i64..8 {
            for b in [-3i64, -2, 2, 3] {
                let (floor, ceil) = ((a as f64 / b as f64).floor() as i64, (a as f64 / b as f64).ceil() as i64);
                assert_eq!(Dim::Const(a).floor_div(&b.into()), Dim::Const(floor), "{a} / {b}");
                assert_eq!(Dim::Const(a).ceil_div(&b.into()), Dim::Const(ceil), "{a} / {b}");
            }
        }
        let n = Dim::symbol("N");
        let half = (n.clone() + 1.into()).floor_div(&Dim::Const(2));
        assert_eq!(half.eval(&Bindings::from([("N".into(), 4)])), Some(2));
        assert_eq!(half.eval(&Bindings::new()), None);
        assert_eq!(half.substitute(&|_| Some(Dim::Const(5))), Dim::Const(3));
    }
}
