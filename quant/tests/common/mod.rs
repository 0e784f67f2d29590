//! Checkpoints to convert, and the command to convert them with.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::{Map, Value};
use tempfile::TempDir;
use tn_quantize::{
    checkpoint::Config,
    names::{self, ModelTensor},
    synthetic::{self, Options},
};
use transnormer::dtype::DType;

/// A folder with a checkpoint in `in` and room for an output beside it.
pub struct Sandbox {
    root: TempDir,
}

impl Sandbox {
    /// A valid checkpoint of `config` as the synthesizer writes it.
    pub fn new(config: &Value, options: &Options) -> Self {
        let root = tempfile::tempdir().unwrap();
        synthetic::write_checkpoint(&root.path().join("in"), config, options).unwrap();
        Self { root }
    }

    /// The tiny F32 checkpoint in one safetensors file.
    pub fn tiny() -> Self {
        Self::new(&synthetic::tiny_config_json(), &Options::default())
    }

    /// The checkpoint's folder, or the file `name` in it.
    pub fn input(&self, name: &str) -> PathBuf {
        self.root.path().join("in").join(name)
    }

    /// The output file.
    pub fn out(&self) -> PathBuf {
        self.root.path().join("out.gguf")
    }

    /// Runs `tn-quantize` on the checkpoint and the output, with more arguments.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What [`Sandbox::run`] runs.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = tn_quantize();
        command.arg(self.input("")).arg(self.out()).args(arguments);
        command
    }

    /// Names in the output's folder other than the checkpoint.
    pub fn leftovers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "in");
        names.sort();
        names
    }

    /// Replaces the weights by what `write` puts into the folder.
    pub fn replace_weights(&self, write: impl FnOnce(&Path)) {
        fs::remove_file(self.input("model.safetensors")).unwrap();
        write(&self.input(""));
    }
}

/// The command under test.
pub fn tn_quantize() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tn-quantize"))
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Changes the header of a safetensors file and leaves its data alone.
pub fn edit_header(path: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let bytes = fs::read(path).unwrap();
    let (len, rest) = bytes.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    let mut header: Map<String, Value> = serde_json::from_slice(header).unwrap();
    edit(&mut header);
    write_safetensors(path, &Value::Object(header).to_string(), data);
}

/// A safetensors file of these parts.
pub fn write_safetensors(path: &Path, header: &str, data: &[u8]) {
    let len = (header.len() as u64).to_le_bytes();
    fs::write(path, [&len[..], header.as_bytes(), data].concat()).unwrap();
}

/// A tensor of a hand-written checkpoint.
pub struct Tensor {
    pub name: String,
    pub shape: Vec<u64>,
    pub dtype: DType,
    pub bytes: Vec<u8>,
    /// Number of the storage entry; tied tensors share one.
    pub storage: usize,
}

/// All tensors of a synthetic model in `dtype`, with tensor names of a checkpoint.
pub fn tensors(config: &Config, separate_head: bool, dtype: DType) -> Vec<Tensor> {
    let tensor = |(storage, tensor): (usize, ModelTensor)| {
        let bytes = values(config, &tensor).into_iter().flat_map(|value| encode(dtype, value)).collect();
        Tensor { name: tensor.source, shape: tensor.shape, dtype, bytes, storage }
    };
    names::model_tensors(config, separate_head).into_iter().enumerate().map(tensor).collect()
}

/// All values of a synthetic tensor.
pub fn values(config: &Config, tensor: &ModelTensor) -> Vec<f32> {
    synthetic::fill(tensor, config, 1, 0..tensor.shape.iter().product())
}

/// One element in the bytes of `dtype`.
pub fn encode(dtype: DType, value: f32) -> Vec<u8> {
    match dtype {
        DType::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
        DType::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        DType::F32 => value.to_le_bytes().to_vec(),
        other => panic!("no checkpoint has {other} elements"),
    }
}

/// Writes what `torch.save(state_dict, path)` writes, without its check sums.
pub fn write_torch(path: &Path, tensors: &[Tensor]) {
    let storages: BTreeMap<_, _> = tensors.iter().map(|tensor| (tensor.storage, &tensor.bytes[..])).collect();
    let pickle = pickle(tensors);
    let mut entries = vec![("archive/data.pkl".to_owned(), &pickle[..])];
    entries.push(("archive/byteorder".to_owned(), b"little"));
    entries.extend(storages.iter().map(|(key, bytes)| (format!("archive/data/{key}"), *bytes)));
    fs::write(path, zip(&entries)).unwrap();
}

/// The pickle of an `OrderedDict` of tensors.
pub fn pickle(tensors: &[Tensor]) -> Vec<u8> {
    let text = |text: &str| [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let number = |number: u64| [&b"J"[..], &(number as u32).to_le_bytes()].concat();
    let tuple = |numbers: &[u64]| {
        let items: Vec<u8> = numbers.iter().flat_map(|&n| number(n)).collect();
        [&b"("[..], &items, b"t"].concat()
    };
    let mut code = b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01(".to_vec();
    for Tensor { name, shape, dtype, storage, .. } in tensors {
        let class = match dtype {
            DType::F16 => "HalfStorage",
            DType::BF16 => "BFloat16Storage",
            _ => "FloatStorage",
        };
        let elements: u64 = shape.iter().product();
        let strides: Vec<u64> = (1..=shape.len()).map(|axis| shape[axis..].iter().product()).collect();
        code.extend(
            [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(), text("storage")].concat(),
        );
        code.extend(format!("ctorch\n{class}\n").bytes());
        code.extend(
            [text(&storage.to_string()), text("cpu"), number(elements), b"tQK\x00".to_vec()].concat(),
        );
        code.extend([tuple(shape), tuple(&strides), b"\x89h\x00)RtR".to_vec()].concat());
    }
    // The dictionary gets an attribute, as a module's does, and ends.
    code.extend([&b"u}"[..], &text("_metadata"), b"h\x00)Rsb."].concat());
    code
}

/// A zip file of stored entries.
pub fn zip(entries: &[(String, &[u8])]) -> Vec<u8> {
    let (mut file, mut table) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let offset = (file.len() as u32).to_le_bytes();
        let size = (data.len() as u32).to_le_bytes();
        let name_len = (name.len() as u16).to_le_bytes();
        file.extend(
            [&b"PK\x03\x04"[..], &[0; 14], &size, &size, &name_len, &[0; 2], name.as_bytes(), data].concat(),
        );
        table.extend([&b"PK\x01\x02"[..], &[0; 16], &size, &size, &name_len, &[0; 12], &offset].concat());
        table.extend(name.as_bytes());
    }
    let (offset, count) = ((file.len() as u32).to_le_bytes(), (entries.len() as u16).to_le_bytes());
    let table_len = (table.len() as u32).to_le_bytes();
    [&file[..], &table, b"PK\x05\x06", &[0; 4], &count, &count, &table_len, &offset, &[0; 2]].concat()
}

/// A folder that the repository's neighbour may offer; `None`, said aloud, where it does not.
pub fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared").join(path);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is not here", path.display());
    None
}
