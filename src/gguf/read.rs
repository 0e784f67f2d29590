//! Reading the header of a GGUF file.

use std::collections::HashSet;

use super::{ALIGNMENT_KEY, Array, DEFAULT_ALIGNMENT, MAGIC, Metadata, ReadError, VERSION, Value, tag};
use crate::dtype::DType;

/// Longest metadata key, in bytes.
const MAX_KEY: u64 = 64 << 10;
/// Longest tensor name, in bytes.
const MAX_NAME: u64 = 256;
/// Longest metadata string, in bytes.
const MAX_STRING: u64 = 1 << 20;
/// Most elements in an array, metadata entries and tensors: far above any model, and small enough that a
/// header of nothing but tiny records stays cheap.
const MAX_ARRAY: u64 = 1 << 24;
const MAX_ENTRIES: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 16;
const MAX_DIM: u64 = 1 << 31;

/// A key of one byte, its value type, a value of one byte.
const MIN_ENTRY_BYTES: u64 = 8 + 1 + 4 + 1;
/// A name of one byte, dimension count, one dimension, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;
/// A string is at least its length.
const MIN_STRING_BYTES: u64 = 8;

/// Where a tensor lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Unique name, 1 to 256 bytes.
    pub name: String,
    /// One to four lengths in ggml order, fastest first, each 1 to 2^31.
    pub shape: Vec<u64>,
    /// Element type; `shape[0]` is a whole number of its blocks.
    pub dtype: DType,
    /// First byte of the data, from the start of the file; a multiple of the alignment.
    pub offset: u64,
    /// Bytes of data, without padding. `offset + nbytes` is within the file.
    pub nbytes: u64,
}

/// The checked header of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    /// Format version, always 3.
    pub version: u32,
    /// Alignment of tensor data in bytes: a power of two from 8 to 4096.
    pub alignment: u64,
    /// The metadata in file order.
    pub metadata: Metadata,
    /// The tensors in file order, contiguous up to padding.
    pub tensors: Vec<TensorInfo>,
    /// First byte of the data section, from the start of the file.
    pub data_offset: u64,
    /// Indices into `tensors`, sorted by name.
    by_name: Vec<usize>,
}

impl Gguf {
    /// Checks the header of a whole file, usually a mapped one. Tensor data are not touched: the result says
    /// where they are and that they are all there, not that their numbers are sane.
    ///
    /// # Errors
    /// The first rule that the file breaks, see [`ReadError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ReadError> {
        Self::parse_header(bytes, bytes.len() as u64)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let at = self.by_name.binary_search_by(|&i| self.tensors[i].name.as_str().cmp(name)).ok()?;
        Some(&self.tensors[self.by_name[at]])
    }

    /// [`parse`](Self::parse) for a file of `file_len` bytes of which `header` is the beginning.
    pub(super) fn parse_header(header: &[u8], file_len: u64) -> Result<Self, ReadError> {
        let mut input = Cursor::new(header);
        read_magic_and_version(&mut input)?;
        let tensor_count = input.count("tensors", MAX_TENSORS, MIN_TENSOR_BYTES)?;
        let entry_count = input.count("metadata entries", MAX_ENTRIES, MIN_ENTRY_BYTES)?;
        let metadata = read_metadata(&mut input, entry_count)?;
        let alignment = alignment(&metadata)?;
        let mut tensors =
            (0..tensor_count).map(|_| read_tensor(&mut input)).collect::<Result<Vec<_>, ReadError>>()?;
        let by_name = index_by_name(&tensors)?;
        let data_offset = place(&mut tensors, input.offset(), alignment, file_len)?;
        Ok(Self { version: VERSION, alignment, metadata, tensors, data_offset, by_name })
    }
}

