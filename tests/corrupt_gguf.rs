//! Damaged GGUF files: the reader answers with an error or with a header that keeps every promise; it never
//! panics and never allocates more than in proportion to the file.
//!
//! `TN_MUTANTS=100000000 cargo test --release --test corrupt_gguf -- --nocapture` makes a long run of it.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::HashSet,
    fs,
    mem::discriminant,
};

use transnormer::{
    DType, Error, ErrorKind,
    gguf::{Gguf, Metadata, ReadError, TensorSpec, Writer},
};

const DEFAULT_MUTANTS: u64 = 200_000;

#[test]
fn mutants_are_refused_or_sound() {
    let mutants = match std::env::var("TN_MUTANTS") {
        Ok(count) => count.parse().expect("TN_MUTANTS is a number"),
        Err(_) => DEFAULT_MUTANTS,
    };
    let seed = valid_file();
    let mut random = Random(0x7472_616e_736e_6f72);
    let mut rules = HashSet::new();
    let mut accepted = 0u64;
    for _ in 0..mutants {
        let mut mutant = seed.clone();
        for _ in 0..=random.below(3) {
            mutate(&mut mutant, &mut random);
        }
        match parse_within(&mutant, 4 * mutant.len() + (16 << 10)) {
            Ok(_) => accepted += 1,
            Err(error) => drop(rules.insert(discriminant(&error))),
        }
    }
    println!("{mutants} mutants: {accepted} accepted, the rest broke {} different rules", rules.len());
    // Else the mutations are too weak, or too strong, to reach the checks.
    assert!(rules.len() >= 20 && accepted > mutants / 100 && accepted < mutants / 2);
}

#[test]
fn every_truncation_is_refused() {
    let file = valid_file();
    let padded = 28; // the last tensor has 4 bytes of 32
    for len in 0..file.len() {
        let result = parse_within(&file[..len], 4 * len + (16 << 10));
        assert_eq!(result.is_ok(), len >= file.len() - padded, "{len} of {} bytes", file.len());
    }
}

#[test]
fn every_flipped_bit_is_survived() {
    let mut file = valid_file();
    let whole = Gguf::parse(&file).unwrap();
    for bit in 0..8 * file.len() {
        file[bit / 8] ^= 1 << (bit % 8);
        let result = parse_within(&file, 4 * file.len() + (16 << 10));
        // Tensor data are not looked at.
        if bit / 8 >= whole.data_offset as usize {
            assert_eq!(result.as_ref(), Ok(&whole));
        }
        file[bit / 8] ^= 1 << (bit % 8);
    }
}

/// The largest headers for their size: nothing but tiny records.
#[test]
fn dense_headers_stay_within_the_promised_memory() {
    let count = |n: u64| n.to_le_bytes();
    let start = |tensors, entries| [b"GGUF\x03\0\0\0" as &[u8], &count(tensors), &count(entries)].concat();
    let array = |tag: u8, len, bytes: Vec<u8>| {
        let key: &[u8] = &[&count(1), b"k" as &[u8], &[9, 0, 0, 0, tag, 0, 0, 0], &count(len)].concat();
        [start(0, 1), key.to_vec(), bytes].concat()
    };
    const MAX: u64 = 65_536;
    let (mut entries, mut tensors) = (start(0, MAX), start(MAX, 0));
    for i in 0..MAX {
        let name = format!("{i:05}");
        entries.extend([&count(5), name.as_bytes(), &[7, 0, 0, 0, 1]].concat());
        tensors
            .extend([&count(5), name.as_bytes(), &[1, 0, 0, 0], &count(1), &[0; 4], &count(32 * i)].concat());
    }
    let data_len = MAX as usize * 32;
    tensors.resize(tensors.len().next_multiple_of(32) + data_len, 0);
    for (file, data_len) in [
        (entries, 0),
        (tensors, data_len),
        (array(8, 1 << 20, vec![0; 8 << 20]), 0),
        (array(7, 1 << 24, vec![1; 1 << 24]), 0),
        (array(10, 1 << 20, vec![1; 8 << 20]), 0),
    ] {
        let header_len = file.len() - data_len;
        parse_within(&file, 3 * header_len + (16 << 20)).expect("the file is valid");
    }
}

/// Parses under a memory limit and checks what every caller relies on.
fn parse_within(bytes: &[u8], limit: usize) -> Result<Gguf, ReadError> {
    let (result, peak) = peak_memory(|| Gguf::parse(bytes));
    assert!(peak <= limit, "{peak} bytes allocated for a file of {}", bytes.len());
    match &result {
        Ok(gguf) => assert_sound(gguf, bytes.len() as u64),
        Err(error) => {
            let error = Error::from(error.clone());
            assert!(matches!(error.kind(), ErrorKind::Format | ErrorKind::Unsupported));
            assert!(!error.to_string().is_empty() && !error.to_string().contains('\n'));
        }
    }
    result
}

