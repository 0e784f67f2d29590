//! Why a file is not an acceptable GGUF: one variant for each rule.

use crate::{
    dtype::DType,
    error::{Error, ErrorKind},
};

/// The rule that a file breaks, and where. Offsets count bytes from the start of the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The first four bytes are not `GGUF`.
    #[error("not a GGUF file: it starts with {}", show_bytes(.0))]
    Magic([u8; 4]),
    /// The file was written for big-endian machines.
    #[error("big-endian GGUF is not supported; convert the model again for little-endian")]
    BigEndian,
    /// The version is not 3.
    #[error("GGUF version {0} is not supported, only version 3; convert the model again")]
    Version(u32),
    /// The header goes on behind the end of the file.
    #[error("file is cut short: {what} at byte {offset} needs {needed} bytes and {remaining} remain")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it starts.
        offset: u64,
        /// Its length in bytes.
        needed: u64,
        /// Bytes left in the file.
        remaining: u64,
    },
    /// More metadata entries or tensors than the rest of the file can hold, or than are ever sensible.
    #[error("{count} {what} declared, at most {limit} possible")]
    Count {
        /// What is counted.
        what: &'static str,
        /// The declared count.
        count: u64,
        /// The most that can be true.
        limit: u64,
    },
    /// A key, a tensor name or a string is longer than allowed.
    #[error("{what} at byte {offset} has {len} bytes, at most {limit} allowed")]
    TextTooLong {
        /// What the text is.
        what: &'static str,
        /// Where it starts.
        offset: u64,
        /// The declared length in bytes.
        len: u64,
        /// The longest allowed.
        limit: u64,
    },
    /// A key, a tensor name or a string is not UTF-8.
    #[error("{what} at byte {offset} is not UTF-8")]
    NotUtf8 {
        /// What the text is.
        what: &'static str,
        /// Where it starts.
        offset: u64,
    },
    /// A key or a tensor name is empty.
    #[error("{what} at byte {offset} is empty")]
    EmptyName {
        /// What the text is.
        what: &'static str,
        /// Where it starts.
        offset: u64,
    },
    /// A metadata key occurs twice.
    #[error("metadata key '{}' occurs twice", show(.0))]
    DuplicateKey(String),
    /// A metadata value or array element has a type number that GGUF does not define.
    #[error("metadata key '{}' has unknown value type {id}", show(.key))]
    ValueType {
        /// The key.
        key: String,
        /// The type number.
        id: u32,
    },
    /// An array holds arrays.
    #[error("metadata key '{}' holds arrays inside an array, which is not supported", show(.0))]
    NestedArray(String),
    /// An array is longer than the rest of the file or than allowed.
    #[error("metadata key '{}' declares an array of {len}, at most {limit} possible", show(.key))]
    ArrayTooLong {
        /// The key.
        key: String,
        /// The declared number of elements.
        len: u64,
        /// The most that can be true.
        limit: u64,
    },
    /// A boolean is neither 0 nor 1.
    #[error("metadata key '{}' holds the boolean {value}, must be 0 or 1", show(.key))]
    Bool {
        /// The key.
        key: String,
        /// The stored byte.
        value: u8,
    },
    /// `general.alignment` is not a `u32`.
    #[error("metadata key 'general.alignment' is {0}, must be u32")]
    AlignmentType(&'static str),
    /// `general.alignment` is not a power of two from 8 to 4096.
    #[error("metadata key 'general.alignment' is {0}, must be a power of two from 8 to 4096")]
    Alignment(u32),
    /// A tensor has no or more than four dimensions.
    #[error("tensor '{}' has {count} dimensions, must be 1 to 4", show(.name))]
    DimensionCount {
        /// The tensor.
        name: String,
        /// Its number of dimensions.
        count: u64,
    },
    /// A dimension is 0 or above 2^31.
    #[error("tensor '{}' has length {len} in dimension {axis}, must be 1 to 2147483648", show(.name))]
    Dimension {
        /// The tensor.
        name: String,
        /// Index of the dimension, 0 for the fastest.
        axis: usize,
        /// Its length.
        len: u64,
    },
    /// The type of a tensor is not one that the engine accepts.
    #[error("tensor '{}' has unsupported type number {id}; convert the model to another type", show(.name))]
    TensorType {
        /// The tensor.
        name: String,
        /// ggml's type number.
        id: u32,
    },
    /// The rows of a tensor are not a whole number of blocks.
    #[error(
        "tensor '{}' has rows of {row}, not a multiple of the {} of a {dtype} block",
        show(.name),
        .dtype.block_len()
    )]
    PartialBlock {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: DType,
        /// Elements in a row.
        row: u64,
    },
    /// The size of a tensor, or the end of its data, does not fit 64 bits.
    #[error("tensor '{}' is too large", show(.0))]
    TensorTooLarge(String),
    /// A tensor name occurs twice.
    #[error("tensor '{}' occurs twice", show(.0))]
    DuplicateTensor(String),
    /// The data of a tensor does not follow the data of the one before at the next aligned byte.
    #[error("tensor '{}' has data offset {found}, must be {expected}", show(.name))]
    TensorOffset {
        /// The tensor.
        name: String,
        /// The stored offset, from the start of the data section.
        found: u64,
        /// The only possible one.
        expected: u64,
    },
    /// The data of a tensor goes on behind the end of the file.
    #[error(
        "file is cut short: tensor '{}' has {nbytes} bytes at byte {offset}, the file has {file_len}",
        show(.name)
    )]
    TensorPastEnd {
        /// The tensor.
        name: String,
        /// Where its data starts.
        offset: u64,
        /// Length of its data.
        nbytes: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// There are bytes behind the padding of the last tensor.
    #[error(
        "file has {file_len} bytes, the last tensor ends at byte {end}; the rest is not part of the model"
    )]
    TrailingBytes {
        /// Where the last tensor, padded, ends.
        end: u64,
        /// Length of the file.
        file_len: u64,
    },
}

