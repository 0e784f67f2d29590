//! GGUF v3 files, little-endian: the only door through which model files enter the engine.
//!
//! [`Gguf::parse`] trusts nothing: every count is bounded by the bytes that remain before anything is
//! reserved, every product and sum is checked, text is UTF-8 of bounded length, and the tensors lie one after
//! another inside the file with nothing behind them. What it returns needs no second check. [`Writer`]
//! produces the same format as a stream and the file appears whole or not at all.
//!
//! Layout of a file: magic `GGUF`, version, tensor count, metadata count, metadata entries, tensor entries,
//! zeros up to the alignment, then the data of each tensor padded to the alignment.
//!
//! Parsing allocates at most three times the bytes of the header plus 16 MiB, whatever the header claims.

mod error;
mod read;
mod value;
mod write;

pub use error::ReadError;
pub use read::{Gguf, TensorInfo};
pub use value::{Array, Metadata, Value};
pub use write::{TensorSpec, Writer};

const MAGIC: [u8; 4] = *b"GGUF";
const VERSION: u32 = 3;

/// Metadata key that overrides the alignment of tensor data.
const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;

/// Numbers of the metadata value types in the file.
mod tag {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}
