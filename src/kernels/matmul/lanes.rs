//! Registers that hold 16 rows of weights: 64 bytes (16 rows, 4 columns), 16 i32, or 16 f32.
#![allow(clippy::missing_safety_doc)]

/// One instruction set's registers, one or several to a value.
///
/// # Safety
/// Every method requires the implementation's instruction set; loads and stores require valid memory at any
/// alignment.
pub(super) trait Lanes: Copy {
    /// 64 bytes, or 16 i32.
    type I: Copy;
    /// 16 f32.
    type F: Copy;
    /// Four input bytes, as [`Lanes::dot`] wants them.
    type Quad: Copy;
    /// Whether twelve tokens' accumulators fit the registers.
    const MANY_REGISTERS: bool;
    /// Whether [`Lanes::dot_signed`] adds 128 to each weight.
    const FLIPS: bool;

    unsafe fn load(p: *const u8) -> Self::I;
    unsafe fn zero() -> Self::I;
    unsafe fn splat_byte(x: u8) -> Self::I;
    unsafe fn splat_word(x: i32) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Shifts by N bits; bits may come in from a neighbouring byte, to be masked off.
    unsafe fn shift_right<const N: i32>(a: Self::I) -> Self::I;
    unsafe fn shift_left<const N: i32>(a: Self::I) -> Self::I;
    /// Shifts each i32 right by `n` bits, zeros coming in.
    unsafe fn shift_words_right(a: Self::I, n: usize) -> Self::I;
    /// `table[index]` for each byte; the table is repeated every 16 bytes, indices are below 16.
    unsafe fn look_up(table: Self::I, index: Self::I) -> Self::I;
    /// 16 bytes as i32, with their sign.
    unsafe fn widen(p: *const i8) -> Self::I;
    unsafe fn quad(p: *const i8) -> Self::Quad;
    /// Adds to each i32 the products of its row's four weights, 0 to 127, with four inputs.
    unsafe fn dot(sums: Self::I, weights: Self::I, x: Self::Quad) -> Self::I;
    /// [`Lanes::dot`] for weights from -128 to 127; see [`Lanes::FLIPS`].
    unsafe fn dot_signed(sums: Self::I, weights: Self::I, x: Self::Quad) -> Self::I;
    unsafe fn to_float(a: Self::I) -> Self::F;
    /// 16 half-precision values.
    unsafe fn halves(p: *const u8) -> Self::F;
    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn store(p: *mut f32, a: Self::F);
    unsafe fn prefetch(p: *const u8);
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Portable {
    fn words(a: [u8; 64]) -> [i32; 16] {
        std::array::from_fn(|i| i32::from_le_bytes([a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]]))
    }

    fn bytes(a: [i32; 16]) -> [u8; 64] {
        std::array::from_fn(|i| a[i / 4].to_le_bytes()[i % 4])
    }
}

