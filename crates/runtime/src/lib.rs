//! Versions of models on a device: store, swap, rollout and routing. Synchronous.
