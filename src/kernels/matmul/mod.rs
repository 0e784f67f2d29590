//! `y = W x` for weights of every type.
//!
//! Weights that are quantized to 8 bits or less meet inputs quantized to int8 ([`int8`]); float weights, and
//! the rare types that have no integer kernel, meet f32 inputs ([`float`]).

mod float;

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
    pub fn of(_dtype: DType) -> Self {
        Reads::Float
    }
}

/// Prepared input rows, `tokens` of them, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Inputs {
    pub format: Format,
    pub rows: *const u8,
    pub tokens: usize,
}

/// Where the products go: element (token, row) at `data + token * stride + row`.
#[derive(Clone, Copy)]
pub(crate) struct Outputs {
    pub data: *mut f32,
    pub stride: usize,
}

/// Computes rows `range` of `weights` times every input row. `scratch` grows once and is kept by the caller.
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
    unsafe { float::multiply(isa, weights, range, inputs, outputs, scratch) }
}
