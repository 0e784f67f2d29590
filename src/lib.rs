//! An embedded inference engine for the TransNormerLLM family.
//!
//! A [`Model`] is a checked GGUF file, immutable and shared. A [`Session`] is one sequence over it: a state of fixed
//! size, and the tokens that the state stands for.
//!
//! ```no_run
//! use transnormer::{Event, GenerateOptions, Model, Session, SessionOptions};
//!
//! # fn main() -> transnormer::Result<()> {
//! let model = Model::open("models/fable-8m/fable-8m-Q8_0.gguf")?;
//! let mut session = Session::new(&model, &SessionOptions::default())?;
//! for event in session.generate("Once upon a time", GenerateOptions::default())? {
//!     if let Event::Token(token) = event? {
//!         print!("{}", token.text);
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! ARCHITECTURE.md says how it works, MODEL.md what it computes.

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
pub use mapping::{LoadMode, Mapping, open_regular};
pub use model::Model;
pub use sampler::{Sampler, SamplerOptions};
pub use session::{CheckpointId, Session, SessionOptions, Snapshot, SyncReport};
pub use state::State;
