//! Promise: what the checkpoint says is what the file says. F32 output holds the source bit for bit, from
//! every format; every quantized type stays within its error.

mod common;

use std::{fs, path::Path};

use common::{Sandbox, Tensor, encode, shared, stderr, tensors, tn_quantize, values, write_torch};
use serde_json::{Value, json};
use tn_quantize::{
    checkpoint::{Checkpoint, Config},
    names,
    synthetic::{self, Options},
};
use transnormer::{dtype::DType, ggml, gguf::Gguf, tiles, tokenizer::Vocab, weights::TILE_ROWS_KEY};

fn tiny_config() -> Config {
    synthetic::config(&synthetic::tiny_config_json()).unwrap()
}

/// Converts and parses; every promise below is about the parsed file.
fn convert(sandbox: &Sandbox, preset: &str) -> (Vec<u8>, Gguf) {
    let output = sandbox.run(&["--type", preset]);
    assert!(output.status.success(), "{}", stderr(&output));
    let bytes = fs::read(sandbox.out()).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    (bytes, gguf)
}

/// Asserts that an F32 file holds the synthetic model, rounded to `dtype`, bit for bit.
fn assert_exact(bytes: &[u8], gguf: &Gguf, config: &Config, separate_head: bool, dtype: DType) {
    let expected = names::model_tensors(config, separate_head);
    assert_eq!(gguf.tensors.len(), expected.len());
    for tensor in expected {
        let info = gguf.tensor(&tensor.target).unwrap();
        assert_eq!((info.dtype, &info.shape), (DType::F32, &tensor.target_shape()));
        let found = &bytes[info.offset as usize..(info.offset + info.nbytes) as usize];
        let rounded = |value| match dtype {
            DType::BF16 => half::bf16::from_f32(value).to_f32(),
            DType::F16 => half::f16::from_f32(value).to_f32(),
            _ => value,
        };
        let wanted: Vec<u8> =
            values(config, &tensor).into_iter().flat_map(|v| rounded(v).to_le_bytes()).collect();
        assert!(found == wanted, "{} differs", tensor.target);
    }
}

#[test]
fn safetensors_of_every_type_are_exact_in_f32() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let options = Options { dtype, ..Options::default() };
        let sandbox = Sandbox::new(&synthetic::tiny_config_json(), &options);
        let (bytes, gguf) = convert(&sandbox, "F32");
        assert_exact(&bytes, &gguf, &tiny_config(), false, dtype);
    }
}

#[test]
fn sharded_safetensors_are_exact_in_f32() {
    let options = Options { shard_bytes: 60_000, ..Options::default() };
    let sandbox = Sandbox::new(&synthetic::tiny_config_json(), &options);
    assert!(sandbox.input("model.safetensors.index.json").exists(), "the limit on shards has an effect");
    let (bytes, gguf) = convert(&sandbox, "F32");
    assert_exact(&bytes, &gguf, &tiny_config(), false, DType::F32);
}

#[test]
fn torch_files_of_every_type_are_exact_in_f32() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let sandbox = Sandbox::tiny();
        sandbox.replace_weights(|dir| {
            let mut all = tensors(&tiny_config(), false, dtype);
            let embedding = &all[0];
            let tied = Tensor {
                name: names::HEAD.to_owned(),
                shape: embedding.shape.clone(),
                dtype,
                bytes: embedding.bytes.clone(),
                storage: 0,
            };
            all.push(tied);
            write_torch(&dir.join("pytorch_model.bin"), &all);
        });
        let (bytes, gguf) = convert(&sandbox, "F32");
        assert_exact(&bytes, &gguf, &tiny_config(), false, dtype);
    }
}

#[test]
fn sharded_torch_files_are_exact_in_f32() {
    let sandbox = Sandbox::tiny();
    sandbox.replace_weights(|dir| {
        let all = tensors(&tiny_config(), false, DType::BF16);
        let mut weight_map = serde_json::Map::new();
        for (number, shard) in all.chunks(5).enumerate() {
            let name = format!("pytorch_model-{number:05}.bin");
            write_torch(&dir.join(&name), shard);
            weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), Value::from(name.clone()))));
        }
        let index = json!({ "metadata": {}, "weight_map": weight_map });
        fs::write(dir.join("pytorch_model.bin.index.json"), index.to_string()).unwrap();
    });
    let (bytes, gguf) = convert(&sandbox, "F32");
    assert_exact(&bytes, &gguf, &tiny_config(), false, DType::BF16);
}

