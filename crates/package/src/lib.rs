//! What travels: a model with its weights, golden vectors and manifest, as a folder or as one ZIP file.
//!
//! The files are standard ones: `model.onnx` whose weights are external data in `weights.safetensors`, `golden.safetensors` with inputs
//! and the outputs expected for them, `profile.json` where the training data is known, `tokenizer.json` where inputs are made of texts, and `manifest.json`. An archive (`NAME.cutover`) holds the same files, stored and page-aligned.
//! Everything is hostile until its digest was compared. Nothing is signed or encrypted here yet.

mod archive;
mod golden;
mod manifest;
mod package;
mod profile;
pub mod ranking;

pub use cutover_input as input;
pub use golden::{Golden, numbers};
pub use manifest::{FileEntry, GoldenTolerance, Manifest, Resources, ShrinkSummary, TensorSchema, check_name};
pub use package::{Contents, Package, PackageError, write, write_folder};
pub use profile::{Distribution, Profile};

/// Names of the files in a package.
pub mod file {
    pub const MANIFEST: &str = "manifest.json";
    pub const MODEL: &str = "model.onnx";
    pub const WEIGHTS: &str = "weights.safetensors";
    pub const GOLDEN: &str = "golden.safetensors";
    /// Not every package has one.
    pub const PROFILE: &str = "profile.json";
    /// Of packages whose inputs are made of texts.
    pub const TOKENIZER: &str = "tokenizer.json";
    /// All that a package of this version may hold.
    pub const ALL: &[&str] = &[MANIFEST, MODEL, WEIGHTS, GOLDEN, PROFILE, TOKENIZER];
    /// Those that it may lack.
    pub const OPTIONAL: &[&str] = &[PROFILE, TOKENIZER];
}
