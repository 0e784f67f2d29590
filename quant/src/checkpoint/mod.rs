//! Official TransNormerLLM checkpoints, read as untrusted input: `config.json`, safetensors or PyTorch
//! weights in one file or several, and the SentencePiece tokenizer.

pub mod config;
pub mod json;
pub mod pickle;
pub mod safetensors;
pub mod source;
pub mod tokenizer;
pub mod torch;
pub mod zip;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    ops::Range,
    path::{Path, PathBuf},
};

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use serde_json::Value;
use transnormer::{
    dtype::DType,
    error::{Error, ErrorKind, Result},
};

pub use config::Config;
pub use source::{SourceFile, SourceTensor};

/// Size limit of an index; that of the 7B model has ten kilobytes.
const MAX_INDEX_BYTES: u64 = 4 << 20;
/// Limit on the number of weight files of one checkpoint.
const MAX_SHARDS: usize = 1000;

/// An open checkpoint folder: its configuration, and where each tensor lies. No weight is in memory.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Config,
    files: Vec<SourceFile>,
    tensors: BTreeMap<String, SourceTensor>,
}

impl Checkpoint {
    /// Opens the folder `dir`: `config.json` and the first of `model.safetensors`,
    /// `model.safetensors.index.json`, `pytorch_model.bin`, `pytorch_model.bin.index.json`.
    ///
    /// # Errors
    /// One line that names the file and the field, for everything that is missing, damaged or
    /// contradictory.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::new(
                ErrorKind::Io,
                format_args!("{}: not a folder; name the folder that holds config.json", dir.display()),
            ));
        }
        let config = Config::read(&dir.join("config.json"))?;
        let mut checkpoint =
            Self { dir: dir.to_owned(), config, files: Vec::new(), tensors: BTreeMap::new() };
        checkpoint.open_weights()?;
        Ok(checkpoint)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The checked `config.json`.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The weight files.
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// Every tensor, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &SourceTensor> {
        self.tensors.values()
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&SourceTensor> {
        self.tensors.get(name)
    }

    /// Reads the elements of `tensor` in `range` (flat, row-major) as stored into `bytes`, replacing what
    /// it held.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the file cannot be read, [`ErrorKind::Format`] where it has shrunk since it
    /// was opened, [`ErrorKind::InvalidArgument`] where `range` leaves the tensor.
    pub fn read_bytes(&self, tensor: &SourceTensor, range: Range<u64>, bytes: &mut Vec<u8>) -> Result<()> {
        let (name, elements, size) = (&tensor.name, tensor.elements, tensor.dtype.block_bytes());
        let len = range.end.checked_sub(range.start).filter(|_| range.end <= elements);
        let len = len.and_then(|len| usize::try_from(len * size).ok()).ok_or_else(|| {
            let message = format_args!("tensor {name:?} has {elements} elements, {range:?} were asked for");
            Error::new(ErrorKind::InvalidArgument, message)
        })?;
        bytes.clear();
        bytes.resize(len, 0);
        let file = &self.files[tensor.file];
        file.read_exact_at(tensor.offset + range.start * size, bytes)
            .map_err(|error| error.context(format_args!("tensor {name:?}")))
    }

    /// Reads the elements of `tensor` in `range` as f32; `scratch` is overwritten.
    ///
    /// # Errors
    /// As [`Checkpoint::read_bytes`].
    pub fn read_f32(
        &self,
        tensor: &SourceTensor,
        range: Range<u64>,
        scratch: &mut Vec<u8>,
    ) -> Result<Vec<f32>> {
        self.read_bytes(tensor, range, scratch)?;
        let mut values = vec![0.0; scratch.len() / tensor.dtype.block_bytes() as usize];
        decode(tensor.dtype, scratch, &mut values);
        Ok(values)
    }

    /// Opens the weights of the folder, in the order in which the field's loaders look for them.
    fn open_weights(&mut self) -> Result<()> {
        for single in ["model.safetensors", "pytorch_model.bin"] {
            let (path, index) = (self.dir.join(single), self.dir.join(format!("{single}.index.json")));
            if path.exists() {
                let tensors = self.open_file(&path)?;
                return self.insert(tensors);
            }
            if index.exists() {
                return self.open_shards(&index);
            }
        }
        Err(Error::new(
            ErrorKind::Io,
            format_args!(
                "{}: no weights: expected model.safetensors, pytorch_model.bin, or either one's .index.json",
                self.dir.display()
            ),
        ))
    }

    fn open_shards(&mut self, index: &Path) -> Result<()> {
        let weight_map = read_weight_map(index)?;
        let shards: BTreeSet<&String> = weight_map.values().collect();
        if shards.len() > MAX_SHARDS {
            return Err(source::format_error(index, format_args!("weight_map names {} files", shards.len())));
        }
        for shard in shards {
            let path = self.dir.join(shard);
            let tensors = self.open_file(&path).map_err(|error| match error.kind() {
                ErrorKind::Io => error.context(format_args!("shard named in {}", index.display())),
                _ => error,
            })?;
            if let Some(stray) = tensors.iter().find(|tensor| weight_map.get(&tensor.name) != Some(shard)) {
                return Err(source::format_error(
                    index,
                    format_args!("weight_map does not list tensor {:?}, which {shard:?} holds", stray.name),
                ));
            }
            self.insert(tensors)?;
        }
        match weight_map.iter().find(|(name, _)| !self.tensors.contains_key(*name)) {
            None => Ok(()),
            Some((name, shard)) => Err(source::format_error(
                index,
                format_args!("weight_map puts tensor {name:?} into {shard:?}, which does not hold it"),
            )),
        }
    }

    /// Opens one weight file and lists its tensors.
    fn open_file(&mut self, path: &Path) -> Result<Vec<SourceTensor>> {
        let file = SourceFile::open(path)?;
        let index = self.files.len();
        let tensors = match path.extension().is_some_and(|extension| extension == "safetensors") {
            true => safetensors::read(&file, index)?,
            false => torch::read(&file, index)?,
        };
        self.files.push(file);
        Ok(tensors)
    }

    fn insert(&mut self, tensors: Vec<SourceTensor>) -> Result<()> {
        for tensor in tensors {
            match self.tensors.entry(tensor.name.clone()) {
                Entry::Vacant(entry) => entry.insert(tensor),
                Entry::Occupied(_) => {
                    let message = format_args!("tensor {:?} appears twice", tensor.name);
                    return Err(self.files[tensor.file].error(message));
                }
            };
        }
        Ok(())
    }
}

