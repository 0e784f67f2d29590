//! Metadata: ordered keys with typed values.

use super::tag;
use crate::error::{Error, ErrorKind, Result};

/// A metadata value.
#[allow(missing_docs)]
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A metadata array: elements of one type, never arrays themselves.
#[allow(missing_docs)]
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Metadata in the order of the file, each key once.
///
/// The typed getters return `Ok(None)` where the key is absent, and an error of kind
/// [`Model`](ErrorKind::Model) naming the key where its value has another type. A missing key that must be
/// there is [`require`](Self::require)'s business.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    /// A list, because files have tens of keys and look-ups happen once, while loading.
    entries: Vec<(String, Value)>,
}

impl Metadata {
    /// No entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `key`. An existing entry keeps its place; its old value is returned.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Option<Value> {
        let (key, value) = (key.into(), value.into());
        match self.entries.iter_mut().find(|(k, _)| *k == key) {
            Some((_, old)) => Some(std::mem::replace(old, value)),
            None => {
                self.entries.push((key, value));
                None
            }
        }
    }

    /// Removes `key` and returns its value.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let at = self.entries.iter().position(|(k, _)| k == key)?;
        Some(self.entries.remove(at).1)
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(k, _)| k == key).map(|(_, value)| value)
    }

    /// All entries in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What `get` finds under `key`, which must be there:
    /// `metadata.require("transnormer.block_count", Metadata::u32)?`.
    ///
    /// # Errors
    /// Those of `get`, and a missing key.
    pub fn require<'a, T>(
        &'a self,
        key: &str,
        get: impl FnOnce(&'a Self, &str) -> Result<Option<T>>,
    ) -> Result<T> {
        get(self, key)?
            .ok_or_else(|| Error::new(ErrorKind::Model, format_args!("metadata key '{key}' is missing")))
    }

    /// An integer of any type that fits `u32`.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.integer(key, "u32")
    }

    /// An integer of any type that fits `u64`.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.integer(key, "u64")
    }

    /// A 32-bit float.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "f32", |value| if let Value::F32(x) = value { Some(*x) } else { None })
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "bool", |value| if let Value::Bool(x) = value { Some(*x) } else { None })
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "string", |value| if let Value::String(x) = value { Some(x.as_str()) } else { None })
    }

    /// An array of integers of any type that all fit `u32`.
    pub fn u32_array(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.integers(key, "array of u32")
    }

    /// An array of integers of any type that all fit `i32`.
    pub fn i32_array(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.integers(key, "array of i32")
    }

    /// An array of 32-bit floats.
    pub fn f32_array(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "array of f32", |value| match value {
            Value::Array(Array::F32(x)) => Some(x.as_slice()),
            _ => None,
        })
    }

    /// An array of strings.
    pub fn str_array(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "array of string", |value| match value {
            Value::Array(Array::String(x)) => Some(x.as_slice()),
            _ => None,
        })
    }

    /// Metadata of entries whose keys are known to differ.
    pub(super) fn from_unique(entries: Vec<(String, Value)>) -> Self {
        Self { entries }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| wrong_type(key, value, wanted))
    }

    fn integer<T: TryFrom<i128>>(&self, key: &str, wanted: &str) -> Result<Option<T>> {
        let Some(wide) = self.typed(key, wanted, Value::integer)? else { return Ok(None) };
        T::try_from(wide).map(Some).map_err(|_| out_of_range(key, wide, wanted))
    }

    fn integers<T: TryFrom<i128>>(&self, key: &str, wanted: &str) -> Result<Option<Vec<T>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Value::Array(array) = value else { return Err(wrong_type(key, value, wanted)) };
        match array.integers().ok_or_else(|| wrong_type(key, value, wanted))? {
            Ok(integers) => Ok(Some(integers)),
            Err(wide) => Err(out_of_range(key, wide, wanted)),
        }
    }
}

