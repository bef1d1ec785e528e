//! When a program has warmed up: caches filled, pages there, frequencies risen, whatever is compiled at first use compiled.

use anyhow::Result;
use std::time::{Duration, Instant};

/// Runs are looked at in blocks of at least this long: single ones of a fast model say little.
const BLOCK: Duration = Duration::from_millis(2);
/// Blocks that are compared with as many before.
const BLOCKS: usize = 3;
/// Levels are the same within this.
const TOLERANCE: f64 = 0.03;

/// How a program was warmed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WarmUp {
    pub runs: usize,
    /// `false` where the time was over before.
    pub is_steady: bool,
}

/// Calls `run` until its level is steady: the median of the newest three blocks is within 3 % of that of the three before. At least once, and no longer than `most`.
pub(super) fn warm_up(most: Duration, mut run: impl FnMut() -> Result<()>) -> Result<WarmUp> {
    let begun = Instant::now();
    let (mut blocks, mut runs) = (Vec::new(), 0);
    loop {
        let (start, mut in_block) = (Instant::now(), 0u32);
        while in_block == 0 || start.elapsed() < BLOCK {
            run()?;
            in_block += 1;
        }
        runs += in_block as usize;
        blocks.push(start.elapsed().as_secs_f64() / f64::from(in_block));
        let is_steady = is_steady(&blocks);
        if is_steady || begun.elapsed() >= most {
            return Ok(WarmUp { runs, is_steady });
        }
    }
}

fn is_steady(blocks: &[f64]) -> bool {
    let Some(start) = blocks.len().checked_sub(2 * BLOCKS) else { return false };
    let (before, after) = blocks[start..].split_at(BLOCKS);
    let ratio = super::statistics::median(after) / super::statistics::median(before);
    (ratio - 1.0).abs() <= TOLERANCE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_steady_when_it_neither_falls_nor_rises() {
        let cases: &[(&[f64], bool)] = &[
            (&[1.0; 5], false),
            (&[1.0; 6], true),
            (&[9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.01, 1.02], true),
            (&[2.0, 1.8, 1.6, 1.4, 1.2, 1.0], false),
            (&[1.0, 1.1, 1.2, 1.3, 1.4, 1.5], false),
            // One slow block is noise, no change of level.
            (&[1.0, 1.0, 5.0, 1.0, 1.0, 1.0], true),
        ];
        for (blocks, steady) in cases {
            assert_eq!(is_steady(blocks), *steady, "{blocks:?}");
        }
    }

    #[test]
    fn warming_up_ends_at_its_bound() {
        let mut slower = 0;
        let warmed = warm_up(Duration::from_millis(30), || {
            slower += 1;
            std::thread::sleep(Duration::from_millis(2 + 3 * slower));
            Ok(())
        })
        .unwrap();
        assert!(!warmed.is_steady && warmed.runs == slower as usize && slower < 8, "{warmed:?}");
        assert!(warm_up(Duration::from_secs(9), || anyhow::bail!("no")).is_err());
    }
}