/// Converts little-endian elements of `dtype` (F32, F16 or BF16) to f32.
///
/// # Panics
/// If `bytes` does not hold exactly `values.len()` elements, or `dtype` is another type.
pub fn decode(dtype: DType, bytes: &[u8], values: &mut [f32]) {
    /// Elements converted at a time, so that the conversion works on vectors and needs no heap.
    const BLOCK: usize = 512;
    assert_eq!(bytes.len() as u64, values.len() as u64 * dtype.block_bytes(), "one value for each element");
    if dtype == DType::F32 {
        let words = bytes.as_chunks::<4>().0;
        values.iter_mut().zip(words).for_each(|(value, word)| *value = f32::from_le_bytes(*word));
        return;
    }
    let mut block = [0_u16; BLOCK];
    for (values, words) in values.chunks_mut(BLOCK).zip(bytes.as_chunks::<2>().0.chunks(BLOCK)) {
        let bits = &mut block[..values.len()];
        bits.iter_mut().zip(words).for_each(|(bits, word)| *bits = u16::from_le_bytes(*word));
        match dtype {
            DType::F16 => bits.reinterpret_cast::<half::f16>().convert_to_f32_slice(values),
            DType::BF16 => bits.reinterpret_cast::<half::bf16>().convert_to_f32_slice(values),
            other => panic!("{other} is not an element type of checkpoints"),
        }
    }
}

/// The `weight_map` of an index: file name by tensor name.
fn read_weight_map(index: &Path) -> Result<BTreeMap<String, String>> {
    let error = |message: &str| source::format_error(index, message);
    let mut object = json::read_object(index, MAX_INDEX_BYTES)?;
    let Some(Value::Object(weight_map)) = object.remove("weight_map") else {
        return Err(error("weight_map is missing or not an object"));
    };
    if weight_map.is_empty() {
        return Err(error("weight_map is empty"));
    }
    weight_map
        .into_iter()
        .map(|(name, value)| match value {
            Value::String(shard) if is_plain_file_name(&shard) => Ok((name, shard)),
            other => Err(source::format_error(
                index,
                format_args!("weight_map puts tensor {name:?} into {other}, which is not a plain file name"),
            )),
        })
        .collect()
}

/// Whether `name` names a file in the same folder on every system: no separator, no drive, no `..`.
fn is_plain_file_name(name: &str) -> bool {
    let legal = |c: char| c.is_alphanumeric() || "._-+ ".contains(c);
    (1..=255).contains(&name.len()) && name.chars().all(legal) && !name.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_decode_exactly() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let mut values = vec![0.0; bits.len()];
        decode(DType::F16, &bytes, &mut values);
        let expected = |bits: u16| half::f16::from_bits(bits).to_f32();
        assert!(bits.iter().zip(&values).all(|(&bits, value)| {
            value.to_bits() == expected(bits).to_bits() || (value.is_nan() && expected(bits).is_nan())
        }));
        decode(DType::BF16, &bytes, &mut values);
        let expected = |bits: u16| f32::from_bits(u32::from(bits) << 16);
        assert!(bits.iter().zip(&values).all(|(&bits, value)| {
            value.to_bits() == expected(bits).to_bits() || (value.is_nan() && expected(bits).is_nan())
        }));
        decode(DType::F32, &bytes[..8], &mut values[..2]);
        assert_eq!(values[1].to_bits(), 0x0003_0002);
    }

    #[test]
    fn shard_names_stay_in_the_folder() {
        for name in ["model-00001-of-00003.safetensors", "pytorch_model-1.bin"] {
            assert!(is_plain_file_name(name), "{name}");
        }
        for name in ["", ".", "..", "../x.bin", "/etc/passwd", "a/b", "a\\b", "C:x", "a\0b", ".hidden", "a\n"]
        {
            assert!(!is_plain_file_name(name), "{name:?}");
        }
    }
}
