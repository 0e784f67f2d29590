//! Which tensor gets which type.
//!
//! | tensor | F32, F16, BF16 | Q8_0 | Q4_0 | Q4_K_M |
//! |---|---|---|---|---|
//! | LRPE angles, biases | F32 | F32 | F32 | F32 |
//! | embedding, output head | as named | Q8_0 | Q6_K | Q6_K |
//! | q, k, v, u | as named | Q8_0 | Q4_0 | Q4_K |
//! | channel mixer, down | as named | Q8_0 | Q4_0 | Q6_K in the first and last eighth of the layers and every third between, else Q4_K |
//! | other projections | as named | Q8_0 | Q4_0 | Q4_K |
//!
//! Angles and biases are few and enter the result unaveraged, so they are never rounded. The head decides
//! between tokens, and the down projection writes products of two activations into the residual stream: they
//! are the most sensitive matrices, and get more bits where a mix has bits to give.
//!
//! A block type needs rows of whole blocks. Where they are not, the next type with smaller blocks and no
//! fewer bits takes its place: Q4_K → Q5_0, Q6_K → Q8_0, and F16 where not even 32 divides the row.

use std::fmt;

use clap::ValueEnum;
use transnormer::dtype::DType;

use crate::names::Role;

/// A choice of types for a whole file.
#[allow(non_camel_case_types)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
#[value(rename_all = "verbatim")]
pub enum Preset {
    /// 32-bit floats: every bit of any checkpoint
    F32,
    /// 16-bit floats: exact for F16 checkpoints
    F16,
    /// Brain floats: exact for BF16 checkpoints
    BF16,
    /// 8 bits: no loss that a benchmark can see
    Q8_0,
    /// 4 bits, small blocks: the fastest on most phones
    Q4_0,
    /// 4 to 6 bits by tensor: the best quality for its size
    Q4_K_M,
}

impl Preset {
    /// The usual name, for example `Q4_K_M`.
    pub fn name(self) -> &'static str {
        match self {
            Preset::F32 => "F32",
            Preset::F16 => "F16",
            Preset::BF16 => "BF16",
            Preset::Q8_0 => "Q8_0",
            Preset::Q4_0 => "Q4_0",
            Preset::Q4_K_M => "Q4_K_M",
        }
    }

    /// The number of the mix in `general.file_type`, as the field numbers them.
    pub fn file_type(self) -> u32 {
        match self {
            Preset::F32 => 0,
            Preset::F16 => 1,
            Preset::Q4_0 => 2,
            Preset::Q8_0 => 7,
            Preset::Q4_K_M => 15,
            Preset::BF16 => 32,
        }
    }

    /// The type for a tensor of this role, in layer `layer` of `layers` if it belongs to one, before the rows
    /// are looked at.
    pub fn wanted(self, role: Role, layer: Option<u32>, layers: u32) -> DType {
        if matches!(role, Role::Theta | Role::Bias) {
            return DType::F32;
        }
        let outer = matches!(role, Role::Embedding | Role::Head);
        match self {
            Preset::F32 => DType::F32,
            Preset::F16 => DType::F16,
            Preset::BF16 => DType::BF16,
            Preset::Q8_0 => DType::Q8_0,
            Preset::Q4_0 | Preset::Q4_K_M if outer => DType::Q6_K,
            Preset::Q4_0 => DType::Q4_0,
            Preset::Q4_K_M => match (role, layer) {
                (Role::Down, Some(layer)) if gets_more_bits(layer, layers) => DType::Q6_K,
                _ => DType::Q4_K,
            },
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The type that takes the place of `wanted` for rows of `row_len` elements: `wanted` itself where they are
/// whole blocks of it.
pub fn fitting(wanted: DType, row_len: u64) -> DType {
    let mut dtype = wanted;
    while !row_len.is_multiple_of(dtype.block_len()) {
        dtype = fallback(dtype);
    }
    dtype
}

fn fallback(dtype: DType) -> DType {
    match dtype {
        DType::Q4_K => DType::Q5_0,
        DType::Q6_K => DType::Q8_0,
        _ => DType::F16,
    }
}

/// The layers at both ends, where errors are largest or last, and every third between.
fn gets_more_bits(layer: u32, layers: u32) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= layers - eighth || (layer - eighth) % 3 == 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_tensors_are_never_rounded() {
        for preset in Preset::value_variants() {
            for role in [Role::Theta, Role::Bias] {
                assert_eq!(preset.wanted(role, Some(0), 24), DType::F32);
            }
        }
    }

    #[test]
    fn the_mix_spends_bits_where_stated() {
        let down = |layer| Preset::Q4_K_M.wanted(Role::Down, Some(layer), 24);
        let more: Vec<u32> = (0..24).filter(|&layer| down(layer) == DType::Q6_K).collect();
        assert_eq!(more, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]);
        assert!((0..24).all(|layer| [DType::Q4_K, DType::Q6_K].contains(&down(layer))));
        assert_eq!(Preset::Q4_K_M.wanted(Role::Embedding, None, 24), DType::Q6_K);
        assert_eq!(Preset::Q4_K_M.wanted(Role::Qkvu, Some(0), 24), DType::Q4_K);
        assert_eq!(Preset::Q4_0.wanted(Role::Down, Some(0), 24), DType::Q4_0);
        assert_eq!(Preset::Q4_0.wanted(Role::Head, None, 24), DType::Q6_K);
        assert_eq!(Preset::Q8_0.wanted(Role::Head, None, 24), DType::Q8_0);
        assert_eq!(Preset::Q4_K_M.wanted(Role::Down, Some(1), 2), DType::Q4_K, "two layers have no eighth");
    }

    #[test]
    fn rows_of_any_length_find_a_type() {
        assert_eq!(fitting(DType::Q4_K, 2816), DType::Q4_K);
        assert_eq!(fitting(DType::Q4_K, 96), DType::Q5_0);
        assert_eq!(fitting(DType::Q6_K, 96), DType::Q8_0);
        assert_eq!(fitting(DType::Q4_K, 144), DType::F16);
        assert_eq!(fitting(DType::Q8_0, 144), DType::F16);
        assert_eq!(fitting(DType::F32, 7), DType::F32);
        for preset in Preset::value_variants() {
            for role in [Role::Embedding, Role::Qkvu, Role::Down] {
                let wanted = preset.wanted(role, Some(0), 8);
                for row_len in 1..600 {
                    assert!(fitting(wanted, row_len).row_bytes(row_len).is_some());
                }
            }
        }
    }
}
