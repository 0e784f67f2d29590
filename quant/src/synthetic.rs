//! Checkpoints in the official layout with random weights that any language can reproduce (SPEC §8): for
//! tests, and for measuring at the published sizes without the published weights.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    ops::Range,
    path::Path,
};

use half::{bf16, f16};
use prost::Message;
use serde_json::{Map, Value, json};
use transnormer::{
    dtype::DType,
    error::{Error, ErrorKind, Result},
    tokenizer::PieceType,
};

use crate::{
    checkpoint::{
        Config,
        tokenizer::{ModelProto, NormalizerSpec, SentencePiece, TrainerSpec},
    },
    names::{self, ModelTensor, Role},
};

/// Odd constant of the splitmix64 sequence: 2^64 over the golden ratio.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
/// Elements generated and written at a time.
const STEP: u64 = 1 << 20;

/// The published sizes (SPEC §1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// TransNormerLLM-385M.
    M385,
    /// TransNormerLLM-1B.
    B1,
    /// TransNormerLLM-7B.
    B7,
}

impl Shape {
    /// The shape called `385m`, `1b` or `7b`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "385m" => Some(Self::M385),
            "1b" => Some(Self::B1),
            "7b" => Some(Self::B7),
            _ => None,
        }
    }

    /// A config.json of this shape.
    pub fn config_json(self) -> Value {
        let [width, layers, heads, glu_dim] = match self {
            Self::M385 => [1024, 24, 8, 2816],
            Self::B1 => [2048, 16, 16, 5632],
            Self::B7 => [4096, 30, 32, 11008],
        };
        config_json([64000, width, layers, heads, glu_dim])
    }
}

/// A config.json of a model of some ten thousand parameters whose rows are not all whole quantization blocks.
pub fn tiny_config_json() -> Value {
    config_json([300, 64, 2, 4, 96])
}

/// Checks a config.json that is still in memory.
///
/// # Errors
/// Those of [`Config::read`].
pub fn config(json: &Value) -> Result<Config> {
    let map = json.as_object().ok_or_else(|| invalid("config.json must be an object"))?;
    Config::from_object(Path::new("config.json"), map)
}

/// How a checkpoint is written.
#[derive(Debug, Clone)]
pub struct Options {
    /// Seed of all tensors.
    pub seed: u64,
    /// Element type: F32, F16 or BF16.
    pub dtype: DType,
    /// Most bytes of tensors in one file; a larger model is sharded.
    pub shard_bytes: u64,
    /// SentencePiece model to write; without one, a synthetic one of the right size.
    pub tokenizer: Option<Vec<u8>>,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 1, dtype: DType::F32, shard_bytes: u64::MAX, tokenizer: None }
    }
}

/// Writes a checkpoint for `config_json` into the folder `dir`, which is made if it is not there: config.json,
/// safetensors in one file or several, tokenizer.model.
///
/// # Errors
/// Those of [`Config::read`] and of writing; [`ErrorKind::InvalidArgument`] for another element type.
pub fn write_checkpoint(dir: &Path, config_json: &Value, options: &Options) -> Result<()> {
    let config = config(config_json)?;
    if !matches!(options.dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format_args!("no checkpoint has {} elements", options.dtype),
        ));
    }
    fs::create_dir_all(dir).map_err(|source| Error::io(dir, source))?;
    write_file(&dir.join("config.json"), format!("{config_json:#}\n").as_bytes())?;
    let tokenizer = options.tokenizer.clone().unwrap_or_else(|| tokenizer_model(config.vocab_size));
    write_file(&dir.join("tokenizer.model"), &tokenizer)?;

    let tensors = names::model_tensors(&config, !config.tie_word_embeddings);
    let shards = shards(&tensors, options);
    if let [all] = &shards[..] {
        return write_safetensors(&dir.join("model.safetensors"), all, &config, options);
    }
    let mut weight_map = Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        write_safetensors(&dir.join(&name), shard, &config, options)?;
        weight_map.extend(shard.iter().map(|tensor| (tensor.source.clone(), name.clone().into())));
    }
    let total: u64 = tensors.iter().map(|tensor| byte_len(tensor, options)).sum();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    write_file(&dir.join("model.safetensors.index.json"), format!("{index:#}\n").as_bytes())
}