#[test]
fn every_bit_pattern_of_a_half_survives_its_own_type() {
    // The embedding of 300 x 64 takes the finite patterns; subnormals and negative zero are among them.
    for (dtype, preset, infinity) in [(DType::F16, "F16", 0x7c00_u16), (DType::BF16, "BF16", 0x7f80)] {
        let sandbox = Sandbox::tiny();
        let patterns: Vec<u8> = (0..300 * 64_u16)
            .map(|i| i.wrapping_mul(3))
            .map(|bits| if bits & infinity == infinity { bits & !infinity } else { bits })
            .flat_map(u16::to_le_bytes)
            .collect();
        sandbox.replace_weights(|dir| {
            let mut all = tensors(&tiny_config(), false, dtype);
            all[0].bytes.copy_from_slice(&patterns);
            write_torch(&dir.join("pytorch_model.bin"), &all);
        });
        let (bytes, gguf) = convert(&sandbox, preset);
        let info = gguf.tensor("token_embd.weight").unwrap();
        assert_eq!(info.dtype, dtype);
        assert!(bytes[info.offset as usize..][..info.nbytes as usize] == patterns, "{preset} is not exact");
    }
}

#[test]
fn a_head_of_its_own_is_kept_and_a_copy_is_not() {
    let mut config = synthetic::tiny_config_json();
    config["tie_word_embeddings"] = false.into();
    let sandbox = Sandbox::new(&config, &Options::default());
    let (bytes, gguf) = convert(&sandbox, "F32");
    assert_exact(&bytes, &gguf, &tiny_config(), true, DType::F32);
    assert_eq!(gguf.metadata.bool("transnormer.tie_embeddings").unwrap(), Some(false));

    // The same weights under a configuration that ties them: the head still differs, so it is used.
    fs::write(sandbox.input("config.json"), synthetic::tiny_config_json().to_string()).unwrap();
    let output = sandbox.run(&["--type", "F32", "--force"]);
    assert!(stderr(&output).contains("warning: config.json ties lm_head.weight"), "{}", stderr(&output));
    let bytes = fs::read(sandbox.out()).unwrap();
    assert_exact(&bytes, &Gguf::parse(&bytes).unwrap(), &tiny_config(), true, DType::F32);

    // A head with the embedding's values in a storage of its own is the embedding.
    fs::remove_file(sandbox.input("model.safetensors")).unwrap();
    let mut all = tensors(&tiny_config(), true, DType::F32);
    all[1].bytes = all[0].bytes.clone();
    write_torch(&sandbox.input("pytorch_model.bin"), &all);
    let output = sandbox.run(&["--type", "F32", "--force"]);
    assert!(output.status.success() && !stderr(&output).contains("warning"), "{}", stderr(&output));
    let bytes = fs::read(sandbox.out()).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_exact(&bytes, &gguf, &tiny_config(), false, DType::F32);
    assert_eq!(gguf.metadata.bool("transnormer.tie_embeddings").unwrap(), Some(true));
}

#[test]
fn all_variants_of_the_architecture_are_described() {
    let mut config = synthetic::tiny_config_json();
    for (key, value) in [
        ("hidden_dim", json!(96)),
        ("glu_dim", json!(-1)),
        ("bias", json!(true)),
        ("linear_use_lrpe_list", json!([0, 0])),
        ("linear_act_fun", json!("1+elu")),
        ("no_scale_embedding", json!(true)),
    ] {
        config[key] = value;
    }
    let sandbox = Sandbox::new(&config, &Options::default());
    let (bytes, gguf) = convert(&sandbox, "F32");
    assert_exact(&bytes, &gguf, &synthetic::config(&config).unwrap(), false, DType::F32);
    let metadata = &gguf.metadata;
    for (key, expected) in
        [("embedding_length", 64), ("feed_forward_length", 64), ("attention.hidden_length", 96)]
    {
        assert_eq!(metadata.u32(&format!("transnormer.{key}")).unwrap(), Some(expected), "{key}");
    }
    assert_eq!(metadata.str("transnormer.attention.activation").unwrap(), Some("1+elu"));
    assert_eq!(metadata.f32("transnormer.embedding_scale").unwrap(), Some(1.0));
    assert_eq!(metadata.u32_array("transnormer.attention.lrpe_layers").unwrap(), Some(vec![0, 0]));
    assert_eq!(metadata.bool("transnormer.use_bias").unwrap(), Some(true));
}