impl Value {
    /// Name of the type for people, for example `u32` or `array of string`.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::U8(_) => "u8",
            Value::I8(_) => "i8",
            Value::U16(_) => "u16",
            Value::I16(_) => "i16",
            Value::U32(_) => "u32",
            Value::I32(_) => "i32",
            Value::F32(_) => "f32",
            Value::Bool(_) => "bool",
            Value::String(_) => "string",
            Value::Array(array) => array.type_name(),
            Value::U64(_) => "u64",
            Value::I64(_) => "i64",
            Value::F64(_) => "f64",
        }
    }

    /// Appends the type number and the value as they stand in a file.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Value::U8(x) => put(out, tag::U8, &x.to_le_bytes()),
            Value::I8(x) => put(out, tag::I8, &x.to_le_bytes()),
            Value::U16(x) => put(out, tag::U16, &x.to_le_bytes()),
            Value::I16(x) => put(out, tag::I16, &x.to_le_bytes()),
            Value::U32(x) => put(out, tag::U32, &x.to_le_bytes()),
            Value::I32(x) => put(out, tag::I32, &x.to_le_bytes()),
            Value::F32(x) => put(out, tag::F32, &x.to_le_bytes()),
            Value::Bool(x) => put(out, tag::BOOL, &[u8::from(*x)]),
            Value::String(x) => {
                put(out, tag::STRING, &[]);
                put_str(out, x);
            }
            Value::Array(x) => {
                put(out, tag::ARRAY, &[]);
                x.encode(out);
            }
            Value::U64(x) => put(out, tag::U64, &x.to_le_bytes()),
            Value::I64(x) => put(out, tag::I64, &x.to_le_bytes()),
            Value::F64(x) => put(out, tag::F64, &x.to_le_bytes()),
        }
    }

    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(x) => x.into(),
            Value::I8(x) => x.into(),
            Value::U16(x) => x.into(),
            Value::I16(x) => x.into(),
            Value::U32(x) => x.into(),
            Value::I32(x) => x.into(),
            Value::U64(x) => x.into(),
            Value::I64(x) => x.into(),
            _ => return None,
        })
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(x) => x.len(),
            Array::I8(x) => x.len(),
            Array::U16(x) => x.len(),
            Array::I16(x) => x.len(),
            Array::U32(x) => x.len(),
            Array::I32(x) => x.len(),
            Array::F32(x) => x.len(),
            Array::Bool(x) => x.len(),
            Array::String(x) => x.len(),
            Array::U64(x) => x.len(),
            Array::I64(x) => x.len(),
            Array::F64(x) => x.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn type_name(&self) -> &'static str {
        match self {
            Array::U8(_) => "array of u8",
            Array::I8(_) => "array of i8",
            Array::U16(_) => "array of u16",
            Array::I16(_) => "array of i16",
            Array::U32(_) => "array of u32",
            Array::I32(_) => "array of i32",
            Array::F32(_) => "array of f32",
            Array::Bool(_) => "array of bool",
            Array::String(_) => "array of string",
            Array::U64(_) => "array of u64",
            Array::I64(_) => "array of i64",
            Array::F64(_) => "array of f64",
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Array::U8(x) => put_array(out, tag::U8, x, |x| x.to_le_bytes()),
            Array::I8(x) => put_array(out, tag::I8, x, |x| x.to_le_bytes()),
            Array::U16(x) => put_array(out, tag::U16, x, |x| x.to_le_bytes()),
            Array::I16(x) => put_array(out, tag::I16, x, |x| x.to_le_bytes()),
            Array::U32(x) => put_array(out, tag::U32, x, |x| x.to_le_bytes()),
            Array::I32(x) => put_array(out, tag::I32, x, |x| x.to_le_bytes()),
            Array::F32(x) => put_array(out, tag::F32, x, |x| x.to_le_bytes()),
            Array::Bool(x) => put_array(out, tag::BOOL, x, |x| [u8::from(*x)]),
            Array::String(x) => {
                put(out, tag::STRING, &(x.len() as u64).to_le_bytes());
                x.iter().for_each(|text| put_str(out, text));
            }
            Array::U64(x) => put_array(out, tag::U64, x, |x| x.to_le_bytes()),
            Array::I64(x) => put_array(out, tag::I64, x, |x| x.to_le_bytes()),
            Array::F64(x) => put_array(out, tag::F64, x, |x| x.to_le_bytes()),
        }
    }

    /// The elements as `T`; `None` if they are not integers, `Err` with the first that does not fit.
    fn integers<T: TryFrom<i128>>(&self) -> Option<Result<Vec<T>, i128>> {
        fn narrow<S: Copy + Into<i128>, T: TryFrom<i128>>(from: &[S]) -> Result<Vec<T>, i128> {
            from.iter().map(|&x| T::try_from(x.into()).map_err(|_| x.into())).collect()
        }
        Some(match self {
            Array::U8(x) => narrow(x),
            Array::I8(x) => narrow(x),
            Array::U16(x) => narrow(x),
            Array::I16(x) => narrow(x),
            Array::U32(x) => narrow(x),
            Array::I32(x) => narrow(x),
            Array::U64(x) => narrow(x),
            Array::I64(x) => narrow(x),
            _ => return None,
        })
    }
}

macro_rules! value_from {
    ($($variant:ident $type:ty),*) => {$(
        impl From<$type> for Value {
            fn from(value: $type) -> Self {
                Value::$variant(value)
            }
        }

        impl From<Vec<$type>> for Value {
            fn from(values: Vec<$type>) -> Self {
                Value::Array(Array::$variant(values))
            }
        }
    )*};
}

value_from!(U8 u8, I8 i8, U16 u16, I16 i16, U32 u32, I32 i32, F32 f32, Bool bool, String String);
value_from!(U64 u64, I64 i64, F64 f64);

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::String(text.to_owned())
    }
}

impl From<Array> for Value {
    fn from(array: Array) -> Self {
        Value::Array(array)
    }
}

