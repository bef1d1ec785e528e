//! What the threads of a backend can do at most, measured.

use super::{Device, pool::Barrier};
use crate::Peak;
use cutover_kernels::cpu::{
    quantized_product::{Form, ProductShape},
    roofline,
};
use std::{
    hint::black_box,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Multiply-adds of each chain in one try: about a millisecond.
const ROUNDS: usize = 200_000;

/// Floats that a thread reads over and over: a quarter of a MiB, which the second-level cache of any core holds.
const READ_LEN: usize = 64 * 1024;

/// Times that it reads them in one try.
const READS: usize = 64;

/// Tries, of which the best counts: others may be at work.
const TRIES: usize = 8;

pub(super) fn measure(device: &Device) -> Peak {
    let data = vec![1f32; READ_LEN];
    let operations_per_second = best(device, || roofline::multiply_add(device.level, ROUNDS));
    let bytes_per_second = best(device, || {
        for _ in 0..READS {
            black_box(roofline::read(device.level, black_box(&data)));
        }
        (READS * size_of_val(&data[..])) as u64
    });
    // Not measured: what multiplies f32 multiplies twice as many pairs of 16 bits, or four times as many bytes; where their sums saturate, three instructions
    // multiply what two such would.
    let terms = 64;
    let shape = ProductShape::matrices(1, terms, 1);
    let integers_each = match Form::of(device.level, &shape, &vec![0; terms], false, None) {
        Form::Halves => 2.0,
        Form::Bytes => 4.0,
        Form::Bounded { .. } => 8.0 / 3.0,
    };
    let integer_operations_per_second = integers_each * operations_per_second;
    Peak { operations_per_second, integer_operations_per_second, bytes_per_second }
}

/// What all threads together do in a second, each counting what it did.
fn best(device: &Device, work: impl Fn() -> u64 + Sync) -> f64 {
    let mut best = 0f64;
    for _ in 0..TRIES {
        let (barrier, total) = (Barrier::default(), Mutex::new((0u64, Duration::ZERO)));
        device.pool.run(&|_, threads| {
            barrier.wait(threads);
            let start = Instant::now();
            let count = work();
            let took = start.elapsed();
            let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
            *total = (total.0 + count, total.1.max(took));
        });
        let (count, longest) = total.into_inner().unwrap_or_else(PoisonError::into_inner);
        best = best.max(count as f64 / longest.as_secs_f64().max(1e-9));
    }
    best
}
