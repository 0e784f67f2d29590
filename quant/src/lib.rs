//! Converts official TransNormerLLM checkpoints to quantized GGUF files: the library behind `tn-quantize`.
//!
//! [`checkpoint`] reads what the authors publish, as untrusted input; [`names`] and [`policy`] say what each
//! tensor becomes; [`plan`] puts that together before a weight is read; [`convert`] carries it out in bounded
//! memory; [`report`] shows it. [`synthetic`] makes checkpoints of random weights for tests and measurements.

pub mod checkpoint;
pub mod convert;
pub mod metadata;
pub mod names;
pub mod plan;
pub mod policy;
pub mod report;
pub mod synthetic;
