//! What the user gets to see of a plan or a finished conversion: a table, or one line of JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::plan::{Plan, PlannedTensor};

/// The table of all tensors, with totals.
pub fn table(plan: &Plan) -> String {
    let shapes: Vec<String> = plan.tensors.iter().map(shape).collect();
    let name_width =
        plan.tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0).max("tensor".len());
    let shape_width = shapes.iter().map(String::len).max().unwrap_or(0).max("shape".len());
    let mut text = format!(
        "{:name_width$}  {:>shape_width$}  {:4}  {:4}  {:>13}\n",
        "tensor", "shape", "from", "to", "bytes"
    );
    for (tensor, shape) in plan.tensors.iter().zip(&shapes) {
        let PlannedTensor { name, source, dtype, bytes, .. } = tensor;
        let note = fallback_note(tensor).map(|note| format!("  {note}")).unwrap_or_default();
        let from = source.dtype;
        let _ = writeln!(
            text,
            "{name:name_width$}  {shape:>shape_width$}  {from:4}  {dtype:4}  {bytes:>13}{note}"
        );
    }
    let _ = writeln!(
        text,
        "{} tensors, {} parameters, {} bytes, {:.2} bits per weight",
        plan.tensors.len(),
        plan.parameters(),
        plan.bytes(),
        plan.bits_per_weight()
    );
    text
}

/// The same as one JSON object. `file_bytes` is the size of the file, if one was written.
pub fn json(plan: &Plan, file_bytes: Option<u64>) -> Value {
    let tensors: Vec<Value> = plan
        .tensors
        .iter()
        .map(|tensor| {
            json!({
                "name": tensor.name,
                "source": tensor.source.name,
                "shape": tensor.shape,
                "from": tensor.source.dtype.name(),
                "to": tensor.dtype.name(),
                "bytes": tensor.bytes,
                "fallback": fallback_note(tensor),
            })
        })
        .collect();
    json!({
        "type": plan.preset.name(),
        "parameters": plan.parameters(),
        "tensor_bytes": plan.bytes(),
        "file_bytes": file_bytes,
        "bits_per_weight": plan.bits_per_weight(),
        "tensors": tensors,
    })
}

/// Why a tensor has another type than the policy wants.
fn fallback_note(tensor: &PlannedTensor) -> Option<String> {
    let PlannedTensor { wanted, dtype, .. } = tensor;
    (wanted != dtype).then(|| {
        let (row, block) = (tensor.row_len(), wanted.block_len());
        format!("fallback: rows of {row} are not whole blocks of {block} for {wanted}")
    })
}

fn shape(tensor: &PlannedTensor) -> String {
    tensor.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ")
}
