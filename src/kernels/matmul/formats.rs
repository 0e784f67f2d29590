//! How a tile's block becomes bytes, scales and offsets. See [`tiles`](super::tiles) for the layouts.

use super::lanes::Lanes;

/// A block format: `value = scale · weight + offset`, with one scale and offset a group.
///
/// # Safety
/// `block` points to a tile's block of `BYTES` bytes, of 16 rows.
pub(super) trait Format {
    /// Columns in a block.
    const COLUMNS: usize;
    /// Bytes in a tile's block.
    const BYTES: usize;
    /// Columns that share a scale: 16 or 32.
    const GROUP: usize;
    /// Whether weights can be negative; others are below 128.
    const SIGNED: bool;
    /// Whether offsets can be other than zero.
    const HAS_OFFSET: bool;
    /// What all groups of a block share.
    type Head<L: Lanes>;

    unsafe fn head<L: Lanes>(block: *const u8) -> Self::Head<L>;
    /// Weights of columns `8 · pair` to `8 · pair + 8`: two quads.
    unsafe fn weights<L: Lanes>(block: *const u8, pair: usize) -> [L::I; 2];
    /// Scale and offset of group `g`.
    unsafe fn scale<L: Lanes>(block: *const u8, head: &Self::Head<L>, g: usize) -> (L::F, L::F);
}

/// The low and the high nibbles of a line.
#[inline(always)]
unsafe fn nibbles<L: Lanes>(line: *const u8) -> [L::I; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let (line, low) = (L::load(line), L::splat_byte(15));
        [L::and(line, low), L::and(L::shift_right::<4>(line), low)]
    }
}

/// Signed bytes.
#[allow(non_camel_case_types)]
pub(super) struct Q8_0;

impl Format for Q8_0 {
    const COLUMNS: usize = 32;
    const BYTES: usize = 544;
    const GROUP: usize = 32;
    const SIGNED: bool = true;
    const HAS_OFFSET: bool = false;
    type Head<L: Lanes> = ();

    #[inline(always)]
    unsafe fn head<L: Lanes>(_block: *const u8) {}

    #[inline(always)]
    unsafe fn weights<L: Lanes>(block: *const u8, pair: usize) -> [L::I; 2] {
        // SAFETY: the trait's contract.
        unsafe { [L::load(block.add(32 + 128 * pair)), L::load(block.add(96 + 128 * pair))] }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(block: *const u8, _head: &(), _g: usize) -> (L::F, L::F) {
        // SAFETY: the trait's contract.
        unsafe { (L::halves(block), L::splat(0.0)) }
    }
}

/// Nibbles minus eight.
#[allow(non_camel_case_types)]
pub(super) struct Q4_0;

impl Format for Q4_0 {
    const COLUMNS: usize = 32;
    const BYTES: usize = 288;
    const GROUP: usize = 32;
    const SIGNED: bool = false;
    const HAS_OFFSET: bool = true;
    type Head<L: Lanes> = ();

    #[inline(always)]
    unsafe fn head<L: Lanes>(_block: *const u8) {}

    #[inline(always)]
    unsafe fn weights<L: Lanes>(block: *const u8, pair: usize) -> [L::I; 2] {
        // SAFETY: the trait's contract.
        unsafe { nibbles::<L>(block.add(32 + 64 * pair)) }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(block: *const u8, _head: &(), _g: usize) -> (L::F, L::F) {
        // SAFETY: the trait's contract.
        unsafe {
            let d = L::halves(block);
            (d, L::mul(d, L::splat(-8.0)))
        }
    }
}

/// Nibbles that index 16 values, closer together near zero.
#[allow(non_camel_case_types)]
pub(super) struct IQ4_NL;

/// The values, four times for the registers that look up in 16 bytes at a time.
static NON_LINEAR: [[i8; 16]; 4] =
    [[-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]; 4];

impl Format for IQ4_NL {
    const COLUMNS: usize = 32;
    const BYTES: usize = 288;
    const GROUP: usize = 32;
    const SIGNED: bool = true;
    const HAS_OFFSET: bool = false;
    type Head<L: Lanes> = ();

    #[inline(always)]
    unsafe fn head<L: Lanes>(_block: *const u8) {}

