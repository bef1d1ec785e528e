//! What needs no run: formatting, the workspace's rules, clippy and rustdoc, cheapest first.

use crate::{cargo, rules};
use anyhow::Result;

pub fn check() -> Result<()> {
    cargo(&["fmt", "--all", "--check"], &[])?;
    rules::check()?;
    cargo(&["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"], &[])?;
    cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"], &[("RUSTDOCFLAGS", "--deny warnings")])
}