/// Bytes of a tensor, or the rule that its shape breaks.
pub(super) fn tensor_bytes(name: &str, shape: &[u64], dtype: DType) -> Result<u64, ReadError> {
    let name = || name.to_owned();
    let [row, ..] = *shape else { return Err(ReadError::DimensionCount { name: name(), count: 0 }) };
    if shape.len() > 4 {
        return Err(ReadError::DimensionCount { name: name(), count: shape.len() as u64 });
    }
    if let Some(axis) = shape.iter().position(|len| !(1..=MAX_DIM).contains(len)) {
        return Err(ReadError::Dimension { name: name(), axis, len: shape[axis] });
    }
    // Cannot overflow: rows are at most 2^31 elements of at most 4 bytes.
    let row_bytes =
        dtype.row_bytes(row).ok_or_else(|| ReadError::PartialBlock { name: name(), dtype, row })?;
    shape[1..]
        .iter()
        .try_fold(row_bytes, |bytes, &len| bytes.checked_mul(len))
        .ok_or_else(|| ReadError::TensorTooLarge(name()))
}

/// The alignment that `metadata` asks for.
pub(super) fn alignment(metadata: &Metadata) -> Result<u64, ReadError> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(a)) if a.is_power_of_two() && (8..=4096).contains(&a) => Ok(a.into()),
        Some(&Value::U32(a)) => Err(ReadError::Alignment(a)),
        Some(other) => Err(ReadError::AlignmentType(other.type_name())),
    }
}

fn read_magic_and_version(input: &mut Cursor<'_>) -> Result<(), ReadError> {
    let magic = input.chunk("magic")?;
    if magic == *b"FUGG" {
        return Err(ReadError::BigEndian);
    }
    if magic != MAGIC {
        return Err(ReadError::Magic(magic));
    }
    match u32::from_le_bytes(input.chunk("version")?) {
        VERSION => Ok(()),
        // Writers keep the magic as it is and swap the version: no real version has its low half empty.
        version if version != 0 && version & 0xffff == 0 => Err(ReadError::BigEndian),
        version => Err(ReadError::Version(version)),
    }
}

fn read_metadata(input: &mut Cursor<'_>, count: u64) -> Result<Metadata, ReadError> {
    let mut seen = HashSet::new();
    let mut entries = Vec::new();
    for _ in 0..count {
        let key = input.name("metadata key", MAX_KEY)?;
        if !seen.insert(key) {
            return Err(ReadError::DuplicateKey(key.to_owned()));
        }
        entries.push((key.to_owned(), read_value(input, key)?));
    }
    Ok(Metadata::from_unique(entries))
}

fn read_value(input: &mut Cursor<'_>, key: &str) -> Result<Value, ReadError> {
    const WHAT: &str = "metadata value";
    Ok(match input.u32("value type")? {
        tag::U8 => Value::U8(u8::from_le_bytes(input.chunk(WHAT)?)),
        tag::I8 => Value::I8(i8::from_le_bytes(input.chunk(WHAT)?)),
        tag::U16 => Value::U16(u16::from_le_bytes(input.chunk(WHAT)?)),
        tag::I16 => Value::I16(i16::from_le_bytes(input.chunk(WHAT)?)),
        tag::U32 => Value::U32(u32::from_le_bytes(input.chunk(WHAT)?)),
        tag::I32 => Value::I32(i32::from_le_bytes(input.chunk(WHAT)?)),
        tag::F32 => Value::F32(f32::from_le_bytes(input.chunk(WHAT)?)),
        tag::U64 => Value::U64(u64::from_le_bytes(input.chunk(WHAT)?)),
        tag::I64 => Value::I64(i64::from_le_bytes(input.chunk(WHAT)?)),
        tag::F64 => Value::F64(f64::from_le_bytes(input.chunk(WHAT)?)),
        tag::BOOL => Value::Bool(check_bool(u8::from_le_bytes(input.chunk(WHAT)?), key)?),
        tag::STRING => Value::String(input.text(WHAT, MAX_STRING)?.to_owned()),
        tag::ARRAY => Value::Array(read_array(input, key)?),
        id => return Err(ReadError::ValueType { key: key.to_owned(), id }),
    })
}

