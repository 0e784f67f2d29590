//! The tokenizer of a checkpoint: `tokenizer.model` (SentencePiece) and the settings beside it (SPEC §5).

use std::{collections::HashSet, path::Path};

use prost::Message;
use serde_json::{Map, Value};
use transnormer::{
    error::{Error, ErrorKind, Result},
    tokenizer::{PieceType, Tokenizer, Vocab},
};

use super::{
    config::{Config, Fields},
    json,
    source::{format_error, read_small_file},
};

/// File name of the SentencePiece model.
const MODEL_FILE: &str = "tokenizer.model";
/// Size limit of `tokenizer.model`: 64,000 pieces take one megabyte.
const MAX_MODEL_BYTES: u64 = 8 << 20;
/// Size limit of the settings files.
const MAX_JSON_BYTES: u64 = 4 << 20;
/// Size limit of the chat template.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// SentencePiece's number for byte-pair encoding.
const MODEL_TYPE_BPE: i32 = 2;

/// Reads `tokenizer.model` of the checkpoint `dir`, and `tokenizer_config.json` and `generation_config.json`
/// where they are. A vocabulary that is smaller than `config.vocab_size` is padded with unused pieces
/// `[PAD0]`, `[PAD1]` …, as the field does.
///
/// # Errors
/// [`ErrorKind::Io`] where `tokenizer.model` is missing, [`ErrorKind::Tokenizer`] where the engine cannot
/// tokenize as the model demands, [`ErrorKind::Format`] where a file is damaged.
pub fn read(dir: &Path, config: &Config) -> Result<Vocab> {
    let path = dir.join(MODEL_FILE);
    if !path.exists() {
        return Err(Error::new(
            ErrorKind::Io,
            format_args!("{}: missing; put the model's SentencePiece file there", path.display()),
        ));
    }
    let bytes = read_small_file(&path, MAX_MODEL_BYTES)?;
    let model = ModelProto::decode(&bytes[..])
        .map_err(|error| format_error(&path, format_args!("not a SentencePiece model: {error}")))?;
    let refused = |error: Error| error.context(path.display());
    let mut vocab = model.vocab(config).map_err(refused)?;
    read_settings(&mut vocab, dir, config.vocab_size)?;
    // The engine's own checks: what it would refuse to load is not written.
    Tokenizer::new(vocab.clone()).map_err(refused)?;
    Ok(vocab)
}

fn read_settings(vocab: &mut Vocab, dir: &Path, vocab_size: u32) -> Result<()> {
    let path = dir.join("tokenizer_config.json");
    if let Some(map) = read_optional(&path)? {
        let fields = Fields { path: &path, map: &map };
        // Without the key, SPEC §5 gives no beginning-of-sequence token.
        vocab.add_bos = fields.boolean("add_bos_token", false)?;
        vocab.chat_template = chat_template(&fields)?;
    }
    let path = dir.join("generation_config.json");
    if let Some(map) = read_optional(&path)? {
        let fields = Fields { path: &path, map: &map };
        // A list means "any of these ends"; GGUF holds one, by convention the first.
        let eos =
            fields.get("eos_token_id").map(|eos| eos.as_array().and_then(|ids| ids.first()).unwrap_or(eos));
        if let Some(eos) = eos {
            vocab.eos = fields.token_id_value("eos_token_id", eos, vocab_size)?;
        }
    }
    Ok(())
}

fn read_optional(path: &Path) -> Result<Option<Map<String, Value>>> {
    if path.exists() { json::read_object(path, MAX_JSON_BYTES).map(Some) } else { Ok(None) }
}

/// `chat_template`: one text, or a list of named ones of which `default` counts.
fn chat_template(fields: &Fields<'_>) -> Result<Option<String>> {
    const KEY: &str = "chat_template";
    let Some(value) = fields.get(KEY) else { return Ok(None) };
    let template = match value {
        Value::Array(templates) => templates
            .iter()
            .find(|template| template.get("name").is_some_and(|name| name == "default"))
            .and_then(|template| template.get("template")),
        other => Some(other),
    };
    match template.and_then(Value::as_str) {
        Some(text) if text.len() <= MAX_TEMPLATE_BYTES => Ok(Some(text.to_owned())),
        _ => Err(fields.wrong(KEY, "a text of at most a megabyte, or a list with one called default", value)),
    }
}

