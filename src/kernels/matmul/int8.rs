//! Tiles of quantized weights times int8 inputs.
//!
//! Both sides are integers in groups of 32 (or 16) columns with a scale each, so that
//!
//! ```text
//! y = Σ over groups of  w_scale · x_scale · Σ w·x  +  w_offset · x_scale · Σ x
//! ```
//!
//! and the inner sums are exact. A register holds 16 rows, so nothing is summed across lanes, and the same
//! loop serves one token, which is bound by memory, and many, which is bound by arithmetic.

use std::ops::Range;

use super::{Inputs, Outputs, formats, formats::Format, lanes, lanes::Lanes, tiles::ROWS};
use crate::{
    dtype::DType,
    kernels::{isa::Isa, operand::Operand},
    weights::Matrix,
};

/// Bytes that are fetched ahead of the reads when one token streams the weights from memory.
const AHEAD: usize = 8192;

/// See [`super::multiply`]; `range` starts at a whole tile.
pub(super) unsafe fn multiply(
    isa: Isa,
    weights: &Matrix,
    range: Range<usize>,
    inputs: Inputs,
    outputs: Outputs,
) {
    debug_assert!(range.start.is_multiple_of(ROWS));
    let tile_bytes = ROWS * weights.row_bytes();
    for first in range.clone().step_by(ROWS) {
        let count = ROWS.min(range.end - first);
        // SAFETY: the caller's promise; tiles are padded to 16 rows, results of the padding go to `tail`.
        unsafe {
            let tile = weights.bytes().as_ptr().add(first / ROWS * tile_bytes);
            let out = Outputs { data: outputs.data.wrapping_add(first), ..outputs };
            if count == ROWS {
                multiply_tile(isa, weights.dtype, tile, inputs, out);
                continue;
            }
            let mut tail = [0.0; ROWS];
            for t in 0..inputs.tokens {
                let one =
                    Inputs { rows: inputs.rows.add(t * inputs.format.row_bytes()), tokens: 1, ..inputs };
                multiply_tile(
                    isa,
                    weights.dtype,
                    tile,
                    one,
                    Outputs { data: tail.as_mut_ptr(), stride: ROWS },
                );
                std::ptr::copy_nonoverlapping(tail.as_ptr(), out.data.wrapping_add(t * out.stride), count);
            }
        }
    }
}

/// One tile times all tokens.
unsafe fn multiply_tile(isa: Isa, dtype: DType, tile: *const u8, inputs: Inputs, outputs: Outputs) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn avx512_vnni(dtype: DType, tile: *const u8, inputs: Inputs, outputs: Outputs) {
        // SAFETY: the caller's promise.
        unsafe { for_type::<lanes::Avx512Vnni>(dtype, tile, inputs, outputs) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2(dtype: DType, tile: *const u8, inputs: Inputs, outputs: Outputs) {
        // SAFETY: the caller's promise.
        unsafe { for_type::<lanes::Avx2>(dtype, tile, inputs, outputs) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn avx_vnni(dtype: DType, tile: *const u8, inputs: Inputs, outputs: Outputs) {
        // SAFETY: the caller's promise.
        unsafe { for_type::<lanes::AvxVnni>(dtype, tile, inputs, outputs) }
    }
    #[cfg(target_arch = "aarch64")]
    #[target_feature(enable = "dotprod")]
    unsafe fn neon_dot(dtype: DType, tile: *const u8, inputs: Inputs, outputs: Outputs) {
        // SAFETY: the caller's promise.
        unsafe { for_type::<lanes::NeonDot>(dtype, tile, inputs, outputs) }
    }
    // SAFETY: the caller's promise; an Isa value exists only where the machine has its features.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => avx512_vnni(dtype, tile, inputs, outputs),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => avx_vnni(dtype, tile, inputs, outputs),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 => avx2(dtype, tile, inputs, outputs),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot | Isa::NeonI8mm => neon_dot(dtype, tile, inputs, outputs),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => for_type::<lanes::Neon>(dtype, tile, inputs, outputs),
            _ => for_type::<lanes::Portable>(dtype, tile, inputs, outputs),
        }
    }
}

#[inline(always)]
unsafe fn for_type<L: Lanes>(dtype: DType, tile: *const u8, inputs: Inputs, outputs: Outputs) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::Q8_0 => for_tokens::<L, formats::Q8_0>(tile, inputs, outputs),
            DType::Q4_0 => for_tokens::<L, formats::Q4_0>(tile, inputs, outputs),
            DType::IQ4_NL => for_tokens::<L, formats::IQ4_NL>(tile, inputs, outputs),
            DType::Q4_K => for_tokens::<L, formats::Q4_K>(tile, inputs, outputs),
            DType::Q5_K => for_tokens::<L, formats::Q5_K>(tile, inputs, outputs),
            DType::Q6_K => for_tokens::<L, formats::Q6_K>(tile, inputs, outputs),
            _ => unreachable!("{dtype} has no tiles"),
        }
    }
}

