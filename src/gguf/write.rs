//! Writing a GGUF file as a stream. The file appears under its name complete, or not at all.

use std::path::Path;

use super::{Gguf, MAGIC, Metadata, ReadError, TensorInfo, VERSION, read, value::put_str};
use crate::{
    atomic_file::AtomicFile,
    dtype::DType,
    error::{Error, ErrorKind, Result},
};

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Unique name, 1 to 256 bytes.
    pub name: String,
    /// One to four lengths in ggml order, fastest first.
    pub shape: Vec<u64>,
    /// Element type; `shape[0]` must be a whole number of its blocks.
    pub dtype: DType,
}

/// Writes one GGUF file, tensor after tensor.
///
/// A crash, a full disk or a dropped writer leaves what was there before. A dropped writer removes its temporary
/// file; that of a killed process is removed when the same target is next written.
#[derive(Debug)]
pub struct Writer {
    out: AtomicFile,
    /// In file order, with the places that their data will take.
    tensors: Vec<TensorInfo>,
    /// Index of the tensor being written.
    current: usize,
    /// Bytes of the complete file.
    file_len: u64,
}

impl Writer {
    /// Starts a file with `metadata` and exactly `tensors`, whose data are to follow in this order.
    /// Data are aligned to 32 bytes, or to what `general.alignment` in `metadata` says.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) where [`Gguf::parse`] would refuse the result or
    /// `path` cannot name a file; [`Io`](ErrorKind::Io) where the temporary file cannot be made.
    pub fn create(path: &Path, metadata: &Metadata, tensors: &[TensorSpec]) -> Result<Self> {
        let invalid = |error| misuse(path, format_args!("cannot be written: {error}"));
        let (header, file_len) = plan(metadata, tensors).map_err(invalid)?;
        // Reading our own header back keeps every rule in one place: nothing is written that cannot be read.
        let gguf = Gguf::parse_header(&header, file_len).map_err(invalid)?;
        let out = AtomicFile::create(path)?;
        let mut writer = Self { out, tensors: gguf.tensors, current: 0, file_len };
        writer.out.write(&header)?;
        writer.pad_to(gguf.data_offset)?;
        Ok(writer)
    }

    /// Appends `bytes` to the data of the current tensor; when that is complete, the next one begins.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument), with nothing written, if the current tensor has not
    /// that much room or all tensors are complete; [`Io`](ErrorKind::Io), for example on a full disk, after
    /// which the file cannot be finished.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let Some(tensor) = self.tensors.get(self.current) else {
            return Err(misuse(self.out.target(), "data after the last tensor"));
        };
        let end = tensor.offset + tensor.nbytes;
        let room = end - self.out.position();
        if bytes.len() as u64 > room {
            let (name, len) = (&tensor.name, bytes.len());
            let what = format_args!("tensor '{name}' has room for {room} more bytes, got {len}");
            return Err(misuse(self.out.target(), what));
        }
        self.out.write(bytes)?;
        if self.out.position() == end {
            self.current += 1;
            let next = self.tensors.get(self.current).map_or(self.file_len, |tensor| tensor.offset);
            self.pad_to(next)?;
        }
        Ok(())
    }

    /// Puts the complete file under its name, durably, and returns its length in bytes.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) if data are missing, [`Io`](ErrorKind::Io) if the
    /// system refuses; either way the target is the old file or the complete new one.
    pub fn finish(self) -> Result<u64> {
        if let Some(TensorInfo { name, offset, nbytes, .. }) = self.tensors.get(self.current) {
            let missing = offset + nbytes - self.out.position();
            return Err(misuse(self.out.target(), format_args!("tensor '{name}' lacks {missing} bytes")));
        }
        self.out.finish()?;
        Ok(self.file_len)
    }

    /// Zeros up to `offset`, which is less than one alignment away.
    fn pad_to(&mut self, offset: u64) -> Result<()> {
        let zeros = vec![0; (offset - self.out.position()) as usize];
        self.out.write(&zeros)
    }
}

