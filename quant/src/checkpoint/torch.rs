//! PyTorch's `.bin` checkpoints: a zip file with one pickle and one stored entry for each storage.

use std::collections::HashMap;

use transnormer::error::{Error, ErrorKind, Result};

use super::{
    pickle::{self, PickledTensor},
    source::{SourceFile, SourceTensor, element_count},
    zip::{self, Entry},
};

/// Size limit of `data.pkl`; that of a 7B shard has some tens of kilobytes.
const MAX_PICKLE: u64 = 8 << 20;

/// Every tensor of `file`, the checkpoint's file number `index`. Nothing of the file is executed. Tied
/// tensors are two entries with the same bytes.
///
/// # Errors
/// One line that names the file: not a zip file of `torch.save`, a pickle that asks for anything but
/// tensors, a storage that is missing or short, elements that are not F32, F16 or BF16.
pub fn read(file: &SourceFile, index: usize) -> Result<Vec<SourceTensor>> {
    check_magic(file)?;
    let entries = zip::read(file)?;
    let prefix = archive_prefix(file, &entries)?;
    let entry = |name: &str| entries.get(&format!("{prefix}{name}"));
    if let Some(order) = entry("byteorder")
        && (order.len != 6 || file.read_vec_at(order.offset, order.len)? != b"little")
    {
        return Err(file.error("byteorder is not \"little\": save the checkpoint on a little-endian machine"));
    }
    let pickle = entry("data.pkl").expect("archive_prefix found data.pkl");
    if pickle.len > MAX_PICKLE {
        return Err(
            file.error(format_args!("data.pkl has {} bytes, more than {MAX_PICKLE} allowed", pickle.len))
        );
    }
    let code = file.read_vec_at(pickle.offset, pickle.len)?;
    let tensors = pickle::state_dict(&code)
        .map_err(|error| error.context(format_args!("{}: data.pkl", file.path().display())))?;
    tensors
        .into_iter()
        .map(|(name, tensor)| {
            let storage = entry(&format!("data/{}", tensor.storage_key));
            locate(&tensor, storage)
                .map(|(offset, elements)| {
                    let PickledTensor { dtype, shape, .. } = tensor;
                    SourceTensor { name: name.clone(), shape, dtype, file: index, offset, elements }
                })
                .map_err(|message| file.error(format_args!("tensor {name:?} {message}")))
        })
        .collect()
}

fn check_magic(file: &SourceFile) -> Result<()> {
    let start = file.read_vec_at(0, file.size().min(2))?;
    match start[..] {
        [b'P', b'K'] => Ok(()),
        [0x80, _] => Err(Error::new(
            ErrorKind::Unsupported,
            format_args!(
                "{}: the torch format from before 2020: load it and torch.save it again",
                file.path().display()
            ),
        )),
        _ => Err(file.error("not a PyTorch checkpoint (no zip signature)")),
    }
}

/// What stands before `data.pkl` in every entry name: `archive/`, the file's stem, or nothing.
fn archive_prefix<'a>(file: &SourceFile, entries: &'a HashMap<String, Entry>) -> Result<&'a str> {
    let mut prefixes = entries.keys().filter_map(|name| {
        name.strip_suffix("data.pkl").filter(|prefix| prefix.is_empty() || prefix.ends_with('/'))
    });
    match (prefixes.next(), prefixes.next()) {
        (Some(prefix), None) => Ok(prefix),
        (Some(_), Some(_)) => Err(file.error("more than one data.pkl")),
        (None, _) => Err(file.error("no data.pkl: not written by torch.save")),
    }
}

