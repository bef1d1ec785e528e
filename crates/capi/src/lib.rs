//! The C ABI over the facade.
