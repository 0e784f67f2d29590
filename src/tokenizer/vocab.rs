//! The vocabulary as GGUF stores it, and the checks that make it safe to use.

use crate::error::{Error, ErrorKind, Result};

/// The mark that stands for a space inside pieces (U+2581).
pub(super) const SPACE: char = '▁';

/// Most pieces a vocabulary may have.
const MAX_PIECES: usize = 1 << 20;
/// Most bytes in one piece.
const MAX_PIECE_BYTES: usize = 1024;
/// Most bytes in all control and user-defined pieces: they become an automaton of some 50 times their size.
const MAX_ATOM_BYTES: usize = 1 << 20;

/// What a piece is for; the numbers are those of `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum PieceType {
    /// Made by merging.
    Normal = 1,
    /// Stands for what has no piece.
    Unknown = 2,
    /// Marks begin, end and the like; never made from plain text and never shown.
    Control = 3,
    /// Cut out of the text before anything is merged.
    UserDefined = 4,
    /// Fills up the table.
    Unused = 5,
    /// One byte, written `<0xHH>`.
    Byte = 6,
}

impl PieceType {
    /// The type with this GGUF number.
    ///
    /// # Errors
    /// `Tokenizer` for any number but 1..=6.
    pub fn from_gguf(number: i32) -> Result<Self> {
        use PieceType::*;
        [Normal, Unknown, Control, UserDefined, Unused, Byte]
            .into_iter()
            .find(|&kind| kind as i32 == number)
            .ok_or_else(|| invalid(format_args!("tokenizer.ggml.token_type: unknown type {number}")))
    }

    /// Whether text can become the piece by its spelling.
    pub(super) fn is_text(self) -> bool {
        matches!(self, Self::Normal | Self::UserDefined | Self::Unused)
    }

    /// Whether the piece is a mark without text of its own.
    pub(super) fn is_special(self) -> bool {
        matches!(self, Self::Control | Self::Unknown)
    }
}

/// A SentencePiece-BPE vocabulary: pieces, scores and types by id, and the ids with a meaning.
#[derive(Debug, Clone, PartialEq)]
pub struct Vocab {
    /// Text of each piece, with `▁` for a space.
    pub pieces: Vec<String>,
    /// Score of each piece; of two possible merges the higher score goes first.
    pub scores: Vec<f32>,
    /// Type of each piece.
    pub types: Vec<PieceType>,
    /// Begin of a document.
    pub bos: u32,
    /// End of a document; generation stops here.
    pub eos: u32,
    /// The one piece of type [`PieceType::Unknown`].
    pub unk: u32,
    /// Padding, if the vocabulary names one.
    pub pad: Option<u32>,
    /// Whether `encode` puts [`bos`](Self::bos) in front when it adds specials.
    pub add_bos: bool,
    /// Whether each text segment is encoded as if a space came before it.
    pub add_space_prefix: bool,
    /// The chat template, as text.
    pub chat_template: Option<String>,
}

impl Vocab {
    /// Number of pieces.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there are no pieces; such a vocabulary is refused by [`Tokenizer::new`](super::Tokenizer::new).
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The byte of a byte piece.
    pub(super) fn byte(&self, id: u32) -> Option<u8> {
        if self.types[id as usize] != PieceType::Byte {
            return None;
        }
        let hex = self.pieces[id as usize].strip_prefix("<0x")?.strip_suffix('>')?;
        let strict = hex.len() == 2 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
        if strict { u8::from_str_radix(hex, 16).ok() } else { None }
    }

    /// Checks everything that can be checked piece by piece; `Bpe::new` finds pieces that occur twice.
    pub(super) fn validate(&self) -> Result<()> {
        let len = self.len();
        if !(1..=MAX_PIECES).contains(&len) {
            return Err(invalid(format_args!(
                "tokenizer.ggml.tokens: {len} pieces, must be 1 to {MAX_PIECES}"
            )));
        }
        for (key, other) in [("scores", self.scores.len()), ("token_type", self.types.len())] {
            if other != len {
                return Err(invalid(format_args!("tokenizer.ggml.{key}: {other} values for {len} pieces")));
            }
        }
        let mut atom_bytes = 0;
        for id in 0..len as u32 {
            self.validate_piece(id)?;
            let kind = self.types[id as usize];
            if kind.is_special() || kind == PieceType::UserDefined {
                atom_bytes += self.pieces[id as usize].len();
            }
        }
        if atom_bytes > MAX_ATOM_BYTES {
            return Err(invalid(format_args!(
                "tokenizer.ggml.tokens: control and user-defined pieces have {atom_bytes} bytes, \
                 must be at most {MAX_ATOM_BYTES}"
            )));
        }
        self.validate_special("bos", Some(self.bos), &[PieceType::Control])?;
        self.validate_special("eos", Some(self.eos), &[PieceType::Control])?;
        self.validate_special("unknown", Some(self.unk), &[PieceType::Unknown])?;
        self.validate_special("padding", self.pad, &[PieceType::Control, PieceType::Unknown])
    }

    fn validate_piece(&self, id: u32) -> Result<()> {
        let (piece, score) = (&self.pieces[id as usize], self.scores[id as usize]);
        let kind = self.types[id as usize];
        if !(1..=MAX_PIECE_BYTES).contains(&piece.len()) {
            return Err(invalid(format_args!(
                "tokenizer.ggml.tokens: piece {id} has {} bytes, must be 1 to {MAX_PIECE_BYTES}",
                piece.len()
            )));
        }
        if !score.is_finite() {
            return Err(invalid(format_args!("tokenizer.ggml.scores: piece {id} has score {score}")));
        }
        if kind == PieceType::Byte && self.byte(id).is_none() {
            return Err(invalid(format_args!(
                "tokenizer.ggml.tokens: byte piece {id} is {piece:?}, must be <0xHH> with two upper-case digits"
            )));
        }
        if kind == PieceType::Unknown && id != self.unk {
            return Err(invalid(format_args!(
                "tokenizer.ggml.token_type: piece {id} is a second unknown piece beside {}",
                self.unk
            )));
        }
        Ok(())
    }

    fn validate_special(&self, name: &str, id: Option<u32>, allowed: &[PieceType]) -> Result<()> {
        let Some(id) = id else { return Ok(()) };
        match self.types.get(id as usize) {
            None => Err(invalid(format_args!(
                "tokenizer.ggml.{name}_token_id: {id} is not below the {} pieces",
                self.len()
            ))),
            Some(kind) if !allowed.contains(kind) => Err(invalid(format_args!(
                "tokenizer.ggml.{name}_token_id: piece {id} has type {kind:?}, must be {:?}",
                allowed[0]
            ))),
            Some(_) => Ok(()),
        }
    }
}

/// An error about the vocabulary.
pub(super) fn invalid(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Tokenizer, message)
}