#[test]
fn quantized_types_stay_within_their_error_and_fall_back_where_rows_demand_it() {
    let mut config = synthetic::tiny_config_json();
    for (key, value) in [("decoder_embed_dim", 256), ("hidden_dim", 256), ("glu_dim", 96)] {
        config[key] = value.into();
    }
    let checked = synthetic::config(&config).unwrap();
    let sandbox = Sandbox::new(&config, &Options::default());
    for (preset, limit) in [("Q8_0", 0.006), ("Q4_0", 0.09), ("Q4_K_M", 0.09)] {
        let output = sandbox.run(&["--type", preset, "--plain", "--force"]);
        let table = String::from_utf8(output.stdout).unwrap();
        let bytes = fs::read(sandbox.out()).unwrap();
        let gguf = Gguf::parse(&bytes).unwrap();
        for tensor in names::model_tensors(&checked, false) {
            let info = gguf.tensor(&tensor.target).unwrap();
            let source = values(&checked, &tensor);
            let mut found = vec![0.0; source.len()];
            ggml::dequantize(info.dtype, &bytes[info.offset as usize..][..info.nbytes as usize], &mut found)
                .unwrap();
            let square = |x: f32| f64::from(x) * f64::from(x);
            let error: f64 = found.iter().zip(&source).map(|(a, b)| square(a - b)).sum();
            let relative = (error / source.iter().copied().map(square).sum::<f64>()).sqrt();
            assert!(relative < limit, "{preset} {} {}: {relative}", tensor.target, info.dtype);
        }
        let down = gguf.tensor("blk.0.ffn_down.weight").unwrap().dtype;
        let line = table.lines().find(|line| line.starts_with("blk.0.ffn_down")).unwrap();
        if preset == "Q4_K_M" {
            assert_eq!(down, DType::Q5_0);
            assert!(line.contains("fallback: rows of 96 are not whole blocks of 256 for Q4_K"), "{line}");
            assert_eq!(gguf.tensor("blk.0.ffn_up.weight").unwrap().dtype, DType::Q4_K);
        } else {
            assert_eq!(down.name(), preset);
            assert!(!line.contains("fallback"), "{line}");
        }
    }
}

