//! The package a model version travels in.