fn read_array(input: &mut Cursor<'_>, key: &str) -> Result<Array, ReadError> {
    let id = input.u32("array element type")?;
    let len = input.u64("array length")?;
    Ok(match id {
        tag::U8 => Array::U8(input.numbers(key, len, u8::from_le_bytes)?),
        tag::I8 => Array::I8(input.numbers(key, len, i8::from_le_bytes)?),
        tag::U16 => Array::U16(input.numbers(key, len, u16::from_le_bytes)?),
        tag::I16 => Array::I16(input.numbers(key, len, i16::from_le_bytes)?),
        tag::U32 => Array::U32(input.numbers(key, len, u32::from_le_bytes)?),
        tag::I32 => Array::I32(input.numbers(key, len, i32::from_le_bytes)?),
        tag::F32 => Array::F32(input.numbers(key, len, f32::from_le_bytes)?),
        tag::U64 => Array::U64(input.numbers(key, len, u64::from_le_bytes)?),
        tag::I64 => Array::I64(input.numbers(key, len, i64::from_le_bytes)?),
        tag::F64 => Array::F64(input.numbers(key, len, f64::from_le_bytes)?),
        tag::BOOL => {
            let bytes = input.numbers(key, len, u8::from_le_bytes)?;
            Array::Bool(bytes.into_iter().map(|byte| check_bool(byte, key)).collect::<Result<_, _>>()?)
        }
        tag::STRING => {
            let len = input.array_len(key, len, MIN_STRING_BYTES)?;
            let mut strings = Vec::with_capacity(len);
            for _ in 0..len {
                strings.push(input.text("array element", MAX_STRING)?.to_owned());
            }
            Array::String(strings)
        }
        tag::ARRAY => return Err(ReadError::NestedArray(key.to_owned())),
        id => return Err(ReadError::ValueType { key: key.to_owned(), id }),
    })
}

fn check_bool(byte: u8, key: &str) -> Result<bool, ReadError> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(ReadError::Bool { key: key.to_owned(), value }),
    }
}

/// Reads one tensor entry; `offset` is still relative to the data section.
fn read_tensor(input: &mut Cursor<'_>) -> Result<TensorInfo, ReadError> {
    let name = input.name("tensor name", MAX_NAME)?;
    let count = input.u32("dimension count")?;
    if !(1..=4).contains(&count) {
        return Err(ReadError::DimensionCount { name: name.to_owned(), count: count.into() });
    }
    let shape = (0..count).map(|_| input.u64("dimension")).collect::<Result<Vec<_>, _>>()?;
    let id = input.u32("tensor type")?;
    let dtype = DType::from_ggml(id).ok_or_else(|| ReadError::TensorType { name: name.to_owned(), id })?;
    let nbytes = tensor_bytes(name, &shape, dtype)?;
    let offset = input.u64("tensor offset")?;
    Ok(TensorInfo { name: name.to_owned(), shape, dtype, offset, nbytes })
}

/// Indices of `tensors` in the order of their names, which must differ.
fn index_by_name(tensors: &[TensorInfo]) -> Result<Vec<usize>, ReadError> {
    let mut index: Vec<usize> = (0..tensors.len()).collect();
    index.sort_unstable_by_key(|&i| &tensors[i].name);
    match index.windows(2).find(|pair| tensors[pair[0]].name == tensors[pair[1]].name) {
        Some(pair) => Err(ReadError::DuplicateTensor(tensors[pair[0]].name.clone())),
        None => Ok(index),
    }
}

