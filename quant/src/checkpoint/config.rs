//! `config.json`: the hyperparameters of a TransNormerLLM (SPEC §1), checked.

use std::{fmt::Display, ops::RangeInclusive, path::Path};

use serde_json::{Map, Value};
use transnormer::{
    error::{Error, ErrorKind, Result},
    hparams::Activation,
};

use super::{json, source::format_error};

/// Size limit of `config.json`; real ones have about a kilobyte.
const MAX_BYTES: u64 = 1 << 20;

/// Hyperparameters of a TransNormerLLM, with the class defaults where `config.json` is silent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// V, rows of the embedding.
    pub vocab_size: u32,
    /// D, width of the residual stream (`decoder_embed_dim`).
    pub embed_dim: u32,
    /// L, number of layers, at least two: the decay rates divide by L − 1.
    pub layers: u32,
    /// h, number of attention heads.
    pub heads: u32,
    /// H, total width of q (and of k, v, u); a multiple of `heads`.
    pub hidden_dim: u32,
    /// G, width of the channel mixer; the file's −1 is resolved to D.
    pub glu_dim: u32,
    /// Whether layer i carries LRPE; length L.
    pub lrpe: Vec<bool>,
    /// φ, applied to q and k.
    pub activation: Activation,
    /// Whether the embedding is multiplied by √D (the file's `no_scale_embedding`, negated).
    pub scale_embedding: bool,
    /// Whether every linear layer but the head has a bias.
    pub bias: bool,
    /// Whether the output head shares the embedding's weights.
    pub tie_word_embeddings: bool,
    /// Beginning-of-sequence id.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence id.
    pub eos_token_id: Option<u32>,
    /// Padding id.
    pub pad_token_id: Option<u32>,
}

impl Config {
    /// Reads and checks the file `path`. Unknown keys are ignored.
    ///
    /// # Errors
    /// One line that names the file and the key: a wrong type, a value out of range, or a contradiction
    /// between keys.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_object(path, &json::read_object(path, MAX_BYTES)?)
    }

    /// Like [`Config::read`], for an object that was read already; errors name `path`.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn from_object(path: &Path, map: &Map<String, Value>) -> Result<Self> {
        Self::from_fields(&Fields { path, map })
    }

    /// Width of one head: H / h.
    pub fn head_dim(&self) -> u32 {
        self.hidden_dim / self.heads
    }

    fn from_fields(fields: &Fields<'_>) -> Result<Self> {
        fields.expect_text("model_type", "transnormer", ErrorKind::Model)?;
        fields.expect_text("norm_type", "simplermsnorm", ErrorKind::Unsupported)?;
        let vocab_size = fields.integer("vocab_size", 64000, 1..=1 << 20)?;
        let embed_dim = fields.integer("decoder_embed_dim", 1024, 1..=1 << 16)?;
        let config = Self {
            vocab_size,
            embed_dim,
            layers: fields.integer("decoder_layers", 24, 2..=512)?,
            heads: fields.integer("decoder_attention_heads", 8, 1..=1024)?,
            hidden_dim: fields.integer("hidden_dim", 1024, 1..=1 << 16)?,
            glu_dim: fields.glu_dim(embed_dim)?,
            lrpe: fields.lrpe_list()?,
            activation: fields.activation()?,
            scale_embedding: !fields.boolean("no_scale_embedding", false)?,
            bias: fields.boolean("bias", false)?,
            tie_word_embeddings: fields.boolean("tie_word_embeddings", true)?,
            bos_token_id: fields.token_id("bos_token_id", 1, vocab_size)?,
            eos_token_id: fields.token_id("eos_token_id", 2, vocab_size)?,
            pad_token_id: fields.token_id("pad_token_id", 0, vocab_size)?,
        };
        config.check(fields)?;
        Ok(config)
    }

    fn check(&self, fields: &Fields<'_>) -> Result<()> {
        let Self { layers, heads, hidden_dim, embed_dim, .. } = *self;
        if hidden_dim % heads != 0 {
            return Err(fields.error(format_args!(
                "hidden_dim {hidden_dim} is not a multiple of decoder_attention_heads {heads}"
            )));
        }
        if self.lrpe.len() != layers as usize {
            return Err(fields.error(format_args!(
                "linear_use_lrpe_list has {} entries, decoder_layers is {layers}",
                self.lrpe.len()
            )));
        }
        if self.lrpe.contains(&true) && hidden_dim != embed_dim {
            return Err(fields.error(format_args!(
                "linear_use_lrpe_list enables LRPE, which needs hidden_dim {hidden_dim} equal to \
                 decoder_embed_dim {embed_dim}"
            )));
        }
        Ok(())
    }
}

