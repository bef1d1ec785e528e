//! The facade: what `cargo add cutover` gives.
