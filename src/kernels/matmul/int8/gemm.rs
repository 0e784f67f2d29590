//! Many tokens at a time: panels of 16 rows, unpacked to bytes once, times all tokens.
//!
//! A panel is laid out for the dot-product instructions, which multiply four bytes at a time: for each four
//! columns a line of 64 bytes, (16 rows, 4 columns). The scales and offsets of a group are (16 rows) f32.

use std::ops::Range;

use super::{
    super::{Inputs, Outputs},
    unpack::Blocks,
    with_blocks,
};
use crate::{
    dtype::DType,
    kernels::{
        dispatch,
        isa::Isa,
        operand::{GROUP, Operand},
        simd::Simd,
    },
    weights::Matrix,
};

/// Rows of a panel.
pub(super) const ROWS: usize = 16;

/// A panel and what the dot products need to know about it.
pub(super) struct Panel {
    /// (columns / 4, ROWS, 4)
    pub quants: *mut i8,
    /// (columns / group, ROWS)
    pub scales: *mut f32,
    /// (columns / group, ROWS)
    pub offsets: *mut f32,
    pub columns: usize,
    /// Columns that share a scale: 16 or 32.
    pub group: usize,
    /// Whether values use all 8 bits.
    pub signed: bool,
}

/// See [`super::super::multiply`].
pub(super) unsafe fn multiply(
    isa: Isa,
    weights: &Matrix,
    range: Range<usize>,
    inputs: Inputs,
    outputs: Outputs,
    scratch: &mut Vec<f32>,
) {
    let columns = weights.columns;
    // Panel, scales, offsets, rows before they are transposed, and results of a row tail.
    let sizes = [
        columns * ROWS / 4,
        columns / 16 * ROWS,
        columns / 16 * ROWS,
        columns * ROWS / 4,
        ROWS * inputs.tokens,
    ];
    let total: usize = sizes.iter().sum::<usize>() + 16;
    if scratch.len() < total {
        scratch.resize(total, 0.0);
    }
    // SAFETY: the parts follow one another inside the scratch memory; the caller's promise for the rest.
    unsafe {
        let quants = scratch.as_mut_ptr();
        let quants = quants.add(quants.align_offset(64).min(16));
        let scales = quants.add(sizes[0]);
        let offsets = scales.add(sizes[1]);
        let rows = offsets.add(sizes[2]);
        let tail = rows.add(sizes[3]);
        for first in range.clone().step_by(ROWS) {
            let count = ROWS.min(range.end - first);
            let source = weights.bytes()[first * weights.row_bytes()..].as_ptr();
            let mut panel =
                Panel { quants: quants.cast(), scales, offsets, columns, group: 0, signed: false };
            pack(isa, weights.dtype, source, weights.row_bytes(), count, &mut panel, rows.cast());
            if count == ROWS {
                let outputs = Outputs { data: outputs.data.wrapping_add(first), ..outputs };
                multiply_panel(isa, &panel, &inputs, &outputs);
                continue;
            }
            multiply_panel(isa, &panel, &inputs, &Outputs { data: tail, stride: ROWS });
            for t in 0..inputs.tokens {
                let out = outputs.data.wrapping_add(t * outputs.stride + first);
                std::ptr::copy_nonoverlapping(tail.add(t * ROWS), out, count);
            }
        }
    }
}

dispatch! {
    /// Unpacks `count` rows into the panel; missing rows become zero. `rows` has room for (ROWS, columns) bytes.
    unsafe fn pack(
        dtype: DType, source: *const u8, row_bytes: usize, count: usize, panel: &mut Panel, rows: *mut i8,
    ) = pack_of;
}

#[inline(always)]
unsafe fn pack_of<S: Simd>(
    dtype: DType,
    source: *const u8,
    row_bytes: usize,
    count: usize,
    panel: &mut Panel,
    rows: *mut i8,
) {
    // SAFETY: the caller's promise.
    unsafe {
        with_blocks!(dtype, Format => {
            panel.group = Format::GROUP;
            panel.signed = Format::SIGNED;
            for r in 0..count {
                unpack_row::<Format>(source.add(r * row_bytes), r, rows.add(r * panel.columns), panel);
            }
        });
        for r in count..ROWS {
            std::ptr::write_bytes(rows.add(r * panel.columns), 0, panel.columns);
            for g in 0..panel.columns / panel.group {
                *panel.scales.add(g * ROWS + r) = 0.0;
                *panel.offsets.add(g * ROWS + r) = 0.0;
            }
        }
        let lines = panel.quants.cast::<u32>();
        for quad in 0..panel.columns / 4 {
            for r in 0..ROWS {
                *lines.add(quad * ROWS + r) =
                    rows.add(r * panel.columns).cast::<u32>().add(quad).read_unaligned();
            }
        }
    }
}

