//! What is measured of a version in service, and what may be concluded from it.
//!
//! Pure: no clock, no file, no randomness. [`Window`] counts; [`judge()`] compares a candidate's window with the incumbent's under
//! [`Gates`] and gives a [`Verdict`] with the numbers it rests on.

mod gates;
mod histogram;
mod judge;
mod sequence;
mod window;

pub use gates::{Gates, Labels};
pub use histogram::LatencyHistogram;
pub use judge::{Comparison, Design, Evidence, Gate, GateState, Metric, Reference, Verdict, effect, judge};
pub use sequence::{half_width, ln_evidence_above, ln_evidence_below, proportion_difference, stratified_difference};
pub use window::{Classes, Moments, Pairs, Proportion, Seen, Strata, Window};
