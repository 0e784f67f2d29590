//! Bounded reads of checkpoint files, and where a tensor lies in them.

use std::{
    fs::File,
    io::{ErrorKind as IoErrorKind, Read, Seek, SeekFrom},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use transnormer::{
    dtype::DType,
    error::{Error, ErrorKind, Result},
};

/// One tensor of a checkpoint: what it is called, and where its elements lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceTensor {
    /// Name in the checkpoint, for example `model.embed_tokens.weight`.
    pub name: String,
    /// Dimensions, slowest first (row-major), as PyTorch prints them.
    pub shape: Vec<u64>,
    /// Element type: `F32`, `F16` or `BF16`.
    pub dtype: DType,
    /// Index into [`super::Checkpoint::files`].
    pub file: usize,
    /// Position of the first byte in that file.
    pub offset: u64,
    /// Number of elements: the product of `shape`, checked when the checkpoint was opened.
    pub elements: u64,
}

impl SourceTensor {
    /// The bytes of the tensor in its file.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.elements * self.dtype.block_bytes()
    }
}

/// An open checkpoint file. Reads are positioned and bounded by the length found when it was opened, so a
/// file that shrinks afterwards gives an error, where a mapped one would give a signal.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    len: u64,
    file: Mutex<File>,
}

impl SourceFile {
    /// Opens `path` for reading.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the file is missing, unreadable, or not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, len) = transnormer::open_regular(path)?;
        Ok(Self { path: path.to_owned(), len, file: Mutex::new(file) })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes when the file was opened.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Fills `buffer` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] where the file ends first; [`ErrorKind::Io`] where the system refuses.
    pub fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(self.truncated());
        }
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(offset)).map_err(|source| Error::io(&self.path, source))?;
        file.read_exact(buffer).map_err(|source| match source.kind() {
            IoErrorKind::UnexpectedEof => self.truncated(),
            _ => Error::io(&self.path, source),
        })
    }

    /// The `len` bytes from `offset` on. The file's own length bounds the allocation.
    ///
    /// # Errors
    /// As [`SourceFile::read_exact_at`].
    pub fn read_vec_at(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        let len = usize::try_from(len).ok().filter(|_| fits).ok_or_else(|| self.truncated())?;
        let mut bytes = vec![0; len];
        self.read_exact_at(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// A [`ErrorKind::Format`] error about this file.
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        format_error(&self.path, message)
    }

    fn truncated(&self) -> Error {
        self.error(format_args!("the file ends early, after {} bytes: download it again", self.len))
    }
}

/// A [`ErrorKind::Format`] error about the file `path`.
pub fn format_error(path: &Path, message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Format, format_args!("{}: {message}", path.display()))
}

/// The whole of a file that should be small: at most `limit` bytes.
///
/// # Errors
/// [`ErrorKind::Io`] where it cannot be read, [`ErrorKind::Format`] where it is larger.
pub fn read_small_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = SourceFile::open(path)?;
    if file.size() > limit {
        return Err(file.error(format_args!("{} bytes, more than the {limit} allowed", file.size())));
    }
    file.read_vec_at(0, file.size())
}

/// Number of elements of `shape`, if it and the bytes it takes stay far from overflow.
pub fn element_count(shape: &[u64], dtype: DType) -> Option<u64> {
    let elements = shape.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim))?;
    elements.checked_mul(dtype.block_bytes()).filter(|&bytes| bytes <= i64::MAX as u64)?;
    Some(elements)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_stay_inside_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"0123456789").unwrap();
        let file = SourceFile::open(&path).unwrap();
        assert_eq!(file.read_vec_at(8, 2).unwrap(), b"89");
        for (offset, len) in [(8, 3), (11, 0), (u64::MAX, 1), (0, u64::MAX)] {
            let error = file.read_vec_at(offset, len).unwrap_err();
            assert!(error.to_string().contains("ends early"), "{error}");
        }
        std::fs::write(&path, b"0123").unwrap();
        let error = file.read_vec_at(2, 8).unwrap_err();
        assert!(error.to_string().contains("ends early"), "a file that shrank is an error: {error}");
        assert!(SourceFile::open(dir.path()).unwrap_err().to_string().contains("not a regular file"));
    }

    #[test]
    fn small_files_are_small() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [0; 11]).unwrap();
        assert_eq!(read_small_file(&path, 11).unwrap().len(), 11);
        assert_eq!(read_small_file(&path, 10).unwrap_err().kind(), ErrorKind::Format);
    }

    #[test]
    fn element_counts_do_not_overflow() {
        assert_eq!(element_count(&[3, 4], DType::F16), Some(12));
        assert_eq!(element_count(&[], DType::F32), Some(1));
        assert_eq!(element_count(&[1 << 40, 1 << 40], DType::F32), None);
        assert_eq!(element_count(&[1 << 62], DType::F32), None);
    }
}
