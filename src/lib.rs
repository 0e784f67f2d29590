//! An embedded inference engine for the TransNormerLLM family.

mod atomic_file;
mod batch;
pub mod chat;
pub mod dtype;
mod engine;
pub mod error;
mod fingerprint;
pub mod generate;
pub mod ggml;
pub mod gguf;
mod graph;
pub mod hparams;
mod kernels;
mod mapping;
mod model;
pub mod reference;
pub mod sampler;
pub mod session;
mod state;
mod threads;
pub mod tokenizer;
pub mod weights;

pub use batch::{Batch, SequenceId};
pub use dtype::DType;
pub use error::{Error, ErrorKind, Result};
pub use generate::{CancelToken, Done, Event, GenerateOptions, Generation, Prompt, Stats, StopReason, Token};
pub use kernels::{isa::Isa, matmul::tiles};
pub use mapping::{LoadMode, Mapping};
pub use model::Model;
pub use sampler::{Sampler, SamplerOptions};
pub use session::{CheckpointId, Session, SessionOptions, Snapshot, SyncReport};
pub use state::State;
