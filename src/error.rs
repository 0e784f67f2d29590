//! The one error type of the engine: a kind to match on, and one line of text for people.

use std::{fmt, io, path::Path};

/// Result with the engine's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for programs. Match on this, never on the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused to open, read, write or map a file.
    Io,
    /// A file does not follow its format (GGUF, safetensors, torch, snapshot …).
    Format,
    /// A valid value beyond what this build handles: unknown version, type or option.
    Unsupported,
    /// The metadata or the tensors do not describe a TransNormerLLM.
    Model,
    /// The vocabulary is unusable.
    Tokenizer,
    /// The caller passed a value out of range.
    InvalidArgument,
    /// The work was cancelled by the caller.
    Cancelled,
    /// ggml refused: out of memory, or a back end failed.
    Backend,
}

/// An error: its [`ErrorKind`], and one lower-case line that names the file, the field and the fix.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

impl Error {
    /// An error of `kind`; `message` is one line in lower case without a full stop.
    pub fn new(kind: ErrorKind, message: impl fmt::Display) -> Self {
        Self { kind, message: message.to_string() }
    }

    /// An operating-system error on `path`.
    pub fn io(path: &Path, source: io::Error) -> Self {
        Self::new(ErrorKind::Io, format_args!("{}: {source}", path.display()))
    }

    /// Puts `context` (a file name, a key) before the message.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}
