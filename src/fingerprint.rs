//! Telling models apart without reading gigabytes.

use crate::{
    gguf::{Metadata, TensorInfo},
    hparams::ARCHITECTURE,
};

/// Places in each tensor that are looked at.
const PLACES: usize = 4;
/// Bytes at each place: a page.
const PLACE_BYTES: usize = 4096;

/// Digest of what makes a model: hyper-parameters, vocabulary, tensor table, and four pages spread over each
/// tensor's data, the first and the last included. Models that were trained or quantized differently differ
/// in nearly every page; one flipped bit between the places is not seen. Names, authors and chat templates
/// are not looked at.
pub(crate) fn of(file: &[u8], metadata: &Metadata, tensors: &[TensorInfo]) -> [u8; 32] {
    let counts = |key: &str| key.starts_with(ARCHITECTURE) || key.starts_with("tokenizer.ggml.");
    let mut entries: Vec<_> = metadata.iter().filter(|(key, _)| counts(key)).collect();
    entries.sort_unstable_by_key(|(key, _)| *key);
    // Lengths precede everything that has one, so that no two models give the same bytes.
    let mut table = (entries.len() as u64).to_le_bytes().to_vec();
    let text = |table: &mut Vec<u8>, text: &str| {
        table.extend((text.len() as u64).to_le_bytes());
        table.extend(text.as_bytes());
    };
    for (key, value) in entries {
        text(&mut table, key);
        value.encode(&mut table);
    }
    for TensorInfo { name, shape, dtype, .. } in tensors {
        text(&mut table, name);
        text(&mut table, &format!("{shape:?} {dtype}"));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&table);
    for tensor in tensors {
        let data = &file[tensor.offset as usize..(tensor.offset + tensor.nbytes) as usize];
        if data.len() <= PLACES * PLACE_BYTES {
            hasher.update(data);
            continue;
        }
        let last = data.len() - PLACE_BYTES;
        for place in 0..PLACES {
            hasher.update(&data[last * place / (PLACES - 1)..][..PLACE_BYTES]);
        }
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    const MIB: usize = 1 << 20;

    fn tensor(name: &str, offset: usize, nbytes: usize) -> TensorInfo {
        TensorInfo {
            name: name.to_owned(),
            shape: vec![nbytes as u64 / 4],
            dtype: DType::F32,
            offset: offset as u64,
            nbytes: nbytes as u64,
        }
    }

    #[test]
    fn small_tensors_and_places_in_large_ones_count() {
        let tensors = [tensor("a", 64, 256), tensor("b", 320, MIB)];
        let mut file = vec![0; 320 + MIB];
        let digest = |file: &[u8]| of(file, &Metadata::new(), &tensors);
        let (original, len) = (digest(&file), file.len());
        for at in [64, 319, 320, 320 + 4095, 320 + MIB / 3, 320 + 2 * MIB / 3, len - 4096, len - 1] {
            file[at] ^= 1;
            assert_ne!(digest(&file), original, "byte {at}");
            file[at] ^= 1;
        }
        assert_eq!(digest(&file), original);
    }

    #[test]
    fn shapes_and_what_the_engine_reads_count_but_names_do_not() {
        let file = vec![0; 320 + MIB];
        let metadata = |entries: &[(&str, u32)]| {
            let mut metadata = Metadata::new();
            entries.iter().for_each(|&(key, value)| drop(metadata.insert(key, value)));
            metadata
        };
        let keys = [("transnormer.block_count", 2), ("tokenizer.ggml.bos_token_id", 1)];
        let tensors = [tensor("a", 64, 256)];
        let original = of(&file, &metadata(&keys), &tensors);
        let same = [("general.version", 3), keys[1], keys[0], ("tokenizer.chat_template", 7)];
        assert_eq!(of(&file, &metadata(&same), &tensors), original);
        for other in
            [[keys[0], ("tokenizer.ggml.bos_token_id", 2)], [keys[1], ("transnormer.block_counts", 2)]]
        {
            assert_ne!(of(&file, &metadata(&other), &tensors), original);
        }
        for other in [tensor("b", 64, 256), TensorInfo { shape: vec![8, 8], ..tensor("a", 64, 256) }] {
            assert_ne!(of(&file, &metadata(&keys), &[other]), original);
        }
        // The place in the file does not matter.
        assert_eq!(of(&file, &metadata(&keys), &[tensor("a", 128, 256)]), original);
    }
}
