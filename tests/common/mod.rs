//! Golden cases for the integration tests: models made from a recipe, and what the official code computes on them.

#![allow(dead_code, reason = "each test program uses its own part")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
};

use indicatif::ProgressBar;
use safetensors::SafeTensors;
use tempfile::TempDir;
use tn_quantize::{
    checkpoint::{Checkpoint, Config, tokenizer},
    convert, metadata, names,
    plan::{Head, Plan},
    policy::Preset,
    synthetic,
};
use transnormer::{DType, GenerateOptions, LoadMode, Model, SamplerOptions, Session, SessionOptions};

/// The cases that are small enough for every run. `A` is the smallest, and has intermediate values.
pub const CASES: [&str; 4] = [A, "b_odd_l3_h6", "b2_lrpe_multi_untied_l5_h8", "d_variants_bias_hidden96"];
/// 2 layers, the first with LRPE; 4 heads of 16.
pub const A: &str = "a_tiny_l2_h4";
/// The published 385M shape.
pub const LARGE: &str = "c_385m_config";

/// A model from the recipe and the results of the official code, of `tests/fixtures/golden`.
pub struct Case {
    /// Its folder's name.
    pub name: &'static str,
    config: serde_json::Value,
    manifest: serde_json::Value,
    golden: Vec<u8>,
}

impl Case {
    /// Reads the case's files.
    pub fn open(name: &'static str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name);
        let read = |file: &str| fs::read(folder.join(file)).expect("the fixture is in the repository");
        let json = |file: &str| serde_json::from_slice(&read(file)).expect("the fixture is JSON");
        Self {
            name,
            config: json("config.json"),
            manifest: json("manifest.json"),
            golden: read("golden.safetensors"),
        }
    }

    /// The model, its weights as f32.
    pub fn model(&self) -> Model {
        self.model_of(DType::F32, Preset::F32)
    }

    /// The model with its weights rounded to `checkpoint`, converted to `preset`.
    pub fn model_of(&self, checkpoint: DType, preset: Preset) -> Model {
        synthetic_model(&self.config, self.seed(), checkpoint, preset)
    }

    /// Writes the checkpoint that the recipe gives into `folder`, without its weights.
    pub fn write_config(&self, folder: &Path) {
        let vocab_size = self.config["vocab_size"].as_u64().expect("config.json has a vocab_size");
        let tokenizer = synthetic::tokenizer_model(u32::try_from(vocab_size).expect("a small vocabulary"));
        fs::write(folder.join("config.json"), self.config.to_string()).expect("the folder is writable");
        fs::write(folder.join("tokenizer.model"), tokenizer).expect("the folder is writable");
    }

    /// Checks the weights that the recipe gives against those that the official code was run with.
    pub fn assert_weights(&self) {
        let config: Config = synthetic::config(&self.config).expect("a valid config.json");
        let expected = self.manifest["xor32"].as_object().expect("the manifest has checks");
        let tensors = names::model_tensors(&config, !config.tie_word_embeddings);
        assert_eq!(tensors.len(), expected.len(), "{}: tensors", self.name);
        for tensor in tensors {
            let len: u64 = tensor.shape.iter().product();
            let values = synthetic::fill(&tensor, &config, self.seed(), 0..len);
            let xor = values.iter().fold(0, |xor, value| xor ^ value.to_bits());
            assert_eq!(expected[&tensor.source], format!("{xor:08x}"), "{}: {}", self.name, tensor.source);
        }
    }

    /// A golden tensor of floats, flat. A leading batch dimension is always 1.
    pub fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.golden).expect("a valid fixture");
        let tensor = tensors.tensor(name).expect("the fixture has the tensor");
        let bytes = tensor.data();
        match tensor.dtype() {
            safetensors::Dtype::F32 => {
                bytes.as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)).collect()
            }
            safetensors::Dtype::F64 => {
                bytes.as_chunks().0.iter().map(|&word| f64::from_le_bytes(word) as f32).collect()
            }
            other => panic!("{name} is {other:?}"),
        }
    }

    /// A golden tensor of token ids or positions.
    pub fn ids(&self, name: &str) -> Vec<u32> {
        let tensors = SafeTensors::deserialize(&self.golden).expect("a valid fixture");
        let tensor = tensors.tensor(name).expect("the fixture has the tensor");
        assert_eq!(tensor.dtype(), safetensors::Dtype::I64);
        let words = tensor.data().as_chunks().0;
        words.iter().map(|&word| u32::try_from(i64::from_le_bytes(word)).expect("an id")).collect()
    }

    /// Names of all golden tensors.
    pub fn names(&self) -> Vec<String> {
        let tensors = SafeTensors::deserialize(&self.golden).expect("a valid fixture");
        tensors.names().into_iter().map(String::from).collect()
    }

    /// The states of all layers after the whole text, in the order of [`transnormer::State::values`].
    pub fn states(&self, layers: usize) -> Vec<f32> {
        (0..layers).flat_map(|layer| self.floats(&format!("long.layer{layer}.state"))).collect()
    }

    fn seed(&self) -> u64 {
        self.manifest["seed"].as_u64().expect("the manifest has a seed")
    }
}

/// A model of the shape in `config`, a config.json, with random weights.
pub fn synthetic_model(config: &serde_json::Value, seed: u64, checkpoint: DType, preset: Preset) -> Model {
    let folder = TempDir::new().expect("there is room for temporary files");
    let options = synthetic::Options { seed, dtype: checkpoint, ..synthetic::Options::default() };
    synthetic::write_checkpoint(folder.path(), config, &options).expect("the recipe is complete");
    convert(folder.path(), preset)
}

