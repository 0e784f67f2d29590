//! Quantized weights times int8 inputs.
//!
//! Both sides are integers in groups of 32 (or 16) with a scale each, so that
//!
//! ```text
//! y = Σ over groups of  w_scale · x_scale · Σ w·x  +  w_offset · x_scale · Σ x
//! ```
//!
//! and the inner sums are exact. One token at a time, rows stream from the file as they are ([`gemv`]); many
//! tokens share a panel of rows unpacked to bytes ([`gemm`]).

mod gemm;
mod gemv;
mod unpack;

use std::ops::Range;

use super::{Inputs, Outputs};
use crate::{dtype::DType, kernels::isa::Isa, weights::Matrix};

/// Calls `$body` with `$blocks` bound to the block format of `$dtype`; `None` where there is none.
macro_rules! with_blocks {
    ($dtype:expr, $blocks:ident => $body:expr) => {{
        use crate::kernels::matmul::int8::unpack;
        macro_rules! arm {
            ($format:ident) => {{
                #[allow(non_camel_case_types)]
                type $blocks = unpack::$format;
                Some($body)
            }};
        }
        match $dtype {
            DType::Q4_0 => arm!(Q4_0),
            DType::Q4_1 => arm!(Q4_1),
            DType::Q5_0 => arm!(Q5_0),
            DType::Q8_0 => arm!(Q8_0),
            DType::Q4_K => arm!(Q4_K),
            DType::Q5_K => arm!(Q5_K),
            DType::Q6_K => arm!(Q6_K),
            DType::IQ4_NL => arm!(IQ4_NL),
            DType::IQ4_XS => arm!(IQ4_XS),
            DType::MXFP4 => arm!(MXFP4),
            _ => None,
        }
    }};
}
use with_blocks;

/// From this many tokens on, unpacking a panel pays.
const PANEL_TOKENS: usize = 4;

/// Whether there is an integer kernel for `dtype`.
pub(super) fn supports(dtype: DType) -> bool {
    with_blocks!(dtype, Format => <Format as unpack::Blocks>::LEN > 0).unwrap_or(false)
}

/// See [`super::multiply`].
pub(super) unsafe fn multiply(
    isa: Isa,
    weights: &Matrix,
    range: Range<usize>,
    inputs: Inputs,
    outputs: Outputs,
    scratch: &mut Vec<f32>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if inputs.tokens < PANEL_TOKENS {
            gemv::multiply(isa, weights, range, inputs, outputs, scratch);
        } else {
            gemm::multiply(isa, weights, range, inputs, outputs, scratch);
        }
    }
}