/// The keys of a JSON file, read by type. A `null` counts as an absent key, as in Python's configuration
/// classes.
pub(super) struct Fields<'a> {
    pub(super) path: &'a Path,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn boolean(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(self.wrong(key, "true or false", other)),
        }
    }

    /// A token id below `vocab_size`. An absent key gives `default` if the vocabulary has it; −1 gives none.
    pub(super) fn token_id(&self, key: &str, default: u32, vocab_size: u32) -> Result<Option<u32>> {
        match self.get(key) {
            None => Ok(Some(default).filter(|id| *id < vocab_size)),
            Some(value) if value.as_i64() == Some(-1) => Ok(None),
            Some(value) => self.token_id_value(key, value, vocab_size).map(Some),
        }
    }

    /// `value`, found under `key`, as a token id below `vocab_size`.
    pub(super) fn token_id_value(&self, key: &str, value: &Value, vocab_size: u32) -> Result<u32> {
        as_u32(value)
            .filter(|id| *id < vocab_size)
            .ok_or_else(|| self.wrong(key, format_args!("a token id below vocab_size {vocab_size}"), value))
    }

    pub(super) fn wrong(&self, key: &str, expected: impl Display, found: &Value) -> Error {
        let mut text = found.to_string();
        if text.len() > 60 {
            text.truncate((0..=60).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0));
            text.push('…');
        }
        self.error(format_args!("{key} must be {expected}, found {text}"))
    }

    fn error(&self, message: impl Display) -> Error {
        format_error(self.path, message)
    }

    fn integer(&self, key: &str, default: u32, allowed: RangeInclusive<u32>) -> Result<u32> {
        let Some(value) = self.get(key) else { return Ok(default) };
        as_u32(value).filter(|number| allowed.contains(number)).ok_or_else(|| {
            let (low, high) = (allowed.start(), allowed.end());
            self.wrong(key, format_args!("a whole number from {low} to {high}"), value)
        })
    }

    fn expect_text(&self, key: &str, expected: &str, kind: ErrorKind) -> Result<()> {
        match self.get(key) {
            None => Ok(()),
            Some(Value::String(text)) if text == expected => Ok(()),
            Some(Value::String(text)) => Err(Error::new(
                kind,
                format_args!("{}: {key} {text:?} is not supported, only {expected:?}", self.path.display()),
            )),
            Some(other) => Err(self.wrong(key, format_args!("{expected:?}"), other)),
        }
    }

    fn glu_dim(&self, embed_dim: u32) -> Result<u32> {
        match self.get("glu_dim") {
            Some(value) if value.as_i64() == Some(-1) => Ok(embed_dim),
            _ => self.integer("glu_dim", 2816, 1..=1 << 18),
        }
    }

    fn lrpe_list(&self) -> Result<Vec<bool>> {
        const KEY: &str = "linear_use_lrpe_list";
        let Some(value) = self.get(KEY) else {
            return Err(self.error(format_args!("{KEY} is missing: one 0 or 1 for each layer")));
        };
        let flag = |item: &Value| match item {
            Value::Bool(flag) => Some(*flag),
            other => other.as_u64().filter(|number| *number <= 1).map(|number| number == 1),
        };
        let flags = value.as_array().and_then(|items| items.iter().map(flag).collect::<Option<Vec<_>>>());
        flags.ok_or_else(|| self.wrong(KEY, "a list of 0 and 1", value))
    }

    fn activation(&self) -> Result<Activation> {
        const KEY: &str = "linear_act_fun";
        let Some(value) = self.get(KEY) else { return Ok(Activation::Silu) };
        // The authors' code turns any unknown name into the identity, which would hide a typing error.
        let known = value.as_str().and_then(Activation::from_name);
        known.ok_or_else(|| self.wrong(KEY, "an activation such as \"silu\" or \"1+elu\"", value))
    }
}

