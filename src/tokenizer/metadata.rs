//! The vocabulary in GGUF metadata, under the field's usual keys.

use super::vocab::{PieceType, Vocab};
use crate::{
    error::{Error, ErrorKind, Result},
    gguf::{Array, Metadata},
};

/// Name of SentencePiece-BPE with byte fallback.
const MODEL: &str = "llama";

/// The metadata keys, each used for reading and for writing.
mod key {
    pub const MODEL: &str = "tokenizer.ggml.model";
    pub const PRE: &str = "tokenizer.ggml.pre";
    pub const TOKENS: &str = "tokenizer.ggml.tokens";
    pub const SCORES: &str = "tokenizer.ggml.scores";
    pub const TYPES: &str = "tokenizer.ggml.token_type";
    pub const BOS: &str = "tokenizer.ggml.bos_token_id";
    pub const EOS: &str = "tokenizer.ggml.eos_token_id";
    pub const UNK: &str = "tokenizer.ggml.unknown_token_id";
    pub const PAD: &str = "tokenizer.ggml.padding_token_id";
    pub const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
    pub const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
    pub const REMOVE_EXTRA_WHITESPACES: &str = "tokenizer.ggml.remove_extra_whitespaces";
    pub const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
}

impl Vocab {
    /// Reads the vocabulary of a GGUF file. Absent options mean: no begin id, a space prefix, whitespace kept.
    ///
    /// # Errors
    /// `Model` for a missing key or a value of the wrong type, `Tokenizer` for an unknown piece type,
    /// `Unsupported` for another tokenizer than SentencePiece-BPE or one that removes whitespace.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self> {
        let model = metadata.require(key::MODEL, Metadata::str)?;
        if model != MODEL {
            return Err(unsupported(format_args!("{}: '{model}', must be '{MODEL}'", key::MODEL)));
        }
        if metadata.bool(key::REMOVE_EXTRA_WHITESPACES)?.unwrap_or(false) {
            return Err(unsupported(format_args!("{}: must be false", key::REMOVE_EXTRA_WHITESPACES)));
        }
        let types = metadata.require(key::TYPES, Metadata::i32_array)?;
        Ok(Self {
            pieces: metadata.require(key::TOKENS, Metadata::str_array)?.to_vec(),
            scores: metadata.require(key::SCORES, Metadata::f32_array)?.to_vec(),
            types: types.into_iter().map(PieceType::from_gguf).collect::<Result<_>>()?,
            bos: metadata.require(key::BOS, Metadata::u32)?,
            eos: metadata.require(key::EOS, Metadata::u32)?,
            unk: metadata.require(key::UNK, Metadata::u32)?,
            pad: metadata.u32(key::PAD)?,
            add_bos: metadata.bool(key::ADD_BOS)?.unwrap_or(false),
            add_space_prefix: metadata.bool(key::ADD_SPACE_PREFIX)?.unwrap_or(true),
            chat_template: metadata.str(key::CHAT_TEMPLATE)?.map(String::from),
        })
    }

    /// Writes the vocabulary, every option spelled out.
    ///
    /// # Errors
    /// `Tokenizer` if the vocabulary is one that [`Tokenizer::new`](super::Tokenizer::new) would refuse piece
    /// by piece.
    pub fn to_metadata(&self, metadata: &mut Metadata) -> Result<()> {
        self.validate()?;
        metadata.insert(key::MODEL, MODEL);
        metadata.insert(key::PRE, "default");
        metadata.insert(key::TOKENS, Array::String(self.pieces.clone()));
        metadata.insert(key::SCORES, Array::F32(self.scores.clone()));
        metadata.insert(key::TYPES, Array::I32(self.types.iter().map(|&kind| kind as i32).collect()));
        let ids = [
            (key::BOS, Some(self.bos)),
            (key::EOS, Some(self.eos)),
            (key::UNK, Some(self.unk)),
            (key::PAD, self.pad),
        ];
        for (key, id) in ids {
            if let Some(id) = id {
                metadata.insert(key, id);
            }
        }
        metadata.insert(key::ADD_BOS, self.add_bos);
        metadata.insert(key::ADD_SPACE_PREFIX, self.add_space_prefix);
        metadata.insert(key::REMOVE_EXTRA_WHITESPACES, false);
        if let Some(template) = &self.chat_template {
            metadata.insert(key::CHAT_TEMPLATE, template.as_str());
        }
        Ok(())
    }
}

fn unsupported(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}
