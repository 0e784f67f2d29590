//! An embedded inference engine for the TransNormerLLM family.

pub mod dtype;
mod engine;
pub mod error;
pub mod ggml;
pub mod gguf;
mod graph;
pub mod hparams;
mod kernels;
mod mapping;
mod model;
mod session;
mod state;
pub mod tokenizer;
pub mod weights;

pub use dtype::DType;
pub use error::{Error, ErrorKind, Result};
pub use kernels::isa::Isa;
pub use mapping::LoadMode;
pub use model::Model;
pub use session::{Session, SessionOptions};
pub use state::State;
