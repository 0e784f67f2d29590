//! Promise: whatever bytes a checkpoint consists of, reading it ends with a result or with one line of error:
//! no panic, no endless loop, no memory beyond what its size explains.

mod common;

use std::{fs, ops::Range};

use common::{Sandbox, tensors, write_torch};
use tn_quantize::{
    checkpoint::{Checkpoint, tokenizer},
    metadata,
    plan::{Head, Plan},
    policy::Preset,
    synthetic,
};
use transnormer::{dtype::DType, error::Result};

/// Mutants of each file.
const MUTANTS: u64 = 500;

/// Everything that happens to a checkpoint before its weights are converted.
fn read(sandbox: &Sandbox) -> Result<()> {
    let checkpoint = Checkpoint::open(&sandbox.input(""))?;
    let head = Head::of(&checkpoint)?;
    let plan = Plan::new(&checkpoint, head, Preset::Q4_K_M)?;
    let vocab = tokenizer::read(checkpoint.dir(), checkpoint.config())?;
    metadata::build(&checkpoint, &plan, &vocab).map(drop)
}

/// Damages `name` in `range` again and again, and reads the checkpoint each time.
fn mutate(sandbox: &Sandbox, name: &str, range: Range<usize>) {
    let path = sandbox.input(name);
    let original = fs::read(&path).unwrap();
    read(sandbox).unwrap();
    let mut random = Random(name.bytes().map(u64::from).sum());
    let mut refused = 0;
    for mutant in 0..MUTANTS {
        let mut bytes = original.clone();
        for _ in 0..=random.below(3) {
            let at = range.start + random.below(range.len());
            damage(&mut bytes, at, &mut random);
        }
        fs::write(&path, &bytes).unwrap();
        if let Err(error) = read(sandbox) {
            let line = error.to_string();
            assert!(!line.contains('\n') && line.len() < 2000, "mutant {mutant} of {name}: {line}");
            refused += 1;
        }
    }
    assert!(
        refused > MUTANTS / 4,
        "{refused} of {MUTANTS} mutants of {name} were refused: does it look at all?"
    );
    fs::write(&path, original).unwrap();
}

fn damage(bytes: &mut Vec<u8>, at: usize, random: &mut Random) {
    let interesting = [0, 1, 0x7f, 0x80, 0xff, b'"', b'[', b'}', b'\n', b'9'];
    let at = at.min(bytes.len().saturating_sub(1));
    match random.below(8) {
        _ if bytes.is_empty() => {}
        0 => bytes.truncate(at),
        1 => drop(bytes.drain(at..bytes.len().min(at + 1 + random.below(8)))),
        2 => {
            let end = bytes.len().min(at + 1 + random.below(40));
            let copy = bytes[at..end].to_vec();
            bytes.splice(at..at, copy);
        }
        3 => bytes.iter_mut().skip(at).take(4).for_each(|byte| *byte = 0xff),
        4 | 5 => bytes[at] = interesting[random.below(interesting.len())],
        _ => bytes[at] ^= 1 << random.below(8),
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }
}

fn len(sandbox: &Sandbox, name: &str) -> usize {
    fs::metadata(sandbox.input(name)).unwrap().len() as usize
}

#[test]
fn configurations_and_safetensors_headers() {
    let sandbox = Sandbox::tiny();
    mutate(&sandbox, "config.json", 0..len(&sandbox, "config.json"));
    let bytes = fs::read(sandbox.input("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    mutate(&sandbox, "model.safetensors", 0..8 + header);
}

#[test]
fn tokenizers() {
    let sandbox = Sandbox::tiny();
    mutate(&sandbox, "tokenizer.model", 0..len(&sandbox, "tokenizer.model"));
}

#[test]
fn pickles_and_zip_tables() {
    let sandbox = Sandbox::tiny();
    sandbox.replace_weights(|dir| {
        let config = synthetic::config(&synthetic::tiny_config_json()).unwrap();
        write_torch(&dir.join("pytorch_model.bin"), &tensors(&config, false, DType::BF16));
    });
    let bytes = fs::read(sandbox.input("pytorch_model.bin")).unwrap();
    let find = |what: &[u8]| bytes.windows(what.len()).position(|window| window == what).unwrap();
    mutate(&sandbox, "pytorch_model.bin", 0..find(b"archive/byteorder"));
    mutate(&sandbox, "pytorch_model.bin", find(b"PK\x01\x02")..bytes.len());
}
