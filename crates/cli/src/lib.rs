//! Everything the `cutover` command does, as a library so that `cargo xtask convert` is the same code.