/// Gives every row of the embedding a piece.
fn pad(vocab: &mut Vocab, vocab_size: usize) {
    let taken: HashSet<String> = vocab.pieces.iter().cloned().collect();
    let names = (0..).map(|i| format!("[PAD{i}]")).filter(|name| !taken.contains(name));
    let missing = vocab_size - vocab.pieces.len();
    vocab.pieces.extend(names.take(missing));
    vocab.scores.resize(vocab_size, 0.0);
    vocab.types.resize(vocab_size, PieceType::Unused);
}

/// SentencePiece's `ModelProto`; only the fields that matter here, the others are skipped.
#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    /// The vocabulary.
    #[prost(message, repeated, tag = "1")]
    pub pieces: Vec<SentencePiece>,
    /// How the vocabulary was made.
    #[prost(message, optional, tag = "2")]
    pub trainer_spec: Option<TrainerSpec>,
    /// How text is prepared.
    #[prost(message, optional, tag = "3")]
    pub normalizer_spec: Option<NormalizerSpec>,
    /// How decoded text is finished.
    #[prost(message, optional, tag = "5")]
    pub denormalizer_spec: Option<NormalizerSpec>,
}

/// One entry of the vocabulary.
#[derive(Clone, PartialEq, Message)]
pub struct SentencePiece {
    /// Text.
    #[prost(string, optional, tag = "1")]
    pub piece: Option<String>,
    /// Merge priority.
    #[prost(float, optional, tag = "2")]
    pub score: Option<f32>,
    /// Kind, see [`PieceType`].
    #[prost(int32, optional, tag = "3", default = "1")]
    pub kind: Option<i32>,
}

/// The training settings that decide how text becomes tokens.
#[derive(Clone, PartialEq, Message)]
pub struct TrainerSpec {
    /// 1 unigram, 2 BPE, 3 word, 4 character.
    #[prost(int32, optional, tag = "3", default = "1")]
    pub model_type: Option<i32>,
    /// Whether `▁` ends a word, where it usually starts one.
    #[prost(bool, optional, tag = "24")]
    pub treat_whitespace_as_suffix: Option<bool>,
    /// Whether text without a piece becomes bytes.
    #[prost(bool, optional, tag = "35")]
    pub byte_fallback: Option<bool>,
    /// Id of the unknown piece.
    #[prost(int32, optional, tag = "40", default = "0")]
    pub unk_id: Option<i32>,
    /// Id of the beginning of a sequence.
    #[prost(int32, optional, tag = "41", default = "1")]
    pub bos_id: Option<i32>,
    /// Id of the end of a sequence.
    #[prost(int32, optional, tag = "42", default = "2")]
    pub eos_id: Option<i32>,
}

/// How text is prepared.
#[derive(Clone, PartialEq, Message)]
pub struct NormalizerSpec {
    /// Name of the rule, `identity` for none.
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    /// Compiled replacement rules.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub precompiled_charsmap: Option<Vec<u8>>,
    /// Whether a space is put before the text.
    #[prost(bool, optional, tag = "3", default = "true")]
    pub add_dummy_prefix: Option<bool>,
    /// Whether runs of spaces are merged.
    #[prost(bool, optional, tag = "4", default = "true")]
    pub remove_extra_whitespaces: Option<bool>,
    /// Whether a space becomes `▁`.
    #[prost(bool, optional, tag = "5", default = "true")]
    pub escape_whitespaces: Option<bool>,
}

impl ModelProto {
    /// The vocabulary, one piece for each row of the embedding, before the other files have their say.
    fn vocab(&self, config: &Config) -> Result<Vocab> {
        let trainer = self.trainer_spec.clone().unwrap_or_default();
        self.check_rules(&trainer)?;
        let (count, vocab_size) = (self.pieces.len(), config.vocab_size as usize);
        if count > vocab_size {
            return Err(refusal(format_args!(
                "{count} pieces, config.json has vocab_size {vocab_size}: they do not belong together"
            )));
        }
        let kinds: Result<Vec<_>> =
            self.pieces.iter().map(|entry| PieceType::from_gguf(entry.kind())).collect();
        let id = |number: i32| u32::try_from(number).unwrap_or(u32::MAX);
        let mut vocab = Vocab {
            pieces: self.pieces.iter().map(|entry| entry.piece().to_owned()).collect(),
            scores: self.pieces.iter().map(SentencePiece::score).collect(),
            types: kinds?,
            bos: config.bos_token_id.unwrap_or(id(trainer.bos_id())),
            eos: config.eos_token_id.unwrap_or(id(trainer.eos_id())),
            unk: id(trainer.unk_id()),
            pad: config.pad_token_id,
            add_bos: false,
            add_space_prefix: self.normalizer_spec.as_ref().is_none_or(NormalizerSpec::add_dummy_prefix),
            chat_template: None,
        };
        pad(&mut vocab, vocab_size);
        Ok(vocab)
    }