fn assert_sound(gguf: &Gguf, file_len: u64) {
    assert!(gguf.version == 3 && gguf.alignment.is_power_of_two() && (8..=4096).contains(&gguf.alignment));
    let mut end = gguf.data_offset;
    for tensor in &gguf.tensors {
        assert_eq!(tensor.offset, end.next_multiple_of(gguf.alignment));
        let [row, rest @ ..] = &tensor.shape[..] else { panic!("no dimensions") };
        assert_eq!(tensor.nbytes, tensor.dtype.row_bytes(*row).unwrap() * rest.iter().product::<u64>());
        assert!(tensor.nbytes > 0 && tensor.name.len() <= 256 && tensor.shape.len() <= 4);
        assert_eq!(gguf.tensor(&tensor.name), Some(tensor));
        end = tensor.offset + tensor.nbytes;
    }
    assert!(gguf.tensors.is_empty() || end <= file_len);
    assert!(file_len <= end.next_multiple_of(gguf.alignment));
    let keys: HashSet<_> = gguf.metadata.iter().map(|(key, _)| key).collect();
    assert_eq!(keys.len(), gguf.metadata.len());
}

/// A small file with values of every type and tensors of several.
fn valid_file() -> Vec<u8> {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "transnormer");
    metadata.insert("general.alignment", 32u32);
    metadata.insert("a", 1u8);
    metadata.insert("b", -1i16);
    metadata.insert("c", 0.5f32);
    metadata.insert("d", true);
    metadata.insert("e", u64::MAX);
    metadata.insert("f", vec![true, false, true]);
    metadata.insert("tokens", vec!["<s>".to_owned(), "▁the".to_owned(), String::new()]);
    metadata.insert("scores", vec![0.0f32, -1.5, -2.0]);
    metadata.insert("types", vec![3i32, 1, 1]);
    let tensor =
        |name: &str, shape: &[u64], dtype| TensorSpec { name: name.into(), shape: shape.into(), dtype };
    let tensors = [
        tensor("token_embd.weight", &[32, 2], DType::Q8_0),
        tensor("blk.0.attn_norm.weight", &[3, 1, 2], DType::F16),
        tensor("output.weight", &[1], DType::F32),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("valid.gguf");
    let mut writer = Writer::create(&path, &metadata, &tensors).unwrap();
    for nbytes in [68, 12, 4] {
        writer.write(&vec![0x55; nbytes]).unwrap();
    }
    writer.finish().unwrap();
    fs::read(&path).unwrap()
}

/// One random damage: flipped bits, telling integers, cut, deleted, repeated or swapped bytes.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    const INTEGERS: [u64; 22] = [
        0,
        1,
        2,
        3,
        4,
        5,
        8,
        9,
        12,
        13,
        31,
        32,
        33,
        0x7f,
        0xff,
        0x100,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 62,
        u64::MAX,
    ];
    if bytes.is_empty() {
        return;
    }
    let at = random.below(bytes.len());
    let len = 1 + random.below(16.min(bytes.len() - at));
    match random.below(16) {
        0..=4 => bytes[at] ^= 1 << random.below(8),
        5 => bytes[at] = random.next() as u8,
        6..=9 => {
            let integer = INTEGERS[random.below(INTEGERS.len())].to_le_bytes();
            let width = [1, 4, 8][random.below(3)].min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&integer[..width]);
        }
        // A small step from what is there: one more, one less.
        10..=11 => bytes[at] = bytes[at].wrapping_add([1, 0xff][random.below(2)]),
        12 => bytes.truncate(at),
        13 => drop(bytes.drain(at..at + len)),
        14 => {
            let copy = bytes[at..at + len].to_vec();
            let to = random.below(bytes.len());
            bytes.splice(to..to, copy);
        }
        _ => {
            let to = random.below(bytes.len() - len + 1);
            let copy = bytes[at..at + len].to_vec();
            bytes[to..to + len].copy_from_slice(&copy);
        }
    }
}

/// SplitMix64: the same mutants on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// What `work` returns, and the most bytes that it held at once on this thread.
fn peak_memory<T>(work: impl FnOnce() -> T) -> (T, usize) {
    LIVE.set(0);
    PEAK.set(0);
    let result = work();
    (result, PEAK.get() as usize)
}

thread_local! {
    // Per thread, so that tests running side by side do not count each other's memory.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

impl Counting {
    fn count(bytes: isize) {
        let live = LIVE.get() + bytes;
        LIVE.set(live);
        PEAK.set(PEAK.get().max(live));
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator unchanged; counting neither allocates nor panics, as the
// cells need no initialization and no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(layout.size() as isize);
        // SAFETY: the caller keeps `System`'s contract, which is ours.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        Self::count(-(layout.size() as isize));
        // SAFETY: `ptr` came from `System` through `alloc`, with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}
