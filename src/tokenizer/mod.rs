//! Text to ids and back, equal to SentencePiece on every string (SPEC §5), built from GGUF metadata alone.
//!
//! The order of work is SentencePiece's, by way of the slow tokenizer class of the checkpoints:
//!
//! 1. If asked for, control pieces written in the text are cut out ([`AddedVocabulary`]).
//! 2. Each text segment between them gets a space in front, and spaces become `▁`.
//! 3. User-defined pieces are cut out, the longest first ([`AddedVocabulary`] again).
//! 4. What is left is merged (`bpe.rs`); characters without a piece become their UTF-8 bytes.

mod bpe;
mod metadata;
mod seams;
mod stream;
mod vocab;

use std::{fmt, sync::Arc};

use tokenizers::{
    AddedToken, AddedVocabulary, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizedString,
    models::wordlevel::WordLevel,
};

use self::{
    bpe::{Bpe, Merger},
    seams::Seams,
    vocab::{SPACE, invalid},
};
pub use self::{
    stream::StreamDecoder,
    vocab::{PieceType, Vocab},
};
use crate::error::{Error, ErrorKind, Result};

/// Longest stretch of text without a seam. It needs about 100 times its size in working memory; ordinary text
/// has a seam every few characters.
const MAX_WINDOW_BYTES: usize = 4 << 20;

/// A tokenizer; cheap to clone, shared between threads.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    vocab: Vocab,
    bpe: Bpe,
    /// Control pieces, found in raw text.
    specials: AddedVocabulary,
    /// User-defined pieces, found in text whose spaces are `▁`; as in SentencePiece, one with a space never is.
    user_defined: AddedVocabulary,
    seams: Seams,
}

impl Tokenizer {
    /// Checks the vocabulary and builds the tokenizer.
    ///
    /// # Errors
    /// `Tokenizer` if the vocabulary is inconsistent, `Unsupported` if it needs what this tokenizer lacks.
    pub fn new(vocab: Vocab) -> Result<Self> {
        vocab.validate()?;
        let bpe = Bpe::new(&vocab)?;
        let specials = atoms(&vocab, PieceType::is_special)?;
        let user_defined = atoms(&vocab, |kind| kind == PieceType::UserDefined)?;
        let seams = Seams::new(&vocab);
        Ok(Self { inner: Arc::new(Inner { vocab, bpe, specials, user_defined, seams }) })
    }

    /// Ids of `text`. No text gives no ids.
    ///
    /// `add_special` puts the begin id in front if the vocabulary wants one. With `parse_special`, control
    /// pieces written in the text (`</s>`) become their ids, and each segment between them is encoded on its
    /// own; without it they are plain text, which is what text from users should be.
    ///
    /// # Errors
    /// `InvalidArgument` if more than 4 MiB of the text form one word, such as a single letter repeated.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        let mut encoder = Encoder::new(&self.inner);
        if add_special && self.inner.vocab.add_bos {
            encoder.push_special(self.inner.vocab.bos);
        }
        for window in self.inner.seams.windows(text) {
            if window.len() > MAX_WINDOW_BYTES {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format_args!(
                        "text has a word of {} bytes, must be at most {MAX_WINDOW_BYTES}",
                        window.len()
                    ),
                ));
            }
            if parse_special {
                for (part, special) in splits(&cut(&self.inner.specials, window)) {
                    match special {
                        Some(id) => encoder.push_special(id),
                        None => encoder.push_text(part),
                    }
                }
            } else {
                encoder.push_text(window);
            }
        }
        Ok(encoder.ids)
    }

    /// Text of `ids`: specials give nothing, the space that encoding put in front is taken off, and bytes that
    /// are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// `InvalidArgument` if an id is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let mut decoder = StreamDecoder::new(self);
        let mut text = String::new();
        for &id in ids {
            text.push_str(decoder.push(id)?);
        }
        text.push_str(&decoder.finish());
        Ok(text)
    }

    /// The piece as the vocabulary spells it, with `▁` for a space and `<0xHH>` for a byte.
    pub fn piece(&self, id: u32) -> Option<&str> {
        self.inner.vocab.pieces.get(id as usize).map(String::as_str)
    }

    /// The bytes that the piece adds to a text: none for specials, one for a byte piece.
    pub fn piece_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let vocab = self.vocab();
        let piece = self.piece(id)?;
        Some(match vocab.types[id as usize] {
            PieceType::Byte => vocab.byte(id).into_iter().collect(),
            kind if kind.is_special() => Vec::new(),
            _ => piece.replace(SPACE, " ").into_bytes(),
        })
    }

    /// The vocabulary.
    pub fn vocab(&self) -> &Vocab {
        &self.inner.vocab
    }

    /// Number of pieces; every id is below it.
    pub fn vocab_size(&self) -> usize {
        self.vocab().len()
    }

    /// Id of the begin of a document.
    pub fn bos(&self) -> u32 {
        self.vocab().bos
    }

    /// Id of the end of a document.
    pub fn eos(&self) -> u32 {
        self.vocab().eos
    }

    /// Id of the unknown piece.
    pub fn unk(&self) -> u32 {
        self.vocab().unk
    }

    /// Whether the id is a control piece or the unknown piece: it has no text.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocab().types.get(id as usize).is_some_and(|kind| kind.is_special())
    }

    /// Whether generation ends at this id.
    pub fn is_eog(&self, id: u32) -> bool {
        id == self.eos()
    }

    /// Refuses an id that is not in the vocabulary.
    fn check(&self, id: u32) -> Result<()> {
        if (id as usize) < self.vocab_size() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::InvalidArgument,
            format_args!("token id {id} is not below the {} pieces of the vocabulary", self.vocab_size()),
        ))
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("pieces", &self.vocab_size()).finish_non_exhaustive()
    }
}

