//! The metadata of the GGUF file. MODEL.md documents every key.

use std::path::Path;

use transnormer::{
    error::Result,
    gguf::{Array, Metadata},
    hparams::{ARCHITECTURE, Hparams},
    tiles,
    tokenizer::Vocab,
    weights::TILE_ROWS_KEY,
};

use crate::{
    checkpoint::{Checkpoint, Config},
    plan::{Head, Plan},
};

/// Tensor data start at multiples of this many bytes: a cache line, and enough for any vector load.
const ALIGNMENT: u32 = 64;
/// Layout version of ggml's quantized blocks.
const QUANTIZATION_VERSION: u32 = 2;
/// Tokens in a training sequence of all published models (SPEC §1). The architecture itself has no limit.
const TRAINING_CONTEXT: u32 = 2048;
/// ε of SimpleRMSNorm (SPEC §3.0).
const NORM_EPSILON: f32 = 1e-6;

/// The metadata for `plan`, in the order in which they are written.
///
/// # Errors
/// Those of the vocabulary and of the engine's own check of the hyperparameters.
pub fn build(checkpoint: &Checkpoint, plan: &Plan, vocab: &Vocab) -> Result<Metadata> {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", ARCHITECTURE);
    metadata.insert("general.type", "model");
    if let Some(name) = model_name(checkpoint.dir()) {
        metadata.insert("general.name", name);
    }
    metadata.insert("general.size_label", size_label(plan.parameters()));
    metadata.insert("general.file_type", plan.preset.file_type());
    metadata.insert("general.quantization_version", QUANTIZATION_VERSION);
    metadata.insert("general.alignment", ALIGNMENT);
    insert_hparams(&mut metadata, checkpoint.config(), plan.head == Head::Tied);
    if plan.tensors.iter().any(|tensor| tensor.tiled) {
        metadata.insert(TILE_ROWS_KEY, tiles::ROWS as u32);
    }
    vocab.to_metadata(&mut metadata)?;
    // The engine's own check: what it would refuse to load is not written.
    Hparams::from_metadata(&metadata)?;
    Ok(metadata)
}

fn insert_hparams(metadata: &mut Metadata, config: &Config, tied: bool) {
    let mut insert = |key: &str, value: transnormer::gguf::Value| {
        metadata.insert(format!("{ARCHITECTURE}.{key}"), value);
    };
    let scale = if config.scale_embedding { f64::from(config.embed_dim).sqrt() as f32 } else { 1.0 };
    let lrpe = config.lrpe.iter().map(|&used| u32::from(used)).collect();
    insert("vocab_size", config.vocab_size.into());
    insert("context_length", TRAINING_CONTEXT.into());
    insert("embedding_length", config.embed_dim.into());
    insert("block_count", config.layers.into());
    insert("feed_forward_length", config.glu_dim.into());
    insert("attention.head_count", config.heads.into());
    insert("attention.hidden_length", config.hidden_dim.into());
    insert("attention.lrpe_layers", Array::U32(lrpe).into());
    insert("attention.activation", config.activation.name().into());
    insert("attention.layer_norm_rms_epsilon", NORM_EPSILON.into());
    insert("embedding_scale", scale.into());
    insert("use_bias", config.bias.into());
    insert("tie_embeddings", tied.into());
}

/// The folder's own name, where it has one in UTF-8.
fn model_name(dir: &Path) -> Option<String> {
    let dir = dir.canonicalize().ok()?;
    dir.file_name()?.to_str().map(str::to_owned)
}

/// The number of parameters as the field writes it: `399M`, `1.0B`.
fn size_label(parameters: u64) -> String {
    match parameters as f64 {
        n if n >= 1e9 => format!("{:.1}B", n / 1e9),
        n if n >= 1e6 => format!("{:.0}M", n / 1e6),
        n => format!("{:.0}K", n / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (parameters, label) in
            [(398_984_192, "399M"), (1_020_266_496, "1.0B"), (6_836_719_616, "6.8B"), (92_352, "92K")]
        {
            assert_eq!(size_label(parameters), label);
        }
    }
}
