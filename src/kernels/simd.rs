//! Vectors of f32: one trait, one implementation per register file.
//!
//! All methods are `#[inline(always)]` so that they become single instructions inside the
//! `#[target_feature]` functions that [`dispatch!`](super::dispatch) makes.
#![allow(clippy::missing_safety_doc)]

/// A vector of [`Simd::LANES`] f32 values.
///
/// # Safety
/// Every method requires the implementation's instruction set; loads and stores require `LANES` valid
/// elements at any alignment.
pub(crate) trait Simd: Copy {
    /// The register type.
    type V: Copy;
    /// Values in a register.
    const LANES: usize;
    /// Whether there are 32 registers, enough for the larger tiles of the matrix kernels.
    const MANY_REGISTERS: bool;

    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the machine can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// 2 to the power of integers from -126 to 127.
    unsafe fn exp2i(a: Self::V) -> Self::V;
    /// Stores integers from -127 to 127 as bytes.
    unsafe fn store_i8(p: *mut i8, a: Self::V);
    /// Sum of all lanes.
    unsafe fn sum(a: Self::V) -> f32;
    /// Largest lane.
    unsafe fn largest(a: Self::V) -> f32;
}

/// Plain Rust, `N` values in an array, which compilers turn into whatever vectors the baseline has.
#[derive(Clone, Copy)]
pub(crate) struct Array<const N: usize>;

/// The fallback on every machine.
pub(crate) type Scalar = Array<8>;

/// The fallback for widths that are not a multiple of any register.
pub(crate) type Single = Array<1>;

impl<const N: usize> Simd for Array<N> {
    type V = [f32; N];
    const LANES: usize = N;
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; N]
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not mul_add: without the instruction it is a slow library call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn exp2i(a: Self::V) -> Self::V {
        a.map(|x| f32::from_bits(((x as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, a: Self::V) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[i8; N]>().write_unaligned(a.map(|x| x as i8)) }
    }
    #[inline(always)]
    unsafe fn sum(a: Self::V) -> f32 {
        a.iter().sum()
    }
    #[inline(always)]
    unsafe fn largest(a: Self::V) -> f32 {
        a.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Simd;

    /// Implements [`Simd`] by one intrinsic per method.
    macro_rules! x86 {
        ($(#[$doc:meta])* $name:ident, $vector:ty, $lanes:expr, $many:expr, $load:ident, $store:ident, $splat:ident, $add:ident,
         $sub:ident, $mul:ident, $div:ident, $min:ident, $max:ident, $fma:ident,
         round: $round:expr, exp2i: $exp2i:expr, store_i8: $store_i8:expr, sum: $sum:expr, largest: $largest:expr) => {
            $(#[$doc])*
            #[derive(Clone, Copy)]
            pub(crate) struct $name;

            // SAFETY (all blocks): the trait's contract gives the instruction set and valid pointers.
            #[allow(clippy::undocumented_unsafe_blocks)]
            impl Simd for $name {
                type V = $vector;
                const LANES: usize = $lanes;
                const MANY_REGISTERS: bool = $many;
                #[inline(always)]
                unsafe fn load(p: *const f32) -> Self::V { unsafe { $load(p) } }
                #[inline(always)]
                unsafe fn store(p: *mut f32, v: Self::V) { unsafe { $store(p, v) } }
                #[inline(always)]
                unsafe fn splat(x: f32) -> Self::V { unsafe { $splat(x) } }
                #[inline(always)]
                unsafe fn add(a: Self::V, b: Self::V) -> Self::V { unsafe { $add(a, b) } }
                #[inline(always)]
                unsafe fn sub(a: Self::V, b: Self::V) -> Self::V { unsafe { $sub(a, b) } }
                #[inline(always)]
                unsafe fn mul(a: Self::V, b: Self::V) -> Self::V { unsafe { $mul(a, b) } }
                #[inline(always)]
                unsafe fn div(a: Self::V, b: Self::V) -> Self::V { unsafe { $div(a, b) } }
                #[inline(always)]
                unsafe fn min(a: Self::V, b: Self::V) -> Self::V { unsafe { $min(a, b) } }
                #[inline(always)]
                unsafe fn max(a: Self::V, b: Self::V) -> Self::V { unsafe { $max(a, b) } }
                #[inline(always)]
                unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V { unsafe { $fma(a, b, c) } }
                #[inline(always)]
                unsafe fn round(a: Self::V) -> Self::V { unsafe { ($round)(a) } }
                #[inline(always)]
                unsafe fn exp2i(a: Self::V) -> Self::V { unsafe { ($exp2i)(a) } }
                #[inline(always)]
                unsafe fn store_i8(p: *mut i8, a: Self::V) { unsafe { ($store_i8)(p, a) } }
                #[inline(always)]
                unsafe fn sum(a: Self::V) -> f32 { unsafe { ($sum)(a) } }
                #[inline(always)]
                unsafe fn largest(a: Self::V) -> f32 { unsafe { ($largest)(a) } }
            }
        };
    }

    x86! {
        /// 256-bit registers: AVX2 and FMA.
        Avx2, __m256, 8, false, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_add_ps,
        _mm256_sub_ps, _mm256_mul_ps, _mm256_div_ps, _mm256_min_ps, _mm256_max_ps, _mm256_fmadd_ps,
        round: |a| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a),
        exp2i: |a| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127)))),
        store_i8: |p: *mut i8, a| {
            let x = _mm256_cvtps_epi32(a);
            let x = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            _mm_storel_epi64(p.cast(), _mm_packs_epi16(x, x))
        },
        sum: |a| {
            let x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        },
        largest: |a| {
            let x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }

    x86! {
        /// 512-bit registers: AVX-512F.
        Avx512, __m512, 16, true, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_add_ps,
        _mm512_sub_ps, _mm512_mul_ps, _mm512_div_ps, _mm512_min_ps, _mm512_max_ps, _mm512_fmadd_ps,
        round: |a| _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a),
        exp2i: |a| _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127)))),
        store_i8: |p: *mut i8, a| _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a))),
        sum: |a| _mm512_reduce_add_ps(a),
        largest: |a| _mm512_reduce_max_ps(a)
    }
}