impl From<ReadError> for Error {
    fn from(error: ReadError) -> Self {
        use ReadError::{BigEndian, NestedArray, TensorType, Version};
        let kind = match error {
            BigEndian | Version(_) | NestedArray(_) | TensorType { .. } => ErrorKind::Unsupported,
            _ => ErrorKind::Format,
        };
        Error::new(kind, error)
    }
}

/// Text from a file for a message: one short line whatever it holds.
fn show(text: &str) -> String {
    const SHOWN: usize = 80;
    let mut shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

fn show_bytes(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{super::Gguf, *};

    macro_rules! rules {
        ($($rule:ident)*) => {
            const RULES: &[&str] = &[$(stringify!($rule)),*];

            fn rule(error: &ReadError) -> &'static str {
                match error { $(ReadError::$rule { .. } => stringify!($rule)),* }
            }
        };
    }

    // The match has no wildcard: a new variant does not compile here until it is listed, and then fails the
    // test below until a file breaks it.
    rules! {
        Magic BigEndian Version Truncated Count TextTooLong NotUtf8 EmptyName
        DuplicateKey ValueType NestedArray ArrayTooLong Bool AlignmentType Alignment
        DimensionCount Dimension TensorType PartialBlock TensorTooLarge
        DuplicateTensor TensorOffset TensorPastEnd TrailingBytes
    }

    fn text(text: &[u8]) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text].concat()
    }

    /// A metadata entry: key, type number, value bytes.
    fn entry(key: &str, tag: u32, value: &[u8]) -> Vec<u8> {
        [text(key.as_bytes()), tag.to_le_bytes().to_vec(), value.to_vec()].concat()
    }

    /// An array entry of which `bytes` follow the declared length.
    fn array(tag: u32, len: u64, bytes: &[u8]) -> Vec<u8> {
        entry("k", 9, &[&tag.to_le_bytes(), &len.to_le_bytes() as &[u8], bytes].concat())
    }

    fn tensor(name: &[u8], shape: &[u64], dtype: u32, offset: u64) -> Vec<u8> {
        let mut bytes = text(name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|len| bytes.extend(len.to_le_bytes()));
        bytes.extend(dtype.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    }

    fn start(tensors: u64, entries: u64) -> Vec<u8> {
        [b"GGUF\x03\0\0\0" as &[u8], &tensors.to_le_bytes(), &entries.to_le_bytes()].concat()
    }

    /// A whole file with `data` bytes of tensor data, aligned to 32.
    fn file(entries: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Vec<u8> {
        let mut bytes = start(tensors.len() as u64, entries.len() as u64);
        entries.iter().chain(tensors).for_each(|record| bytes.extend(record));
        bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
        bytes
    }

    fn broken_preambles() -> Vec<(Vec<u8>, ReadError)> {
        let truncated =
            |what, offset, needed, remaining| ReadError::Truncated { what, offset, needed, remaining };
        let count = |what, count, limit| ReadError::Count { what, count, limit };
        let zeros = vec![0; 65_600 * 33];
        vec![
            (b"GGML\x03\0\0\0".to_vec(), ReadError::Magic(*b"GGML")),
            (b"FUGG\0\0\0\x03".to_vec(), ReadError::BigEndian),
            (b"GGUF\0\0\0\x03".to_vec(), ReadError::BigEndian),
            (b"GGUF\x02\0\0\0".to_vec(), ReadError::Version(2)),
            (b"GGUF\x04\0\0\0".to_vec(), ReadError::Version(4)),
            (b"GGUF\0\0\0\0".to_vec(), ReadError::Version(0)),
            (vec![], truncated("magic", 0, 4, 0)),
            (b"GGUF\x03\0".to_vec(), truncated("version", 4, 4, 2)),
            (start(0, 0)[..23].to_vec(), truncated("metadata entries", 16, 8, 7)),
            (start(u64::MAX, 0), count("tensors", u64::MAX, 0)),
            (start(0, 1), count("metadata entries", 1, 0)),
            ([start(0, 3), vec![0; 41]].concat(), count("metadata entries", 3, 2)),
            ([start(65_537, 0), zeros.clone()].concat(), count("tensors", 65_537, 65_536)),
            ([start(0, 65_537), zeros].concat(), count("metadata entries", 65_537, 65_536)),
        ]
    }

    fn broken_metadata() -> Vec<(Vec<u8>, ReadError)> {
        let one = |entry: Vec<u8>| file(&[entry], &[], 0);
        let key = || "k".to_owned();
        let too_long = |what, offset, len, limit| ReadError::TextTooLong { what, offset, len, limit };
        let array_too_long = |len, limit| ReadError::ArrayTooLong { key: key(), len, limit };
        let long_array = |tag, size: usize| [start(0, 1), array(tag, 1 << 62, &vec![0; 5 * size])].concat();
        let key_len = |len: u64| [start(0, 1), len.to_le_bytes().to_vec(), vec![0; 9]].concat();
        let wide = |bytes: Vec<u8>| [start(0, 1), bytes, vec![0; 1 << 21]].concat();
        vec![
            (key_len(65_537), too_long("metadata key", 24, 65_537, 65_536)),
            (key_len(u64::MAX), too_long("metadata key", 24, u64::MAX, 65_536)),
            (
                key_len(10),
                ReadError::Truncated { what: "metadata key", offset: 32, needed: 10, remaining: 9 },
            ),
            (
                wide(entry("k", 8, &(1u64 << 20 | 1).to_le_bytes())),
                too_long("metadata value", 37, 1 << 20 | 1, 1 << 20),
            ),
            (one(entry("k", 8, &text(b"\xff"))), ReadError::NotUtf8 { what: "metadata value", offset: 37 }),
            (one(array(8, 1, &text(b"\xc3"))), ReadError::NotUtf8 { what: "array element", offset: 49 }),
            (
                one([text(b"\xed\xa0\x80"), vec![0; 8]].concat()),
                ReadError::NotUtf8 { what: "metadata key", offset: 24 },
            ),
            (one(entry("", 0, &[0; 2])), ReadError::EmptyName { what: "metadata key", offset: 24 }),
            (file(&[entry("k", 0, &[1]), entry("k", 7, &[1])], &[], 0), ReadError::DuplicateKey(key())),
            (one(entry("k", 13, &[0])), ReadError::ValueType { key: key(), id: 13 }),
            (one(array(u32::MAX, 0, &[])), ReadError::ValueType { key: key(), id: u32::MAX }),
            (one(array(9, 0, &[])), ReadError::NestedArray(key())),
            (long_array(0, 1), array_too_long(1 << 62, 5)),
            (long_array(4, 4), array_too_long(1 << 62, 5)),
            (long_array(12, 8), array_too_long(1 << 62, 5)),
            (long_array(8, 8), array_too_long(1 << 62, 5)),
            (
                wide([array(0, 1 << 24 | 1, &vec![0; 1 << 24 | 1])].concat()),
                array_too_long(1 << 24 | 1, 1 << 24),
            ),
            (one(entry("k", 7, &[2])), ReadError::Bool { key: key(), value: 2 }),
            (one(array(7, 3, &[0, 1, 255])), ReadError::Bool { key: key(), value: 255 }),
            (
                one(entry("general.alignment", 10, &[32, 0, 0, 0, 0, 0, 0, 0])),
                ReadError::AlignmentType("u64"),
            ),
            (one(entry("general.alignment", 4, &[0; 4])), ReadError::Alignment(0)),
            (one(entry("general.alignment", 4, &[4, 0, 0, 0])), ReadError::Alignment(4)),
            (one(entry("general.alignment", 4, &[48, 0, 0, 0])), ReadError::Alignment(48)),
            (one(entry("general.alignment", 4, &[0, 32, 0, 0])), ReadError::Alignment(8192)),
        ]
    }

    fn broken_tensors() -> Vec<(Vec<u8>, ReadError)> {
        let one = |tensor: Vec<u8>, data| file(&[], &[tensor], data);
        let name = || "t".to_owned();
        let shaped = |shape: &[u64]| one(tensor(b"t", shape, 0, 0), 64);
        let dimension = |axis, len| ReadError::Dimension { name: name(), axis, len };
        let two = |second: &[u8], offset, data| {
            file(&[], &[tensor(b"t", &[4, 2], 0, 0), tensor(second, &[8], 0, offset)], data)
        };
        let misplaced = |found, expected| ReadError::TensorOffset { name: "u".to_owned(), found, expected };
        let past_end = |name: &str, offset, nbytes, file_len| {
            let name = name.to_owned();
            ReadError::TensorPastEnd { name, offset, nbytes, file_len }
        };
        vec![
            (
                one(tensor(&[b'x'; 257], &[8], 0, 0), 32),
                ReadError::TextTooLong { what: "tensor name", offset: 24, len: 257, limit: 256 },
            ),
            (one(tensor(b"", &[8], 0, 0), 32), ReadError::EmptyName { what: "tensor name", offset: 24 }),
            (one(tensor(b"\xff", &[8], 0, 0), 32), ReadError::NotUtf8 { what: "tensor name", offset: 24 }),
            (shaped(&[]), ReadError::DimensionCount { name: name(), count: 0 }),
            (shaped(&[1; 5]), ReadError::DimensionCount { name: name(), count: 5 }),
            (shaped(&[0]), dimension(0, 0)),
            (shaped(&[8, 1, 0]), dimension(2, 0)),
            (shaped(&[8, (1 << 31) + 1]), dimension(1, (1 << 31) + 1)),
            (one(tensor(b"t", &[32], 4, 0), 32), ReadError::TensorType { name: name(), id: 4 }),
            (one(tensor(b"t", &[32], 9999, 0), 32), ReadError::TensorType { name: name(), id: 9999 }),
            (
                one(tensor(b"t", &[128, 2], 12, 0), 144),
                ReadError::PartialBlock { name: name(), dtype: DType::Q4_K, row: 128 },
            ),
            (shaped(&[1 << 31; 4]), ReadError::TensorTooLarge(name())),
            (shaped(&[1 << 31, 1 << 30]), past_end("t", 96, 1 << 63, 160)),
            (two(b"t", 32, 64), ReadError::DuplicateTensor(name())),
            (one(tensor(b"u", &[8], 0, 32), 64), misplaced(32, 0)),
            (two(b"u", 0, 64), misplaced(0, 32)),
            (two(b"u", 64, 96), misplaced(64, 32)),
            (two(b"u", 33, 96), misplaced(33, 32)),
            (two(b"u", u64::MAX, 64), misplaced(u64::MAX, 32)),
            (two(b"u", 32, 63), past_end("u", 160, 32, 191)),
            (two(b"u", 32, 0), past_end("t", 128, 32, 128)),
            (two(b"u", 32, 65), ReadError::TrailingBytes { end: 192, file_len: 193 }),
            (file(&[], &[], 32), ReadError::TrailingBytes { end: 32, file_len: 64 }),
        ]
    }

    #[test]
    fn every_rule_has_a_file_that_breaks_it() {
        let cases = [broken_preambles(), broken_metadata(), broken_tensors()].concat();
        let mut broken = BTreeSet::new();
        for (bytes, expected) in cases {
            assert_eq!(Gguf::parse(&bytes), Err(expected.clone()));
            broken.insert(rule(&expected));
        }
        assert_eq!(broken, RULES.iter().copied().collect());
    }

    #[test]
    fn messages_are_one_short_line() {
        let long = "k\n\u{1b}[2J".repeat(100);
        let message = Error::from(ReadError::DuplicateKey(long)).to_string();
        assert!(message.len() < 400 && !message.chars().any(char::is_control), "{message}");
        let message = Error::from(ReadError::Magic(*b"PK\x03\x04")).to_string();
        assert_eq!(message, r#"not a GGUF file: it starts with "PK\x03\x04""#);
    }

    #[test]
    fn kinds_tell_damage_from_what_is_not_supported() {
        let kind = |bytes: &[u8]| Error::from(Gguf::parse(bytes).unwrap_err()).kind();
        assert_eq!(kind(b"GGUF\x02\0\0\0"), ErrorKind::Unsupported);
        assert_eq!(kind(b"GGUF\0\0\0\x03"), ErrorKind::Unsupported);
        assert_eq!(kind(&file(&[], &[tensor(b"t", &[32], 16, 0)], 32)), ErrorKind::Unsupported);
        assert_eq!(kind(&file(&[array(9, 0, &[])], &[], 0)), ErrorKind::Unsupported);
        assert_eq!(kind(b""), ErrorKind::Format);
        assert_eq!(kind(&file(&[entry("k", 7, &[2])], &[], 0)), ErrorKind::Format);
    }

    #[test]
    fn what_is_just_within_the_rules_is_read() {
        let alignment = |a: u32| file(&[entry("general.alignment", 4, &a.to_le_bytes())], &[], 0);
        for a in [8u32, 32, 4096] {
            let mut bytes = alignment(a);
            bytes.truncate(24 + 8 + 17 + 4 + 4);
            let gguf = Gguf::parse(&bytes).unwrap();
            assert_eq!((gguf.alignment, gguf.data_offset), (a.into(), 57u64.next_multiple_of(a.into())));
        }
        let name = [b'x'; 256];
        let bytes = file(&[], &[tensor(&name, &[3, 1, 2, 1], 1, 0), tensor(b"b", &[64], 8, 32)], 96 + 4);
        assert_eq!(bytes.len(), 484);
        let gguf = Gguf::parse(&bytes).unwrap();
        assert_eq!((gguf.version, gguf.alignment, gguf.data_offset), (3, 32, 384));
        let [first, second] = &gguf.tensors[..] else { panic!("two tensors") };
        assert_eq!((first.offset, first.nbytes, first.dtype), (384, 12, DType::F16));
        assert_eq!((second.offset, second.nbytes, second.dtype), (416, 68, DType::Q8_0));
        assert_eq!(gguf.tensor(str::from_utf8(&name).unwrap()), Some(first));
        assert_eq!((gguf.tensor("b"), gguf.tensor("c")), (Some(second), None));
        for padding in 0..=28 {
            assert!(Gguf::parse(&[&bytes[..], &vec![0xff; padding]].concat()).is_ok(), "{padding}");
        }
        assert!(Gguf::parse(&[&bytes[..], &[0; 29]].concat()).is_err());
    }
}