/// A model so small that hundreds of texts, and every bit of a snapshot, can be tried: 128 tokens.
pub fn small_model(seed: u64) -> Model {
    let config = serde_json::json!({
        "vocab_size": 128, "decoder_embed_dim": 8, "hidden_dim": 8, "decoder_layers": 2,
        "decoder_attention_heads": 2, "glu_dim": 16, "linear_use_lrpe_list": [1, 0],
        "linear_act_fun": "swish", "norm_type": "simplermsnorm", "bias": false,
        "no_scale_embedding": false, "tie_word_embeddings": true, "add_bos_token": false,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "model_type": "transnormer",
        "architectures": ["TransnormerForCausalLM"], "torch_dtype": "float32", "use_cache": true,
        "init_std": 0.02,
    });
    synthetic_model(&config, seed, DType::F32, Preset::F32)
}

/// The model of a checkpoint folder, through the library behind `tn-quantize`.
pub fn convert(checkpoint: &Path, preset: Preset) -> Model {
    let folder = TempDir::new().expect("there is room for temporary files");
    let out = folder.path().join("model.gguf");
    let convert = || {
        let checkpoint = Checkpoint::open(checkpoint)?;
        let plan = Plan::new(&checkpoint, Head::of(&checkpoint)?, preset)?;
        let vocab = tokenizer::read(checkpoint.dir(), checkpoint.config())?;
        let metadata = metadata::build(&checkpoint, &plan, &vocab)?;
        let (progress, cancel) = (ProgressBar::hidden(), AtomicBool::new(false));
        convert::convert(&checkpoint, &plan, &metadata, &out, 2, &progress, &cancel)?;
        // Not mapped: the file goes away with its folder.
        Model::open_with(&out, LoadMode::Heap)
    };
    convert().expect("the checkpoint converts")
}

/// Makes the tests of a program that hold it take turns: threads that outnumber the cores wait for each other.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A session with prompts in blocks of `block` tokens.
pub fn session(model: &Model, block: usize, threads: usize) -> Session {
    Session::new(model, &SessionOptions { threads, block, ..SessionOptions::default() })
        .expect("valid options")
}

/// Logits after each of `tokens`, one row after the other.
pub fn read_all(session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let mut all = Vec::new();
    session
        .read_all(tokens, |index, logits| {
            assert_eq!(index * logits.len(), all.len(), "rows come in order");
            all.extend_from_slice(logits);
        })
        .expect("valid ids");
    all
}

/// Generation of the most likely tokens, `max_tokens` of them.
pub fn greedy_options(max_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        sampler: SamplerOptions::greedy(),
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        ..Default::default()
    }
}

/// The `count` most likely tokens, one after the other.
pub fn greedy(session: &mut Session, count: usize) -> Vec<u32> {
    let next = |session: &mut Session| {
        let token = argmax(session.logits());
        session.read(&[token]).expect("an id below the vocabulary's size");
        token
    };
    (0..count).map(|_| next(session)).collect()
}

/// Index of the largest value, the first of equals.
pub fn argmax(values: &[f32]) -> u32 {
    let best =
        values.iter().enumerate().fold(0, |best, (i, value)| if *value > values[best] { i } else { best });
    best as u32
}

/// Largest difference, relative to the largest expected magnitude. NaN where anything is not a number.
pub fn error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len(), "as many values as expected");
    let largest = |values: &mut dyn Iterator<Item = f64>| {
        // f64::max drops NaN, which must not pass for a small error.
        values.fold(0.0, |max: f64, value| if max.is_nan() || value.abs() <= max { max } else { value.abs() })
    };
    let difference = largest(&mut found.iter().zip(expected).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    difference / largest(&mut expected.iter().map(|&value| f64::from(value)))
}

/// `path` under the folder of shared reference files, which stands beside the repository where there is one; says
/// so where it is absent.
pub fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/reference").join(path);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is not there", path.display());
    None
}

/// Errors by case and by what was compared; printed with `--nocapture`.
pub struct Table {
    title: String,
    rows: Vec<(&'static str, String, f64)>,
}

impl Table {
    /// An empty table.
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), rows: Vec::new() }
    }

    /// Adds the [`error`] of `found`. Of several comparisons with one name the largest error is kept.
    pub fn compare(&mut self, case: &'static str, what: impl Into<String>, found: &[f32], expected: &[f32]) {
        let (what, error) = (what.into(), error(found, expected));
        match self.rows.iter_mut().find(|row| (row.0, &row.1) == (case, &what)) {
            Some((.., largest)) if *largest >= error || largest.is_nan() => {}
            Some((.., largest)) => *largest = error,
            None => self.rows.push((case, what, error)),
        }
    }

    /// Prints the table, then panics if an error is above `limit` or not a number.
    pub fn assert_below(self, limit: f64) {
        let mut text =
            format!("\n{}: largest error relative to the largest value, at most {limit:.0e}\n", self.title);
        for (case, what, error) in &self.rows {
            text += &format!("  {case:28} {what:44} {error:.1e}\n");
        }
        println!("{text}");
        assert!(!self.rows.is_empty(), "{}: nothing was compared", self.title);
        for (case, what, error) in self.rows {
            assert!(error <= limit, "{case}: {what}: error {error:e} above {limit:e}");
        }
    }
}
