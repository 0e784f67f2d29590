//! JSON from untrusted files: bounded in size and depth, and no key twice in one object.

use std::{fmt, path::Path};

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use transnormer::error::{Error, ErrorKind, Result};

use super::source::read_small_file;

/// Reads the JSON object in the file `path`, which may not be larger than `limit` bytes.
///
/// # Errors
/// [`ErrorKind::Io`] where the file cannot be read; [`ErrorKind::Format`] where it is too large, nested
/// too deep, not JSON, not an object, or names a key twice.
pub fn read_object(path: &Path, limit: u64) -> Result<Map<String, Value>> {
    let bytes = read_small_file(path, limit)?;
    parse_object(&bytes).map_err(|error| error.context(path.display()))
}

/// Like [`read_object`], for bytes that are already in memory.
pub fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>> {
    // serde_json itself stops at 128 levels of nesting, so hostile depth cannot exhaust the stack.
    let strict: Strict = serde_json::from_slice(bytes)
        .map_err(|error| Error::new(ErrorKind::Format, format_args!("invalid JSON: {error}")))?;
    match strict.0 {
        Value::Object(map) => Ok(map),
        _ => Err(Error::new(ErrorKind::Format, "invalid JSON: the top level must be an object")),
    }
}

/// A JSON value in which no object repeats a key: of two values, a reader would silently keep one.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Strict(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(de::Error::custom(format_args!("key {key:?} appears twice")));
            }
            let Strict(value) = access.next_value()?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_serde_json_reads() {
        let text = r#"{"a": [1, -2, 0.5, true, null], "b": {"c": "x"}}"#;
        let plain: Value = serde_json::from_str(text).unwrap();
        assert_eq!(Value::Object(parse_object(text.as_bytes()).unwrap()), plain);
    }

    #[test]
    fn refuses_ambiguous_and_hostile_text() {
        let deep = format!("{{\"a\": {}{}}}", "[".repeat(1000), "]".repeat(1000));
        for (text, expected) in [
            (r#"{"a": 1, "a": 2}"#, "\"a\" appears twice"),
            (r#"{"b": {"a": 1, "a": 1}}"#, "\"a\" appears twice"),
            ("[1]", "must be an object"),
            ("{\"a\": 1", "EOF"),
            ("{} x", "trailing"),
            (deep.as_str(), "recursion limit"),
        ] {
            let error = parse_object(text.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Format);
            assert!(error.to_string().contains(expected), "{error}");
        }
        assert!(parse_object(b"{\"\xff\": 1}").is_err());
    }
}
