//! Ids to text, one id at a time, without ever showing half a character.

use super::{
    Tokenizer,
    vocab::{PieceType, SPACE},
};
use crate::error::Result;

/// Longest incomplete UTF-8 sequence.
const MAX_PENDING: usize = 3;

/// Turns ids into text as they come. All texts in order, with that of [`finish`](Self::finish), are exactly
/// [`Tokenizer::decode`] of all ids.
///
/// Byte pieces are held back until they complete a character; bytes that cannot become one give U+FFFD each,
/// as in SentencePiece. Special pieces give no text. Cloning forks the stream.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// Bytes of a character that is not complete yet.
    pending: Vec<u8>,
    /// Whether the next piece loses its leading space, because encoding put it there.
    at_start: bool,
    /// Text of the last push.
    text: String,
}

impl StreamDecoder {
    /// A decoder at the start of a text: the space that encoding put in front is taken off again.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            pending: Vec::with_capacity(MAX_PENDING + 1),
            at_start: tokenizer.vocab().add_space_prefix,
            text: String::new(),
        }
    }

    /// A decoder that has read `ids` already, for the answer to a prompt or a restored session: a leading
    /// space of the next piece is kept if `ids` has any text, and a character begun in `ids` is completed.
    ///
    /// # Errors
    /// `InvalidArgument` if an id is not in the vocabulary.
    pub fn after(tokenizer: &Tokenizer, ids: &[u32]) -> Result<Self> {
        let mut decoder = Self::new(tokenizer);
        for &id in ids {
            decoder.push(id)?;
        }
        Ok(decoder)
    }

    /// Reads one id and gives the text that is certain now, possibly none.
    ///
    /// # Errors
    /// `InvalidArgument` if `id` is not in the vocabulary; the decoder is unchanged then.
    pub fn push(&mut self, id: u32) -> Result<&str> {
        self.tokenizer.check(id)?;
        self.text.clear();
        let vocab = self.tokenizer.vocab();
        match vocab.types[id as usize] {
            PieceType::Byte => {
                self.pending.extend(vocab.byte(id));
                self.at_start = false;
                emit_complete(&mut self.pending, &mut self.text);
            }
            kind => {
                emit_broken(&mut self.pending, &mut self.text);
                if !kind.is_special() {
                    let piece = vocab.pieces[id as usize].as_str();
                    let piece =
                        if self.at_start { piece.strip_prefix(SPACE).unwrap_or(piece) } else { piece };
                    self.text.extend(piece.chars().map(|c| if c == SPACE { ' ' } else { c }));
                    self.at_start = false;
                }
            }
        }
        Ok(&self.text)
    }

    /// Ends the text: U+FFFD for each byte of a character that was never completed.
    pub fn finish(mut self) -> String {
        self.text.clear();
        emit_broken(&mut self.pending, &mut self.text);
        self.text
    }

    /// Bytes, at most three, of a character that waits for its rest.
    pub fn pending(&self) -> &[u8] {
        &self.pending
    }
}

/// Moves whole characters to `text`; what may still become one stays, other bytes become U+FFFD each.
fn emit_complete(pending: &mut Vec<u8>, text: &mut String) {
    let mut rest = pending.as_slice();
    while !rest.is_empty() {
        let (done, broken, stop) = match str::from_utf8(rest) {
            Ok(whole) => (whole.len(), 0, true),
            Err(e) => (e.valid_up_to(), e.error_len().unwrap_or(0), e.error_len().is_none()),
        };
        text.push_str(str::from_utf8(&rest[..done]).expect("checked just above"));
        text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, broken));
        rest = &rest[done + broken..];
        if stop {
            break;
        }
    }
    let kept = rest.len();
    pending.drain(..pending.len() - kept);
}

/// Gives up on the pending bytes.
fn emit_broken(pending: &mut Vec<u8>, text: &mut String) {
    text.extend(pending.drain(..).map(|_| char::REPLACEMENT_CHARACTER));
}
