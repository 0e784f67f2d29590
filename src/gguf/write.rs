//! Writing a GGUF file as a stream. The file appears under its name complete, or not at all.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, OpenOptions, TryLockError},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use super::{Gguf, MAGIC, Metadata, ReadError, TensorInfo, VERSION, read, value::put_str};
use crate::{
    dtype::DType,
    error::{Error, ErrorKind, Result},
};

/// Temporary files are called `.NAME.RANDOM.tmp`, NAME being that of the target.
const TEMP_SUFFIX: &str = ".tmp";
const TEMP_RANDOM_LEN: usize = 12;

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
/// The bytes go to a temporary file beside the target, so that a crash, a full disk or a dropped writer
/// leaves what was there before. A dropped writer removes its temporary file; that of a killed process is
/// removed when the same target is next written.
#[derive(Debug)]
pub struct Writer {
    target: PathBuf,
    out: BufWriter<NamedTempFile>,
    /// In file order, with the places that their data will take.
    tensors: Vec<TensorInfo>,
    /// Index of the tensor being written.
    current: usize,
    /// Bytes written so far.
    position: u64,
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
        let name = path.file_name().ok_or_else(|| misuse(path, "not a file name"))?;
        if path.is_dir() {
            return Err(misuse(path, "is a directory"));
        }
        let dir = directory(path);
        remove_stale(dir, name);
        let temp = create_locked(dir, name).map_err(|error| Error::io(path, error))?;
        let mut writer = Self {
            target: path.to_owned(),
            out: BufWriter::with_capacity(1 << 20, temp),
            tensors: gguf.tensors,
            current: 0,
            position: 0,
            file_len,
        };
        writer.put(&header)?;
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
            return Err(misuse(&self.target, "data after the last tensor"));
        };
        let end = tensor.offset + tensor.nbytes;
        let room = end - self.position;
        if bytes.len() as u64 > room {
            let (name, len) = (&tensor.name, bytes.len());
            let what = format_args!("tensor '{name}' has room for {room} more bytes, got {len}");
            return Err(misuse(&self.target, what));
        }
        self.put(bytes)?;
        if self.position == end {
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
        let Self { target, out, tensors, current, position, file_len } = self;
        if let Some(TensorInfo { name, offset, nbytes, .. }) = tensors.get(current) {
            let missing = offset + nbytes - position;
            return Err(misuse(&target, format_args!("tensor '{name}' lacks {missing} bytes")));
        }
        publish(out, &target, file_len).map_err(|error| Error::io(&target, error))?;
        Ok(file_len)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|error| Error::io(&self.target, error))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// Zeros up to `offset`, which is less than one alignment away.
    fn pad_to(&mut self, offset: u64) -> Result<()> {
        let zeros = vec![0; (offset - self.position) as usize];
        self.put(&zeros)
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

/// Everything to disk, then the new name in one step, then the name to disk.
fn publish(out: BufWriter<NamedTempFile>, target: &Path, file_len: u64) -> io::Result<()> {
    let temp = out.into_inner()?;
    let written = temp.as_file().metadata()?.len();
    if written != file_len {
        // An earlier write failed half-way and the caller went on.
        return Err(io::Error::other(format!("{written} bytes reached the disk instead of {file_len}")));
    }
    temp.as_file().sync_all()?;
    temp.persist(target)?;
    #[cfg(unix)]
    fs::File::open(directory(target))?.sync_all()?;
    Ok(())
}

/// A new temporary file for the target `name` in `dir`, locked for as long as it is open.
fn create_locked(dir: &Path, name: &OsStr) -> io::Result<NamedTempFile> {
    const ATTEMPTS: usize = 16;
    let mut builder = tempfile::Builder::new();
    let prefix = temp_prefix(name);
    builder.prefix(&prefix).suffix(TEMP_SUFFIX).rand_bytes(TEMP_RANDOM_LEN);
    // The file becomes the target: it gets an ordinary file's permissions, not those of a private one.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    for _ in 0..ATTEMPTS {
        let temp = builder.tempfile_in(dir)?;
        match temp.as_file().try_lock() {
            Ok(()) if temp.path().try_exists()? => return Ok(temp),
            // Another writer of this target saw the file before it was locked, and took it for stale.
            Ok(()) | Err(TryLockError::WouldBlock) => {}
            // Without locks nothing is ever taken for stale.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => return Ok(temp),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "cannot lock a temporary file"))
}

/// Removes the temporary files of killed writers of this target: those that nobody holds a lock on.
/// What cannot be listed, opened or removed stays, as it does not stand in the way of the new file.
fn remove_stale(dir: &Path, name: &OsStr) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if !is_temp_of(&entry.file_name(), name) || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        if let Ok(file) = OpenOptions::new().write(true).open(entry.path())
            && file.try_lock().is_ok()
        {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn is_temp_of(file: &OsStr, name: &OsStr) -> bool {
    let random = file
        .as_encoded_bytes()
        .strip_prefix(temp_prefix(name).as_encoded_bytes())
        .and_then(|rest| rest.strip_suffix(TEMP_SUFFIX.as_bytes()));
    random.is_some_and(|r| r.len() == TEMP_RANDOM_LEN && r.iter().all(u8::is_ascii_alphanumeric))
}

fn temp_prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    prefix
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn misuse(target: &Path, what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidArgument, format_args!("{}: {what}", target.display()))
}

#[cfg(test)]
mod tests {
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

        // As after a write that failed half-way and was tried again.
        let mut writer = Writer::create(&path, &Metadata::new(), &specs).unwrap();
        writer.out.get_mut().write_all(b"stray").unwrap();
        writer.write(&[1; 32]).unwrap();
        writer.write(&[2; 8]).unwrap();
        assert_eq!(writer.finish().unwrap_err().kind(), ErrorKind::Io);
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

    #[test]
    fn a_killed_writers_file_is_removed_and_a_living_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let kept = [
            ".m.gguf.backup.tmp",        // not twelve characters
            ".m.gguf.abcdef.12345.tmp",  // not alphanumeric
            ".m.gguf.Abcdef123456.temp", // not our suffix
            ".n.gguf.Abcdef123456.tmp",  // another target
            "m.gguf.Abcdef123456.tmp",
        ];
        kept.iter().for_each(|name| fs::write(dir.path().join(name), "").unwrap());
        fs::write(dir.path().join(".m.gguf.Abcdef123456.tmp"), "half a model").unwrap();

        let specs = [spec("a", &[1], DType::F32)];
        let mut living = Writer::create(&path, &Metadata::new(), &specs).unwrap();
        assert!(!dir.path().join(".m.gguf.Abcdef123456.tmp").exists());
        let mut second = Writer::create(&path, &Metadata::new(), &specs).unwrap();
        second.write(&[2; 4]).unwrap();
        second.finish().unwrap();
        living.write(&[1; 4]).unwrap();
        living.finish().unwrap();

        let gguf = Gguf::parse(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(fs::read(&path).unwrap()[gguf.data_offset as usize..][..4], [1; 4], "the last one wins");
        let mut expected = kept.to_vec();
        expected.push("m.gguf");
        expected.sort();
        assert_eq!(names(dir.path()), expected);
    }

    #[cfg(unix)]
    #[test]
    fn the_file_has_ordinary_permissions() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("plain"), "").unwrap();
        Writer::create(&dir.path().join("m"), &Metadata::new(), &[]).unwrap().finish().unwrap();
        let permissions = |name| fs::metadata(dir.path().join(name)).unwrap().permissions();
        assert_eq!(permissions("m"), permissions("plain"));
    }
}
