//! ONNX models as typed graphs: import, operators, passes, plans and export.
//!
//! The way through this crate is `onnx::import → Graph → passes::declutter → Plan`, and `onnx::export` back. It holds what
//! operators *mean* (their facts and their reference evaluation) and knows no device, no layout and no kernel.

pub mod dim;
mod error;
pub mod fact;
mod graph;
mod identity;
pub mod onnx;
pub mod ops;
pub mod passes;
mod patch;
pub mod plan;

pub use dim::{Bindings, Dim, Symbol};
pub use error::{GraphError, ImportError, OpError};
pub use fact::{Fact, TensorFact};
pub use graph::{Constant, Graph, Node, NodeId, Source, Value, ValueId};
pub use identity::Identity;
pub use ops::Op;
pub use patch::{Patch, PatchNode, PatchValue};
pub use plan::Plan;
