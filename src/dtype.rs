//! Tensor element types: the ggml types this engine accepts, with their block sizes.

use std::{fmt, str::FromStr};

use crate::error::{Error, ErrorKind};

/// Element type of a stored tensor. Quantized types pack a block of elements into a block of bytes.
#[allow(non_camel_case_types, missing_docs)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

use DType::*;

/// (type, name, ggml id, elements in a block, bytes in a block)
const TABLE: [(DType, &str, u32, u64, u64); 16] = [
    (F32, "F32", 0, 1, 4),
    (F16, "F16", 1, 1, 2),
    (BF16, "BF16", 30, 1, 2),
    (Q4_0, "Q4_0", 2, 32, 18),
    (Q4_1, "Q4_1", 3, 32, 20),
    (Q5_0, "Q5_0", 6, 32, 22),
    (Q5_1, "Q5_1", 7, 32, 24),
    (Q8_0, "Q8_0", 8, 32, 34),
    (Q2_K, "Q2_K", 10, 256, 84),
    (Q3_K, "Q3_K", 11, 256, 110),
    (Q4_K, "Q4_K", 12, 256, 144),
    (Q5_K, "Q5_K", 13, 256, 176),
    (Q6_K, "Q6_K", 14, 256, 210),
    (IQ4_NL, "IQ4_NL", 20, 32, 18),
    (IQ4_XS, "IQ4_XS", 23, 256, 136),
    (MXFP4, "MXFP4", 39, 32, 17),
];

impl DType {
    /// Every accepted type.
    pub const ALL: [DType; 16] = {
        let mut all = [F32; 16];
        let mut i = 0;
        while i < 16 {
            all[i] = TABLE[i].0;
            i += 1;
        }
        all
    };

    /// The type with this ggml number, if it is accepted.
    pub fn from_ggml(id: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.2 == id).map(|row| row.0)
    }

    /// ggml's number of the type, as stored in GGUF.
    pub fn ggml_id(self) -> u32 {
        self.row().2
    }

    /// Usual name, for example `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Elements in one block.
    pub fn block_len(self) -> u64 {
        self.row().3
    }

    /// Bytes in one block.
    pub fn block_bytes(self) -> u64 {
        self.row().4
    }

    /// Bytes of a row of `len` elements; `None` if `len` is not a whole number of blocks or overflows.
    pub fn row_bytes(self, len: u64) -> Option<u64> {
        if !len.is_multiple_of(self.block_len()) {
            return None;
        }
        (len / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Average bits per element.
    pub fn bits(self) -> f64 {
        8.0 * self.block_bytes() as f64 / self.block_len() as f64
    }

    /// Whether elements are packed in blocks.
    pub fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    fn row(self) -> &'static (DType, &'static str, u32, u64, u64) {
        TABLE.iter().find(|row| row.0 == self).expect("TABLE lists every DType")
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for DType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        TABLE.iter().find(|row| row.1.eq_ignore_ascii_case(name)).map(|row| row.0).ok_or_else(|| {
            Error::new(ErrorKind::InvalidArgument, format_args!("unknown tensor type '{name}'"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_round_trip() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_ggml(dtype.ggml_id()), Some(dtype));
            assert_eq!(dtype.name().to_lowercase().parse::<DType>().unwrap(), dtype);
        }
        assert_eq!(DType::from_ggml(4), None, "a removed type is refused");
    }

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(Q4_K.row_bytes(512), Some(288));
        assert_eq!(Q4_K.row_bytes(500), None);
        assert_eq!(F32.row_bytes(u64::MAX), None);
    }
}
