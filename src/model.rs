//! A loaded model: immutable, shared by any number of sessions and threads.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use crate::{
    error::{Error, ErrorKind, Result},
    fingerprint,
    gguf::{Gguf, Metadata, TensorInfo},
    hparams::Hparams,
    mapping::{LoadMode, Mapping},
    tokenizer::{Tokenizer, Vocab},
    weights::Weights,
};

/// An immutable model. Cloning shares it.
#[derive(Clone)]
pub struct Model {
    inner: Arc<Inner>,
}

struct Inner {
    metadata: Metadata,
    hparams: Hparams,
    weights: Weights,
    tokenizer: Tokenizer,
    file: Arc<Mapping>,
    tensors: Vec<TensorInfo>,
    fingerprint: OnceLock<[u8; 32]>,
}

impl Model {
    /// Maps the GGUF file at `path` and checks everything in it but the weights' values.
    ///
    /// Errors: [`Io`](crate::ErrorKind::Io), [`Format`](crate::ErrorKind::Format),
    /// [`Model`](crate::ErrorKind::Model), [`Tokenizer`](crate::ErrorKind::Tokenizer); each names the file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, LoadMode::default())
    }

    /// [`Model::open`] with a choice of how the file gets into memory.
    pub fn open_with(path: impl AsRef<Path>, mode: LoadMode) -> Result<Self> {
        let path = path.as_ref();
        let file = Arc::new(Mapping::open(path, mode)?);
        Self::from_mapping(&file).map_err(|error| error.context(path.display()))
    }

    /// The shape of the model.
    pub fn hparams(&self) -> &Hparams {
        &self.inner.hparams
    }

    /// All metadata of the file.
    pub fn metadata(&self) -> &Metadata {
        &self.inner.metadata
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// The weights.
    pub fn weights(&self) -> &Weights {
        &self.inner.weights
    }

    /// Bytes of the model file.
    pub fn file_bytes(&self) -> u64 {
        self.inner.file.len() as u64
    }

    /// Identifies the model: a digest of the hyper-parameters, the vocabulary, the tensor table and four pages of
    /// each tensor. It tells models and their quantizations apart, but does not prove that every weight is intact.
    /// Computed when first asked for, which reads some megabytes of the file.
    pub fn fingerprint(&self) -> &[u8; 32] {
        let Inner { file, metadata, tensors, fingerprint, .. } = &*self.inner;
        fingerprint.get_or_init(|| fingerprint::of(file, metadata, tensors))
    }

    /// Whether this is a clone of `other`.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    fn from_mapping(file: &Arc<Mapping>) -> Result<Self> {
        let gguf = Gguf::parse(file)?;
        let hparams = Hparams::from_metadata(&gguf.metadata)?;
        let weights = Weights::from_gguf(&gguf, file, &hparams)?;
        let vocab = Vocab::from_metadata(&gguf.metadata)?;
        if vocab.len() != hparams.vocab_size {
            return Err(Error::new(
                ErrorKind::Model,
                format_args!(
                    "the tokenizer has {} pieces, but vocab_size is {}",
                    vocab.len(),
                    hparams.vocab_size
                ),
            ));
        }
        let tokenizer = Tokenizer::new(vocab)?;
        let inner = Inner {
            metadata: gguf.metadata,
            hparams,
            weights,
            tokenizer,
            file: file.clone(),
            tensors: gguf.tensors,
            fingerprint: OnceLock::new(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }
}
