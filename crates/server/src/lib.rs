//! Open Inference Protocol, administration and metrics over HTTP.