/// Position of the tensor's first byte in the file, and its number of elements.
fn locate(tensor: &PickledTensor, storage: Option<&Entry>) -> Result<(u64, u64), String> {
    let PickledTensor { storage_key, dtype, storage_len, offset, shape, strides } = tensor;
    let storage = storage.ok_or_else(|| format!("has no storage: entry data/{storage_key:?} is missing"))?;
    let elements =
        element_count(shape, *dtype).ok_or_else(|| format!("has an impossible shape {shape:?}"))?;
    if !is_contiguous(shape, strides) {
        return Err(format!("is not contiguous (strides {strides:?}): save it with .contiguous()"));
    }
    let size = dtype.block_bytes();
    if storage_len.checked_mul(size) != Some(storage.len) {
        let len = storage.len;
        return Err(format!("has {len} bytes of storage, {storage_len} {dtype} elements were promised"));
    }
    if offset.checked_add(elements).is_none_or(|end| end > *storage_len) {
        return Err(format!("of shape {shape:?} reaches beyond its storage of {storage_len} elements"));
    }
    Ok((storage.offset + offset * size, elements))
}

/// Whether the elements follow each other in row-major order; the stride of a dimension of 1 means nothing.
fn is_contiguous(shape: &[u64], strides: &[u64]) -> bool {
    let mut expected = 1_u64;
    shape.iter().zip(strides).rev().all(|(&dim, &stride)| {
        let fits = dim == 1 || stride == expected;
        expected = expected.saturating_mul(dim);
        fits
    })
}

#[cfg(test)]
mod tests {
    use transnormer::dtype::DType;

    use super::*;
    use crate::checkpoint::zip::fixture::zip_with;

    #[test]
    fn strides_of_single_elements_do_not_matter() {
        assert!(is_contiguous(&[2, 1, 3], &[3, 77, 1]));
        assert!(is_contiguous(&[], &[]));
        assert!(!is_contiguous(&[2, 3], &[1, 2]));
        assert!(!is_contiguous(&[2, 3], &[0, 1]));
    }

    #[test]
    fn tensors_stay_inside_their_storage() {
        let tensor = PickledTensor {
            storage_key: "0".into(),
            dtype: DType::F16,
            storage_len: 10,
            offset: 4,
            shape: vec![2, 3],
            strides: vec![3, 1],
        };
        let storage = Entry { offset: 100, len: 20 };
        assert_eq!(locate(&tensor, Some(&storage)), Ok((108, 6)));
        let beyond = PickledTensor { offset: 5, ..tensor.clone() };
        assert!(locate(&beyond, Some(&storage)).unwrap_err().contains("beyond its storage"));
        let overflow = PickledTensor { offset: u64::MAX, ..tensor.clone() };
        assert!(locate(&overflow, Some(&storage)).unwrap_err().contains("beyond its storage"));
        assert!(
            locate(&tensor, Some(&Entry { offset: 100, len: 19 }))
                .unwrap_err()
                .contains("19 bytes of storage")
        );
        assert!(locate(&tensor, None).unwrap_err().contains("data/\"0\" is missing"));
        let transposed = PickledTensor { strides: vec![1, 2], ..tensor };
        assert!(locate(&transposed, Some(&storage)).unwrap_err().contains("not contiguous"));
    }

    #[test]
    fn refuses_files_that_torch_did_not_write() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pytorch_model.bin");
        for (bytes, expected) in [
            (b"".to_vec(), "not a PyTorch checkpoint"),
            (b"\x80\x02abc".to_vec(), "before 2020"),
            (zip_with(&[("a/b", b"")], |_, _| {}), "no data.pkl"),
            (zip_with(&[("a/data.pkl", b""), ("b/data.pkl", b"")], |_, _| {}), "more than one data.pkl"),
            (zip_with(&[("a/data.pkl", b""), ("a/byteorder", b"big")], |_, _| {}), "byteorder is not"),
            (
                zip_with(&[("a/data.pkl", b"\x80\x02cos\nsystem\n.")], |_, _| {}),
                "data.pkl: refused: the pickle calls \"os.system\"",
            ),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = read(&SourceFile::open(&path).unwrap(), 0).unwrap_err().to_string();
            assert!(error.contains("pytorch_model.bin") && error.contains(expected), "{expected}: {error}");
        }
    }
}