/// The elements of `tensor` in `range` (flat, row-major), as f32.
pub fn fill(tensor: &ModelTensor, config: &Config, seed: u64, range: Range<u64>) -> Vec<f32> {
    let uniform = Uniform::new(&tensor.source, seed);
    if tensor.role == Role::Theta {
        let width = f64::from(config.embed_dim);
        let theta = |index: u64| {
            let base = 10000_f64.powf(-2.0 / width * index as f64);
            (base * (1.0 + 0.1 * f64::from(uniform.at(index)))) as f32
        };
        return range.map(theta).collect();
    }
    let scale = scale(tensor, config) as f32;
    range.map(|index| uniform.at(index) * scale).collect()
}

/// A valid SentencePiece model of `vocab_size` pieces: specials, all bytes if they fit, and words over a
/// small alphabet.
pub fn tokenizer_model(vocab_size: u32) -> Vec<u8> {
    let vocab_size = vocab_size as usize;
    let byte_fallback = vocab_size >= 3 + 256;
    let piece = |text: String, score: f32, kind: PieceType| SentencePiece {
        piece: Some(text),
        score: Some(score),
        kind: Some(kind as i32),
    };
    let mut pieces = vec![
        piece("<unk>".to_owned(), 0.0, PieceType::Unknown),
        piece("<s>".to_owned(), 0.0, PieceType::Control),
        piece("</s>".to_owned(), 0.0, PieceType::Control),
    ];
    if byte_fallback {
        pieces.extend((0..=255).map(|byte: u8| piece(format!("<0x{byte:02X}>"), 0.0, PieceType::Byte)));
    }
    let words = words(vocab_size.saturating_sub(pieces.len()));
    pieces.extend(
        words.into_iter().enumerate().map(|(rank, word)| piece(word, -(rank as f32), PieceType::Normal)),
    );
    pieces.truncate(vocab_size);
    let trainer_spec =
        TrainerSpec { model_type: Some(2), byte_fallback: Some(byte_fallback), ..TrainerSpec::default() };
    let normalizer_spec = NormalizerSpec {
        name: Some("identity".to_owned()),
        remove_extra_whitespaces: Some(false),
        ..NormalizerSpec::default()
    };
    ModelProto {
        pieces,
        trainer_spec: Some(trainer_spec),
        normalizer_spec: Some(normalizer_spec),
        denormalizer_spec: None,
    }
    .encode_to_vec()
}

/// The first `count` words over ▁ and the letters, short ones first. Each is a shorter word and one more
/// letter, so merging can reach it.
fn words(count: usize) -> Vec<String> {
    let alphabet: Vec<String> = ['▁'].into_iter().chain('a'..='z').map(String::from).collect();
    let mut words = alphabet.clone();
    let mut parent = 0;
    while words.len() < count {
        let longer: Vec<String> =
            alphabet[1..].iter().map(|letter| format!("{}{letter}", words[parent])).collect();
        words.extend(longer);
        parent += 1;
    }
    words.truncate(count);
    words
}

/// A config.json with the keys of the official ones: vocabulary, width, layers, heads, channel-mixer width.
fn config_json([vocab_size, width, layers, heads, glu_dim]: [u32; 5]) -> Value {
    let lrpe: Vec<u32> = (0..layers).map(|layer| u32::from(layer == 0)).collect();
    json!({
        "architectures": ["TransnormerForCausalLM"],
        "model_type": "transnormer",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": vocab_size,
        "decoder_embed_dim": width,
        "hidden_dim": width,
        "decoder_layers": layers,
        "decoder_attention_heads": heads,
        "glu_dim": glu_dim,
        "linear_use_lrpe_list": lrpe,
        "linear_act_fun": "swish",
        "norm_type": "simplermsnorm",
        "no_scale_embedding": false,
        "bias": false,
        "add_bos_token": false,
        "tie_word_embeddings": true,
    })
}

/// Uniform numbers in [−1, 1), addressed by index.
struct Uniform {
    start: u64,
}

impl Uniform {
    fn new(name: &str, seed: u64) -> Self {
        Self { start: mix(seed.wrapping_add(fnv1a(name))) }
    }

