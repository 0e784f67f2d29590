//! SentencePiece's BPE: the best-scored adjacent pair that spells a piece is merged, until none is left.
//!
//! The usual BPE model of the `tokenizers` crate wants every (left, right) split of every piece as a merge
//! table, which costs most of a start. Looking the merged text up in the vocabulary needs no table and is
//! what SentencePiece itself does, so its tie rule (leftmost pair first) holds without further work.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    hash::{BuildHasher, RandomState},
};

use super::vocab::{PieceType, Vocab, invalid};
use crate::error::{Error, ErrorKind, Result};

/// No symbol, no piece.
const NONE: u32 = u32::MAX;

/// The pieces that text can become, found by their text, with the order in which merges happen.
pub(super) struct Bpe {
    index: PieceIndex,
    /// Per piece: a number that grows with the score, or 0 if text does not become this piece.
    ranks: Vec<u32>,
    /// Bytes of the longest piece: a longer pair needs no look-up, which keeps long words linear.
    longest: usize,
    fallback: Fallback,
}

/// What becomes of a character that is no piece.
enum Fallback {
    /// Ids of the 256 byte pieces.
    Bytes(Box<[u32; 256]>),
    /// Id of the unknown piece, once for a run of such characters.
    Unknown(u32),
}

impl Bpe {
    /// Builds the look-up tables of a vocabulary that passed `Vocab::validate`.
    ///
    /// # Errors
    /// `Tokenizer` if a piece occurs twice, `Unsupported` if text could reach an unused piece.
    pub(super) fn new(vocab: &Vocab) -> Result<Self> {
        let mut index = PieceIndex::with_capacity(vocab.len());
        let mut bytes = Box::new([NONE; 256]);
        let mut longest = 0;
        for (id, piece) in (0u32..).zip(&vocab.pieces) {
            if let Some(first) = index.insert(&vocab.pieces, id) {
                return Err(invalid(format_args!(
                    "tokenizer.ggml.tokens: pieces {first} and {id} are both {piece:?}"
                )));
            }
            longest = longest.max(piece.len());
            if let Some(byte) = vocab.byte(id) {
                bytes[usize::from(byte)] = id;
            }
        }
        let fallback =
            if bytes.contains(&NONE) { Fallback::Unknown(vocab.unk) } else { Fallback::Bytes(bytes) };
        let rank =
            |(&score, kind): (&f32, &PieceType)| if kind.is_text() { ascending_bits(score) } else { 0 };
        let ranks = vocab.scores.iter().zip(&vocab.types).map(rank).collect();
        let bpe = Self { index, ranks, longest, fallback };
        bpe.refuse_reachable_unused(vocab)?;
        Ok(bpe)
    }

    /// The piece that `text` becomes when it is one symbol: its id and rank.
    fn find(&self, vocab: &Vocab, text: &str) -> Option<(u32, u32)> {
        if text.len() > self.longest {
            return None;
        }
        let id = self.index.find(&vocab.pieces, text)?;
        let rank = self.ranks[id as usize];
        (rank != 0).then_some((id, rank))
    }

