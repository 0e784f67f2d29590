//! Which tokens a state stands for: the newest by name, all of them by a digest.

use std::iter;

/// Identifies a sequence of tokens of any length.
pub(crate) type TokensDigest = [u8; 32];

/// Digest of no tokens.
const EMPTY: TokensDigest = [0; 32];

/// The newest `window` tokens of a sequence, its length, and a digest of all its tokens. Its memory is taken
/// once.
pub(crate) struct Ledger {
    /// The newest `window` tokens at the end, and older ones before them until they are in the way.
    tokens: Vec<u32>,
    window: usize,
    position: u64,
    digest: TokensDigest,
}

impl Ledger {
    /// The ledger of an empty sequence.
    pub fn new(window: usize) -> Self {
        Self { tokens: Vec::with_capacity(2 * window), window, position: 0, digest: EMPTY }
    }

    /// Becomes that of a sequence of `position` tokens with this digest, of which the newest are `tokens`.
    pub fn restore(&mut self, position: u64, digest: TokensDigest, tokens: &[u32]) {
        self.tokens.clear();
        self.tokens.extend_from_slice(&tokens[tokens.len().saturating_sub(self.window)..]);
        (self.position, self.digest) = (position, digest);
    }

    /// Adds tokens at the end.
    pub fn extend(&mut self, tokens: &[u32]) {
        self.position += tokens.len() as u64;
        self.digest = tokens.iter().fold(self.digest, next_digest);
        let tokens = &tokens[tokens.len().saturating_sub(self.window)..];
        if self.tokens.len() + tokens.len() > 2 * self.window {
            let kept = self.window - tokens.len();
            let start = self.tokens.len() - kept;
            self.tokens.copy_within(start.., 0);
            self.tokens.truncate(kept);
        }
        self.tokens.extend_from_slice(tokens);
    }

    /// The newest tokens, at most `window`.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens[self.tokens.len().saturating_sub(self.window)..]
    }

    /// Number of all tokens.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Digest of all tokens.
    pub fn digest(&self) -> &TokensDigest {
        &self.digest
    }

    /// Most tokens that [`tokens`](Self::tokens) gives.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Becomes `other`, whose window is the same, without taking memory.
    pub fn copy_from(&mut self, other: &Self) {
        self.restore(other.position, other.digest, other.tokens());
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.restore(0, EMPTY, &[]);
    }
}

impl Clone for Ledger {
    /// With memory for the whole window, which a vector's own clone would not have.
    fn clone(&self) -> Self {
        let mut clone = Self::new(self.window);
        clone.copy_from(self);
        clone
    }
}

/// The digests of `tokens` up to each of its positions, the empty beginning included.
pub(crate) fn digests(tokens: &[u32]) -> impl Iterator<Item = TokensDigest> {
    let mut digest = EMPTY;
    iter::once(EMPTY).chain(tokens.iter().map(move |token| {
        digest = next_digest(digest, token);
        digest
    }))
}

/// A chain, so that it does not depend on how the tokens came, and can be stored and continued.
fn next_digest(digest: TokensDigest, token: &u32) -> TokensDigest {
    let mut link = [0; 36];
    link[..32].copy_from_slice(&digest);
    link[32..].copy_from_slice(&token.to_le_bytes());
    *blake3::hash(&link).as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_tokens_stay_and_memory_does_not_grow() {
        for window in [0, 1, 2, 7, 64] {
            let mut ledger = Ledger::new(window);
            let capacity = ledger.tokens.capacity();
            let all: Vec<u32> = (0..500).collect();
            let mut end = 0;
            for len in [1, 0, 3, 64, 65, 1, 1, 130, 7, 200].into_iter().cycle().take(30) {
                let next = all.len().min(end + len);
                ledger.extend(&all[end..next]);
                end = next;
                assert_eq!(
                    ledger.tokens(),
                    &all[end.saturating_sub(window)..end],
                    "window {window} at {end}"
                );
                assert_eq!((ledger.position(), ledger.tokens.capacity()), (end as u64, capacity));
            }
            assert_eq!(end, all.len());
        }
    }

    #[test]
    fn the_digest_is_that_of_all_tokens() {
        let (mut parts, mut whole) = (Ledger::new(2), Ledger::new(100));
        [&[5, 6, 7][..], &[], &[8]].iter().for_each(|part| parts.extend(part));
        whole.extend(&[5, 6, 7, 8]);
        assert_eq!(parts.digest(), whole.digest());
        let all: Vec<TokensDigest> = digests(&[5, 6, 7, 8]).collect();
        assert_eq!((all.len(), all[0], all[4]), (5, EMPTY, *whole.digest()));
        for other in [&[5, 6, 7, 9][..], &[6, 5, 7, 8], &[5, 6, 7], &[0, 5, 6, 7, 8]] {
            assert_ne!(digests(other).last(), Some(*whole.digest()));
        }
        parts.clear();
        assert_eq!((parts.digest(), parts.position(), parts.tokens()), (&EMPTY, 0, &[][..]));
    }

    #[test]
    fn a_copy_goes_on_alike() {
        let (mut from, mut to) = (Ledger::new(3), Ledger::new(3));
        from.extend(&[1, 2, 3, 4]);
        to.extend(&[9; 8]);
        to.copy_from(&from);
        for ledger in [&mut from, &mut to] {
            ledger.extend(&[5, 6]);
        }
        assert_eq!(
            (from.tokens(), from.position(), from.digest()),
            (to.tokens(), to.position(), to.digest())
        );
        assert_eq!(to.tokens(), [4, 5, 6]);
    }
}
