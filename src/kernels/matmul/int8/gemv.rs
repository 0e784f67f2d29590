//! One token at a time: rows of weights stream from the file as they are stored.
//!
//! Decoding is bound by memory, so what counts is that the loads run ahead of the arithmetic: several rows
//! are read at once, far apart, and each stream is prefetched.

use std::ops::Range;

use super::{
    super::{Inputs, Outputs},
    unpack::{self, Blocks},
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

/// See [`super::super::multiply`].
pub(super) unsafe fn multiply(
    isa: Isa,
    weights: &Matrix,
    range: Range<usize>,
    inputs: Inputs,
    outputs: Outputs,
    _scratch: &mut Vec<f32>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let rows = Rows {
            data: weights.bytes().as_ptr().add(range.start * weights.row_bytes()),
            stride: weights.row_bytes(),
            count: range.len(),
            columns: weights.columns,
        };
        for t in 0..inputs.tokens {
            let x = Operand::at(&inputs.format, inputs.rows.add(t * inputs.format.row_bytes()));
            let y = outputs.data.wrapping_add(t * outputs.stride + range.start);
            match (isa, weights.dtype) {
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512Vnni, DType::Q4_K) => avx512::q4_k(&rows, &x, y),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512Vnni, DType::Q6_K) => avx512::q6_k(&rows, &x, y),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512Vnni, DType::Q8_0) => avx512::q8_0(&rows, &x, y),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512Vnni, DType::Q4_0) => avx512::q4_0(&rows, &x, y),
                _ => portable(isa, weights.dtype, &rows, &x, y),
            }
        }
    }
}

/// Rows of stored weights.
struct Rows {
    data: *const u8,
    /// Bytes from row to row.
    stride: usize,
    count: usize,
    columns: usize,
}

dispatch! {
    unsafe fn portable(dtype: DType, rows: &Rows, x: &Operand, y: *mut f32) = portable_of;
}

/// The plain form for every type: a block is unpacked and multiplied while it is in registers.
#[inline(always)]
unsafe fn portable_of<S: Simd>(dtype: DType, rows: &Rows, x: &Operand, y: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        with_blocks!(dtype, Format => {
            for r in 0..rows.count {
                *y.add(r) = dot_row::<Format>(rows.data.add(r * rows.stride), x, rows.columns);
            }
        });
    }
}

