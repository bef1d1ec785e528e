//! Kernels for NVIDIA's GPUs, run on a processor against sums in `f64`, over shapes at the edges of their tiles.

mod attention;
mod choice;
mod conv;
mod harness;
mod product;
mod recurrent;
mod rows;
