//! Files that appear under their name complete, or not at all.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, OpenOptions, TryLockError},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use crate::error::{Error, ErrorKind, Result};

/// Temporary files are called `.NAME.RANDOM.tmp`, NAME being that of the target.
const TEMP_SUFFIX: &str = ".tmp";
const TEMP_RANDOM_LEN: usize = 12;

/// A file being written.
///
/// The bytes go to a temporary file beside the target, so that a crash or a full disk leaves what was there
/// before. Dropped, it removes its temporary file; that of a killed process is removed when the same target
/// is next written.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    target: PathBuf,
    out: BufWriter<NamedTempFile>,
    position: u64,
}

impl AtomicFile {
    /// Starts a file that is to replace what is at `path`, if anything.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) if `path` cannot name a file; [`Io`](ErrorKind::Io)
    /// where the temporary file cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        let invalid =
            |what| Error::new(ErrorKind::InvalidArgument, format_args!("{}: {what}", path.display()));
        let name = path.file_name().ok_or_else(|| invalid("not a file name"))?;
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => return Err(invalid("is a directory")),
            // A device, a pipe or a socket must not be replaced by a file.
            Ok(metadata) if !metadata.is_file() => return Err(invalid("not a regular file")),
            _ => {}
        }
        let dir = directory(path);
        if !dir.is_dir() {
            return Err(Error::new(ErrorKind::Io, format_args!("{}: no such folder", dir.display())));
        }
        remove_stale(dir, name);
        let temp = create_locked(dir, name).map_err(|error| Error::io(path, error))?;
        Ok(Self { target: path.to_owned(), out: BufWriter::with_capacity(1 << 20, temp), position: 0 })
    }

    /// Appends `bytes`. After an error the file cannot be finished.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|error| Error::io(&self.target, error))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// Puts the file under its name, durably. On an error the target is the old file or the complete new one.
    pub fn finish(self) -> Result<()> {
        let Self { target, out, position } = self;
        publish(out, &target, position).map_err(|error| Error::io(&target, error))
    }

    /// Bytes written so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The name that the file will have.
    pub fn target(&self) -> &Path {
        &self.target
    }
}

/// Everything to disk, then the new name in one step, then the name to disk.
fn publish(out: BufWriter<NamedTempFile>, target: &Path, len: u64) -> io::Result<()> {
    let temp = out.into_inner()?;
    let written = temp.as_file().metadata()?.len();
    if written != len {
        // An earlier write failed half-way and the caller went on.
        return Err(io::Error::other(format!("{written} bytes reached the disk instead of {len}")));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_target_changes_only_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "old").unwrap();

        let mut file = AtomicFile::create(&path).unwrap();
        file.write(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()).len(), 2, "the temporary file is beside the target");
        drop(file);
        assert_eq!((names(dir.path()), fs::read(&path).unwrap()), (vec!["f".to_owned()], b"old".to_vec()));

        // As after a write that failed half-way and was tried again.
        let mut file = AtomicFile::create(&path).unwrap();
        file.out.get_mut().write_all(b"stray").unwrap();
        file.write(b"new").unwrap();
        assert_eq!(file.finish().unwrap_err().kind(), ErrorKind::Io);
        assert_eq!((names(dir.path()), fs::read(&path).unwrap()), (vec!["f".to_owned()], b"old".to_vec()));

        let mut file = AtomicFile::create(&path).unwrap();
        file.write(b"ne").unwrap();
        file.write(b"w").unwrap();
        assert_eq!(file.position(), 3);
        file.finish().unwrap();
        assert_eq!((names(dir.path()), fs::read(&path).unwrap()), (vec!["f".to_owned()], b"new".to_vec()));
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
        fs::write(dir.path().join(".m.gguf.Abcdef123456.tmp"), "half a file").unwrap();

        let mut living = AtomicFile::create(&path).unwrap();
        assert!(!dir.path().join(".m.gguf.Abcdef123456.tmp").exists());
        let mut second = AtomicFile::create(&path).unwrap();
        second.write(b"second").unwrap();
        second.finish().unwrap();
        living.write(b"living").unwrap();
        living.finish().unwrap();

        assert_eq!(fs::read(&path).unwrap(), b"living", "the last one wins");
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
        AtomicFile::create(&dir.path().join("m")).unwrap().finish().unwrap();
        let permissions = |name| fs::metadata(dir.path().join(name)).unwrap().permissions();
        assert_eq!(permissions("m"), permissions("plain"));
    }
}