    /// SentencePiece merges through unused pieces and takes them apart again in a way that depends on the
    /// rest of the text. No such vocabulary is known; unused pieces that only fill up the table are harmless.
    fn refuse_reachable_unused(&self, vocab: &Vocab) -> Result<()> {
        let is_symbol = |text: &str| text.chars().nth(1).is_none() || self.find(vocab, text).is_some();
        let unused = vocab.pieces.iter().zip(&vocab.types).filter(|(_, kind)| **kind == PieceType::Unused);
        for (piece, _) in unused {
            let mut splits = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
            if splits.any(|(left, right)| is_symbol(left) && is_symbol(right)) {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format_args!(
                        "tokenizer.ggml.token_type: unused piece {piece:?} is spelled by other pieces"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Appends what stands for a character that is no piece. `start` is where the current text segment began
    /// in `ids`.
    fn fall_back(&self, symbol: &str, ids: &mut Vec<u32>, start: usize) {
        match &self.fallback {
            Fallback::Bytes(bytes) => ids.extend(symbol.bytes().map(|b| bytes[usize::from(b)])),
            Fallback::Unknown(unk) if ids[start..].last() == Some(unk) => {}
            Fallback::Unknown(unk) => ids.push(*unk),
        }
    }
}

/// Working memory of the merge loop, to be reused from one text to the next.
#[derive(Default)]
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Merge>,
}

/// A span of the text, linked to its neighbours. Emptied when it is merged into the one on its left.
struct Symbol {
    start: u32,
    len: u32,
    prev: u32,
    next: u32,
    /// The piece that a merge made of it; [`NONE`] while it is one character.
    id: u32,
}

/// A pair that spells a piece. The order of the fields is the order of the queue.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Merge {
    /// Rank of the piece, then the leftmost pair first.
    priority: (u32, Reverse<u32>),
    right: u32,
    /// Bytes of both symbols when the pair was found: if they differ later, the entry is stale.
    len: u32,
    id: u32,
}

impl Merger {
    /// Appends the ids of `text`, a window without user-defined pieces.
    /// `start` is where the current segment began in `ids`.
    pub(super) fn encode(&mut self, bpe: &Bpe, vocab: &Vocab, text: &str, ids: &mut Vec<u32>, start: usize) {
        self.split_chars(text);
        for right in 1..self.symbols.len() as u32 {
            self.propose(bpe, vocab, text, right - 1, right);
        }
        while let Some(merge) = self.queue.pop() {
            if let Some((prev, next)) = self.join(&merge) {
                let left = merge.priority.1.0;
                self.propose(bpe, vocab, text, prev, left);
                self.propose(bpe, vocab, text, left, next);
            }
        }
        let mut at = 0;
        while let Some(symbol) = self.symbols.get(at as usize) {
            let part = &text[symbol.start as usize..][..symbol.len as usize];
            match symbol.id {
                NONE => match bpe.find(vocab, part) {
                    Some((id, _)) => ids.push(id),
                    None => bpe.fall_back(part, ids, start),
                },
                id => ids.push(id),
            }
            at = symbol.next;
        }
    }

    fn split_chars(&mut self, text: &str) {
        self.symbols.clear();
        self.symbols.extend(text.char_indices().zip(0u32..).map(|((start, c), i)| Symbol {
            start: start as u32,
            len: c.len_utf8() as u32,
            prev: i.wrapping_sub(1),
            next: i + 1,
            id: NONE,
        }));
        if let Some(last) = self.symbols.last_mut() {
            last.next = NONE;
        }
    }

    /// Queues the pair if both symbols exist and spell a piece.
    fn propose(&mut self, bpe: &Bpe, vocab: &Vocab, text: &str, left: u32, right: u32) {
        let (Some(l), Some(r)) = (self.symbols.get(left as usize), self.symbols.get(right as usize)) else {
            return;
        };
        let len = l.len + r.len;
        if let Some((id, rank)) = bpe.find(vocab, &text[l.start as usize..][..len as usize]) {
            self.queue.push(Merge { priority: (rank, Reverse(left)), right, len, id });
        }
    }

    /// Merges the right symbol into the left one and gives the neighbours of the result, unless the pair is
    /// stale.
    fn join(&mut self, merge: &Merge) -> Option<(u32, u32)> {
        let left = merge.priority.1.0;
        let (l, r) = (&self.symbols[left as usize], &self.symbols[merge.right as usize]);
        if l.len == 0 || r.len == 0 || l.len + r.len != merge.len {
            return None;
        }
        let (prev, next) = (l.prev, r.next);
        self.symbols[merge.right as usize].len = 0;
        let merged = &mut self.symbols[left as usize];
        (merged.len, merged.next, merged.id) = (merge.len, next, merge.id);
        if let Some(after) = self.symbols.get_mut(next as usize) {
            after.prev = left;
        }
        Some((prev, next))
    }
}

/// Hash table from text to id that borrows the text from the vocabulary, which spares a copy of it.
struct PieceIndex {
    /// Random, so that no vocabulary can be made to collide.
    keys: [u64; 2],
    /// Open addressing: the upper half of the hash, and the id. A power of two, at most half full.
    slots: Box<[(u32, u32)]>,
}

impl PieceIndex {
    fn with_capacity(len: usize) -> Self {
        let random = RandomState::new();
        Self {
            keys: [random.hash_one(0), random.hash_one(1) | 1],
            slots: vec![(0, NONE); (2 * len).next_power_of_two()].into(),
        }
    }

    /// Multiply and fold, eight bytes at a time: most pieces take one step.
    fn hash(&self, text: &str) -> u64 {
        let mut hash = self.keys[0] ^ text.len() as u64;
        let (words, rest) = text.as_bytes().as_chunks::<8>();
        let rest = rest.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        for word in words.iter().map(|word| u64::from_le_bytes(*word)).chain([rest]) {
            let product = u128::from(hash ^ word) * u128::from(self.keys[1]);
            hash = product as u64 ^ (product >> 64) as u64;
        }
        hash
    }

    /// The slot that holds `text` or is free for it, and what to put there with the id.
    fn slot(&self, pieces: &[String], text: &str) -> (usize, u32) {
        let (hash, mask) = (self.hash(text), self.slots.len() - 1);
        let tag = (hash >> 32) as u32;
        let mut slot = hash as usize & mask;
        loop {
            let (other, id) = self.slots[slot];
            if id == NONE || (other == tag && pieces[id as usize] == text) {
                return (slot, tag);
            }
            slot = (slot + 1) & mask;
        }
    }

    /// Adds a piece; gives the id that has this text already, if any.
    fn insert(&mut self, pieces: &[String], id: u32) -> Option<u32> {
        let (slot, tag) = self.slot(pieces, &pieces[id as usize]);
        let (_, present) = self.slots[slot];
        if present != NONE {
            return Some(present);
        }
        self.slots[slot] = (tag, id);
        None
    }

    fn find(&self, pieces: &[String], text: &str) -> Option<u32> {
        let (slot, _) = self.slot(pieces, text);
        let (_, id) = self.slots[slot];
        (id != NONE).then_some(id)
    }
}

/// Maps finite floats to integers in the same order, with 0.0 and -0.0 equal.
fn ascending_bits(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

#[cfg(test)]
mod tests {
    use super::ascending_bits;

    #[test]
    fn ranks_follow_scores() {
        let scores = [f32::MIN, -7.5, -1.0, -1e-40, 0.0, 1e-40, 3.0, f32::MAX];
        assert!(scores.windows(2).all(|w| ascending_bits(w[0]) < ascending_bits(w[1])));
        assert_eq!(ascending_bits(-0.0), ascending_bits(0.0));
    }
}