#[inline(always)]
unsafe fn dot_row<B: Blocks>(row: *const u8, x: &Operand, columns: usize) -> f32 {
    let mut q = [0i8; 256];
    let (mut scales, mut offsets) = ([0.0f32; 16], [0.0f32; 16]);
    let mut sum = 0.0;
    for block in 0..columns / B::LEN {
        // SAFETY: the caller's promise; a block has at most 256 values in 16 groups.
        unsafe {
            B::unpack(row.add(block * B::BYTES), q.as_mut_ptr(), scales.as_mut_ptr(), offsets.as_mut_ptr());
            for g in 0..B::LEN / B::GROUP {
                let at = block * B::LEN + g * B::GROUP;
                let x_quants = std::slice::from_raw_parts(x.quants.add(at), B::GROUP);
                let dot: i32 = q[g * B::GROUP..][..B::GROUP]
                    .iter()
                    .zip(x_quants)
                    .map(|(&w, &x)| i32::from(w) * i32::from(x))
                    .sum();
                let x_sum: f32 = (at / 16..(at + B::GROUP) / 16).map(|i| *x.sums.add(i)).sum();
                sum += dot as f32 * (scales[g] * *x.scales.add(at / GROUP)) + offsets[g] * x_sum;
            }
        }
    }
    sum
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    //! AVX-512 VNNI. `STREAMS` rows at a time, spread evenly over the range.

    use std::arch::x86_64::*;

    use super::*;

    const STREAMS: usize = 4;
    /// Bytes ahead of each stream's reads.
    const AHEAD: usize = 2048;

    macro_rules! kernel {
        ($(#[$doc:meta])* $name:ident = $rows:ident) => {
            $(#[$doc])*
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            pub(super) unsafe fn $name(rows: &Rows, x: &Operand, y: *mut f32) {
                let streams = rows.count / STREAMS;
                // SAFETY: the caller's promise.
                unsafe {
                    for r in 0..streams {
                        let sums = $rows::<STREAMS>(rows.data.add(r * rows.stride), streams * rows.stride, x, rows.columns);
                        for (s, sum) in sums.into_iter().enumerate() {
                            *y.add(s * streams + r) = sum;
                        }
                    }
                    for r in STREAMS * streams..rows.count {
                        [*y.add(r)] = $rows::<1>(rows.data.add(r * rows.stride), 0, x, rows.columns);
                    }
                }
            }
        };
    }

    kernel! { q4_k = rows_q4_k }
    kernel! { q6_k = rows_q6_k }
    kernel! { q8_0 = rows_q8_0 }
    kernel! { q4_0 = rows_q4_0 }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn prefetch<const BYTES: usize>(p: *const u8) {
        for line in (0..BYTES).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + line).cast());
        }
    }

    /// Two f32 values, eight lanes each.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn pair(p: *const f32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_insertf32x8::<1>(_mm512_set1_ps(*p), _mm256_set1_ps(*p.add(1))) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn rows_q8_0<const R: usize>(
        data: *const u8,
        stride: usize,
        x: &Operand,
        columns: usize,
    ) -> [f32; R] {
        let flip = _mm512_set1_epi8(i8::MIN);
        let mut sums = [_mm512_setzero_ps(); R];
        let mut corrections = [_mm512_setzero_ps(); R];
        // SAFETY: the caller's promise: rows of columns / 32 blocks of 34 bytes.
        unsafe {
            let groups = columns / GROUP;
            for g in (0..groups - groups % 2).step_by(2) {
                let quants = _mm512_loadu_si512(x.quants.add(g * GROUP).cast());
                let scale = pair(x.scales.add(g));
                // Weights are read as w + 128: take 128 Σ x off, an eighth in each lane.
                let x_sums =
                    [0, 1].map(|i| -16.0 * (*x.sums.add(2 * g + 2 * i) + *x.sums.add(2 * g + 2 * i + 1)));
                let correction = pair(x_sums.as_ptr());
                for r in 0..R {
                    let block = data.add(r * stride + g * 34);
                    prefetch::<64>(block);
                    let w = _mm512_castsi256_si512(_mm256_loadu_si256(block.add(2).cast()));
                    let w = _mm512_inserti64x4::<1>(w, _mm256_loadu_si256(block.add(36).cast()));
                    let dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_xor_si512(w, flip), quants);
                    let d0 = _mm_set1_epi16(block.cast::<i16>().read_unaligned());
                    let d1 = _mm_set1_epi16(block.add(34).cast::<i16>().read_unaligned());
                    let d = _mm512_cvtph_ps(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(d0), d1));
                    sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_mul_ps(d, scale), sums[r]);
                    corrections[r] = _mm512_fmadd_ps(d, correction, corrections[r]);
                }
            }
            let mut out: [f32; R] =
                std::array::from_fn(|r| _mm512_reduce_add_ps(_mm512_add_ps(sums[r], corrections[r])));
            if groups % 2 == 1 {
                last_block::<unpack::Q8_0, R>(&mut out, data, stride, x, columns);
            }
            out
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn rows_q4_0<const R: usize>(
        data: *const u8,
        stride: usize,
        x: &Operand,
        columns: usize,
    ) -> [f32; R] {
        let low = _mm256_set1_epi8(15);
        let mut sums = [_mm512_setzero_ps(); R];
        let mut corrections = [_mm512_setzero_ps(); R];
        // SAFETY: the caller's promise: rows of columns / 32 blocks of 18 bytes.
        unsafe {
            let groups = columns / GROUP;
            // Two blocks' low nibbles, then their high ones: quarters 0, 2, 1, 3 of the inputs.
            let order = _mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7);
            let lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1);
            for g in (0..groups - groups % 2).step_by(2) {
                let quants =
                    _mm512_permutexvar_epi64(order, _mm512_loadu_si512(x.quants.add(g * GROUP).cast()));
                let scale = _mm512_castpd_ps(_mm512_set1_pd(x.scales.add(g).cast::<f64>().read_unaligned()));
                let scale = _mm512_permutexvar_ps(lanes, scale);
                let x_sums = [0, 1].map(|i| -(*x.sums.add(2 * g + 2 * i) + *x.sums.add(2 * g + 2 * i + 1)));
                let correction =
                    _mm512_castpd_ps(_mm512_set1_pd(x_sums.as_ptr().cast::<f64>().read_unaligned()));
                let correction = _mm512_permutexvar_ps(lanes, correction);
                for r in 0..R {
                    let block = data.add(r * stride + g * 18);
                    prefetch::<64>(block);
                    let packed = _mm256_castsi128_si256(_mm_loadu_si128(block.add(2).cast()));
                    let packed = _mm256_inserti128_si256::<1>(packed, _mm_loadu_si128(block.add(20).cast()));
                    let w = _mm512_inserti64x4::<1>(
                        _mm512_castsi256_si512(_mm256_and_si256(packed, low)),
                        _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low),
                    );
                    let dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, quants);
                    let d = i32::from(block.cast::<u16>().read_unaligned())
                        | i32::from(block.add(18).cast::<u16>().read_unaligned()) << 16;
                    let d = _mm512_permutexvar_ps(
                        lanes,
                        _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128(d))),
                    );
                    sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_mul_ps(d, scale), sums[r]);
                    // The offset of 8 over the eight lanes of a block.
                    corrections[r] = _mm512_fmadd_ps(d, correction, corrections[r]);
                }
            }
            let mut out: [f32; R] =
                std::array::from_fn(|r| _mm512_reduce_add_ps(_mm512_add_ps(sums[r], corrections[r])));
            if groups % 2 == 1 {
                last_block::<unpack::Q4_0, R>(&mut out, data, stride, x, columns);
            }
            out
        }
    }

    /// Adds the products of a row's last block where the blocks are odd in number.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn last_block<B: Blocks, const R: usize>(
        sums: &mut [f32; R],
        data: *const u8,
        stride: usize,
        x: &Operand,
        columns: usize,
    ) {
        let at = columns - B::LEN;
        // SAFETY: the caller's promise.
        unsafe {
            let x = Operand {
                quants: x.quants.add(at),
                scales: x.scales.add(at / GROUP),
                sums: x.sums.add(at / 16),
                ..*x
            };
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum += dot_row::<B>(data.add(r * stride + at / B::LEN * B::BYTES), &x, B::LEN);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn rows_q4_k<const R: usize>(
        data: *const u8,
        stride: usize,
        x: &Operand,
        columns: usize,
    ) -> [f32; R] {
        let low = _mm512_set1_epi8(15);
        // 64 bytes of nibbles hold sub-blocks 0 and 2 low, 1 and 3 high; then 4 and 6, 5 and 7.
        let lanes = [0, 1, 4, 5].map(|j: i32| {
            let (a, b) = (j, j + 2);
            _mm512_setr_epi32(a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b)
        });
        let mut sums = [_mm512_setzero_ps(); R];
        let mut corrections = [_mm256_setzero_ps(); R];
        // SAFETY: the caller's promise: rows of columns / 256 blocks of 144 bytes.
        unsafe {
            for b in 0..columns / 256 {
                let quants: [__m512i; 4] =
                    std::array::from_fn(|i| _mm512_loadu_si512(x.quants.add(b * 256 + i * 64).cast()));
                let quants = [
                    _mm512_shuffle_i64x2::<0b01_00_01_00>(quants[0], quants[1]),
                    _mm512_shuffle_i64x2::<0b11_10_11_10>(quants[0], quants[1]),
                    _mm512_shuffle_i64x2::<0b01_00_01_00>(quants[2], quants[3]),
                    _mm512_shuffle_i64x2::<0b11_10_11_10>(quants[2], quants[3]),
                ];
                let x_scales = _mm256_loadu_ps(x.scales.add(b * 8));
                let x_sums = sums_of_pairs(x.sums.add(b * 16));
                for r in 0..R {
                    let block = data.add(r * stride + b * 144);
                    prefetch::<144>(block);
                    let (scales, mins) = scales_mins(block.add(4));
                    let d = _mm_cvtph_ps(_mm_cvtsi32_si128(block.cast::<i32>().read_unaligned()));
                    let dmin = _mm256_broadcastss_ps(_mm_movehdup_ps(d));
                    let scales = _mm256_mul_ps(_mm256_mul_ps(scales, x_scales), _mm256_broadcastss_ps(d));
                    corrections[r] = _mm256_fmadd_ps(_mm256_mul_ps(mins, dmin), x_sums, corrections[r]);
                    let scales = _mm512_castps256_ps512(scales);
                    for half in 0..2 {
                        let packed = _mm512_loadu_si512(block.add(16 + 64 * half).cast());
                        let parts = [
                            _mm512_and_si512(packed, low),
                            _mm512_and_si512(_mm512_srli_epi16::<4>(packed), low),
                        ];
                        for (i, w) in parts.into_iter().enumerate() {
                            let dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, quants[2 * half + i]);
                            let scale = _mm512_permutexvar_ps(lanes[2 * half + i], scales);
                            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale, sums[r]);
                        }
                    }
                }
            }
        }
        std::array::from_fn(|r| {
            let sum = _mm512_sub_ps(sums[r], _mm512_zextps256_ps512(corrections[r]));
            _mm512_reduce_add_ps(sum)
        })
    }

    /// The eight 6-bit scales and minima of a Q4_K or Q5_K block, as f32.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn scales_mins(packed: *const u8) -> (__m256, __m256) {
        // SAFETY: 12 bytes.
        let [a, b, c] = unsafe { packed.cast::<[u32; 3]>().read_unaligned() };
        let scales =
            u64::from(a & 0x3F3F_3F3F) | u64::from(c & 0x0F0F_0F0F | (a >> 6 & 0x0303_0303) << 4) << 32;
        let mins =
            u64::from(b & 0x3F3F_3F3F) | u64::from(c >> 4 & 0x0F0F_0F0F | (b >> 6 & 0x0303_0303) << 4) << 32;
        let widen = |bytes: u64| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64)));
        (widen(scales), widen(mins))
    }

    /// Sums of neighbours: 16 values to 8.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn sums_of_pairs(p: *const f32) -> __m256 {
        // SAFETY: the caller's promise.
        let sums = unsafe { _mm256_hadd_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) };
        // hadd works on 128-bit halves: put the quarters in order.
        _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(sums)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    unsafe fn rows_q6_k<const R: usize>(
        data: *const u8,
        stride: usize,
        x: &Operand,
        columns: usize,
    ) -> [f32; R] {
        let (low, high) = (_mm512_set1_epi8(0x0F), _mm512_set1_epi8(0x30));
        // Bit pairs of the two halves of a register, moved to bits 4 and 5.
        let left = _mm512_inserti64x4::<1>(_mm512_set1_epi16(4), _mm256_set1_epi16(2));
        let right = _mm512_inserti64x4::<1>(_mm512_set1_epi16(0), _mm256_set1_epi16(2));
        let lanes = [0, 4, 8, 12].map(|j: i32| {
            let [a, b, c, d] = [j, j + 1, j + 2, j + 3];
            _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d)
        });
        let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        let mut sums = [_mm512_setzero_ps(); R];
        let mut corrections = [_mm512_setzero_ps(); R];
        // SAFETY: the caller's promise: rows of columns / 256 blocks of 210 bytes.
        unsafe {
            for b in 0..columns / 256 {
                let quants: [__m512i; 4] =
                    std::array::from_fn(|i| _mm512_loadu_si512(x.quants.add(b * 256 + i * 64).cast()));
                let x_scales = _mm512_castps256_ps512(_mm256_loadu_ps(x.scales.add(b * 8)));
                let x_scales = _mm512_permutexvar_ps(twice, x_scales);
                let x_sums = _mm512_loadu_ps(x.sums.add(b * 16));
                for r in 0..R {
                    let block = data.add(r * stride + b * 210);
                    prefetch::<210>(block);
                    let d = _mm512_cvtph_ps(_mm256_set1_epi16(block.add(208).cast::<i16>().read_unaligned()));
                    let scales =
                        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(block.add(192).cast())));
                    let scales = _mm512_mul_ps(scales, d);
                    corrections[r] = _mm512_fmadd_ps(scales, x_sums, corrections[r]);
                    let scales = _mm512_mul_ps(scales, x_scales);
                    for half in 0..2 {
                        let nibbles = _mm512_loadu_si512(block.add(64 * half).cast());
                        let pairs =
                            _mm512_broadcast_i64x4(_mm256_loadu_si256(block.add(128 + 32 * half).cast()));
                        let parts = [
                            (nibbles, _mm512_sllv_epi16(pairs, left)),
                            (_mm512_srli_epi16::<4>(nibbles), _mm512_srlv_epi16(pairs, right)),
                        ];
                        for (i, (nibbles, pairs)) in parts.into_iter().enumerate() {
                            let w = _mm512_or_si512(
                                _mm512_and_si512(nibbles, low),
                                _mm512_and_si512(pairs, high),
                            );
                            let dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, quants[2 * half + i]);
                            let scale = _mm512_permutexvar_ps(lanes[2 * half + i], scales);
                            sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale, sums[r]);
                        }
                    }
                }
            }
            let offset = _mm512_set1_ps(-32.0);
            std::array::from_fn(|r| _mm512_reduce_add_ps(_mm512_fmadd_ps(corrections[r], offset, sums[r])))
        }
    }
}
