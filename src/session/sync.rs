//! Reading a text of which a session may have read the beginning before.

use super::{Past, Session, ledger};
use crate::error::Result;

/// What [`Session::sync`] took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SyncReport {
    /// Tokens that did not have to be read.
    pub reused: usize,
    /// Tokens that were read.
    pub recomputed: usize,
}

impl Session {
    /// Makes `tokens`, from the first on, the session's past, whatever it has read before, with as little
    /// reading as possible. Then keeps a [checkpoint](Self::checkpoint) there, if the session keeps any and
    /// this place is not among them.
    ///
    /// What is reused was read in other blocks, so that the logits may differ by rounding from those of
    /// reading `tokens` in one call.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) for an id outside the vocabulary, with nothing
    /// changed.
    pub fn sync(&mut self, tokens: &[u32]) -> Result<SyncReport> {
        let reused = self.reuse(tokens)?;
        self.read(&tokens[reused..])?;
        let digest = self.past.ledger.digest();
        if !tokens.is_empty() && !self.ring.iter().any(|(_, past)| past.ledger.digest() == digest) {
            self.ring.push(&self.past);
        }
        Ok(SyncReport { reused, recomputed: tokens.len() - reused })
    }

    /// Goes to the longest beginning of `tokens` that the session's past or one of its checkpoints stands
    /// for, or else to the empty beginning. Gives its length: reading the rest completes a
    /// [`sync`](Self::sync).
    ///
    /// Beginnings are known by a digest of all their tokens, so neither their number nor the size of the
    /// ledger matters.
    ///
    /// # Errors
    /// Those of [`sync`](Self::sync).
    pub fn reuse(&mut self, tokens: &[u32]) -> Result<usize> {
        self.check(tokens)?;
        let mut longest = (0, None);
        for (len, digest) in ledger::digests(tokens).enumerate().skip(1) {
            let same = |past: &Past| {
                let ledger = &past.ledger;
                // Logits after the last token are wanted, and only reading gives them.
                let enough = len < tokens.len() || !past.logits.is_empty();
                ledger.position() == len as u64 && *ledger.digest() == digest && enough
            };
            if same(&self.past) {
                longest = (len, Some(None));
            } else if let Some((checkpoint, _)) = self.ring.iter().find(|(_, past)| same(past)) {
                longest = (len, Some(Some(*checkpoint)));
            }
        }
        match longest.1 {
            None => self.past.clear(),
            Some(None) => {}
            Some(Some(checkpoint)) => self.rewind(checkpoint)?,
        }
        Ok(longest.0)
    }
}
