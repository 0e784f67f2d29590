//! Quantized blocks as plain int8: each value is `scale · q + offset`, with one scale and offset a group.
//!
//! The layouts are ggml's. These loops are portable; inside the `dispatch!`ed packers the compiler vectorises
//! them for each instruction set.

/// A block format.
///
/// # Safety
/// `unpack` reads `BYTES` bytes at `block` and writes `LEN` values to `q` and `LEN / GROUP` to `scales` and
/// `offsets`.
pub(super) trait Blocks {
    /// Values in a block.
    const LEN: usize;
    /// Bytes in a block.
    const BYTES: usize;
    /// Values that share a scale: 16 or 32.
    const GROUP: usize;
    /// Whether values can be negative. They then use all 8 bits; others stay below 64.
    const SIGNED: bool;

    unsafe fn unpack(block: *const u8, q: *mut i8, scales: *mut f32, offsets: *mut f32);
}

/// A half-precision scale as f32; scales are finite.
#[inline(always)]
pub(super) unsafe fn half(p: *const u8) -> f32 {
    // SAFETY: the caller's promise.
    let bits = unsafe { p.cast::<u16>().read_unaligned() };
    // The exponent's bias differs by 112; the multiplication also makes subnormals right.
    let magnitude = f32::from_bits(u32::from(bits & 0x7FFF) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

/// Splits 16 bytes of nibbles: low ones are values 0..16, high ones 16..32.
#[inline(always)]
unsafe fn nibbles16(qs: *const u8, q: *mut i8) {
    for i in 0..16 {
        // SAFETY: the caller's promise.
        unsafe {
            *q.add(i) = (*qs.add(i) & 15) as i8;
            *q.add(16 + i) = (*qs.add(i) >> 4) as i8;
        }
    }
}

/// Splits 32 bytes of nibbles: low ones are values 0..32, high ones 32..64.
#[inline(always)]
unsafe fn nibbles32(qs: *const u8, q: *mut i8) {
    for i in 0..32 {
        // SAFETY: the caller's promise.
        unsafe {
            *q.add(i) = (*qs.add(i) & 15) as i8;
            *q.add(32 + i) = (*qs.add(i) >> 4) as i8;
        }
    }
}

/// Sub-block `j`'s 6-bit scale and minimum from the 12 packed bytes of Q4_K and Q5_K.
#[inline(always)]
unsafe fn scale_min(packed: *const u8, j: usize) -> (f32, f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let at = |i: usize| *packed.add(i);
        let (scale, min) = match j < 4 {
            true => (at(j) & 63, at(j + 4) & 63),
            false => (at(j + 4) & 15 | at(j - 4) >> 6 << 4, at(j + 4) >> 4 | at(j) >> 6 << 4),
        };
        (f32::from(scale), f32::from(min))
    }
}

macro_rules! blocks {
    ($(#[$doc:meta])* $name:ident, len $len:expr, bytes $bytes:expr, group $group:expr, signed $signed:expr,
     |$block:ident, $q:ident, $scales:ident, $offsets:ident| $body:block) => {
        $(#[$doc])*
        #[allow(non_camel_case_types)]
        pub(super) struct $name;
        impl Blocks for $name {
            const LEN: usize = $len;
            const BYTES: usize = $bytes;
            const GROUP: usize = $group;
            const SIGNED: bool = $signed;
            #[inline(always)]
            unsafe fn unpack($block: *const u8, $q: *mut i8, $scales: *mut f32, $offsets: *mut f32) {
                // SAFETY: the trait's contract; all offsets lie inside the block.
                unsafe { $body }
            }
        }
    };
}

blocks! {
    /// Half scale, 16 bytes of nibbles; value `d · (q - 8)`.
    Q4_0, len 32, bytes 18, group 32, signed false, |block, q, scales, offsets| {
        *scales = half(block);
        *offsets = -8.0 * *scales;
        nibbles16(block.add(2), q);
    }
}

blocks! {
    /// Half scale and minimum, 16 bytes of nibbles; value `d · q + m`.
    Q4_1, len 32, bytes 20, group 32, signed false, |block, q, scales, offsets| {
        *scales = half(block);
        *offsets = half(block.add(2));
        nibbles16(block.add(4), q);
    }
}

blocks! {
    /// Half scale, 32 fifth bits, 16 bytes of nibbles; value `d · (q - 16)`.
    Q5_0, len 32, bytes 22, group 32, signed false, |block, q, scales, offsets| {
        *scales = half(block);
        *offsets = -16.0 * *scales;
        let high = block.add(2).cast::<u32>().read_unaligned();
        nibbles16(block.add(6), q);
        for i in 0..32 {
            *q.add(i) |= ((high >> i & 1) << 4) as i8;
        }
    }
}

blocks! {
    /// Half scale, 32 signed bytes.
    Q8_0, len 32, bytes 34, group 32, signed true, |block, q, scales, offsets| {
        *scales = half(block);
        *offsets = 0.0;
        std::ptr::copy_nonoverlapping(block.add(2).cast(), q, 32);
    }
}

blocks! {
    /// Half scale and minimum scale, 8 packed pairs of 6-bit scale and minimum, 128 bytes of nibbles;
    /// value `d · s · q - dmin · m`.
    Q4_K, len 256, bytes 144, group 32, signed false, |block, q, scales, offsets| {
        let (d, dmin) = (half(block), half(block.add(2)));
        for j in 0..8 {
            let (scale, min) = scale_min(block.add(4), j);
            *scales.add(j) = d * scale;
            *offsets.add(j) = -dmin * min;
        }
        for chunk in 0..4 {
            nibbles32(block.add(16 + 32 * chunk), q.add(64 * chunk));
        }
    }
}

blocks! {
    /// Q4_K with 32 bytes of fifth bits before the nibbles: bit 2c of byte i belongs to low nibble i of chunk c.
    Q5_K, len 256, bytes 176, group 32, signed false, |block, q, scales, offsets| {
        let (d, dmin) = (half(block), half(block.add(2)));
        for j in 0..8 {
            let (scale, min) = scale_min(block.add(4), j);
            *scales.add(j) = d * scale;
            *offsets.add(j) = -dmin * min;
        }
        let high = block.add(16);
        for chunk in 0..4 {
            let q = q.add(64 * chunk);
            nibbles32(block.add(48 + 32 * chunk), q);
            for i in 0..32 {
                *q.add(i) |= ((*high.add(i) >> (2 * chunk) & 1) << 4) as i8;
                *q.add(32 + i) |= ((*high.add(i) >> (2 * chunk + 1) & 1) << 4) as i8;
            }
        }
    }
}

blocks! {
    /// 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, half scale;
    /// value `d · s · (q - 32)`.
    Q6_K, len 256, bytes 210, group 16, signed false, |block, q, scales, offsets| {
        let d = half(block.add(208));
        for j in 0..16 {
            let scale = d * f32::from(*block.add(192 + j).cast::<i8>());
            *scales.add(j) = scale;
            *offsets.add(j) = -32.0 * scale;
        }
        for part in 0..2 {
            let (low, high, q) = (block.add(64 * part), block.add(128 + 32 * part), q.add(128 * part));
            for i in 0..32 {
                let pairs = *high.add(i);
                *q.add(i) = (*low.add(i) & 15 | (pairs & 3) << 4) as i8;
                *q.add(32 + i) = (*low.add(32 + i) & 15 | (pairs >> 2 & 3) << 4) as i8;
                *q.add(64 + i) = (*low.add(i) >> 4 | (pairs >> 4 & 3) << 4) as i8;
                *q.add(96 + i) = (*low.add(32 + i) >> 4 | (pairs >> 6) << 4) as i8;
            }
        }
    }
}

/// The 16 values of the non-linear 4-bit types.
const NON_LINEAR: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the 16 values of an E2M1 float, plus 12 so that none is negative.
const E2M1: [i8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

#[inline(always)]
unsafe fn look_up(table: &[i8; 16], q: *mut i8, len: usize) {
    for i in 0..len {
        // SAFETY: the caller's promise; values are nibbles.
        unsafe { *q.add(i) = table[(*q.add(i) & 15) as usize] }
    }
}

blocks! {
    /// Half scale, 16 bytes of nibbles that index the non-linear values.
    IQ4_NL, len 32, bytes 18, group 32, signed true, |block, q, scales, offsets| {
        *scales = half(block);
        *offsets = 0.0;
        nibbles16(block.add(2), q);
        look_up(&NON_LINEAR, q, 32);
    }
}

blocks! {
    /// Half scale, 8 scales of 6 bits (2 high bits in a u16, 4 low bits in 4 bytes), 128 bytes of nibbles that
    /// index the non-linear values; value `d · (s - 32) · table[q]`.
    IQ4_XS, len 256, bytes 136, group 32, signed true, |block, q, scales, offsets| {
        let d = half(block);
        let high = block.add(2).cast::<u16>().read_unaligned();
        for j in 0..8 {
            let low = *block.add(4 + j / 2) >> (4 * (j % 2)) & 15;
            let scale = i32::from(low) | i32::from(high >> (2 * j) & 3) << 4;
            *scales.add(j) = d * (scale - 32) as f32;
            *offsets.add(j) = 0.0;
            nibbles16(block.add(8 + 16 * j), q.add(32 * j));
        }
        look_up(&NON_LINEAR, q, 256);
    }
}

blocks! {
    /// A power-of-two scale, 16 bytes of nibbles that are E2M1 floats.
    MXFP4, len 32, bytes 17, group 32, signed false, |block, q, scales, offsets| {
        // Half of 2^(e-127), since the table is doubled. Below 2 the result is subnormal.
        let e = u32::from(*block);
        *scales = f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 });
        *offsets = -12.0 * *scales;
        nibbles16(block.add(1), q);
        look_up(&E2M1, q, 32);
    }
}
