//! What is measured of a version in service, and what may be concluded from it.
//!
//! Pure: no clock, no file, no randomness. [`Window`] counts; [`judge`] compares a candidate's window with the incumbent's under
//! [`Gates`] and gives a [`Verdict`] with the numbers it rests on.

mod gates;
mod histogram;
mod sequence;
mod window;

pub use gates::{Evidence, Gate, GateState, Gates, Labels, Verdict, judge};
pub use histogram::LatencyHistogram;
pub use sequence::{half_width, proportion_difference};
pub use window::{Proportion, Window};