/// One call of `encode`.
struct Encoder<'a> {
    inner: &'a Inner,
    merger: Merger,
    ids: Vec<u32>,
    /// Where the current text segment began in `ids`; `None` if no segment is open.
    segment: Option<usize>,
    /// The window with `▁` for spaces.
    escaped: String,
}

impl<'a> Encoder<'a> {
    fn new(inner: &'a Inner) -> Self {
        Self { inner, merger: Merger::default(), ids: Vec::new(), segment: None, escaped: String::new() }
    }

    fn push_special(&mut self, id: u32) {
        self.ids.push(id);
        self.segment = None;
    }

    fn push_text(&mut self, text: &str) {
        let Inner { vocab, bpe, user_defined, .. } = self.inner;
        let prefix = self.segment.is_none() && vocab.add_space_prefix;
        let start = *self.segment.get_or_insert(self.ids.len());
        self.escaped.clear();
        self.escaped.extend(prefix.then_some(SPACE));
        self.escaped.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));
        for (part, piece) in splits(&cut(user_defined, &self.escaped)) {
            match piece {
                Some(id) => self.ids.push(id),
                None => self.merger.encode(bpe, vocab, part, &mut self.ids, start),
            }
        }
    }
}

/// The pieces that `wanted` picks, as a vocabulary to cut out of text.
fn atoms(vocab: &Vocab, wanted: impl Fn(PieceType) -> bool) -> Result<AddedVocabulary> {
    let pieces = || {
        let ids = vocab.pieces.iter().zip(0u32..);
        ids.filter(|(_, id)| wanted(vocab.types[*id as usize]))
    };
    // The added vocabulary asks a model for the ids; this one knows just these pieces.
    let ids = WordLevel::builder()
        .vocab(pieces().map(|(piece, id)| (piece.clone(), id)).collect())
        .build()
        .map_err(invalid)?;
    let tokens: Vec<_> = pieces().map(|(piece, _)| AddedToken::from(piece.as_str(), true)).collect();
    let mut atoms = AddedVocabulary::new();
    atoms.add_tokens(&tokens, &ids, None::<&NormalizerWrapper>);
    Ok(atoms)
}

/// Cuts the pieces of `atoms` out of `text`.
fn cut(atoms: &AddedVocabulary, text: &str) -> PreTokenizedString {
    atoms.extract_and_normalize(None::<&NormalizerWrapper>, text)
}

/// The parts of a text, with the id of those that were cut out.
fn splits(text: &PreTokenizedString) -> impl Iterator<Item = (&str, Option<u32>)> {
    text.get_splits(OffsetReferential::Normalized, OffsetType::None)
        .into_iter()
        .map(|(part, _, tokens)| (part, tokens.as_ref().and_then(|tokens| tokens.first()).map(|t| t.id)))
}