#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::Simd;

    /// 128-bit registers: NEON.
    #[derive(Clone, Copy)]
    pub(crate) struct Neon;

    // SAFETY (all blocks): NEON is part of every aarch64; pointers are valid by the trait's contract.
    #[allow(clippy::undocumented_unsafe_blocks, unused_unsafe)]
    impl Simd for Neon {
        type V = float32x4_t;
        const LANES: usize = 4;
        const MANY_REGISTERS: bool = true;
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::V {
            unsafe { vld1q_f32(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Self::V) {
            unsafe { vst1q_f32(p, v) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            unsafe { vdupq_n_f32(x) }
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            unsafe { vaddq_f32(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            unsafe { vsubq_f32(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            unsafe { vmulq_f32(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            unsafe { vdivq_f32(a, b) }
        }
        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            unsafe { vminq_f32(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            unsafe { vmaxq_f32(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            unsafe { vfmaq_f32(c, a, b) }
        }
        #[inline(always)]
        unsafe fn round(a: Self::V) -> Self::V {
            unsafe { vrndnq_f32(a) }
        }
        #[inline(always)]
        unsafe fn exp2i(a: Self::V) -> Self::V {
            unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(a), vdupq_n_s32(127)))) }
        }
        #[inline(always)]
        unsafe fn store_i8(p: *mut i8, a: Self::V) {
            unsafe {
                let x = vmovn_s32(vcvtq_s32_f32(a));
                let x = vmovn_s16(vcombine_s16(x, x));
                vst1_lane_s32::<0>(p.cast(), vreinterpret_s32_s8(x))
            }
        }
        #[inline(always)]
        unsafe fn sum(a: Self::V) -> f32 {
            unsafe { vaddvq_f32(a) }
        }
        #[inline(always)]
        unsafe fn largest(a: Self::V) -> f32 {
            unsafe { vmaxvq_f32(a) }
        }
    }
}