/// Splits the tokens into groups as large as the registers allow.
#[inline(always)]
unsafe fn for_tokens<L: Lanes, F: Format>(tile: *const u8, inputs: Inputs, outputs: Outputs) {
    let mut t = 0;
    while t < inputs.tokens {
        let left = inputs.tokens - t;
        // SAFETY: the caller's promise.
        unsafe {
            let group = Inputs { rows: inputs.rows.add(t * inputs.format.row_bytes()), ..inputs };
            let out = Outputs { data: outputs.data.wrapping_add(t * outputs.stride), ..outputs };
            t += if L::MANY_REGISTERS && left >= 12 {
                tokens::<L, F, 12>(tile, group, out)
            } else if left >= 4 {
                tokens::<L, F, 4>(tile, group, out)
            } else if left >= 2 {
                tokens::<L, F, 2>(tile, group, out)
            } else {
                tokens::<L, F, 1>(tile, group, out)
            };
        }
    }
}

/// `N` tokens: an accumulator of 16 rows each for the integers of a group, and one for the result. Returns `N`.
#[inline(always)]
unsafe fn tokens<L: Lanes, F: Format, const N: usize>(
    tile: *const u8,
    inputs: Inputs,
    outputs: Outputs,
) -> usize {
    // SAFETY: the caller's promise; the columns are whole blocks.
    unsafe {
        let mut x = [Operand::at(&inputs.format, inputs.rows); N];
        for (t, x) in x.iter_mut().enumerate() {
            *x = Operand::at(&inputs.format, inputs.rows.add(t * inputs.format.row_bytes()));
        }
        let mut sums = [L::splat(0.0); N];
        for b in 0..inputs.format.len / F::COLUMNS {
            let block = tile.add(b * F::BYTES);
            if N == 1 {
                for line in (0..F::BYTES).step_by(64) {
                    L::prefetch(block.wrapping_add(AHEAD + line));
                }
            }
            let head = F::head::<L>(block);
            for g in 0..F::COLUMNS / F::GROUP {
                let mut dots = [L::zero(); N];
                for pair in 0..F::GROUP / 8 {
                    let w = F::weights::<L>(block, g * (F::GROUP / 8) + pair);
                    let at = b * F::COLUMNS + g * F::GROUP + pair * 8;
                    for (q, w) in w.into_iter().enumerate() {
                        for t in 0..N {
                            let x = L::quad(x[t].quants.add(at + 4 * q));
                            dots[t] =
                                if F::SIGNED { L::dot_signed(dots[t], w, x) } else { L::dot(dots[t], w, x) };
                        }
                    }
                }
                let (scale, mut offset) = F::scale::<L>(block, &head, g);
                if F::SIGNED && L::FLIPS {
                    // `dot_signed` has added 128 to each weight.
                    offset = L::mul(scale, L::splat(-128.0));
                }
                let at = b * (F::COLUMNS / F::GROUP) + g;
                for t in 0..N {
                    let (x_scale, x_sum) = match F::GROUP {
                        16 => (*x[t].scales.add(at / 2), *x[t].sums.add(at)),
                        _ => (*x[t].scales.add(at), *x[t].pair_sums.add(at)),
                    };
                    sums[t] = L::fma(L::to_float(dots[t]), L::mul(scale, L::splat(x_scale)), sums[t]);
                    if F::HAS_OFFSET || F::SIGNED && L::FLIPS {
                        sums[t] = L::fma(offset, L::splat(x_sum), sums[t]);
                    }
                }
            }
        }
        for (t, sum) in sums.into_iter().enumerate() {
            L::store(outputs.data.wrapping_add(t * outputs.stride), sum);
        }
        N
    }
}
