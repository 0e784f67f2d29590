//! `tn inspect`: what a GGUF file holds.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
};

use serde_json::json;
use transnormer::{
    LoadMode, Mapping,
    gguf::{Array, Gguf, TensorInfo, Value},
};

use crate::shared::{Bytes, Failure, count, exists};

/// Shows metadata and tensors of any GGUF file
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// GGUF file, of any architecture
    file: PathBuf,

    /// List the tensors
    #[arg(long)]
    tensors: bool,

    /// Everything as JSON, arrays in full
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  tn inspect model.gguf
  tn inspect model.gguf --tensors
  tn inspect model.gguf --json | jq '.metadata[\"general.name\"]'";

/// Elements of an array, and characters of a string, that the table shows.
const SHOWN_ELEMENTS: usize = 6;
const SHOWN_CHARS: usize = 80;

pub fn run(args: &Args) -> Result<(), Failure> {
    exists(&args.file)?;
    let file = Mapping::open(&args.file, LoadMode::Map)?;
    let named = |e: transnormer::Error| Failure::from(e.context(args.file.display()));
    let gguf = Gguf::parse(&file).map_err(|e| named(e.into()))?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    if args.json {
        serde_json::to_writer_pretty(&mut out, &document(args, &gguf, file.len()))
            .map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        overview(args, &gguf, file.len(), &mut out)?;
    }
    Ok(out.flush()?)
}

fn overview(args: &Args, gguf: &Gguf, file_len: usize, out: &mut impl Write) -> io::Result<()> {
    let tensors = &gguf.tensors;
    writeln!(out, "file         {}", args.file.display())?;
    writeln!(out, "size         {} ({file_len} bytes)", Bytes(file_len as u64))?;
    writeln!(out, "format       GGUF version {}, alignment {}", gguf.version, gguf.alignment)?;
    writeln!(out, "parameters   {}", count(parameters(tensors)))?;
    if let Some(bits) = bits_per_weight(tensors) {
        writeln!(out, "bits/weight  {bits:.3}")?;
    }
    let mut types = BTreeMap::new();
    for tensor in tensors {
        let entry: &mut (usize, u64) = types.entry(tensor.dtype.name()).or_default();
        *entry = (entry.0 + 1, entry.1 + tensor.nbytes);
    }
    for (name, (n, bytes)) in types {
        writeln!(out, "type         {name}: {n} tensors, {}", Bytes(bytes))?;
    }

    writeln!(out, "\nmetadata ({})", gguf.metadata.len())?;
    let width = gguf.metadata.iter().map(|(key, _)| key.len()).max().unwrap_or(0).min(48);
    for (key, value) in gguf.metadata.iter() {
        writeln!(
            out,
            "  {:<width$}  {:<15}  {}",
            key.escape_debug().to_string(),
            value.type_name(),
            show(value)
        )?;
    }
    if args.tensors {
        table(tensors, out)?;
    }
    Ok(())
}

fn table(tensors: &[TensorInfo], out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\ntensors ({})", tensors.len())?;
    let width = tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0).min(48);
    for tensor in tensors {
        let shape = tensor.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
        let (name, dtype, bytes) =
            (tensor.name.escape_debug().to_string(), tensor.dtype, Bytes(tensor.nbytes));
        writeln!(out, "  {name:<width$}  {shape:<16}  {:<8}  {bytes:>12}", dtype.name())?;
    }
    Ok(())
}

fn document(args: &Args, gguf: &Gguf, file_len: usize) -> serde_json::Value {
    let metadata: serde_json::Map<_, _> =
        gguf.metadata.iter().map(|(key, value)| (key.to_owned(), to_json(value))).collect();
    let tensors: Vec<_> = gguf
        .tensors
        .iter()
        .map(|tensor| {
            json!({
                "name": tensor.name, "shape": tensor.shape, "type": tensor.dtype.name(),
                "offset": tensor.offset, "bytes": tensor.nbytes,
            })
        })
        .collect();
    json!({
        "file": args.file.display().to_string(),
        "bytes": file_len,
        "version": gguf.version,
        "alignment": gguf.alignment,
        "parameters": parameters(&gguf.tensors),
        "bits_per_weight": bits_per_weight(&gguf.tensors),
        "metadata": metadata,
        "tensors": tensors,
    })
}