fn as_u32(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config> {
        let map = json::parse_object(text.as_bytes()).unwrap();
        Config::from_object(Path::new("config.json"), &map)
    }

    #[test]
    fn silence_means_the_385m_model() {
        let list = vec!["0"; 24].join(",");
        let config = parse(&format!("{{\"linear_use_lrpe_list\": [{list}]}}")).unwrap();
        assert_eq!((config.vocab_size, config.embed_dim, config.layers), (64000, 1024, 24));
        assert_eq!((config.heads, config.head_dim(), config.glu_dim), (8, 128, 2816));
        assert_eq!((config.activation, config.scale_embedding, config.bias), (Activation::Silu, true, false));
        assert!(config.tie_word_embeddings);
        assert_eq!(
            (config.pad_token_id, config.bos_token_id, config.eos_token_id),
            (Some(0), Some(1), Some(2))
        );
    }

    #[test]
    fn reads_the_variants() {
        let config = parse(
            r#"{"model_type": "transnormer", "vocab_size": 128, "decoder_embed_dim": 64, "hidden_dim": 96,
                "decoder_layers": 3, "decoder_attention_heads": 4, "glu_dim": -1, "bias": true,
                "linear_use_lrpe_list": [0, false, 0], "no_scale_embedding": true, "linear_use_lrpe": 0,
                "linear_act_fun": "1+elu", "tie_word_embeddings": false, "pad_token_id": -1,
                "eos_token_id": null, "transformers_version": "4.37.2"}"#,
        )
        .unwrap();
        assert_eq!((config.glu_dim, config.hidden_dim, config.head_dim()), (64, 96, 24));
        assert!(config.bias && !config.scale_embedding && !config.tie_word_embeddings);
        assert_eq!((config.pad_token_id, config.eos_token_id), (None, Some(2)));
        assert_eq!(config.activation, Activation::OnePlusElu);
        assert_eq!(parse(&tiny("\"linear_act_fun\": \"swish\"")).unwrap().activation, Activation::Silu);
    }

    /// A valid two-layer configuration with one more key.
    fn tiny(extra: &str) -> String {
        format!("{{\"decoder_layers\": 2, \"linear_use_lrpe_list\": [1, 0], {extra}}}")
    }

    #[test]
    fn refuses_wrong_types_and_contradictions() {
        for (text, expected) in [
            ("{}".to_owned(), "linear_use_lrpe_list is missing"),
            (
                tiny("\"vocab_size\": \"many\""),
                "vocab_size must be a whole number from 1 to 1048576, found \"many\"",
            ),
            (tiny("\"vocab_size\": 1e9"), "vocab_size must be"),
            (tiny("\"vocab_size\": 0"), "vocab_size must be"),
            (tiny("\"decoder_embed_dim\": 18446744073709551615"), "decoder_embed_dim must be"),
            (tiny("\"glu_dim\": -2"), "glu_dim must be"),
            (tiny("\"bias\": 1"), "bias must be true or false"),
            (tiny("\"eos_token_id\": 64000"), "eos_token_id must be a token id below vocab_size 64000"),
            (tiny("\"hidden_dim\": 1020"), "hidden_dim 1020 is not a multiple"),
            (tiny("\"hidden_dim\": 512"), "needs hidden_dim 512 equal to decoder_embed_dim 1024"),
            (tiny("\"norm_type\": \"layernorm\""), "norm_type \"layernorm\" is not supported"),
            (tiny("\"model_type\": \"llama\""), "model_type \"llama\" is not supported"),
            (tiny("\"linear_act_fun\": \"Silu\""), "linear_act_fun must be an activation such as \"silu\""),
            ("{\"decoder_layers\": 1, \"linear_use_lrpe_list\": [0]}".to_owned(), "decoder_layers must be"),
            ("{\"decoder_layers\": 2, \"linear_use_lrpe_list\": [0]}".to_owned(), "has 1 entries"),
            ("{\"decoder_layers\": 2, \"linear_use_lrpe_list\": [0, 2]}".to_owned(), "a list of 0 and 1"),
        ] {
            let error = parse(&text).expect_err(&text).to_string();
            assert!(error.starts_with("config.json: ") && error.contains(expected), "{error}");
        }
    }
}