    #[inline(always)]
    unsafe fn weights<L: Lanes>(block: *const u8, pair: usize) -> [L::I; 2] {
        // SAFETY: the trait's contract; the table has 64 bytes.
        unsafe {
            let table = L::load(NON_LINEAR.as_ptr().cast());
            let [low, high] = nibbles::<L>(block.add(32 + 64 * pair));
            [L::look_up(table, low), L::look_up(table, high)]
        }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(block: *const u8, _head: &(), _g: usize) -> (L::F, L::F) {
        // SAFETY: the trait's contract.
        unsafe { (L::halves(block), L::splat(0.0)) }
    }
}

/// Half scales, and the three words that pack eight 6-bit scales and minima of a row.
pub(super) struct KHead<L: Lanes> {
    d: L::F,
    dmin: L::F,
    packed: [L::I; 3],
}

/// Byte where the nibbles of Q4_K and Q5_K start.
const K_NIBBLES: usize = 64 + 192;

#[inline(always)]
unsafe fn k_head<L: Lanes>(block: *const u8) -> KHead<L> {
    // SAFETY: the caller's promise.
    unsafe {
        let packed = [L::load(block.add(64)), L::load(block.add(128)), L::load(block.add(192))];
        KHead { d: L::halves(block), dmin: L::halves(block.add(32)), packed }
    }
}

/// Scale and offset of sub-block `j`: 6 bits each, of which the last four sub-blocks keep the upper two in the
/// first four's bytes.
#[inline(always)]
unsafe fn k_scale<L: Lanes>(head: &KHead<L>, j: usize) -> (L::F, L::F) {
    // SAFETY: the caller's promise.
    unsafe {
        let [a, b, c] = head.packed;
        let (scale, min) = if j < 4 {
            (bits::<L>(a, 8 * j, 63), bits::<L>(b, 8 * j, 63))
        } else {
            let shift = 8 * (j - 4);
            // Two bits at 6 and 7 of a byte, moved to 4 and 5.
            let upper = [bits::<L>(a, shift + 2, 0x30), bits::<L>(b, shift + 2, 0x30)];
            (L::or(bits::<L>(c, shift, 15), upper[0]), L::or(bits::<L>(c, shift + 4, 15), upper[1]))
        };
        let offset = L::mul(L::to_float(min), L::sub(L::splat(0.0), head.dmin));
        (L::mul(L::to_float(scale), head.d), offset)
    }
}

/// `word >> shift & mask`, for each word.
#[inline(always)]
unsafe fn bits<L: Lanes>(words: L::I, shift: usize, mask: i32) -> L::I {
    // SAFETY: the caller's instruction set.
    unsafe { L::and(L::shift_words_right(words, shift), L::splat_word(mask)) }
}

/// Nibbles, with a fifth bit or without, in sub-blocks of 32 with a scale and a minimum: Q5_K and Q4_K.
pub(super) struct K<const FIFTH: bool>;

#[allow(non_camel_case_types)]
pub(super) type Q4_K = K<false>;
#[allow(non_camel_case_types)]
pub(super) type Q5_K = K<true>;

impl<const FIFTH: bool> Format for K<FIFTH> {
    const COLUMNS: usize = 256;
    const BYTES: usize = if FIFTH { 2816 } else { 2304 };
    const GROUP: usize = 32;
    const SIGNED: bool = false;
    const HAS_OFFSET: bool = true;
    type Head<L: Lanes> = KHead<L>;

    #[inline(always)]
    unsafe fn head<L: Lanes>(block: *const u8) -> KHead<L> {
        // SAFETY: the trait's contract.
        unsafe { k_head(block) }
    }

    #[inline(always)]
    unsafe fn weights<L: Lanes>(block: *const u8, pair: usize) -> [L::I; 2] {
        // SAFETY: the trait's contract.
        unsafe {
            let [low, high] = nibbles::<L>(block.add(K_NIBBLES + 64 * pair));
            if !FIFTH {
                return [low, high];
            }
            let fifths = L::load(block.add(K_NIBBLES + 2048 + pair / 4 * 64));
            // Bits 2 · (pair % 4) and the next, moved to bit 4.
            let moved = match pair % 4 {
                0 => [L::shift_left::<4>(fifths), L::shift_left::<3>(fifths)],
                1 => [L::shift_left::<2>(fifths), L::shift_left::<1>(fifths)],
                2 => [fifths, L::shift_right::<1>(fifths)],
                _ => [L::shift_right::<2>(fifths), L::shift_right::<3>(fifths)],
            };
            let bit = L::splat_byte(16);
            [L::or(low, L::and(moved[0], bit)), L::or(high, L::and(moved[1], bit))]
        }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(_block: *const u8, head: &KHead<L>, g: usize) -> (L::F, L::F) {
        // SAFETY: the trait's contract.
        unsafe { k_scale(head, g) }
    }
}

/// Six bits minus 32, in groups of 16 with a signed scale.
#[allow(non_camel_case_types)]
pub(super) struct Q6_K;

impl Format for Q6_K {
    const COLUMNS: usize = 256;
    const BYTES: usize = 3360;
    const GROUP: usize = 16;
    const SIGNED: bool = false;
    const HAS_OFFSET: bool = true;
    /// d
    type Head<L: Lanes> = L::F;

    #[inline(always)]
    unsafe fn head<L: Lanes>(block: *const u8) -> L::F {
        // SAFETY: the trait's contract.
        unsafe { L::halves(block) }
    }

    #[inline(always)]
    unsafe fn weights<L: Lanes>(block: *const u8, pair: usize) -> [L::I; 2] {
        const NIBBLES: usize = 32 + 256;
        // SAFETY: the trait's contract.
        unsafe {
            let pairs = L::load(block.add(NIBBLES + 2048 + pair / 2 * 64));
            let [low, high] = nibbles::<L>(block.add(NIBBLES + 64 * pair));
            // Bit pairs 2 · (pair % 2) and the next, moved to bits 4 and 5.
            let moved = match pair % 2 {
                0 => [L::shift_left::<4>(pairs), L::shift_left::<2>(pairs)],
                _ => [pairs, L::shift_right::<2>(pairs)],
            };
            let bits = L::splat_byte(0x30);
            [L::or(low, L::and(moved[0], bits)), L::or(high, L::and(moved[1], bits))]
        }
    }

    #[inline(always)]
    unsafe fn scale<L: Lanes>(block: *const u8, head: &L::F, g: usize) -> (L::F, L::F) {
        // SAFETY: the trait's contract.
        unsafe {
            let scale = L::mul(*head, L::to_float(L::widen(block.add(32 + 16 * g).cast())));
            (scale, L::mul(scale, L::splat(-32.0)))
        }
    }
}