#[test]
fn tiles_hold_the_rows_of_a_plain_file() {
    let mut config = synthetic::tiny_config_json();
    for (key, value) in [("decoder_embed_dim", 256), ("hidden_dim", 256), ("glu_dim", 40)] {
        config[key] = value.into();
    }
    let sandbox = Sandbox::new(&config, &Options::default());
    for preset in ["Q8_0", "Q4_0", "Q4_K_M"] {
        let read = |flags: &[&str]| {
            let output = sandbox.run(&[&["--type", preset, "--force"], flags].concat());
            assert!(output.status.success(), "{}", stderr(&output));
            fs::read(sandbox.out()).unwrap()
        };
        let (plain, tiled) = (read(&["--plain"]), read(&[]));
        let (plain_gguf, tiled_gguf) = (Gguf::parse(&plain).unwrap(), Gguf::parse(&tiled).unwrap());
        assert_eq!(tiled_gguf.metadata.u32(TILE_ROWS_KEY).unwrap(), Some(16));
        assert_eq!(plain_gguf.metadata.u32(TILE_ROWS_KEY).unwrap(), None);
        for info in &plain_gguf.tensors {
            let rows = &plain[info.offset as usize..][..info.nbytes as usize];
            let other = tiled_gguf.tensor(&info.name).unwrap();
            let stored = &tiled[other.offset as usize..][..other.nbytes as usize];
            let count = info.shape[1..].iter().product::<u64>() as usize;
            if !tiles::stored_in_tiles(info.dtype, count) {
                assert_eq!(stored, rows, "{}", info.name);
                continue;
            }
            let row_bytes = rows.len() / count;
            let mut row = vec![0; row_bytes];
            for (r, expected) in rows.chunks(row_bytes).enumerate() {
                let tile = &stored[r / tiles::ROWS * tiles::ROWS * row_bytes..][..tiles::ROWS * row_bytes];
                tiles::row_of_tile(info.dtype, tile, r % tiles::ROWS, &mut row);
                assert_eq!(row, expected, "{preset} {} row {r}", info.name);
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let sandbox =
        Sandbox::new(&synthetic::tiny_config_json(), &Options { dtype: DType::F16, ..Options::default() });
    let mut files = Vec::new();
    for threads in ["1", "2", "7"] {
        let output = sandbox.run(&["--type", "Q8_0", "--force", "--threads", threads]);
        assert!(output.status.success(), "{}", stderr(&output));
        files.push(fs::read(sandbox.out()).unwrap());
    }
    assert!(files.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn the_vocabulary_is_taken_over_whole() {
    let Some(model) = shared("models/fable-8m") else { return };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("fable.gguf");
    let output = tn_quantize().arg(&model).arg(&out).args(["--type", "Q8_0"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let gguf = Gguf::parse(&fs::read(&out).unwrap()).unwrap();
    let vocab = Vocab::from_metadata(&gguf.metadata).unwrap();
    let checkpoint = Checkpoint::open(&model).unwrap();
    assert_eq!(vocab, tn_quantize::checkpoint::tokenizer::read(&model, checkpoint.config()).unwrap());
    assert_eq!((vocab.len(), vocab.bos, vocab.eos, vocab.pad, vocab.add_bos), (8192, 1, 2, Some(0), false));
    assert_eq!((vocab.pieces[5].as_str(), vocab.types[5] as i32, vocab.types[400] as i32), ("\n", 4, 1));
    assert_eq!(vocab.scores[400], -137.0);
}

#[test]
fn real_torch_files_equal_the_safetensors_beside_them() {
    for case in ["a_tiny_l2_h4", "b2_lrpe_multi_untied_l5_h8"] {
        let Some(golden) = shared(&format!("reference/golden/{case}")) else { return };
        let reference = Checkpoint::open(&golden).unwrap();
        for (file, dtype) in [("pytorch_model.bin", DType::F32), ("pytorch_model.bf16.bin", DType::BF16)] {
            let dir = tempfile::tempdir().unwrap();
            fs::copy(golden.join("config.json"), dir.path().join("config.json")).unwrap();
            fs::copy(golden.join(file), dir.path().join("pytorch_model.bin")).unwrap();
            let torch = Checkpoint::open(dir.path()).unwrap();
            assert!(torch.tensor(names::HEAD).is_some(), "{file} lists the head, tied or not");
            let mut scratch = Vec::new();
            for tensor in reference.tensors() {
                let found = torch.tensor(&tensor.name).unwrap();
                assert_eq!((found.dtype, &found.shape), (dtype, &tensor.shape));
                let wanted = reference.read_f32(tensor, 0..tensor.elements, &mut scratch).unwrap();
                let wanted: Vec<u8> = wanted.into_iter().flat_map(|value| encode(dtype, value)).collect();
                torch.read_bytes(found, 0..found.elements, &mut scratch).unwrap();
                assert!(scratch == wanted, "{case} {file} {}", tensor.name);
            }
        }
    }
}

/// The recorded check sums of the reference's own generator.
#[test]
fn synthetic_weights_are_those_of_the_reference() {
    let Some(golden) = shared("reference/golden") else { return };
    // The 385M case has 400 million values; its first tensors and its angles stand for all.
    let few = |name: &str| !name.contains("embed") && name.contains("layers.0.");
    check_sums(&golden.join("c_385m_config"), few);
    for case in ["a_tiny_l2_h4", "b_odd_l3_h6", "b2_lrpe_multi_untied_l5_h8", "d_variants_bias_hidden96"] {
        check_sums(&golden.join(case), |_| true);
    }
}

fn check_sums(case: &Path, wanted: impl Fn(&str) -> bool) {
    let manifest: Value = serde_json::from_slice(&fs::read(case.join("manifest.json")).unwrap()).unwrap();
    let config = synthetic::config(&manifest["config"]).unwrap();
    let seed = manifest["seed"].as_u64().unwrap();
    let tensors = names::model_tensors(&config, !config.tie_word_embeddings);
    assert_eq!(tensors.len(), manifest["weights"].as_object().unwrap().len());
    for tensor in tensors.iter().filter(|tensor| wanted(&tensor.source)) {
        let values = synthetic::fill(tensor, &config, seed, 0..tensor.shape.iter().product());
        let xor = values.iter().fold(0, |xor, value| xor ^ value.to_bits());
        let recorded = &manifest["weights"][&tensor.source]["xor32"];
        assert_eq!(format!("{xor:08x}"), recorded.as_str().unwrap(), "{} {}", case.display(), tensor.source);
    }
}
