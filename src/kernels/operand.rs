//! Input rows of the matrix products, prepared once and read by every matrix that shares them.
//!
//! A float matrix reads the row as f32. A quantized matrix reads it as int8 in groups of 32 with a scale each,
//! and the sums of each 16 and 32 values, by which a matrix whose blocks have a minimum is corrected.

use super::{dispatch, simd::Simd};

/// Values that share a scale.
pub(crate) const GROUP: usize = 32;

/// What a prepared row of `len` values holds, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Format {
    /// Values in a row, K.
    pub len: usize,
    /// The row as f32 is there.
    pub float: bool,
    /// The row as int8 with scales and sums is there; K is then a multiple of 32.
    pub int8: bool,
}

/// Parts start at multiples of this.
const ALIGN: usize = 64;

impl Format {
    /// Bytes of a prepared row.
    pub fn row_bytes(&self) -> usize {
        if self.int8 {
            self.pair_sums_at() + (self.len / GROUP * 4).next_multiple_of(ALIGN)
        } else {
            self.quants_at()
        }
    }

    fn quants_at(&self) -> usize {
        if self.float { (4 * self.len).next_multiple_of(ALIGN) } else { 0 }
    }

    fn scales_at(&self) -> usize {
        self.quants_at() + self.len.next_multiple_of(ALIGN)
    }

    fn sums_at(&self) -> usize {
        self.scales_at() + (self.len / GROUP * 4).next_multiple_of(ALIGN)
    }

    fn pair_sums_at(&self) -> usize {
        self.sums_at() + (self.len / 16 * 4).next_multiple_of(ALIGN)
    }
}

/// A prepared row.
#[derive(Clone, Copy)]
pub(crate) struct Operand {
    /// (K) f32, if the format has them.
    pub float: *const f32,
    /// (K) values from -127 to 127.
    pub quants: *const i8,
    /// (K / 32) scales.
    pub scales: *const f32,
    /// (K / 16) sums of 16 values times their scale.
    pub sums: *const f32,
    /// (K / 32) sums of 32 values times their scale.
    pub pair_sums: *const f32,
}

impl Operand {
    /// The row that starts at `row`.
    ///
    /// # Safety
    /// `row` has `format.row_bytes()` bytes.
    #[inline(always)]
    pub unsafe fn at(format: &Format, row: *const u8) -> Self {
        // SAFETY: all parts lie inside the row.
        unsafe {
            Self {
                float: row.cast(),
                quants: row.add(format.quants_at()).cast(),
                scales: row.add(format.scales_at()).cast(),
                sums: row.add(format.sums_at()).cast(),
                pair_sums: row.add(format.pair_sums_at()).cast(),
            }
        }
    }
}

dispatch! {
    /// Prepares one row: copies `x` (K) to the f32 part and quantizes it, as `format` asks.
    ///
    /// # Safety
    /// `x` has `format.len` values, `row` has `format.row_bytes()` bytes aligned to 4; where the format has
    /// f32 values `x` may be that part of `row` itself.
    pub(crate) unsafe fn prepare(format: &Format, x: *const f32, row: *mut u8) = prepare_of;
}

#[inline(always)]
unsafe fn prepare_of<S: Simd>(format: &Format, x: *const f32, row: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe {
        if format.float && x != row.cast() {
            std::ptr::copy_nonoverlapping(x, row.cast(), format.len);
        }
        if !format.int8 {
            return;
        }
        let quants = row.add(format.quants_at()).cast::<i8>();
        let scales = row.add(format.scales_at()).cast::<f32>();
        let sums = row.add(format.sums_at()).cast::<f32>();
        let pair_sums = row.add(format.pair_sums_at()).cast::<f32>();
        for group in 0..format.len / GROUP {
            let (x, quants) = (x.add(group * GROUP), quants.add(group * GROUP));
            *scales.add(group) = quantize_group::<S>(x, quants, sums.add(2 * group));
            *pair_sums.add(group) = *sums.add(2 * group) + *sums.add(2 * group + 1);
        }
    }
}