/// Checks that the tensors fill the file from the end of the header on, makes their offsets absolute and
/// returns where the data section starts.
fn place(
    tensors: &mut [TensorInfo],
    header_end: u64,
    alignment: u64,
    file_len: u64,
) -> Result<u64, ReadError> {
    let data_offset = header_end.next_multiple_of(alignment);
    let mut next = data_offset;
    for tensor in tensors {
        if data_offset.checked_add(tensor.offset) != Some(next) {
            let (name, found) = (tensor.name.clone(), tensor.offset);
            return Err(ReadError::TensorOffset { name, found, expected: next - data_offset });
        }
        tensor.offset = next;
        let end = next.checked_add(tensor.nbytes).filter(|&end| end <= file_len);
        next = end.and_then(|end| end.checked_next_multiple_of(alignment)).ok_or_else(|| {
            let TensorInfo { name, offset, nbytes, .. } = tensor.clone();
            ReadError::TensorPastEnd { name, offset, nbytes, file_len }
        })?;
    }
    if file_len > next {
        return Err(ReadError::TrailingBytes { end: next, file_len });
    }
    Ok(data_offset)
}

/// The bytes not read yet. Every read is checked against what remains.
struct Cursor<'a> {
    rest: &'a [u8],
    len: usize,
}

impl<'a> Cursor<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, len: bytes.len() }
    }

    fn chunk<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], ReadError> {
        let (chunk, rest) = self.rest.split_first_chunk().ok_or_else(|| self.truncated(what, N as u64))?;
        self.rest = rest;
        Ok(*chunk)
    }

    fn take(&mut self, len: u64, what: &'static str) -> Result<&'a [u8], ReadError> {
        let split = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let (taken, rest) = split.ok_or_else(|| self.truncated(what, len))?;
        self.rest = rest;
        Ok(taken)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, ReadError> {
        Ok(u32::from_le_bytes(self.chunk(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, ReadError> {
        Ok(u64::from_le_bytes(self.chunk(what)?))
    }

    /// A number of records of at least `min_bytes` each, which must fit in the rest of the file.
    fn count(&mut self, what: &'static str, max: u64, min_bytes: u64) -> Result<u64, ReadError> {
        let count = self.u64(what)?;
        let limit = max.min(self.remaining() / min_bytes);
        if count > limit { Err(ReadError::Count { what, count, limit }) } else { Ok(count) }
    }

    fn text(&mut self, what: &'static str, limit: u64) -> Result<&'a str, ReadError> {
        let offset = self.offset();
        let len = self.u64(what)?;
        if len > limit {
            return Err(ReadError::TextTooLong { what, offset, len, limit });
        }
        str::from_utf8(self.take(len, what)?).map_err(|_| ReadError::NotUtf8 { what, offset })
    }

    fn name(&mut self, what: &'static str, limit: u64) -> Result<&'a str, ReadError> {
        let offset = self.offset();
        let name = self.text(what, limit)?;
        if name.is_empty() { Err(ReadError::EmptyName { what, offset }) } else { Ok(name) }
    }

    /// `len` as a number of array elements of at least `min_bytes` each.
    fn array_len(&self, key: &str, len: u64, min_bytes: u64) -> Result<usize, ReadError> {
        let limit = MAX_ARRAY.min(self.remaining() / min_bytes);
        if len > limit {
            return Err(ReadError::ArrayTooLong { key: key.to_owned(), len, limit });
        }
        Ok(len as usize) // at most `MAX_ARRAY`
    }

    fn numbers<const N: usize, T>(
        &mut self,
        key: &str,
        len: u64,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, ReadError> {
        let len = self.array_len(key, len, N as u64)?;
        let bytes = self.take(len as u64 * N as u64, "array")?;
        Ok(bytes.as_chunks().0.iter().map(|&chunk| decode(chunk)).collect())
    }

    fn remaining(&self) -> u64 {
        self.rest.len() as u64
    }

    fn offset(&self) -> u64 {
        (self.len - self.rest.len()) as u64
    }

    fn truncated(&self, what: &'static str, needed: u64) -> ReadError {
        ReadError::Truncated { what, offset: self.offset(), needed, remaining: self.remaining() }
    }
}
