//! Promise: a damaged or hostile checkpoint is refused with one line that names the file and the field, and
//! nothing is written.

mod common;

use std::{fs, path::Path};

use common::{Sandbox, Tensor, edit_header, pickle, stderr, tensors, write_safetensors, write_torch, zip};
use serde_json::{Map, Value, json};
use tn_quantize::synthetic::{self, Options};
use transnormer::dtype::DType;

/// Damages the sandbox's valid checkpoint.
type Damage = fn(&Sandbox);

/// What is wrong, and what the line must say.
type Case = (Damage, &'static [&'static str]);

fn check(cases: &[Case]) {
    for (number, (damage, expected)) in cases.iter().enumerate() {
        let sandbox = Sandbox::tiny();
        damage(&sandbox);
        check_refused(&sandbox, expected, number);
    }
}

fn check_refused(sandbox: &Sandbox, expected: &[&str], number: usize) {
    let output = sandbox.run(&["--type", "F16"]);
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "case {number} {expected:?}: {error}");
    assert!(error.starts_with("tn-quantize: ") && error.lines().count() == 1, "case {number}: {error}");
    for part in expected {
        assert!(error.contains(part), "case {number}: {part:?} is not in: {error}");
    }
    assert!(sandbox.leftovers().is_empty(), "case {number}: {:?}", sandbox.leftovers());
}

fn edit_config(sandbox: &Sandbox, key: &str, value: Value) {
    let mut config = synthetic::tiny_config_json();
    config[key] = value;
    fs::write(sandbox.input("config.json"), config.to_string()).unwrap();
}

fn edit(sandbox: &Sandbox, edit: impl FnOnce(&mut Map<String, Value>)) {
    edit_header(&sandbox.input("model.safetensors"), edit);
}