impl Lanes for Portable {
    type I = [u8; 64];
    type F = [f32; 16];
    type Quad = [i8; 4];
    const MANY_REGISTERS: bool = false;
    const FLIPS: bool = false;

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self::I {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<Self::I>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn zero() -> Self::I {
        [0; 64]
    }
    #[inline(always)]
    unsafe fn splat_byte(x: u8) -> Self::I {
        [x; 64]
    }
    #[inline(always)]
    unsafe fn splat_word(x: i32) -> Self::I {
        Self::bytes([x; 16])
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn shift_right<const N: i32>(a: Self::I) -> Self::I {
        a.map(|x| x >> N)
    }
    #[inline(always)]
    unsafe fn shift_left<const N: i32>(a: Self::I) -> Self::I {
        a.map(|x| x << N)
    }
    #[inline(always)]
    unsafe fn shift_words_right(a: Self::I, n: usize) -> Self::I {
        Self::bytes(Self::words(a).map(|x| (x as u32 >> n) as i32))
    }
    #[inline(always)]
    unsafe fn look_up(table: Self::I, index: Self::I) -> Self::I {
        index.map(|i| table[usize::from(i & 15)])
    }
    #[inline(always)]
    unsafe fn widen(p: *const i8) -> Self::I {
        // SAFETY: the trait's contract.
        Self::bytes(unsafe { p.cast::<[i8; 16]>().read_unaligned() }.map(i32::from))
    }
    #[inline(always)]
    unsafe fn quad(p: *const i8) -> Self::Quad {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<Self::Quad>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn dot(sums: Self::I, weights: Self::I, x: Self::Quad) -> Self::I {
        let mut sums = Self::words(sums);
        for (r, sum) in sums.iter_mut().enumerate() {
            for (i, x) in x.iter().enumerate() {
                *sum += i32::from(weights[4 * r + i] as i8) * i32::from(*x);
            }
        }
        Self::bytes(sums)
    }
    #[inline(always)]
    unsafe fn dot_signed(sums: Self::I, weights: Self::I, x: Self::Quad) -> Self::I {
        // SAFETY: `dot` reads weights as signed.
        unsafe { Self::dot(sums, weights, x) }
    }
    #[inline(always)]
    unsafe fn to_float(a: Self::I) -> Self::F {
        Self::words(a).map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn halves(p: *const u8) -> Self::F {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[u16; 16]>().read_unaligned() }.map(|bits| half::f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, a: Self::F) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<Self::F>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn prefetch(_p: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512Vnni, AvxVnni};

#[cfg(target_arch = "x86_64")]
// SAFETY (all blocks of this module): the trait's contract gives the instruction set and valid memory.
#[allow(clippy::undocumented_unsafe_blocks)]
mod x86 {
    use std::arch::x86_64::*;

    use super::Lanes;

    /// One 512-bit register.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512Vnni;

    impl Lanes for Avx512Vnni {
        type I = __m512i;
        type F = __m512;
        type Quad = i32;
        const MANY_REGISTERS: bool = true;
        const FLIPS: bool = true;

        #[inline(always)]
        unsafe fn load(p: *const u8) -> Self::I {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }
        #[inline(always)]
        unsafe fn zero() -> Self::I {
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn splat_byte(x: u8) -> Self::I {
            unsafe { _mm512_set1_epi8(x as i8) }
        }
        #[inline(always)]
        unsafe fn splat_word(x: i32) -> Self::I {
            unsafe { _mm512_set1_epi32(x) }
        }
        #[inline(always)]
        unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
            unsafe { _mm512_and_si512(a, b) }
        }
        #[inline(always)]
        unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
            unsafe { _mm512_or_si512(a, b) }
        }
        #[inline(always)]
        unsafe fn shift_right<const N: i32>(a: Self::I) -> Self::I {
            unsafe { _mm512_srl_epi16(a, _mm_cvtsi32_si128(N)) }
        }
        #[inline(always)]
        unsafe fn shift_left<const N: i32>(a: Self::I) -> Self::I {
            unsafe { _mm512_sll_epi16(a, _mm_cvtsi32_si128(N)) }
        }
        #[inline(always)]
        unsafe fn shift_words_right(a: Self::I, n: usize) -> Self::I {
            unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32)) }
        }
        #[inline(always)]
        unsafe fn look_up(table: Self::I, index: Self::I) -> Self::I {
            unsafe { _mm512_shuffle_epi8(table, index) }
        }
        #[inline(always)]
        unsafe fn widen(p: *const i8) -> Self::I {
            unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn quad(p: *const i8) -> Self::Quad {
            unsafe { p.cast::<i32>().read_unaligned() }
        }
        #[inline(always)]
        unsafe fn dot(sums: Self::I, weights: Self::I, x: Self::Quad) -> Self::I {
            unsafe { _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(x)) }
        }
        #[inline(always)]
        unsafe fn dot_signed(sums: Self::I, weights: Self::I, x: Self::Quad) -> Self::I {
            unsafe { Self::dot(sums, _mm512_xor_si512(weights, _mm512_set1_epi8(i8::MIN)), x) }
        }
        #[inline(always)]
        unsafe fn to_float(a: Self::I) -> Self::F {
            unsafe { _mm512_cvtepi32_ps(a) }
        }
        #[inline(always)]
        unsafe fn halves(p: *const u8) -> Self::F {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::F {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, a: Self::F) {
            unsafe { _mm512_storeu_ps(p, a) }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
    }

    /// Two 256-bit registers; `$dot` and `$dot_signed` work on one.
    macro_rules! two_registers {
        ($(#[$doc:meta])* $name:ident, flips $flips:expr, dot $dot:expr, dot_signed $dot_signed:expr) => {
            $(#[$doc])*
            #[derive(Clone, Copy)]
            pub(in super::super) struct $name;

            impl Lanes for $name {
                type I = [__m256i; 2];
                type F = [__m256; 2];
                type Quad = __m256i;
                const MANY_REGISTERS: bool = false;
                const FLIPS: bool = $flips;

                #[inline(always)]
                unsafe fn load(p: *const u8) -> Self::I {
                    unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())] }
                }
                #[inline(always)]
                unsafe fn zero() -> Self::I {
                    unsafe { [_mm256_setzero_si256(); 2] }
                }
                #[inline(always)]
                unsafe fn splat_byte(x: u8) -> Self::I {
                    unsafe { [_mm256_set1_epi8(x as i8); 2] }
                }
                #[inline(always)]
                unsafe fn splat_word(x: i32) -> Self::I {
                    unsafe { [_mm256_set1_epi32(x); 2] }
                }
                #[inline(always)]
                unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
                    unsafe { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
                }
                #[inline(always)]
                unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
                    unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
                }
                #[inline(always)]
                unsafe fn shift_right<const N: i32>(a: Self::I) -> Self::I {
                    unsafe { [_mm256_srli_epi16::<N>(a[0]), _mm256_srli_epi16::<N>(a[1])] }
                }
                #[inline(always)]
                unsafe fn shift_left<const N: i32>(a: Self::I) -> Self::I {
                    unsafe { [_mm256_slli_epi16::<N>(a[0]), _mm256_slli_epi16::<N>(a[1])] }
                }
                #[inline(always)]
                unsafe fn shift_words_right(a: Self::I, n: usize) -> Self::I {
                    unsafe {
                        let n = _mm_cvtsi32_si128(n as i32);
                        [_mm256_srl_epi32(a[0], n), _mm256_srl_epi32(a[1], n)]
                    }
                }
                #[inline(always)]
                unsafe fn look_up(table: Self::I, index: Self::I) -> Self::I {
                    unsafe { [_mm256_shuffle_epi8(table[0], index[0]), _mm256_shuffle_epi8(table[1], index[1])] }
                }
                #[inline(always)]
                unsafe fn widen(p: *const i8) -> Self::I {
                    unsafe {
                        [
                            _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())),
                            _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast())),
                        ]
                    }
                }
                #[inline(always)]
                unsafe fn quad(p: *const i8) -> Self::Quad {
                    unsafe { _mm256_set1_epi32(p.cast::<i32>().read_unaligned()) }
                }
                #[inline(always)]
                unsafe fn dot(sums: Self::I, weights: Self::I, x: Self::Quad) -> Self::I {
                    unsafe { [$dot(sums[0], weights[0], x), $dot(sums[1], weights[1], x)] }
                }
                #[inline(always)]
                unsafe fn dot_signed(sums: Self::I, weights: Self::I, x: Self::Quad) -> Self::I {
                    unsafe { [$dot_signed(sums[0], weights[0], x), $dot_signed(sums[1], weights[1], x)] }
                }
                #[inline(always)]
                unsafe fn to_float(a: Self::I) -> Self::F {
                    unsafe { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
                }
                #[inline(always)]
                unsafe fn halves(p: *const u8) -> Self::F {
                    unsafe {
                        [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast()))]
                    }
                }
                #[inline(always)]
                unsafe fn splat(x: f32) -> Self::F {
                    unsafe { [_mm256_set1_ps(x); 2] }
                }
                #[inline(always)]
                unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
                    unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
                }
                #[inline(always)]
                unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
                    unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
                }
                #[inline(always)]
                unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
                    unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
                }
                #[inline(always)]
                unsafe fn store(p: *mut f32, a: Self::F) {
                    unsafe {
                        _mm256_storeu_ps(p, a[0]);
                        _mm256_storeu_ps(p.add(8), a[1]);
                    }
                }
                #[inline(always)]
                unsafe fn prefetch(p: *const u8) {
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
                }
            }
        };
    }

    #[inline(always)]
    unsafe fn dot_avx2(sums: __m256i, weights: __m256i, x: __m256i) -> __m256i {
        // Pairs are summed in 16 bits: 2 · 127² fits.
        unsafe {
            let pairs = _mm256_maddubs_epi16(weights, x);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn dot_signed_avx2(sums: __m256i, weights: __m256i, x: __m256i) -> __m256i {
        // |w| · (x with w's sign)
        unsafe { dot_avx2(sums, _mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights)) }
    }

    two_registers! {
        /// Two 256-bit registers.
        Avx2, flips false, dot dot_avx2, dot_signed dot_signed_avx2
    }

    #[inline(always)]
    unsafe fn dot_avx_vnni(sums: __m256i, weights: __m256i, x: __m256i) -> __m256i {
        unsafe { _mm256_dpbusd_avx_epi32(sums, weights, x) }
    }

    #[inline(always)]
    unsafe fn dot_signed_avx_vnni(sums: __m256i, weights: __m256i, x: __m256i) -> __m256i {
        unsafe { dot_avx_vnni(sums, _mm256_xor_si256(weights, _mm256_set1_epi8(i8::MIN)), x) }
    }

    two_registers! {
        /// Two 256-bit registers with dot products.
        AvxVnni, flips true, dot dot_avx_vnni, dot_signed dot_signed_avx_vnni
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) use arm::{Neon, NeonDot};

#[cfg(target_arch = "aarch64")]
// SAFETY (all blocks of this module): the trait's contract gives the instruction set and valid memory.
#[allow(clippy::undocumented_unsafe_blocks)]
mod arm {
    use std::arch::{aarch64::*, asm};

    use super::Lanes;

    /// Four 128-bit registers; `$dot` works on one.
    macro_rules! four_registers {
        ($(#[$doc:meta])* $name:ident, dot $dot:expr) => {
            $(#[$doc])*
            #[derive(Clone, Copy)]
            pub(in super::super) struct $name;

            impl Lanes for $name {
                type I = [int32x4_t; 4];
                type F = [float32x4_t; 4];
                type Quad = int8x16_t;
                const MANY_REGISTERS: bool = false;
                const FLIPS: bool = false;

                #[inline(always)]
                unsafe fn load(p: *const u8) -> Self::I {
                    unsafe {
                        let at = |i: usize| vreinterpretq_s32_u8(vld1q_u8(p.add(16 * i)));
                        [at(0), at(1), at(2), at(3)]
                    }
                }
                #[inline(always)]
                unsafe fn zero() -> Self::I {
                    unsafe { [vdupq_n_s32(0); 4] }
                }
                #[inline(always)]
                unsafe fn splat_byte(x: u8) -> Self::I {
                    unsafe { [vreinterpretq_s32_u8(vdupq_n_u8(x)); 4] }
                }
                #[inline(always)]
                unsafe fn splat_word(x: i32) -> Self::I {
                    unsafe { [vdupq_n_s32(x); 4] }
                }
                #[inline(always)]
                unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
                    unsafe { [vandq_s32(a[0], b[0]), vandq_s32(a[1], b[1]), vandq_s32(a[2], b[2]), vandq_s32(a[3], b[3])] }
                }
                #[inline(always)]
                unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
                    unsafe { [vorrq_s32(a[0], b[0]), vorrq_s32(a[1], b[1]), vorrq_s32(a[2], b[2]), vorrq_s32(a[3], b[3])] }
                }
                #[inline(always)]
                unsafe fn shift_right<const N: i32>(a: Self::I) -> Self::I {
                    a.map(|a| unsafe { vreinterpretq_s32_u8(vshlq_u8(vreinterpretq_u8_s32(a), vdupq_n_s8(-N as i8))) })
                }
                #[inline(always)]
                unsafe fn shift_left<const N: i32>(a: Self::I) -> Self::I {
                    a.map(|a| unsafe { vreinterpretq_s32_u8(vshlq_u8(vreinterpretq_u8_s32(a), vdupq_n_s8(N as i8))) })
                }
                #[inline(always)]
                unsafe fn shift_words_right(a: Self::I, n: usize) -> Self::I {
                    a.map(|a| unsafe {
                        vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-(n as i32))))
                    })
                }
                #[inline(always)]
                unsafe fn look_up(table: Self::I, index: Self::I) -> Self::I {
                    index.map(|index| unsafe {
                        vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table[0]), vreinterpretq_u8_s32(index)))
                    })
                }
                #[inline(always)]
                unsafe fn widen(p: *const i8) -> Self::I {
                    unsafe {
                        let bytes = vld1q_s8(p);
                        let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes)));
                        [
                            vmovl_s16(vget_low_s16(low)),
                            vmovl_s16(vget_high_s16(low)),
                            vmovl_s16(vget_low_s16(high)),
                            vmovl_s16(vget_high_s16(high)),
                        ]
                    }
                }
                #[inline(always)]
                unsafe fn quad(p: *const i8) -> Self::Quad {
                    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(p.cast::<i32>().read_unaligned())) }
                }
                #[inline(always)]
                unsafe fn dot(sums: Self::I, weights: Self::I, x: Self::Quad) -> Self::I {
                    unsafe {
                        [
                            $dot(sums[0], vreinterpretq_s8_s32(weights[0]), x),
                            $dot(sums[1], vreinterpretq_s8_s32(weights[1]), x),
                            $dot(sums[2], vreinterpretq_s8_s32(weights[2]), x),
                            $dot(sums[3], vreinterpretq_s8_s32(weights[3]), x),
                        ]
                    }
                }
                #[inline(always)]
                unsafe fn dot_signed(sums: Self::I, weights: Self::I, x: Self::Quad) -> Self::I {
                    unsafe { Self::dot(sums, weights, x) }
                }
                #[inline(always)]
                unsafe fn to_float(a: Self::I) -> Self::F {
                    a.map(|a| unsafe { vcvtq_f32_s32(a) })
                }
                #[inline(always)]
                unsafe fn halves(p: *const u8) -> Self::F {
                    [0, 1, 2, 3].map(|i| unsafe { halves(p.add(8 * i).cast()) })
                }
                #[inline(always)]
                unsafe fn splat(x: f32) -> Self::F {
                    unsafe { [vdupq_n_f32(x); 4] }
                }
                #[inline(always)]
                unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
                    unsafe { [vsubq_f32(a[0], b[0]), vsubq_f32(a[1], b[1]), vsubq_f32(a[2], b[2]), vsubq_f32(a[3], b[3])] }
                }
                #[inline(always)]
                unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
                    unsafe { [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1]), vmulq_f32(a[2], b[2]), vmulq_f32(a[3], b[3])] }
                }
                #[inline(always)]
                unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
                    unsafe {
                        [
                            vfmaq_f32(c[0], a[0], b[0]),
                            vfmaq_f32(c[1], a[1], b[1]),
                            vfmaq_f32(c[2], a[2], b[2]),
                            vfmaq_f32(c[3], a[3], b[3]),
                        ]
                    }
                }
                #[inline(always)]
                unsafe fn store(p: *mut f32, a: Self::F) {
                    for (i, a) in a.into_iter().enumerate() {
                        unsafe { vst1q_f32(p.add(4 * i), a) }
                    }
                }
                #[inline(always)]
                unsafe fn prefetch(p: *const u8) {
                    unsafe { asm!("prfm pldl1keep, [{}]", in(reg) p, options(nostack, preserves_flags, readonly)) }
                }
            }
        };
    }

    /// Four half-precision values; part of every aarch64.
    #[inline(always)]
    unsafe fn halves(p: *const u64) -> float32x4_t {
        let bits = unsafe { p.read_unaligned() };
        let out: float32x4_t;
        unsafe {
            asm!("fmov {v:d}, {bits}", "fcvtl {v:v}.4s, {v:v}.4h", bits = in(reg) bits, v = out(vreg) out,
                 options(pure, nomem, nostack, preserves_flags));
        }
        out
    }

    #[inline(always)]
    unsafe fn dot_neon(sums: int32x4_t, weights: int8x16_t, x: int8x16_t) -> int32x4_t {
        unsafe {
            let low = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
            let high = vmull_s8(vget_high_s8(weights), vget_high_s8(x));
            // Two products fit 16 bits because inputs end at ±127: 2 · 128 · 127 < 2¹⁵.
            vpadalq_s16(sums, vpaddq_s16(low, high))
        }
    }

    four_registers! {
        /// Four 128-bit registers.
        Neon, dot dot_neon
    }

    #[inline(always)]
    unsafe fn dot_neon_dot(mut sums: int32x4_t, weights: int8x16_t, x: int8x16_t) -> int32x4_t {
        // The intrinsic is not stable yet. The instruction reads and writes only its registers.
        unsafe {
            asm!(".arch_extension dotprod", "sdot {s:v}.4s, {w:v}.16b, {x:v}.16b",
                 s = inout(vreg) sums, w = in(vreg) weights, x = in(vreg) x,
                 options(pure, nomem, nostack, preserves_flags));
        }
        sums
    }

    four_registers! {
        /// Four 128-bit registers with dot products.
        NeonDot, dot dot_neon_dot
    }

    #[cfg(test)]
    mod tests {
        use super::{super::Portable, *};

        /// 16 sums, each from a start of its own, for every weight and then for rows of the extremes.
        fn dots<L: Lanes>(x: [i8; 4]) -> Vec<f32> {
            let starts: Vec<i32> = (0..16).map(|i| i * 1_000_003 - 8_000_000).collect();
            let mut weights: Vec<i8> = (i8::MIN..=i8::MAX).collect();
            weights.extend([i8::MIN, i8::MIN, i8::MAX, i8::MIN].repeat(16));
            let mut sums = vec![0.0; weights.len() / 4];
            for (weights, sums) in weights.chunks_exact(64).zip(sums.chunks_exact_mut(16)) {
                unsafe {
                    let start = L::load(starts.as_ptr().cast());
                    let dot = L::dot_signed(start, L::load(weights.as_ptr().cast()), L::quad(x.as_ptr()));
                    L::store(sums.as_mut_ptr(), L::to_float(dot));
                }
            }
            sums
        }

        #[test]
        fn dot_products_are_exact_to_the_last_weight_and_input() {
            for x in [[127; 4], [-127; 4], [127, -127, -127, 127], [-127, -127, 127, 1], [0, 1, -1, 2]] {
                assert_eq!(dots::<Neon>(x), dots::<Portable>(x), "{x:?}");
                if std::arch::is_aarch64_feature_detected!("dotprod") {
                    assert_eq!(dots::<NeonDot>(x), dots::<Portable>(x), "{x:?}");
                }
            }
        }
    }
}
