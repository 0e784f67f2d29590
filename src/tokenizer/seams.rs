//! Where a long text can be cut without changing its ids.

use super::vocab::{PieceType, SPACE, Vocab};

/// Windows have at least this many bytes, and as many more as it takes to find a seam.
const WINDOW_BYTES: usize = 4096;
/// Size of the table of pairs: at most 1/8 of it is used by a vocabulary of 64,000 pieces.
const TABLE_BITS: u32 = 20;

/// Knows which pairs of characters stand side by side in some piece. Between two that do not, nothing is
/// ever merged or cut out, so the text can be cut there; a long text needs working memory for a window only.
pub(super) struct Seams {
    /// A bit per hash of a pair. A chance collision hides a seam, no more.
    pairs: Box<[u64]>,
}

impl Seams {
    pub(super) fn new(vocab: &Vocab) -> Self {
        let mut pairs = vec![0u64; 1 << (TABLE_BITS - 6)].into_boxed_slice();
        let pieces = vocab.pieces.iter().zip(&vocab.types);
        for (piece, _) in pieces.filter(|(_, kind)| **kind != PieceType::Byte) {
            for (left, right) in piece.chars().zip(piece.chars().skip(1)) {
                let (word, bit) = place(left, right);
                pairs[word] |= bit;
            }
        }
        Self { pairs }
    }

    /// Cuts `text` into windows; together they are the text, and none is empty.
    pub(super) fn windows<'a>(&self, text: &'a str) -> impl Iterator<Item = &'a str> {
        let mut rest = text;
        std::iter::from_fn(move || {
            let window;
            (window, rest) = rest.split_at(self.seam_in(rest));
            (!window.is_empty()).then_some(window)
        })
    }

    /// The first seam behind [`WINDOW_BYTES`], or the end.
    fn seam_in(&self, text: &str) -> usize {
        let Some(from) = (WINDOW_BYTES..text.len()).find(|&at| text.is_char_boundary(at)) else {
            return text.len();
        };
        let mut chars = text[from..].char_indices();
        let mut left = chars.next().map_or(SPACE, |(_, first)| first);
        let seam = chars.find(|&(_, right)| {
            let (word, bit) = place(std::mem::replace(&mut left, right), right);
            self.pairs[word] & bit == 0
        });
        seam.map_or(text.len(), |(at, _)| from + at)
    }
}

/// Word and bit of a pair in the table; a space counts as `▁`, which it will become.
fn place(left: char, right: char) -> (usize, u64) {
    let [left, right] = [left, right].map(|c| u64::from(if c == ' ' { SPACE } else { c }));
    let hash = (left << 21 | right).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - TABLE_BITS);
    ((hash >> 6) as usize, 1 << (hash & 63))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seams(pieces: &[&str]) -> Seams {
        let pieces: Vec<_> = pieces.iter().map(ToString::to_string).collect();
        let (scores, types) = (vec![0.0; pieces.len()], vec![PieceType::Normal; pieces.len()]);
        Seams::new(&Vocab {
            pieces,
            scores,
            types,
            bos: 0,
            eos: 0,
            unk: 0,
            pad: None,
            add_bos: false,
            add_space_prefix: true,
            chat_template: None,
        })
    }

    #[test]
    fn windows_end_at_the_first_seam() {
        let text = format!("{}cd e", "ab".repeat(4000));
        let lengths = |pieces| seams(pieces).windows(&text).map(str::len).collect::<Vec<_>>();
        assert_eq!(lengths(&["aba", "bc"]), [8001, 3]);
        assert_eq!(lengths(&["aba", "bcd"]), [8002, 2]);
        assert_eq!(lengths(&["ab"]), [4098, 3906]);
        assert_eq!(lengths(&["aba", "bcd▁", "▁e"]), [8004]);
    }

    #[test]
    fn windows_join_to_the_text() {
        for text in [String::new(), "é".into(), "é的😀 ▁".repeat(3000), " ".repeat(9000)] {
            let windows: Vec<_> = seams(&["é的", "▁▁"]).windows(&text).collect();
            assert_eq!(windows.concat(), text);
            assert!(windows.iter().all(|window| !window.is_empty()));
        }
    }
}
