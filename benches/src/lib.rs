//! Benchmarks: `cargo bench -p cutover-benches`. Throughput is in multiply-adds; two operations each.