fn parameters(tensors: &[TensorInfo]) -> u64 {
    // Products cannot overflow in a checked file: it holds the bytes of every element.
    tensors.iter().map(|tensor| tensor.shape.iter().product::<u64>()).sum()
}

fn bits_per_weight(tensors: &[TensorInfo]) -> Option<f64> {
    let bytes: u64 = tensors.iter().map(|tensor| tensor.nbytes).sum();
    (!tensors.is_empty()).then(|| bytes as f64 * 8.0 / parameters(tensors) as f64)
}

/// Evaluates `$body` with `$values` bound to the vector in an array of any type.
macro_rules! with_elements {
    ($array:expr, $values:ident => $body:expr) => {
        match $array {
            Array::U8($values) => $body,
            Array::I8($values) => $body,
            Array::U16($values) => $body,
            Array::I16($values) => $body,
            Array::U32($values) => $body,
            Array::I32($values) => $body,
            Array::F32($values) => $body,
            Array::Bool($values) => $body,
            Array::String($values) => $body,
            Array::U64($values) => $body,
            Array::I64($values) => $body,
            Array::F64($values) => $body,
        }
    };
}

/// One line for people, without control characters whatever the file holds.
fn show(value: &Value) -> String {
    match value {
        Value::Array(array) => {
            let first: Vec<String> = with_elements!(array, values => {
                values.iter().take(SHOWN_ELEMENTS).cloned().map(|value| show(&value.into())).collect()
            });
            let more = if array.len() > SHOWN_ELEMENTS { ", …" } else { "" };
            format!("{} [{}{more}]", array.len(), first.join(", "))
        }
        Value::String(text) => {
            let more = if text.chars().nth(SHOWN_CHARS).is_some() { "…" } else { "" };
            let shown: String = text.chars().take(SHOWN_CHARS).collect();
            format!("\"{}\"{more}", shown.escape_debug())
        }
        Value::U8(x) => x.to_string(),
        Value::I8(x) => x.to_string(),
        Value::U16(x) => x.to_string(),
        Value::I16(x) => x.to_string(),
        Value::U32(x) => x.to_string(),
        Value::I32(x) => x.to_string(),
        Value::F32(x) => x.to_string(),
        Value::Bool(x) => x.to_string(),
        Value::U64(x) => x.to_string(),
        Value::I64(x) => x.to_string(),
        Value::F64(x) => x.to_string(),
    }
}

fn to_json(value: &Value) -> serde_json::Value {
    match value {
        Value::Array(array) => with_elements!(array, values => {
            values.iter().cloned().map(|value| to_json(&value.into())).collect()
        }),
        Value::String(text) => json!(text),
        Value::U8(x) => json!(x),
        Value::I8(x) => json!(x),
        Value::U16(x) => json!(x),
        Value::I16(x) => json!(x),
        Value::U32(x) => json!(x),
        Value::I32(x) => json!(x),
        // By way of decimals: 0.1 in f32 is to stay 0.1.
        Value::F32(x) => json!(x.to_string().parse::<f64>().ok()),
        Value::Bool(x) => json!(x),
        Value::U64(x) => json!(x),
        Value::I64(x) => json!(x),
        Value::F64(x) => json!(x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_short_and_printable() {
        assert_eq!(show(&"a\u{1b}[2Jb\n".into()), r#""a\u{1b}[2Jb\n""#);
        assert_eq!(show(&Value::from(vec![1u8; 9])), "9 [1, 1, 1, 1, 1, 1, …]");
        assert_eq!(show(&Value::from("x".repeat(100).as_str())).chars().count(), SHOWN_CHARS + 3);
    }

    #[test]
    fn json_keeps_values() {
        assert_eq!(to_json(&0.1f32.into()).to_string(), "0.1");
        assert_eq!(to_json(&f32::NAN.into()), serde_json::Value::Null);
        assert_eq!(to_json(&u64::MAX.into()).to_string(), u64::MAX.to_string());
        assert_eq!(to_json(&vec!["a".to_owned()].into()).to_string(), r#"["a"]"#);
    }
}