/// Appends a string as GGUF stores it: length, then bytes.
pub(super) fn put_str(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put(out: &mut Vec<u8>, tag: u32, bytes: &[u8]) {
    out.extend(tag.to_le_bytes());
    out.extend(bytes);
}

fn put_array<T, const N: usize>(out: &mut Vec<u8>, tag: u32, values: &[T], encode: fn(&T) -> [u8; N]) {
    put(out, tag, &(values.len() as u64).to_le_bytes());
    values.iter().for_each(|value| out.extend(encode(value)));
}

fn wrong_type(key: &str, found: &Value, wanted: &str) -> Error {
    let found = found.type_name();
    Error::new(ErrorKind::Model, format_args!("metadata key '{key}' is {found}, must be {wanted}"))
}

fn out_of_range(key: &str, found: i128, wanted: &str) -> Error {
    Error::new(
        ErrorKind::Model,
        format_args!("metadata key '{key}' holds {found}, out of range for {wanted}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_their_order_and_stay_unique() {
        let mut metadata = Metadata::new();
        assert_eq!(metadata.insert("b", 1u32), None);
        metadata.insert("a", "x");
        metadata.insert("c", true);
        assert_eq!(metadata.insert("b", 2u8), Some(Value::U32(1)));
        let order: Vec<_> = metadata.iter().map(|(key, _)| key).collect();
        assert_eq!(order, ["b", "a", "c"]);
        assert_eq!(metadata.get("b"), Some(&Value::U8(2)));
        assert_eq!(metadata.remove("a"), Some("x".into()));
        assert_eq!((metadata.remove("a"), metadata.get("a"), metadata.len()), (None, None, 2));
    }

    #[test]
    fn getters_convert_integers_that_fit() {
        let mut metadata = Metadata::new();
        for (key, value) in [
            ("u8", Value::from(7u8)),
            ("i8", 7i8.into()),
            ("u16", 7u16.into()),
            ("i16", 7i16.into()),
            ("u32", 7u32.into()),
            ("i32", 7i32.into()),
            ("u64", 7u64.into()),
            ("i64", 7i64.into()),
        ] {
            metadata.insert(key, value);
            assert_eq!((metadata.u32(key).unwrap(), metadata.u64(key).unwrap()), (Some(7), Some(7)), "{key}");
        }
        for values in [
            Value::from(vec![1u8, 2]),
            vec![1i8, 2].into(),
            vec![1u16, 2].into(),
            vec![1i16, 2].into(),
            vec![1u32, 2].into(),
            vec![1i32, 2].into(),
            vec![1u64, 2].into(),
            vec![1i64, 2].into(),
        ] {
            metadata.insert("array", values);
            assert_eq!(metadata.u32_array("array").unwrap(), Some(vec![1, 2]));
            assert_eq!(metadata.i32_array("array").unwrap(), Some(vec![1, 2]));
        }
    }

    #[test]
    fn getters_name_the_key_and_both_types() {
        let mut metadata = Metadata::new();
        metadata.insert("neg", -1i32);
        metadata.insert("big", 1u64 << 32);
        metadata.insert("text", "x");
        metadata.insert("bigs", vec![1u32, u32::MAX]);
        let message = |error: Error| {
            assert_eq!(error.kind(), ErrorKind::Model);
            error.to_string()
        };
        assert_eq!(
            message(metadata.u32("neg").unwrap_err()),
            "metadata key 'neg' holds -1, out of range for u32"
        );
        assert_eq!(
            message(metadata.u32("big").unwrap_err()),
            "metadata key 'big' holds 4294967296, out of range for u32"
        );
        assert_eq!(metadata.u64("big").unwrap(), Some(1 << 32));
        assert_eq!(
            message(metadata.i32_array("bigs").unwrap_err()),
            "metadata key 'bigs' holds 4294967295, out of range for array of i32"
        );
        assert_eq!(message(metadata.u64("text").unwrap_err()), "metadata key 'text' is string, must be u64");
        assert_eq!(message(metadata.f32("text").unwrap_err()), "metadata key 'text' is string, must be f32");
        assert_eq!(message(metadata.bool("neg").unwrap_err()), "metadata key 'neg' is i32, must be bool");
        assert_eq!(
            message(metadata.str("bigs").unwrap_err()),
            "metadata key 'bigs' is array of u32, must be string"
        );
        assert_eq!(
            message(metadata.str_array("text").unwrap_err()),
            "metadata key 'text' is string, must be array of string"
        );
        assert_eq!(
            message(metadata.f32_array("bigs").unwrap_err()),
            "metadata key 'bigs' is array of u32, must be array of f32"
        );
        assert_eq!(
            message(metadata.u32_array("neg").unwrap_err()),
            "metadata key 'neg' is i32, must be array of u32"
        );
    }

    #[test]
    fn a_required_key_must_be_there() {
        let mut metadata = Metadata::new();
        metadata.insert("name", "n");
        metadata.insert("scores", vec![0.5f32]);
        metadata.insert("tokens", vec!["a".to_owned()]);
        assert_eq!(metadata.require("name", Metadata::str).unwrap(), "n");
        assert_eq!(metadata.require("scores", Metadata::f32_array).unwrap(), [0.5]);
        assert_eq!(metadata.require("tokens", Metadata::str_array).unwrap(), ["a"]);
        assert_eq!(metadata.u32("absent").unwrap(), None);
        let error = metadata.require("absent", Metadata::u32).unwrap_err();
        assert_eq!(error.to_string(), "metadata key 'absent' is missing");
    }
}