/// Overwrites element `index` of the data of the only safetensors file.
fn poke(sandbox: &Sandbox, index: usize, value: f32) {
    let path = sandbox.input("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    bytes[8 + header + 4 * index..][..4].copy_from_slice(&value.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

fn truncate(path: &Path, by: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - by).unwrap();
}

const QKVU: &str = "model.layers.0.token_mixer.qkvu_proj.weight";

#[test]
fn configurations() {
    check(&[
        (|s| fs::remove_dir_all(s.input("")).unwrap(), &["in", "not a folder"]),
        (|s| fs::remove_file(s.input("config.json")).unwrap(), &["config.json"]),
        (|s| fs::write(s.input("config.json"), "{\"a\": ").unwrap(), &["config.json", "invalid JSON"]),
        (
            |s| fs::write(s.input("config.json"), "{\"bias\": false, \"bias\": true}").unwrap(),
            &["config.json", "\"bias\" appears twice"],
        ),
        (|s| fs::write(s.input("config.json"), "[".repeat(5000)).unwrap(), &["config.json", "recursion"]),
        (
            |s| fs::write(s.input("config.json"), " ".repeat(2 << 20)).unwrap(),
            &["config.json", "1048576 allowed"],
        ),
        (|s| edit_config(s, "vocab_size", json!("300")), &["config.json", "vocab_size must be"]),
        (
            |s| edit_config(s, "decoder_layers", json!(3)),
            &["config.json", "linear_use_lrpe_list has 2 entries"],
        ),
        (|s| edit_config(s, "norm_type", json!("layernorm")), &["config.json", "norm_type"]),
        (
            |s| edit_config(s, "vocab_size", json!(301)),
            &["model.safetensors", "embed_tokens", "[300, 64]", "[301, 64]"],
        ),
        (
            |s| edit_config(s, "decoder_attention_heads", json!(8)),
            &["model.safetensors", "lrpe.theta", "[4, 1, 16]", "[8, 1, 8]"],
        ),
        (|s| edit_config(s, "bias", json!(true)), &["bias\" is missing"]),
        (
            |s| edit_config(s, "tie_word_embeddings", json!(false)),
            &["lm_head.weight", "tie_word_embeddings false"],
        ),
    ]);
}

#[test]
fn safetensors() {
    check(&[
        (|s| fs::remove_file(s.input("model.safetensors")).unwrap(), &["no weights", "model.safetensors"]),
        (|s| truncate(&s.input("model.safetensors"), 1), &["model.safetensors", "download it again"]),
        (|s| fs::write(s.input("model.safetensors"), "").unwrap(), &["model.safetensors", "ends early"]),
        (|s| fs::write(s.input("model.safetensors"), [0xff; 64]).unwrap(), &["model.safetensors", "header"]),
        (
            |s| {
                fs::remove_file(s.input("model.safetensors")).unwrap();
                fs::create_dir(s.input("model.safetensors")).unwrap();
            },
            &["model.safetensors", "not a regular file"],
        ),
        (
            |s| {
                let entry = r#"{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}"#;
                let header = format!("{{\"x\": {entry}, \"x\": {entry}}}");
                write_safetensors(&s.input("model.safetensors"), &header, &[0; 4]);
            },
            &["model.safetensors", "\"x\" appears twice"],
        ),
        (
            |s| {
                edit(s, |header| {
                    let tensor = header.remove(QKVU).unwrap();
                    header.insert("model.layers.0.token_mixer.q_proj.weight".to_owned(), tensor);
                });
            },
            &[QKVU, "missing"],
        ),
        (
            |s| edit(s, |header| header[QKVU]["shape"] = json!([64, 256])),
            &["model.safetensors", QKVU, "[64, 256]", "[256, 64]"],
        ),
        (
            |s| {
                edit(s, |header| {
                    header.insert(
                        "x\ny".to_owned(),
                        json!({ "dtype": "F32", "shape": [0], "data_offsets": [0, 0] }),
                    );
                });
            },
            &["\"x\\ny\"", "not part of the model"],
        ),
        (|s| edit(s, |header| header[QKVU]["dtype"] = json!("I32")), &["model.safetensors", QKVU, "I32"]),
        (
            |s| edit(s, |header| header[QKVU]["data_offsets"] = json!([0, 65536])),
            &["model.safetensors", "invalid header"],
        ),
        (
            |s| edit(s, |header| header[QKVU]["shape"] = json!([-1, 64])),
            &["model.safetensors", "invalid header"],
        ),
        (|s| poke(s, 19000, f32::NAN), &["model.safetensors", "embed_tokens", "element 19000 is NaN"]),
        (|s| poke(s, 7, f32::NEG_INFINITY), &["model.safetensors", "embed_tokens", "element 7 is -inf"]),
        (|s| poke(s, 5, 1e6), &["model.safetensors", "element 5 is 1000000", "too large for F16"]),
    ]);
}

/// Puts an index beside the weights, which become the shard `a.safetensors`.
fn shard(sandbox: &Sandbox, edit: impl FnOnce(&mut Map<String, Value>)) {
    let all = sandbox.input("model.safetensors");
    let mut names = Vec::new();
    edit_header(&all, |header| names.extend(header.keys().filter(|name| *name != "__metadata__").cloned()));
    fs::rename(&all, sandbox.input("a.safetensors")).unwrap();
    let mut weight_map = names.into_iter().map(|name| (name, json!("a.safetensors"))).collect();
    edit(&mut weight_map);
    let index = json!({ "weight_map": weight_map });
    fs::write(sandbox.input("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn indexes_and_shards() {
    fn point(sandbox: &Sandbox, target: &str) {
        shard(sandbox, |map| drop(map.insert(QKVU.to_owned(), target.into())));
    }
    check(&[
        (|s| point(s, "../a.safetensors"), &["index.json", QKVU, "../a.safetensors", "plain file name"]),
        (|s| point(s, "/etc/passwd"), &["index.json", "/etc/passwd", "plain file name"]),
        (|s| point(s, ""), &["index.json", "plain file name"]),
        (|s| point(s, "b.safetensors"), &["index.json", "a.safetensors", QKVU]),
        (
            |s| shard(s, |map| map.values_mut().for_each(|file| *file = json!("b.safetensors"))),
            &["index.json", "b.safetensors", "No such file"],
        ),
        (
            |s| shard(s, |map| drop(map.insert("x".into(), json!("a.safetensors")))),
            &["\"x\"", "a.safetensors", "does not hold"],
        ),
        (|s| shard(s, |map| drop(map.remove(QKVU))), &["index.json", QKVU, "does not list"]),
        (|s| shard(s, Map::clear), &["index.json", "weight_map is empty"]),
        (|s| shard(s, |map| map[QKVU] = json!(3)), &["index.json", QKVU, "plain file name"]),
        (
            |s| {
                shard(s, |map| drop(map.insert("x".into(), json!("b.safetensors"))));
                fs::copy(s.input("a.safetensors"), s.input("b.safetensors")).unwrap();
            },
            &["index.json", "b.safetensors", "does not list"],
        ),
        (
            |s| {
                shard(s, |_| {});
                fs::write(s.input("model.safetensors.index.json"), "{\"weight_map\": []}").unwrap();
            },
            &["index.json", "weight_map is missing"],
        ),
        (
            |s| {
                shard(s, |_| {});
                truncate(&s.input("a.safetensors"), 100);
            },
            &["a.safetensors", "download it again"],
        ),
    ]);
}

/// Replaces the weights by a torch file of the same tensors after `edit`.
fn torch(sandbox: &Sandbox, edit: impl FnOnce(&mut Vec<Tensor>)) {
    sandbox.replace_weights(|dir| {
        let config = synthetic::config(&synthetic::tiny_config_json()).unwrap();
        let mut all = tensors(&config, false, DType::F32);
        edit(&mut all);
        write_torch(&dir.join("pytorch_model.bin"), &all);
    });
}

fn torch_with_pickle(sandbox: &Sandbox, code: &[u8]) {
    sandbox.replace_weights(|dir| {
        fs::write(dir.join("pytorch_model.bin"), zip(&[("m/data.pkl".to_owned(), code)])).unwrap();
    });
}

#[test]
fn torch_files() {
    check(&[
        (
            |s| torch_with_pickle(s, b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."),
            &["pytorch_model.bin", "data.pkl", "posix.system", "nothing was run"],
        ),
        (
            |s| torch_with_pickle(s, b"\x80\x02]q\x00(h\x00h\x00e."),
            &["pytorch_model.bin", "not a dictionary"],
        ),
        (|s| torch_with_pickle(s, &pickle(&[])[..20]), &["pytorch_model.bin", "ends early"]),
        (
            |s| {
                torch(s, |_| {});
                let path = s.input("pytorch_model.bin");
                let mut bytes = fs::read(&path).unwrap();
                let central = bytes.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
                bytes[central + 10] = 8;
                bytes[central + 24..][..4].copy_from_slice(&0xf000_0000_u32.to_le_bytes());
                fs::write(path, bytes).unwrap();
            },
            &["pytorch_model.bin", "data.pkl", "is compressed"],
        ),
        (
            |s| {
                torch(s, |_| {});
                truncate(&s.input("pytorch_model.bin"), 1000);
            },
            &["pytorch_model.bin", "cut off"],
        ),
        (|s| torch(s, |all| all[3].bytes.truncate(8)), &["pytorch_model.bin", "8 bytes of storage"]),
        (|s| torch(s, |all| drop(all.remove(0))), &["model.embed_tokens.weight", "missing"]),
        (|s| torch(s, |all| all[0].shape = vec![64, 300]), &["pytorch_model.bin", "[64, 300]", "[300, 64]"]),
        (
            |s| torch(s, |all| all[1].name = all[0].name.clone()),
            &["pytorch_model.bin", "model.embed_tokens.weight", "appears twice"],
        ),
        (
            |s| torch(s, |all| all[0].bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes())),
            &["pytorch_model.bin", "embed_tokens", "element 0 is NaN"],
        ),
        (
            |s| {
                s.replace_weights(|dir| {
                    fs::write(dir.join("pytorch_model.bin"), b"\x80\x02\x8a\x0a").unwrap()
                })
            },
            &["pytorch_model.bin", "before 2020"],
        ),
    ]);
}

#[test]
fn tokenizers() {
    check(&[
        (|s| fs::remove_file(s.input("tokenizer.model")).unwrap(), &["tokenizer.model", "missing", "put"]),
        (
            |s| fs::write(s.input("tokenizer.model"), "not protobuf").unwrap(),
            &["tokenizer.model", "not a SentencePiece"],
        ),
        (
            |s| {
                let mut bytes = fs::read(s.input("tokenizer.model")).unwrap();
                let at = bytes.windows(5).position(|window| window == b"<unk>").unwrap();
                bytes[at] = 0xc0;
                fs::write(s.input("tokenizer.model"), bytes).unwrap();
            },
            &["tokenizer.model", "UTF-8"],
        ),
        (
            |s| fs::write(s.input("tokenizer.model"), synthetic::tokenizer_model(301)).unwrap(),
            &["tokenizer.model", "301 pieces", "vocab_size 300"],
        ),
        (
            |s| fs::write(s.input("tokenizer_config.json"), "{\"add_bos_token\": 1}").unwrap(),
            &["tokenizer_config.json", "add_bos_token"],
        ),
        (
            |s| fs::write(s.input("generation_config.json"), "{\"eos_token_id\": 300}").unwrap(),
            &["generation_config.json", "eos_token_id"],
        ),
    ]);
}

#[test]
fn the_checkpoint_that_the_cases_damage_is_fine() {
    let sandbox = Sandbox::new(&synthetic::tiny_config_json(), &Options::default());
    for prepare in [(|_| {}) as Damage, |s| shard(s, |_| {}), |s| torch_in_shards(s)] {
        prepare(&sandbox);
        let output = sandbox.run(&["--type", "F16", "--force"]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
}

fn torch_in_shards(sandbox: &Sandbox) {
    fs::rename(sandbox.input("a.safetensors"), sandbox.input("model.safetensors")).unwrap();
    fs::remove_file(sandbox.input("model.safetensors.index.json")).unwrap();
    torch(sandbox, |_| {});
}
