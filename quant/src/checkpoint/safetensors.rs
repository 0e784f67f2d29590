//! The header of a safetensors file.

use safetensors::{Dtype, tensor::Metadata};
use transnormer::{dtype::DType, error::Result};

use super::{
    json,
    source::{SourceFile, SourceTensor, element_count},
};

/// Size limit of the header; that of a 7B shard has about ten kilobytes.
const MAX_HEADER: u64 = 8 << 20;

/// Every tensor of `file`, the checkpoint's file number `index`.
///
/// # Errors
/// One line that names the file: header too large or no JSON, a name twice, offsets that overlap or leave
/// a hole, a file that is shorter or longer than its header says, elements that are not F32, F16 or BF16.
pub fn read(file: &SourceFile, index: usize) -> Result<Vec<SourceTensor>> {
    let mut prefix = [0; 8];
    file.read_exact_at(0, &mut prefix)?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER {
        return Err(file.error(format_args!(
            "the header claims {header_len} bytes, more than the {MAX_HEADER} allowed: not a safetensors file?"
        )));
    }
    let header = file.read_vec_at(8, header_len)?;
    let object = json::parse_object(&header).map_err(|error| error.context(file.path().display()))?;
    // Checks that offsets follow each other without overlap or hole and agree with the shapes.
    let metadata: Metadata = serde_json::from_value(object.into())
        .map_err(|error| file.error(format_args!("invalid header: {error}")))?;

    let data_start = 8 + header_len;
    let (found, needed) = (file.size() - data_start, metadata.data_len() as u64);
    if found != needed {
        return Err(file.error(format_args!(
            "the header describes {needed} bytes of tensors, the file holds {found}: download it again"
        )));
    }
    metadata
        .offset_keys()
        .into_iter()
        .map(|name| {
            let info = metadata.info(&name).expect("offset_keys lists the names of the header");
            let dtype = element_type(info.dtype).ok_or_else(|| {
                file.error(format_args!(
                    "tensor {name:?} has {:?} elements, not F32, F16 or BF16",
                    info.dtype
                ))
            })?;
            let shape: Vec<u64> = info.shape.iter().map(|&dim| dim as u64).collect();
            let elements = element_count(&shape, dtype).ok_or_else(|| {
                file.error(format_args!("tensor {name:?} has an impossible shape {shape:?}"))
            })?;
            let offset = data_start + info.data_offsets.0 as u64;
            Ok(SourceTensor { name, shape, dtype, file: index, offset, elements })
        })
        .collect()
}

fn element_type(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_bytes(bytes: &[u8]) -> Result<Vec<SourceTensor>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, bytes).unwrap();
        read(&SourceFile::open(&path).unwrap(), 7)
    }

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn lists_tensors_with_absolute_offsets() {
        let header = r#"{"__metadata__": {"format": "pt"},
            "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [4, 16]},
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#;
        let tensors = read_bytes(&file(header, 16)).unwrap();
        assert_eq!(tensors.iter().map(|tensor| tensor.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((tensors[1].dtype, tensors[1].elements, tensors[1].file), (DType::BF16, 6, 7));
        let start = 8 + header.len() as u64;
        assert_eq!(tensors[1].range(), start + 4..start + 16);
    }

    #[test]
    fn refuses_damaged_headers() {
        let one = |offsets: &str| {
            format!("{{\"a\": {{\"dtype\": \"F32\", \"shape\": [1], \"data_offsets\": {offsets}}}}}")
        };
        let twice = r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#;
        for (bytes, expected) in [
            (vec![1, 2, 3], "ends early"),
            (u64::MAX.to_le_bytes().to_vec(), "header claims"),
            (1000_u64.to_le_bytes().to_vec(), "ends early"),
            (file("[]", 0), "must be an object"),
            (file(twice, 4), "\"a\" appears twice"),
            (file(&one("[0, 4]"), 3), "describes 4 bytes of tensors, the file holds 3"),
            (file(&one("[0, 4]"), 5), "the file holds 5"),
            (file(&one("[0, 8]"), 8), "invalid header"),
            (file(&one("[4, 8]"), 8), "invalid header"),
            (file(&one("[8, 4]"), 8), "invalid header"),
            (file(&one("[0, 4]").replace("F32", "I32"), 4), "has I32 elements"),
            (file(&one("[0, 4]").replace("[1]", "[9223372036854775807, 9]"), 4), "invalid header"),
        ] {
            let error = read_bytes(&bytes).unwrap_err().to_string();
            assert!(error.contains("model.safetensors") && error.contains(expected), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