    /// Refuses rules that the engine does not follow: it would produce other tokens without a word.
    fn check_rules(&self, trainer: &TrainerSpec) -> Result<()> {
        let normalizer = self.normalizer_spec.clone().unwrap_or_default();
        let denormalizes =
            self.denormalizer_spec.as_ref().is_some_and(|spec| !spec.precompiled_charsmap().is_empty());
        let byte_pieces = self.pieces.iter().filter(|entry| entry.kind() == PieceType::Byte as i32).count();
        let rules = [
            (trainer.model_type() == MODEL_TYPE_BPE, "model_type is not BPE"),
            (
                byte_pieces == if trainer.byte_fallback() { 256 } else { 0 },
                "byte_fallback and byte pieces disagree",
            ),
            (!trainer.treat_whitespace_as_suffix(), "treat_whitespace_as_suffix is on"),
            (normalizer.precompiled_charsmap().is_empty(), "the normalizer is not identity"),
            (!normalizer.remove_extra_whitespaces(), "remove_extra_whitespaces is on"),
            (normalizer.escape_whitespaces(), "escape_whitespaces is off"),
            (!denormalizes, "the denormalizer is not identity"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            None => Ok(()),
            Some((_, broken)) => Err(refusal(format_args!(
                "{broken}: not the SentencePiece BPE of the TransNormerLLM family, unsupported"
            ))),
        }
    }
}

fn refusal(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Tokenizer, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small model of the family's kind: specials, all bytes, two words.
    fn model() -> ModelProto {
        let piece = |text: &str, score, kind: PieceType| SentencePiece {
            piece: Some(text.to_owned()),
            score: Some(score),
            kind: Some(kind as i32),
        };
        let mut pieces = vec![
            piece("<unk>", 0.0, PieceType::Unknown),
            piece("<s>", 0.0, PieceType::Control),
            piece("</s>", 0.0, PieceType::Control),
            piece("\n", 0.0, PieceType::UserDefined),
        ];
        pieces.extend((0..256).map(|byte| piece(&format!("<0x{byte:02X}>"), 0.0, PieceType::Byte)));
        pieces.push(piece("▁a", -1.0, PieceType::Normal));
        ModelProto {
            pieces,
            trainer_spec: Some(TrainerSpec {
                model_type: Some(MODEL_TYPE_BPE),
                byte_fallback: Some(true),
                ..TrainerSpec::default()
            }),
            normalizer_spec: Some(NormalizerSpec {
                name: Some("identity".to_owned()),
                remove_extra_whitespaces: Some(false),
                ..NormalizerSpec::default()
            }),
            denormalizer_spec: None,
        }
    }

    fn config(vocab_size: u32) -> Config {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let text = format!(
            "{{\"vocab_size\": {vocab_size}, \"decoder_layers\": 2, \"linear_use_lrpe_list\": [0, 0]}}"
        );
        std::fs::write(&path, text).unwrap();
        Config::read(&path).unwrap()
    }

    fn read_model(model: &ModelProto, vocab_size: u32, others: &[(&str, &str)]) -> Result<Vocab> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(MODEL_FILE), model.encode_to_vec()).unwrap();
        for (name, text) in others {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        read(dir.path(), &config(vocab_size))
    }

    #[test]
    fn keeps_every_piece_and_pads() {
        let mut model = model();
        model.pieces[260].piece = Some("[PAD0]".to_owned());
        let vocab = read_model(&model, 263, &[]).unwrap();
        assert_eq!((vocab.pieces.len(), vocab.scores.len(), vocab.types.len()), (263, 263, 263));
        assert_eq!((vocab.pieces[3].as_str(), vocab.types[3]), ("\n", PieceType::UserDefined));
        assert_eq!((vocab.scores[260], vocab.types[260]), (-1.0, PieceType::Normal));
        assert_eq!(vocab.pieces[261], "[PAD1]", "padding does not repeat a name");
        assert_eq!(vocab.types[262], PieceType::Unused);
        assert_eq!((vocab.unk, vocab.bos, vocab.eos, vocab.pad), (0, 1, 2, Some(0)));
        assert!(vocab.add_space_prefix && !vocab.add_bos && vocab.chat_template.is_none());
    }

