//! Float weights, or weights dequantized to f32, times f32 inputs.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;

use super::{Inputs, Outputs};
use crate::{
    dtype::DType,
    kernels::{
        dispatch,
        isa::Isa,
        operand::Operand,
        simd::Simd,
        tile::{Tile, accumulate, tiles},
    },
    weights::Matrix,
};

/// Rows of weights that are dequantized together; a whole number of registers of every instruction set.
const PANEL: usize = 32;

/// See [`super::multiply`].
pub(super) unsafe fn multiply(
    isa: Isa,
    weights: &Matrix,
    range: Range<usize>,
    inputs: Inputs,
    outputs: Outputs,
    scratch: &mut Vec<f32>,
) {
    let columns = weights.columns;
    if scratch.len() < columns * (PANEL + 1) {
        scratch.resize(columns * (PANEL + 1), 0.0);
    }
    let (row, panel) = scratch.split_at_mut(columns);
    for first in range.clone().step_by(PANEL) {
        let count = PANEL.min(range.end - first);
        // Few tokens read each weight once, in place; many share a transposed panel.
        let transpose = inputs.tokens >= 4 && count == PANEL;
        for r in 0..count {
            load_row(weights, first + r, row);
            if transpose {
                for (i, value) in row.iter().enumerate() {
                    panel[i * PANEL + r] = *value;
                }
                continue;
            }
            for t in 0..inputs.tokens {
                // SAFETY: rows of `columns` values; the output has room.
                unsafe {
                    let x = Operand::at(&inputs.format, inputs.rows.add(t * inputs.format.row_bytes())).float;
                    *outputs.data.wrapping_add(t * outputs.stride + first + r) =
                        dot(isa, row.as_ptr(), x, columns);
                }
            }
        }
        if transpose {
            // SAFETY: the panel is (columns, PANEL); the output has room.
            unsafe {
                let outputs = Outputs { data: outputs.data.wrapping_add(first), ..outputs };
                multiply_panel(isa, panel.as_ptr(), columns, &inputs, &outputs);
            }
        }
    }
}

/// Row `row` of the weights as f32.
fn load_row(weights: &Matrix, row: usize, out: &mut [f32]) {
    let bytes = &weights.bytes()[row * weights.row_bytes()..][..weights.row_bytes()];
    match (weights.dtype, bytemuck::try_cast_slice::<u8, u16>(bytes)) {
        (DType::F16, Ok(halves)) => bytemuck::cast_slice::<u16, half::f16>(halves).convert_to_f32_slice(out),
        (DType::BF16, Ok(halves)) => {
            for (value, half) in out.iter_mut().zip(halves) {
                *value = f32::from_bits(u32::from(*half) << 16);
            }
        }
        _ => weights.row(row, out),
    }
}

dispatch! {
    /// Dot product of two rows.
    unsafe fn dot(a: *const f32, b: *const f32, len: usize) -> f32 = dot_of;
}

#[inline(always)]
unsafe fn dot_of<S: Simd>(a: *const f32, b: *const f32, len: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [S::splat(0.0); 4];
        let mut i = 0;
        while i + 4 * S::LANES <= len {
            for (j, sum) in sums.iter_mut().enumerate() {
                let at = i + j * S::LANES;
                *sum = S::fma(S::load(a.add(at)), S::load(b.add(at)), *sum);
            }
            i += 4 * S::LANES;
        }
        let mut total = S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
        while i < len {
            total += *a.add(i) * *b.add(i);
            i += 1;
        }
        total
    }
}

dispatch! {
    /// All tokens times one panel (columns, PANEL).
    unsafe fn multiply_panel(panel: *const f32, columns: usize, inputs: &Inputs, outputs: &Outputs) = multiply_panel_of;
}

#[inline(always)]
unsafe fn multiply_panel_of<S: Simd>(panel: *const f32, columns: usize, inputs: &Inputs, outputs: &Outputs) {
    // SAFETY: the caller's promise; the f32 part of a prepared row comes first.
    unsafe { tiles::<S>(inputs.tokens, PANEL, &Panel { panel, columns, inputs, outputs }) }
}

struct Panel<'a> {
    panel: *const f32,
    columns: usize,
    inputs: &'a Inputs,
    outputs: &'a Outputs,
}

impl Tile for Panel<'_> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const C: usize>(&self, token: usize, column: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let stride = self.inputs.format.row_bytes() / 4;
            let x = Operand::at(&self.inputs.format, self.inputs.rows).float.add(token * stride);
            let mut sums = [[S::splat(0.0); C]; R];
            accumulate::<S, R, C>(&mut sums, (x, stride), (self.panel.add(column), PANEL), self.columns);
            for (r, sums) in sums.into_iter().enumerate() {
                let out = self.outputs.data.wrapping_add((token + r) * self.outputs.stride + column);
                for (c, sum) in sums.into_iter().enumerate() {
                    S::store(out.add(c * S::LANES), sum);
                }
            }
        }
    }
}