#[inline(always)]
unsafe fn unpack_row<B: Blocks>(row: *const u8, r: usize, q: *mut i8, panel: &Panel) {
    let mut scales = [0.0; 16];
    let mut offsets = [0.0; 16];
    let groups = B::LEN / B::GROUP;
    for block in 0..panel.columns / B::LEN {
        // SAFETY: the caller's promise; a block has at most 16 groups.
        unsafe {
            let block_at = row.add(block * B::BYTES);
            B::unpack(block_at, q.add(block * B::LEN), scales.as_mut_ptr(), offsets.as_mut_ptr());
            for g in 0..groups {
                *panel.scales.add((block * groups + g) * ROWS + r) = scales[g];
                *panel.offsets.add((block * groups + g) * ROWS + r) = offsets[g];
            }
        }
    }
}

/// All tokens times one panel.
unsafe fn multiply_panel(isa: Isa, panel: &Panel, inputs: &Inputs, outputs: &Outputs) {
    // SAFETY: the caller's promise.
    unsafe {
        match (isa, panel.group) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Vnni, 16) => x86::multiply_avx512_vnni::<16>(panel, inputs, outputs),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Vnni, _) => x86::multiply_avx512_vnni::<32>(panel, inputs, outputs),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2 | Isa::AvxVnni | Isa::Avx512, 16) => x86::multiply_avx2::<16>(panel, inputs, outputs),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2 | Isa::AvxVnni | Isa::Avx512, _) => x86::multiply_avx2::<32>(panel, inputs, outputs),
            #[cfg(target_arch = "aarch64")]
            (Isa::NeonDot | Isa::NeonI8mm, 16) => arm::multiply_dot::<16>(panel, inputs, outputs),
            #[cfg(target_arch = "aarch64")]
            (Isa::NeonDot | Isa::NeonI8mm, _) => arm::multiply_dot::<32>(panel, inputs, outputs),
            _ => multiply_portable(isa, panel, inputs, outputs),
        }
    }
}

/// The sums of a token's values in group `g` of `group` columns, times their scale; and the scale.
#[inline(always)]
unsafe fn scale_and_sum(x: &Operand, g: usize, group: usize) -> (f32, f32) {
    // SAFETY: the caller's promise.
    unsafe {
        if group == GROUP {
            (*x.scales.add(g), *x.sums.add(2 * g) + *x.sums.add(2 * g + 1))
        } else {
            (*x.scales.add(g / 2), *x.sums.add(g))
        }
    }
}

dispatch! {
    unsafe fn multiply_portable(panel: &Panel, inputs: &Inputs, outputs: &Outputs) = multiply_portable_of;
}

