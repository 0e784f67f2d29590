//! `y = W x` for weights of every type.
//!
//! | module | what |
//! |---|---|
//! | [`tiles`] | the layout of quantized weights: 16 rows side by side |
//! | [`lanes`] | registers that hold 16 rows, for each instruction set |
//! | [`formats`] | how each type's tiles become bytes and scales |
//! | [`int8`] | tiles times int8 inputs |
//! | [`float`] | float weights, and the types that have no tiles, times f32 inputs |

mod float;
mod formats;
mod int8;
mod lanes;
pub mod tiles;

use std::ops::Range;

use super::{isa::Isa, operand::Format};
use crate::{dtype::DType, weights::Matrix};

/// Which form of the input rows a weight type reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    Float,
    Int8,
}

impl Reads {
    /// The form for weights of `dtype`.
    pub fn of(dtype: DType) -> Self {
        if tiles::tileable(dtype) { Reads::Int8 } else { Reads::Float }
    }
}

/// Prepared input rows, `tokens` of them, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Inputs {
    pub format: Format,
    pub rows: *const u8,
    pub tokens: usize,
}

// SAFETY: a handle; `multiply` states who may write where.
unsafe impl Sync for Inputs {}
// SAFETY: as above.
unsafe impl Sync for Outputs {}

/// Where the products go: element (token, row) at `data + token * stride + row`. `data` itself may lie outside the
/// memory; only the elements of the rows that are computed lie inside.
#[derive(Clone, Copy)]
pub(crate) struct Outputs {
    pub data: *mut f32,
    pub stride: usize,
}

/// Computes rows `range` of `weights`, which starts at a whole tile, times every input row. `scratch` grows once and is kept by the caller.
///
/// # Safety
/// The inputs are prepared in a format of `weights.columns` values that has the form [`Reads`] names, and the
/// outputs have room for all rows of all tokens.
pub(crate) unsafe fn multiply(
    isa: Isa,
    weights: &Matrix,
    range: Range<usize>,
    inputs: Inputs,
    outputs: Outputs,
    scratch: &mut Vec<f32>,
) {
    debug_assert!(range.end <= weights.rows && inputs.format.len == weights.columns);
    // SAFETY: the caller's promise.
    unsafe {
        match Reads::of(weights.dtype) {
            Reads::Float => float::multiply(isa, weights, range, inputs, outputs, scratch),
            Reads::Int8 => int8::multiply(isa, weights, range, inputs, outputs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::operand::{self, Operand};

    /// Values in ±1 with a few large ones, as activations have.
    fn values(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|i| next() * if i % 61 == 7 { 8.0 } else { 1.0 }).collect()
    }

    /// Prepared rows, and the values that they stand for.
    fn prepared(format: Format, tokens: usize, isa: Isa) -> (Vec<u64>, Vec<f32>) {
        let x = values(format.len * tokens, 2);
        let mut rows = vec![0u64; format.row_bytes() * tokens / 8];
        let mut seen = vec![0.0; x.len()];
        for t in 0..tokens {
            // SAFETY: the buffer has row_bytes() bytes for each token.
            unsafe {
                let row = rows.as_mut_ptr().cast::<u8>().add(t * format.row_bytes());
                operand::prepare(isa, &format, x[t * format.len..].as_ptr(), row);
                let operand = Operand::at(&format, row);
                for i in 0..format.len {
                    seen[t * format.len + i] = match format.int8 {
                        true => f32::from(*operand.quants.add(i)) * *operand.scales.add(i / operand::GROUP),
                        false => *operand.float.add(i),
                    };
                }
            }
        }
        (rows, seen)
    }

    fn check(dtype: DType, isa: Isa, columns: usize, rows: usize, tokens: usize) {
        let weights = Matrix::from_values(dtype, columns, &values(rows * columns, 1));
        let int8 = Reads::of(dtype) == Reads::Int8;
        let format = Format { len: columns, float: !int8, int8 };
        let (input, seen) = prepared(format, tokens, isa);
        // One row and one token more than is written, which must stay as they are.
        let mut y = vec![7.0; (rows + 1) * (tokens + 1)];
        let outputs = Outputs { data: y.as_mut_ptr(), stride: rows + 1 };
        let inputs = Inputs { format, rows: input.as_ptr().cast(), tokens };
        let mut scratch = Vec::new();
        for range in [0..16, 16..rows] {
            // SAFETY: the inputs are prepared for these weights, the output has room.
            unsafe { multiply(isa, &weights, range, inputs, outputs, &mut scratch) };
        }
        let mut row = vec![0.0; columns];
        for r in 0..rows {
            weights.row(r, &mut row);
            for t in 0..tokens {
                let products =
                    || row.iter().zip(&seen[t * columns..]).map(|(&w, &x)| f64::from(w) * f64::from(x));
                let (expected, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                let got = f64::from(y[t * (rows + 1) + r]);
                let error = (got - expected).abs();
                assert!(
                    error <= 2e-6 * size,
                    "{dtype} {isa} {columns}x{rows}, token {t} of {tokens}, row {r}: {got}, not {expected}"
                );
            }
        }
        for (i, value) in y.iter().enumerate() {
            assert!(
                i % (rows + 1) < rows && i / (rows + 1) < tokens || *value == 7.0,
                "{dtype} {isa}: wrote past the end"
            );
        }
    }

    #[test]
    fn every_type_and_instruction_set_agrees_with_dequantized_weights() {
        for isa in Isa::available() {
            for dtype in DType::ALL {
                for tokens in [1, 3, 5, 17] {
                    check(dtype, isa, dtype.block_len().max(32) as usize * 3, 37, tokens);
                    check(dtype, isa, 512, 32, tokens);
                }
            }
        }
    }
}
