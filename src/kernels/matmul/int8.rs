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

/// Bytes that are fetched ahead of each stream's reads when one token streams the weights from memory.
const AHEAD: usize = 8192;

/// Tiles that one token reads at once, far apart: a core follows several streams faster than one.
const STREAMS: usize = 4;

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
    let whole = range.len() / ROWS;
    let job = |tile: usize, streams: usize, step: usize| Job {
        // SAFETY: the caller's promise.
        tile: unsafe { weights.bytes().as_ptr().add((range.start / ROWS + tile) * tile_bytes) },
        streams,
        step: step * tile_bytes,
        inputs,
        outputs: Outputs { data: outputs.data.wrapping_add(range.start + tile * ROWS), ..outputs },
        out_step: step * ROWS,
    };
    // Tiles that are read in streams: each stream has a stretch of its own.
    let stretch = if inputs.tokens == 1 { whole / STREAMS } else { 0 };
    // SAFETY: the caller's promise; all tiles lie in the range.
    unsafe {
        for tile in 0..stretch {
            run(isa, weights.dtype, &job(tile, STREAMS, stretch));
        }
        for tile in stretch * STREAMS..whole {
            run(isa, weights.dtype, &job(tile, 1, 0));
        }
        let rest = range.len() % ROWS;
        if rest > 0 {
            // The tile is padded to 16 rows, and so are its results.
            let mut padded = [0.0; ROWS];
            for t in 0..inputs.tokens {
                let last = job(whole, 1, 0);
                let rows = inputs.rows.add(t * inputs.format.row_bytes());
                let inputs = Inputs { rows, tokens: 1, ..inputs };
                let padding = Outputs { data: padded.as_mut_ptr(), stride: ROWS };
                run(isa, weights.dtype, &Job { inputs, outputs: padding, ..last });
                let out = last.outputs.data.wrapping_add(t * outputs.stride);
                std::ptr::copy_nonoverlapping(padded.as_ptr(), out, rest);
            }
        }
    }
}

/// One tile times all tokens, or several tiles times one.
#[derive(Clone, Copy)]
struct Job {
    tile: *const u8,
    /// 1, or [`STREAMS`] tiles `step` bytes apart; then there is one token.
    streams: usize,
    step: usize,
    inputs: Inputs,
    outputs: Outputs,
    /// Rows from one stream's results to the next.
    out_step: usize,
}

unsafe fn run(isa: Isa, dtype: DType, job: &Job) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn avx512_vnni(dtype: DType, job: &Job) {
        // SAFETY: the caller's promise.
        unsafe { for_type::<lanes::Avx512Vnni>(dtype, job) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn avx2(dtype: DType, job: &Job) {
        // SAFETY: the caller's promise.
        unsafe { for_type::<lanes::Avx2>(dtype, job) }
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn avx_vnni(dtype: DType, job: &Job) {
        // SAFETY: the caller's promise.
        unsafe { for_type::<lanes::AvxVnni>(dtype, job) }
    }
    #[cfg(target_arch = "aarch64")]
    #[target_feature(enable = "dotprod")]
    unsafe fn neon_dot(dtype: DType, job: &Job) {
        // SAFETY: the caller's promise.
        unsafe { for_type::<lanes::NeonDot>(dtype, job) }
    }
    // SAFETY: the caller's promise; an Isa value exists only where the machine has its features.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => avx512_vnni(dtype, job),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => avx_vnni(dtype, job),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 => avx2(dtype, job),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot | Isa::NeonI8mm => neon_dot(dtype, job),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => for_type::<lanes::Neon>(dtype, job),
            _ => for_type::<lanes::Portable>(dtype, job),
        }
    }
}

#[inline(always)]
unsafe fn for_type<L: Lanes>(dtype: DType, job: &Job) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::Q8_0 => for_tokens::<L, formats::Q8_0>(job),
            DType::Q4_0 => for_tokens::<L, formats::Q4_0>(job),
            DType::IQ4_NL => for_tokens::<L, formats::IQ4_NL>(job),
            DType::Q4_K => for_tokens::<L, formats::Q4_K>(job),
            DType::Q5_K => for_tokens::<L, formats::Q5_K>(job),
            DType::Q6_K => for_tokens::<L, formats::Q6_K>(job),
            _ => unreachable!("{dtype} has no tiles"),
        }
    }
}

/// Splits the tokens into groups as large as the registers allow.
#[inline(always)]
unsafe fn for_tokens<L: Lanes, F: Format>(job: &Job) {
    // SAFETY: the caller's promise.
    unsafe {
        if job.streams == STREAMS {
            return tokens::<L, F, 1, STREAMS>(job, 0);
        }
        let mut t = 0;
        while t < job.inputs.tokens {
            let left = job.inputs.tokens - t;
            let group = if L::MANY_REGISTERS && left >= 12 { 12 } else { [0, 1, 2, 2, 4][left.min(4)] };
            match group {
                12 => tokens::<L, F, 12, 1>(job, t),
                4 => tokens::<L, F, 4, 1>(job, t),
                2 => tokens::<L, F, 2, 1>(job, t),
                _ => tokens::<L, F, 1, 1>(job, t),
            }
            t += group;
        }
    }
}

/// Tokens `first` to `first + N`, times `R` tiles: for each an accumulator of 16 rows for the integers of a group,
/// and one for the result.
#[inline(always)]
unsafe fn tokens<L: Lanes, F: Format, const N: usize, const R: usize>(job: &Job, first: usize) {
    let Job { inputs, outputs, .. } = *job;
    // SAFETY: the caller's promise; the columns are whole blocks.
    unsafe {
        let mut x = [Operand::at(&inputs.format, inputs.rows); N];
        for (t, x) in x.iter_mut().enumerate() {
            *x = Operand::at(&inputs.format, inputs.rows.add((first + t) * inputs.format.row_bytes()));
        }
        let mut sums = [[L::splat(0.0); N]; R];
        for b in 0..inputs.format.len / F::COLUMNS {
            for (r, sums) in sums.iter_mut().enumerate() {
                let block = job.tile.add(r * job.step + b * F::BYTES);
                if N == 1 {
                    for line in (0..F::BYTES).step_by(64) {
                        L::prefetch(block.wrapping_add(AHEAD + line));
                    }
                }
                add_block::<L, F, N>(block, b, &x, sums);
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (t, sum) in sums.into_iter().enumerate() {
                L::store(outputs.data.wrapping_add((first + t) * outputs.stride + r * job.out_step), sum);
            }
        }
    }
}

/// Adds the products of block `b` of a tile with `N` tokens.
#[inline(always)]
unsafe fn add_block<L: Lanes, F: Format, const N: usize>(
    block: *const u8,
    b: usize,
    x: &[Operand; N],
    sums: &mut [L::F; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
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
}