/// The plain form, for machines without a kernel of their own; also what the others are checked against.
#[inline(always)]
unsafe fn multiply_portable_of<S: Simd>(panel: &Panel, inputs: &Inputs, outputs: &Outputs) {
    for t in 0..inputs.tokens {
        // SAFETY: the caller's promise.
        unsafe {
            let x = Operand::at(&inputs.format, inputs.rows.add(t * inputs.format.row_bytes()));
            let mut sums = [0.0f32; ROWS];
            for g in 0..panel.columns / panel.group {
                let mut dots = [0i32; ROWS];
                for quad in g * panel.group / 4..(g + 1) * panel.group / 4 {
                    let line = std::slice::from_raw_parts(panel.quants.add(quad * 4 * ROWS), 4 * ROWS);
                    let x = x.quants.add(4 * quad);
                    for (r, dot) in dots.iter_mut().enumerate() {
                        *dot +=
                            (0..4).map(|i| i32::from(line[4 * r + i]) * i32::from(*x.add(i))).sum::<i32>();
                    }
                }
                let (scale, sum) = scale_and_sum(&x, g, panel.group);
                for (r, total) in sums.iter_mut().enumerate() {
                    *total += dots[r] as f32 * (*panel.scales.add(g * ROWS + r) * scale);
                    *total += *panel.offsets.add(g * ROWS + r) * sum;
                }
            }
            std::ptr::copy_nonoverlapping(sums.as_ptr(), outputs.data.wrapping_add(t * outputs.stride), ROWS);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    /// Splits the tokens into groups of `$wide` and singles and calls `$kernel::<G, N>` for each.
    macro_rules! over_tokens {
        ($panel:ident, $inputs:ident, $outputs:ident, $group:ident, $kernel:ident, [$($n:literal),*]) => {{
            let mut t = 0;
            $(while $inputs.tokens - t >= $n {
                let rows = $inputs.rows.add(t * $inputs.format.row_bytes());
                let inputs = Inputs { rows, ..*$inputs };
                let outputs = Outputs { data: $outputs.data.wrapping_add(t * $outputs.stride), ..*$outputs };
                $kernel::<$group, $n>($panel, &inputs, &outputs);
                t += $n;
            })*
        }};
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub(super) unsafe fn multiply_avx512_vnni<const G: usize>(
        panel: &Panel,
        inputs: &Inputs,
        outputs: &Outputs,
    ) {
        // SAFETY: the caller's promise.
        unsafe { over_tokens!(panel, inputs, outputs, G, tokens_avx512_vnni, [12, 4, 1]) }
    }

    /// `N` tokens: one accumulator of 16 rows each for the integers of a group and for the result.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn tokens_avx512_vnni<const G: usize, const N: usize>(
        panel: &Panel,
        inputs: &Inputs,
        outputs: &Outputs,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let x: [Operand; N] = std::array::from_fn(|t| {
                Operand::at(&inputs.format, inputs.rows.add(t * inputs.format.row_bytes()))
            });
            let flip = _mm512_set1_epi8(if panel.signed { i8::MIN } else { 0 });
            let correction = _mm512_set1_ps(if panel.signed { -128.0 } else { 0.0 });
            let mut sums = [_mm512_setzero_ps(); N];
            for g in 0..panel.columns / G {
                let mut dots = [_mm512_setzero_si512(); N];
                for quad in g * G / 4..(g + 1) * G / 4 {
                    // The instruction wants unsigned weights: add 128 here, take it off again in the offset.
                    let w = _mm512_xor_si512(_mm512_loadu_si512(panel.quants.add(quad * 64).cast()), flip);
                    for t in 0..N {
                        let x = _mm512_set1_epi32(x[t].quants.add(4 * quad).cast::<i32>().read_unaligned());
                        dots[t] = _mm512_dpbusd_epi32(dots[t], w, x);
                    }
                }
                let scales = _mm512_loadu_ps(panel.scales.add(g * ROWS));
                let offsets =
                    _mm512_fmadd_ps(scales, correction, _mm512_loadu_ps(panel.offsets.add(g * ROWS)));
                for t in 0..N {
                    let (scale, sum) = scale_and_sum(&x[t], g, G);
                    let scale = _mm512_mul_ps(scales, _mm512_set1_ps(scale));
                    sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t]), scale, sums[t]);
                    sums[t] = _mm512_fmadd_ps(offsets, _mm512_set1_ps(sum), sums[t]);
                }
            }
            for (t, sum) in sums.into_iter().enumerate() {
                _mm512_storeu_ps(outputs.data.wrapping_add(t * outputs.stride), sum);
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn multiply_avx2<const G: usize>(panel: &Panel, inputs: &Inputs, outputs: &Outputs) {
        // SAFETY: the caller's promise.
        unsafe { over_tokens!(panel, inputs, outputs, G, tokens_avx2, [4, 1]) }
    }

    /// `N` tokens, eight rows at a time.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tokens_avx2<const G: usize, const N: usize>(panel: &Panel, inputs: &Inputs, outputs: &Outputs) {
        // SAFETY: the caller's promise.
        unsafe {
            let x: [Operand; N] = std::array::from_fn(|t| {
                Operand::at(&inputs.format, inputs.rows.add(t * inputs.format.row_bytes()))
            });
            let ones = _mm256_set1_epi16(1);
            for half in 0..2 {
                let mut sums = [_mm256_setzero_ps(); N];
                for g in 0..panel.columns / G {
                    let mut dots = [_mm256_setzero_si256(); N];
                    for quad in g * G / 4..(g + 1) * G / 4 {
                        let w = _mm256_loadu_si256(panel.quants.add(quad * 64 + half * 32).cast());
                        // Pairs are summed in 16 bits, so one factor must be unsigned and the products small:
                        // |w| · (x with w's sign) stays below 2 · 127².
                        let magnitude = _mm256_abs_epi8(w);
                        for t in 0..N {
                            let x =
                                _mm256_set1_epi32(x[t].quants.add(4 * quad).cast::<i32>().read_unaligned());
                            let x = if panel.signed { _mm256_sign_epi8(x, w) } else { x };
                            let pairs = _mm256_maddubs_epi16(magnitude, x);
                            dots[t] = _mm256_add_epi32(dots[t], _mm256_madd_epi16(pairs, ones));
                        }
                    }
                    let scales = _mm256_loadu_ps(panel.scales.add(g * ROWS + half * 8));
                    let offsets = _mm256_loadu_ps(panel.offsets.add(g * ROWS + half * 8));
                    for t in 0..N {
                        let (scale, sum) = scale_and_sum(&x[t], g, G);
                        let scale = _mm256_mul_ps(scales, _mm256_set1_ps(scale));
                        sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[t]), scale, sums[t]);
                        sums[t] = _mm256_fmadd_ps(offsets, _mm256_set1_ps(sum), sums[t]);
                    }
                }
                for (t, sum) in sums.into_iter().enumerate() {
                    _mm256_storeu_ps(outputs.data.wrapping_add(t * outputs.stride + half * 8), sum);
                }
            }
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use std::arch::{aarch64::*, asm};

    use super::*;

    /// `sums + Σ w·x` over four bytes in each of four lanes. The intrinsic is not stable yet.
    #[inline]
    #[target_feature(enable = "dotprod")]
    fn dot(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: the instruction reads and writes only its registers.
        unsafe {
            asm!("sdot {s:v}.4s, {w:v}.16b, {x:v}.16b", s = inout(vreg) sums, w = in(vreg) w, x = in(vreg) x,
                 options(pure, nomem, nostack, preserves_flags));
        }
        sums
    }

    #[target_feature(enable = "dotprod")]
    pub(super) unsafe fn multiply_dot<const G: usize>(panel: &Panel, inputs: &Inputs, outputs: &Outputs) {
        let mut t = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while t < inputs.tokens {
                let rows = inputs.rows.add(t * inputs.format.row_bytes());
                let inputs = Inputs { rows, tokens: inputs.tokens - t, ..*inputs };
                let outputs = Outputs { data: outputs.data.wrapping_add(t * outputs.stride), ..*outputs };
                if inputs.tokens >= 4 {
                    tokens_dot::<G, 4>(panel, &inputs, &outputs);
                    t += 4;
                } else {
                    tokens_dot::<G, 1>(panel, &inputs, &outputs);
                    t += 1;
                }
            }
        }
    }

    /// `N` tokens, eight rows at a time in two registers.
    #[inline]
    #[target_feature(enable = "dotprod")]
    unsafe fn tokens_dot<const G: usize, const N: usize>(panel: &Panel, inputs: &Inputs, outputs: &Outputs) {
        // SAFETY: the caller's promise.
        unsafe {
            let x: [Operand; N] = std::array::from_fn(|t| {
                Operand::at(&inputs.format, inputs.rows.add(t * inputs.format.row_bytes()))
            });
            for half in 0..2 {
                let mut sums = [[vdupq_n_f32(0.0); 2]; N];
                for g in 0..panel.columns / G {
                    let mut dots = [[vdupq_n_s32(0); 2]; N];
                    for quad in g * G / 4..(g + 1) * G / 4 {
                        let line = panel.quants.add(quad * 64 + half * 32);
                        let w = [vld1q_s8(line), vld1q_s8(line.add(16))];
                        for t in 0..N {
                            let x = x[t].quants.add(4 * quad).cast::<i32>().read_unaligned();
                            let x = vreinterpretq_s8_s32(vdupq_n_s32(x));
                            dots[t] = [dot(dots[t][0], w[0], x), dot(dots[t][1], w[1], x)];
                        }
                    }
                    for t in 0..N {
                        let (scale, sum) = scale_and_sum(&x[t], g, G);
                        for part in 0..2 {
                            let at = g * ROWS + half * 8 + part * 4;
                            let scale = vmulq_n_f32(vld1q_f32(panel.scales.add(at)), scale);
                            sums[t][part] = vfmaq_f32(sums[t][part], vcvtq_f32_s32(dots[t][part]), scale);
                            sums[t][part] = vfmaq_n_f32(sums[t][part], vld1q_f32(panel.offsets.add(at)), sum);
                        }
                    }
                }
                for (t, sums) in sums.into_iter().enumerate() {
                    let out = outputs.data.wrapping_add(t * outputs.stride + half * 8);
                    vst1q_f32(out, sums[0]);
                    vst1q_f32(out.add(4), sums[1]);
                }
            }
        }
    }
}
