//! Smaller models with measured evidence: Graph to Graph, and the training that needs.

#[cfg(feature = "train")]
pub mod train;