/// Quantizes 32 values symmetrically; returns the scale. NaN and infinities give a scale that is not finite.
#[inline(always)]
unsafe fn quantize_group<S: Simd>(x: *const f32, quants: *mut i8, sums: *mut f32) -> f32 {
    // SAFETY: the caller's promise; 16 is a multiple of LANES for every dispatched type.
    unsafe {
        let mut largest = S::splat(0.0);
        for i in (0..GROUP).step_by(S::LANES) {
            let v = S::load(x.add(i));
            largest = S::max(largest, S::max(v, S::sub(S::splat(0.0), v)));
        }
        let largest = S::largest(largest);
        let scale = largest / 127.0;
        // Infinite where all values are zero, or nearly: those become zero.
        let inverse = 127.0 / largest;
        let inverse = S::splat(if inverse.is_finite() { inverse } else { 0.0 });
        for half in 0..2 {
            let mut sum = S::splat(0.0);
            for i in (half * 16..half * 16 + 16).step_by(S::LANES) {
                let q = S::round(S::mul(S::load(x.add(i)), inverse));
                S::store_i8(quants.add(i), q);
                sum = S::add(sum, q);
            }
            *sums.add(half) = scale * S::sum(sum);
        }
        // A maximum may pass over a NaN; a sum does not.
        scale + 0.0 * (*sums + *sums.add(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::isa::Isa;

    #[test]
    fn tiny_values_become_zero_and_a_nan_is_not_lost() {
        let format = Format { len: 32, float: false, int8: true };
        for isa in Isa::available() {
            let mut row = vec![0u32; format.row_bytes() / 4];
            let mut quantized = |x: &[f32]| {
                // SAFETY: the row has row_bytes() bytes.
                unsafe {
                    prepare(isa, &format, x.as_ptr(), row.as_mut_ptr().cast());
                    let operand = Operand::at(&format, row.as_ptr().cast());
                    (*operand.scales, *operand.pair_sums, *operand.quants)
                }
            };
            assert_eq!(quantized(&[1e-38; 32]).1, 0.0, "{isa}");
            assert_eq!(quantized(&[1e-38; 32]).2, 0, "{isa}");
            for at in [0, 13, 31] {
                let mut x = [1.0; 32];
                x[at] = f32::NAN;
                assert!(!quantized(&x).0.is_finite(), "{isa} {at}");
            }
        }
    }

    #[test]
    fn prepared_rows_hold_the_values_on_every_instruction_set() {
        let format = Format { len: 96, float: true, int8: true };
        let x: Vec<f32> =
            (0..96).map(|i| if i < 64 { ((i * 29 % 64) as f32 - 31.0) / 7.0 } else { 0.0 }).collect();
        for isa in Isa::available() {
            let mut row = vec![0u32; format.row_bytes() / 4];
            // SAFETY: the row has row_bytes() bytes.
            let operand = unsafe {
                prepare(isa, &format, x.as_ptr(), row.as_mut_ptr().cast());
                Operand::at(&format, row.as_ptr().cast())
            };
            for (i, &value) in x.iter().enumerate() {
                // SAFETY: all indices are inside the row's parts.
                unsafe {
                    assert_eq!(*operand.float.add(i), value);
                    let scale = *operand.scales.add(i / 32);
                    let back = f32::from(*operand.quants.add(i)) * scale;
                    assert!((back - value).abs() <= scale * 0.501, "{isa}: {back} for {value}");
                    let sum: f32 = (0..16).map(|j| f32::from(*operand.quants.add(i / 16 * 16 + j))).sum();
                    assert_eq!(*operand.sums.add(i / 16), sum * scale);
                    let pair = *operand.sums.add(i / 32 * 2) + *operand.sums.add(i / 32 * 2 + 1);
                    assert_eq!(*operand.pair_sums.add(i / 32), pair);
                }
            }
        }
    }
}