    #[test]
    fn reads_the_settings() {
        let settings = [
            ("tokenizer_config.json", r#"{"add_bos_token": true, "chat_template": "{{ messages }}"}"#),
            ("generation_config.json", r#"{"eos_token_id": [1, 2]}"#),
        ];
        let vocab = read_model(&model(), 261, &settings).unwrap();
        assert!(vocab.add_bos);
        assert_eq!((vocab.eos, vocab.chat_template.as_deref()), (1, Some("{{ messages }}")));
        let named =
            r#"{"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        let vocab = read_model(&model(), 261, &[("tokenizer_config.json", named)]).unwrap();
        assert_eq!(vocab.chat_template.as_deref(), Some("d"));
        for (name, text, expected) in [
            (
                "tokenizer_config.json",
                r#"{"add_bos_token": "yes"}"#,
                "tokenizer_config.json: add_bos_token must be",
            ),
            (
                "tokenizer_config.json",
                r#"{"chat_template": 3}"#,
                "tokenizer_config.json: chat_template must be",
            ),
            (
                "generation_config.json",
                r#"{"eos_token_id": 261}"#,
                "generation_config.json: eos_token_id must be",
            ),
            ("generation_config.json", "[]", "generation_config.json: invalid JSON"),
        ] {
            let error = read_model(&model(), 261, &[(name, text)]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn refuses_models_it_could_not_follow() {
        type Break = fn(&mut ModelProto);
        let cases: [(Break, &str); 15] = [
            (|m| m.trainer_spec = None, "model_type is not BPE"),
            (
                |m| m.trainer_spec.as_mut().unwrap().byte_fallback = None,
                "byte_fallback and byte pieces disagree",
            ),
            (|m| m.trainer_spec.as_mut().unwrap().treat_whitespace_as_suffix = Some(true), "suffix is on"),
            (|m| m.trainer_spec.as_mut().unwrap().unk_id = Some(-1), "unknown"),
            (|m| m.trainer_spec.as_mut().unwrap().unk_id = Some(1), "unknown"),
            (
                |m| m.normalizer_spec.as_mut().unwrap().precompiled_charsmap = Some(vec![1]),
                "normalizer is not identity",
            ),
            (
                |m| m.normalizer_spec.as_mut().unwrap().escape_whitespaces = Some(false),
                "escape_whitespaces is off",
            ),
            (|m| m.normalizer_spec = None, "remove_extra_whitespaces is on"),
            (|m| m.denormalizer_spec = m.normalizer_spec.clone(), ""),
            (|m| m.pieces[260].piece = Some(String::new()), "piece 260 has 0 bytes"),
            (|m| m.pieces[260].score = Some(f32::NAN), "piece 260 has score NaN"),
            (|m| m.pieces[260].piece = Some("<s>".into()), "\"<s>\""),
            (|m| m.pieces[260].kind = Some(7), "unknown type 7"),
            (|m| m.pieces[9].piece = Some("<0x+5>".into()), "<0x+5>"),
            (|m| m.pieces[9].kind = Some(1), "byte_fallback and byte pieces disagree"),
        ];
        for (damage, expected) in cases {
            let mut model = model();
            damage(&mut model);
            if expected.is_empty() {
                assert!(read_model(&model, 261, &[]).is_ok(), "an empty denormalizer changes nothing");
                continue;
            }
            let error = read_model(&model, 261, &[]).expect_err(expected);
            assert_eq!(error.kind(), ErrorKind::Tokenizer);
            assert!(
                error.to_string().contains("tokenizer.model: ") && error.to_string().contains(expected),
                "{error}"
            );
        }
        let error = read_model(&model(), 260, &[]).unwrap_err().to_string();
        assert!(error.contains("261 pieces, config.json has vocab_size 260"), "{error}");
    }

    #[test]
    fn damaged_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = read(dir.path(), &config(261)).unwrap_err().to_string();
        assert!(error.contains("tokenizer.model: missing; put the model's"), "{error}");
        let mut bytes = model().encode_to_vec();
        let at = bytes.windows(5).position(|window| window == b"<unk>").unwrap();
        bytes[at] = 0xff;
        for (bytes, expected) in
            [(&bytes[..], "UTF-8"), (&bytes[..at], "not a SentencePiece model"), (b"\xff\xff", "not a")]
        {
            std::fs::write(dir.path().join(MODEL_FILE), bytes).unwrap();
            let error = read(dir.path(), &config(261)).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{error}");
        }
    }
}
