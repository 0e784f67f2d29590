//! Kernels on rows of f32: norms, gates, activation functions.

use std::f32::consts::LOG2_E;

use super::{dispatch, simd::Simd};
use crate::hparams::Activation;

/// SRMSNorm's epsilon (SPEC section 3).
pub(crate) const NORM_EPSILON: f32 = 1e-6;

dispatch! {
    /// Simple RMS norm of one row: `y = x / sqrt(mean(x²) + 1e-6)` (SPEC section 3).
    ///
    /// # Safety
    /// `x` and `y` hold `len` elements; they may be the same row.
    pub(crate) unsafe fn norm(x: *const f32, y: *mut f32, len: usize) = norm_of;
}

dispatch! {
    /// The gated output of a token mixer: `y = u · norm(o)` (SPEC section 3.1, steps 6 and 7).
    ///
    /// # Safety
    /// All three rows hold `len` elements.
    pub(crate) unsafe fn gated_norm(o: *const f32, u: *const f32, y: *mut f32, len: usize) = gated_norm_of;
}

dispatch! {
    /// Element-wise product `y = a · b`.
    ///
    /// # Safety
    /// All three rows hold `len` elements.
    pub(crate) unsafe fn product(a: *const f32, b: *const f32, y: *mut f32, len: usize) = product_of;
}

/// Writes `$vector`, an expression of the index `$i`, to `$y[$i..]` in whole registers, and `$single` for the rest.
///
/// A macro, because a closure would not be compiled for the caller's instruction set.
macro_rules! for_row {
    ($y:expr, $len:expr, |$i:ident| $vector:expr, $single:expr) => {{
        let mut $i = 0;
        while $i + S::LANES <= $len {
            S::store($y.add($i), $vector);
            $i += S::LANES;
        }
        while $i < $len {
            *$y.add($i) = $single;
            $i += 1;
        }
    }};
}

#[inline(always)]
unsafe fn norm_of<S: Simd>(x: *const f32, y: *mut f32, len: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let scale = norm_scale::<S>(x, len);
        for_row!(y, len, |i| S::mul(S::load(x.add(i)), S::splat(scale)), *x.add(i) * scale);
    }
}

#[inline(always)]
unsafe fn gated_norm_of<S: Simd>(o: *const f32, u: *const f32, y: *mut f32, len: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let scale = norm_scale::<S>(o, len);
        let normed = S::splat(scale);
        for_row!(
            y,
            len,
            |i| S::mul(S::load(u.add(i)), S::mul(S::load(o.add(i)), normed)),
            *u.add(i) * (*o.add(i) * scale)
        );
    }
}

#[inline(always)]
unsafe fn product_of<S: Simd>(a: *const f32, b: *const f32, y: *mut f32, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { for_row!(y, len, |i| S::mul(S::load(a.add(i)), S::load(b.add(i))), *a.add(i) * *b.add(i)) }
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
unsafe fn norm_scale<S: Simd>(x: *const f32, len: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        // Four sums, so that additions do not wait for one another.
        let mut sums = [S::splat(0.0); 4];
        let mut i = 0;
        while i + 4 * S::LANES <= len {
            for (j, sum) in sums.iter_mut().enumerate() {
                let v = S::load(x.add(i + j * S::LANES));
                *sum = S::fma(v, v, *sum);
            }
            i += 4 * S::LANES;
        }
        let mut total = S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
        while i < len {
            total += *x.add(i) * *x.add(i);
            i += 1;
        }
        1.0 / (total / len as f32 + NORM_EPSILON).sqrt()
    }
}

/// Applies the activation function of q and k to one head's row of `len` elements (SPEC section 1,
/// `linear_act_fun`). SiLU, which every published model uses, is vectorised.
///
/// # Safety
/// `x` and `y` hold `len` elements.
#[inline(always)]
pub(crate) unsafe fn activate<S: Simd>(activation: Activation, x: *const f32, y: *mut f32, len: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match activation {
            Activation::Silu => {
                for_row!(y, len, |i| silu::<S>(S::load(x.add(i))), Activation::Silu.apply(*x.add(i)));
            }
            Activation::Exp => {
                let largest =
                    std::slice::from_raw_parts(x, len).iter().copied().fold(f32::NEG_INFINITY, f32::max);
                (0..len).for_each(|i| *y.add(i) = (*x.add(i) - largest).exp());
            }
            other => (0..len).for_each(|i| *y.add(i) = other.apply(*x.add(i))),
        }
    }
}

/// `x / (1 + e^-x)`
#[inline(always)]
unsafe fn silu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's instruction set.
    unsafe { S::div(x, S::add(S::splat(1.0), exp::<S>(S::sub(S::splat(0.0), x)))) }
}

/// e to the x, within 2 units in the last place; results below 2⁻¹²⁶ and above 2¹²⁷ are clamped.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, and a polynomial for e to the r.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    /// ln 2 in two parts, so that n·ln 2 is exact in the first.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    /// 1/n! for n = 7 … 0.
    const SERIES: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    // SAFETY: the caller's instruction set.
    unsafe {
        let x = S::max(S::min(x, S::splat(88.0)), S::splat(-87.0));
        let n = S::round(S::mul(x, S::splat(LOG2_E)));
        let r = S::fma(n, S::splat(-LN_2_HIGH), x);
        let r = S::fma(n, S::splat(-LN_2_LOW), r);
        let mut p = S::splat(SERIES[0]);
        for coefficient in &SERIES[1..] {
            p = S::fma(p, r, S::splat(*coefficient));
        }
        S::mul(p, S::exp2i(n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{isa::Isa, simd};

    fn row(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next() * 3.0).collect()
    }

    #[test]
    fn every_instruction_set_agrees_with_f64() {
        for isa in Isa::available() {
            for len in [1, 7, 16, 144, 1000] {
                let (o, u) = (row(len, 1), row(len, 2));
                let mut y = vec![0.0; len];
                // SAFETY: all rows have the same length; the instruction set is available.
                unsafe { gated_norm(isa, o.as_ptr(), u.as_ptr(), y.as_mut_ptr(), len) };
                let mean = o.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / len as f64;
                for i in 0..len {
                    let expected = f64::from(u[i]) * f64::from(o[i]) / (mean + 1e-6).sqrt();
                    assert!((f64::from(y[i]) - expected).abs() < 2e-6, "{isa} {len} {i}");
                }
                // SAFETY: as above.
                unsafe { product(isa, o.as_ptr(), u.as_ptr(), y.as_mut_ptr(), len) };
                assert!((0..len).all(|i| y[i] == o[i] * u[i]), "{isa} {len}");
            }
        }
    }

    #[test]
    fn a_zero_row_norms_to_zero() {
        let mut y = [1.0; 32];
        // SAFETY: 32 elements each.
        unsafe { norm(Isa::best(), [0.0; 32].as_ptr(), y.as_mut_ptr(), 32) };
        assert_eq!(y, [0.0; 32]);
    }

    #[test]
    fn exp_is_close_everywhere() {
        for i in -8600..=8600 {
            let x = i as f32 / 100.0;
            // SAFETY: plain Rust.
            let y = unsafe { exp::<simd::Single>([x])[0] };
            let expected = f64::from(x).exp();
            assert!((f64::from(y) / expected - 1.0).abs() < 3e-7, "exp({x}) = {y}, not {expected}");
        }
    }
}
