//! The bytes of a model file: mapped, or read into memory.

use std::{fs::File, ops::Deref, path::Path};

use crate::error::{Error, ErrorKind, Result};

/// How a model file gets into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadMode {
    /// Map the file: pages are read when needed, shared between processes, and given back under memory
    /// pressure. The file must not be changed or shortened while the model is in use: the results are then wrong,
    /// or the system kills the process. Replacing it by another file of that name is safe.
    #[default]
    Map,
    /// Read the file into memory: for storage that others can change.
    Heap,
}

/// An immutable file image.
#[derive(Debug)]
pub struct Mapping {
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Mapped(memmap2::Mmap),
    Heap(Vec<u8>),
}

impl Mapping {
    /// Opens `path`. Errors with [`ErrorKind::Io`] naming the file.
    pub fn open(path: &Path, mode: LoadMode) -> Result<Self> {
        let io = |source| Error::io(path, source);
        let (file, len) = open_regular(path)?;
        let bytes = match mode {
            LoadMode::Map if len > 0 => {
                // SAFETY: the file is only read; that it must not shrink is stated in LoadMode::Map.
                let map = unsafe { memmap2::Mmap::map(&file) };
                Bytes::Mapped(map.map_err(io)?)
            }
            _ => read(file, len).map_err(io)?,
        };
        Ok(Self { bytes })
    }

    /// A file image that is in memory already.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { bytes: Bytes::Heap(bytes) }
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Heap(bytes) => bytes,
        }
    }
}

/// Opens a regular file for reading; returns it and its length. Anything else is refused with [`ErrorKind::Io`].
pub fn open_regular(path: &Path) -> Result<(File, u64)> {
    let io = |source| Error::io(path, source);
    // Looked at before it is opened: opening a pipe waits for its other end.
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(Error::new(ErrorKind::Io, format_args!("{}: not a regular file", path.display())));
    }
    let file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    Ok((file, len))
}

fn read(mut file: File, len: u64) -> std::io::Result<Bytes> {
    use std::io::{Error, ErrorKind, Read};
    let len = usize::try_from(len).map_err(|_| Error::from(ErrorKind::OutOfMemory))?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| Error::from(ErrorKind::OutOfMemory))?;
    bytes.resize(len, 0);
    file.read_exact(&mut bytes)?;
    Ok(Bytes::Heap(bytes))
}