/// The header up to the last tensor entry, and the length of the complete file.
fn plan(metadata: &Metadata, tensors: &[TensorSpec]) -> Result<(Vec<u8>, u64), ReadError> {
    let alignment = read::alignment(metadata)?;
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        put_str(&mut header, key);
        value.encode(&mut header);
    }
    let mut data_len = 0u64;
    for TensorSpec { name, shape, dtype } in tensors {
        let nbytes = read::tensor_bytes(name, shape, *dtype)?;
        put_str(&mut header, name);
        header.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|len| header.extend(len.to_le_bytes()));
        header.extend(dtype.ggml_id().to_le_bytes());
        header.extend(data_len.to_le_bytes());
        // File lengths are signed in the system's calls; the margin also covers the header.
        data_len = data_len
            .checked_add(nbytes)
            .and_then(|end| end.checked_next_multiple_of(alignment))
            .filter(|&end| end <= i64::MAX as u64)
            .ok_or_else(|| ReadError::TensorTooLarge(name.clone()))?;
    }
    let data_offset = (header.len() as u64).next_multiple_of(alignment);
    Ok((header, data_offset + data_len))
}

fn misuse(target: &Path, what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidArgument, format_args!("{}: {what}", target.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::{collection::vec, prelude::*};

    use super::{super::Value, *};

    fn spec(name: &str, shape: &[u64], dtype: DType) -> TensorSpec {
        TensorSpec { name: name.to_owned(), shape: shape.to_vec(), dtype }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn any_value() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<u8>().prop_map(Value::from),
            any::<i8>().prop_map(Value::from),
            any::<u16>().prop_map(Value::from),
            any::<i16>().prop_map(Value::from),
            any::<u32>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            any::<f32>().prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
        ]
    }

    fn any_array() -> impl Strategy<Value = Value> {
        prop_oneof![
            vec(any::<u8>(), 0..9).prop_map(Value::from),
            vec(any::<i8>(), 0..9).prop_map(Value::from),
            vec(any::<u16>(), 0..9).prop_map(Value::from),
            vec(any::<i16>(), 0..9).prop_map(Value::from),
            vec(any::<u32>(), 0..9).prop_map(Value::from),
            vec(any::<i32>(), 0..9).prop_map(Value::from),
            vec(any::<f32>(), 0..9).prop_map(Value::from),
            vec(any::<bool>(), 0..9).prop_map(Value::from),
            vec(any::<String>(), 0..9).prop_map(Value::from),
            vec(any::<u64>(), 0..9).prop_map(Value::from),
            vec(any::<i64>(), 0..9).prop_map(Value::from),
            vec(any::<f64>(), 0..9).prop_map(Value::from),
        ]
    }

    prop_compose! {
        fn any_metadata()(
            entries in vec((".{1,20}", prop_oneof![any_value(), any_array()]), 0..12),
            alignment in proptest::option::of(3u32..=12),
        ) -> Metadata {
            let mut metadata = Metadata::new();
            entries.into_iter().for_each(|(key, value)| drop(metadata.insert(key, value)));
            alignment.into_iter().for_each(|a| drop(metadata.insert("general.alignment", 1u32 << a)));
            metadata
        }
    }

    prop_compose! {
        fn any_tensors()(
            tensors in vec((0..DType::ALL.len(), 1u64..3, vec(1u64..4, 0..4)), 0..6),
        ) -> Vec<TensorSpec> {
            let spec = |(i, (dtype, blocks, mut shape)): (usize, (usize, u64, Vec<u64>))| {
                let dtype = DType::ALL[dtype];
                shape.insert(0, blocks * dtype.block_len());
                TensorSpec { name: format!("tensor {i}"), shape, dtype }
            };
            tensors.into_iter().enumerate().map(spec).collect()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_written_is_read(metadata in any_metadata(), specs in any_tensors(), step in 1usize..200) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("m.gguf");
            let mut writer = Writer::create(&path, &metadata, &specs).unwrap();
            for (i, tensor) in writer.tensors.clone().iter().enumerate() {
                let data = vec![i as u8 + 1; tensor.nbytes as usize];
                data.chunks(step).for_each(|part| writer.write(part).unwrap());
            }
            let len = writer.finish().unwrap();
            let bytes = fs::read(&path).unwrap();
            prop_assert_eq!(len, bytes.len() as u64);
            let gguf = Gguf::parse(&bytes).unwrap();
            // Compared as text, in which a NaN equals itself.
            prop_assert_eq!(format!("{:?}", gguf.metadata), format!("{:?}", metadata));
            prop_assert_eq!(gguf.tensors.len(), specs.len());
            let mut untouched = bytes[gguf.data_offset as usize..].to_vec();
            for (i, (tensor, spec)) in gguf.tensors.iter().zip(&specs).enumerate() {
                prop_assert_eq!((&tensor.name, &tensor.shape), (&spec.name, &spec.shape));
                prop_assert_eq!(tensor.dtype, spec.dtype);
                prop_assert_eq!(tensor.offset % gguf.alignment, 0);
                let start = (tensor.offset - gguf.data_offset) as usize;
                let data = &mut untouched[start..][..tensor.nbytes as usize];
                prop_assert!(data.iter().all(|&byte| byte == i as u8 + 1));
                data.fill(0);
            }
            prop_assert!(untouched.iter().all(|&byte| byte == 0), "padding is zeros");
        }
    }

    #[test]
    fn the_target_changes_only_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        fs::write(&path, "old").unwrap();
        let specs = [spec("a", &[8], DType::F32), spec("b", &[2], DType::F32)];

        let mut writer = Writer::create(&path, &Metadata::new(), &specs).unwrap();
        writer.write(&[1; 32]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()).len(), 2, "the temporary file is beside the target");
        let error = writer.finish().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().ends_with("m.gguf: tensor 'b' lacks 8 bytes"), "{error}");
        assert_eq!(names(dir.path()), ["m.gguf"]);
        assert_eq!(fs::read(&path).unwrap(), b"old");

        let mut writer = Writer::create(&path, &Metadata::new(), &specs).unwrap();
        writer.write(&[1; 32]).unwrap();
        writer.write(&[2; 8]).unwrap();
        writer.finish().unwrap();
        assert_eq!(names(dir.path()), ["m.gguf"]);
        assert_eq!(Gguf::parse(&fs::read(&path).unwrap()).unwrap().tensors.len(), 2);
    }

    #[test]
    fn data_must_fit_the_tensor() {
        let dir = tempfile::tempdir().unwrap();
        let specs = [spec("a", &[2], DType::F32), spec("b", &[1], DType::F32)];
        let mut writer = Writer::create(&dir.path().join("m"), &Metadata::new(), &specs).unwrap();
        writer.write(&[0; 5]).unwrap();
        let error = writer.write(&[0; 4]).unwrap_err();
        assert!(error.to_string().ends_with("tensor 'a' has room for 3 more bytes, got 4"), "{error}");
        writer.write(&[0; 3]).unwrap();
        writer.write(&[]).unwrap();
        writer.write(&[0; 4]).unwrap();
        let error = writer.write(&[0]).unwrap_err();
        assert!(error.to_string().ends_with("data after the last tensor"), "{error}");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        writer.finish().expect("refused writes leave no trace");
    }

    #[test]
    fn what_the_reader_would_refuse_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let refused = |path: &Path, metadata: &Metadata, specs: &[TensorSpec]| {
            let error = Writer::create(path, metadata, specs).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert_eq!(names(dir.path()), [""; 0]);
            error.to_string()
        };
        let with = |key: &str, value: Value| {
            let mut metadata = Metadata::new();
            metadata.insert(key, value);
            metadata
        };
        let none = Metadata::new();
        let tensor = |name: &str, shape: &[u64], dtype| [spec(name, shape, dtype)];
        for (message, end) in [
            (refused(&path, &with("", 1u64.into()), &[]), "metadata key at byte 24 is empty"),
            (refused(&path, &with("general.alignment", 48u32.into()), &[]), "a power of two from 8 to 4096"),
            (refused(&path, &with("k", "x".repeat(1 << 21).into()), &[]), "at most 1048576 allowed"),
            (
                refused(&path, &none, &tensor("t", &[100], DType::Q8_0)),
                "not a multiple of the 32 of a Q8_0 block",
            ),
            (refused(&path, &none, &tensor("t", &[1; 5], DType::F32)), "has 5 dimensions, must be 1 to 4"),
            (refused(&path, &none, &tensor("", &[1], DType::F32)), "is empty"),
            (refused(&path, &none, &vec![spec("t", &[1], DType::F32); 2]), "tensor 't' occurs twice"),
            (refused(&path, &none, &[spec("a", &[1 << 31, 1 << 30], DType::F32)]), "tensor 'a' is too large"),
            (refused(dir.path(), &none, &[]), "is a directory"),
            (refused(&dir.path().join(".."), &none, &[]), "not a file name"),
        ] {
            assert!(message.ends_with(end), "{message}");
        }
        let error = Writer::create(&dir.path().join("no/m.gguf"), &none, &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
    }
}
