//! An embedded inference engine for the TransNormerLLM family.

pub mod chat;
pub mod dtype;
mod engine;
pub mod error;
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
mod session;
mod state;
mod threads;
pub mod tokenizer;
pub mod weights;

pub use dtype::DType;
pub use error::{Error, ErrorKind, Result};
pub use generate::{CancelToken, Done, Event, GenerateOptions, Generation, Prompt, Stats, StopReason, Token};
pub use kernels::isa::Isa;
pub use mapping::{LoadMode, Mapping};
pub use model::Model;
pub use sampler::{Sampler, SamplerOptions};
pub use session::{Session, SessionOptions};
pub use state::State;