    fn at(&self, index: u64) -> f32 {
        let bits = mix(self.start.wrapping_add((index + 1).wrapping_mul(GOLDEN)));
        (bits >> 40) as f32 * 2_f32.powi(-23) - 1.0
    }
}

/// splitmix64's finaliser.
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

/// Half-width of the distribution: √3 times its standard deviation.
fn scale(tensor: &ModelTensor, config: &Config) -> f64 {
    let width = f64::from(config.embed_dim);
    let fan_in = *tensor.shape.last().expect("every tensor has a dimension") as f64;
    let deviation = match tensor.role {
        Role::Bias => return 0.1,
        Role::Embedding if config.scale_embedding => width.powf(-0.5),
        Role::Embedding => 1.0,
        Role::Head => return 3_f64.sqrt() * 2.0 * width.powf(-0.5),
        // Branch outputs are three times larger, so that the embedding does not dominate the residual stream.
        Role::AttentionOutput | Role::Down => return 3_f64.sqrt() * 3.0 * fan_in.powf(-0.5),
        Role::Qkvu | Role::Gate | Role::Up | Role::Theta => fan_in.powf(-0.5),
    };
    3_f64.sqrt() * deviation
}

fn elements(tensor: &ModelTensor) -> u64 {
    tensor.shape.iter().product()
}

fn byte_len(tensor: &ModelTensor, options: &Options) -> u64 {
    elements(tensor) * options.dtype.block_bytes()
}

/// Consecutive tensors grouped into files of at most `shard_bytes`, at least one tensor each.
fn shards(tensors: &[ModelTensor], options: &Options) -> Vec<Vec<ModelTensor>> {
    let mut shards: Vec<Vec<ModelTensor>> = vec![Vec::new()];
    let mut used = 0;
    for tensor in tensors {
        let len = byte_len(tensor, options);
        if used > 0 && used + len > options.shard_bytes {
            shards.push(Vec::new());
            used = 0;
        }
        used += len;
        shards.last_mut().expect("starts with one shard").push(tensor.clone());
    }
    shards
}

fn write_safetensors(path: &Path, tensors: &[ModelTensor], config: &Config, options: &Options) -> Result<()> {
    let io_error = |source| Error::io(path, source);
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += byte_len(tensor, options);
        let entry =
            json!({ "dtype": options.dtype.name(), "shape": tensor.shape, "data_offsets": [start, end] });
        header.insert(tensor.source.clone(), entry);
    }
    let mut header = Value::Object(header).to_string();
    // The format wants the data to start at a multiple of eight.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));

    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io_error)?);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io_error)?;
    out.write_all(header.as_bytes()).map_err(io_error)?;
    for tensor in tensors {
        let count = elements(tensor);
        for start in (0..count).step_by(STEP as usize) {
            let values = fill(tensor, config, options.seed, start..count.min(start + STEP));
            out.write_all(&encode(options.dtype, &values)).map_err(io_error)?;
        }
    }
    out.flush().map_err(io_error)
}

fn encode(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(|source| Error::io(path, source))
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::Format, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_specification() {
        assert_eq!(fnv1a("a"), 12638187200555641996);
        let uniform = Uniform::new("a", 1);
        let first: Vec<f32> = (0..4).map(|index| uniform.at(index)).collect();
        assert_eq!(first, [-0.7663082, -0.22231042, 0.8428402, -0.47784877]);
    }

    #[test]
    fn every_synthetic_word_can_be_merged() {
        let words = words(2000);
        assert_eq!(words.len(), 2000);
        for (rank, word) in words.iter().enumerate() {
            let stem: String = word.chars().take(word.chars().count() - 1).collect();
            assert!(stem.is_empty() || words[..rank].contains(&stem), "{word}");
        }
    }

    #[test]
    fn shards_hold_all_tensors_in_order() {
        let config = config(&tiny_config_json()).unwrap();
        let tensors = names::model_tensors(&config, false);
        let options = Options { shard_bytes: 100_000, ..Options::default() };
        let shards = shards(&tensors, &options);
        assert!(shards.len() > 1);
        assert_eq!(shards.concat(), tensors);
        for shard in shards {
            let bytes: u64 = shard.iter().map(|tensor| byte_len(tensor, &options)).sum();
            assert!(bytes <= 100_000 || shard.len() == 1);
        }
    }
}
