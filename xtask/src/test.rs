//! Everything that must pass before a change lands.

use crate::{cargo, check};
use anyhow::Result;
use std::time::Instant;

pub fn test() -> Result<()> {
    let start = Instant::now();
    check::check()?;
    // One build serves every suite: the dev profile keeps overflow checks and debug assertions, its kernels are optimised.
    cargo(&["test", "--workspace", "--quiet"], &[])?;
    // candle splits its sums by threads; on one, training gives the same bytes again.
    let training = ["test", "--package", "cutover-shrink", "--features", "train", "--lib", "--quiet", "train::"];
    cargo(&training, &[("RAYON_NUM_THREADS", "1")])?;
    println!("all tests passed in {} s", start.elapsed().as_secs());
    Ok(())
}
