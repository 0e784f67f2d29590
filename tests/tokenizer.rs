//! The tokenizer against SentencePiece: vectors made by `fixtures/tokenizer/make_vectors.py`.

use proptest::prelude::*;
use serde::Deserialize;
use transnormer::{
    ErrorKind,
    gguf::{Metadata, Value},
    tokenizer::{PieceType, StreamDecoder, Tokenizer, Vocab},
};

const GOLDEN: &str = include_str!("fixtures/tokenizer/golden.json");
const FABLE: &str = include_str!("fixtures/tokenizer/fable.json");

#[derive(Deserialize)]
struct Fixture {
    pieces: Vec<String>,
    /// Type, count, first score, step.
    runs: Vec<(i32, usize, f32, f32)>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    add: Vec<(String, i32)>,
    add_space_prefix: bool,
    byte_fallback: bool,
    encode: Vec<(String, Vec<u32>)>,
    decode: Vec<(Vec<u32>, String)>,
}

impl Fixture {
    fn parse(json: &str) -> Self {
        serde_json::from_str(json).unwrap()
    }

    fn vocab(&self) -> Vocab {
        let mut vocab = Vocab {
            pieces: self.pieces.clone(),
            scores: Vec::new(),
            types: Vec::new(),
            bos: 1,
            eos: 2,
            unk: 0,
            pad: None,
            add_bos: false,
            add_space_prefix: true,
            chat_template: None,
        };
        for &(kind, count, first, step) in &self.runs {
            vocab.scores.extend((0..count).map(|i| first + i as f32 * step));
            vocab.types.extend(std::iter::repeat_n(PieceType::from_gguf(kind).unwrap(), count));
        }
        vocab
    }

    fn tokenizer(&self, case: &Case) -> Tokenizer {
        let mut vocab = self.vocab();
        for (piece, kind) in &case.add {
            vocab.pieces.push(piece.clone());
            vocab.scores.push(0.0);
            vocab.types.push(PieceType::from_gguf(*kind).unwrap());
        }
        vocab.add_space_prefix = case.add_space_prefix;
        if !case.byte_fallback {
            for kind in vocab.types.iter_mut().filter(|kind| **kind == PieceType::Byte) {
                *kind = PieceType::Normal;
            }
        }
        Tokenizer::new(vocab).unwrap()
    }
}

fn golden() -> Tokenizer {
    Tokenizer::new(Fixture::parse(GOLDEN).vocab()).unwrap()
}

/// Checks every vector; gives how many there were.
fn check_vectors(fixture: &Fixture) -> usize {
    let mut count = 0;
    for case in &fixture.cases {
        let tokenizer = fixture.tokenizer(case);
        for (text, ids) in &case.encode {
            let found = tokenizer.encode(text, false, false).unwrap();
            assert_eq!(&found, ids, "{text:?} with {:?}", case.add);
        }
        for (ids, text) in &case.decode {
            assert_eq!(&tokenizer.decode(ids).unwrap(), text, "{ids:?}");
        }
        count += case.encode.len() + case.decode.len();
    }
    count
}

#[test]
fn equal_to_sentencepiece() {
    assert!(check_vectors(&Fixture::parse(GOLDEN)) > 400);
    assert!(check_vectors(&Fixture::parse(FABLE)) > 150);
}

#[test]
#[ignore = "reads vectors made by hand: make_vectors.py --fuzz, path in TOKENIZER_VECTORS"]
fn given_vectors() {
    let path = std::env::var("TOKENIZER_VECTORS").expect("TOKENIZER_VECTORS names the file");
    let fixture = Fixture::parse(&std::fs::read_to_string(path).unwrap());
    println!("{} vectors equal", check_vectors(&fixture));
}

/// What the checkpoints' own slow tokenizer class gives (SPEC §5).
#[test]
fn equal_to_the_slow_class() {
    let fixture = Fixture::parse(GOLDEN);
    // (text, ids with control pieces parsed, begin id left out)
    let cases: [(&str, &[u32]); 5] = [
        ("Hello world", &[593, 498, 344, 404, 270, 1384]),
        (" Hello", &[259, 2053, 498, 344]),
        ("a</s>b", &[347, 2, 389]),
        ("a </s> b", &[347, 1971, 2, 259, 1997]),
        ("<s>x", &[1, 765]),
    ];
    for add_bos in [false, true] {
        let tokenizer = Tokenizer::new(Vocab { add_bos, ..fixture.vocab() }).unwrap();
        for (text, ids) in cases {
            let expected: Vec<u32> = add_bos.then_some(1).into_iter().chain(ids.iter().copied()).collect();
            assert_eq!(tokenizer.encode(text, true, true).unwrap(), expected, "{text:?}");
            assert_eq!(tokenizer.encode(text, false, true).unwrap(), ids, "{text:?}");
        }
        assert_eq!(tokenizer.decode(&[347, 2, 389]).unwrap(), "a b");
        assert!(tokenizer.encode("", false, true).unwrap().is_empty());
    }
}

#[test]
fn specials_typed_by_a_user_are_text() {
    let tokenizer = golden();
    for text in ["</s>", "a<s>b", "<unk>", "<0x41>"] {
        let ids = tokenizer.encode(text, true, false).unwrap();
        assert!(ids.iter().all(|&id| !tokenizer.is_special(id)), "{text:?} gave {ids:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
    assert_eq!(tokenizer.encode("<unk></s>", false, true).unwrap(), [0, 2]);
}

#[test]
fn long_texts_survive() {
    let tokenizer = golden();
    let word = "pneumono的";
    for text in [word.repeat(20_000), format!("{word} \n").repeat(10_000), "a".repeat(200_000)] {
        let ids = tokenizer.encode(&text, false, false).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
    let one = tokenizer.encode("a b</s>", false, true).unwrap();
    assert_eq!(tokenizer.encode(&"a b</s>".repeat(5000), false, true).unwrap(), one.repeat(5000));
    let word = "ab".repeat(3 << 20);
    let mut vocab = tokenizer.vocab().clone();
    vocab.pieces[300..302].clone_from_slice(&["aba".into(), "bab".into()]);
    let error = Tokenizer::new(vocab).unwrap().encode(&word, false, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn pieces_and_ids() {
    let tokenizer = golden();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.unk()), (1, 2, 0));
    assert_eq!(tokenizer.vocab_size(), 2400);
    assert_eq!(tokenizer.piece(2400), None);
    assert_eq!(tokenizer.piece(593), Some("▁H"));
    assert_eq!(tokenizer.piece_bytes(593).unwrap(), b" H");
    assert_eq!(tokenizer.piece_bytes(3 + 0xE4).unwrap(), [0xE4]);
    assert_eq!(tokenizer.piece_bytes(2).unwrap(), b"");
    assert!(tokenizer.is_eog(2) && !tokenizer.is_eog(1) && tokenizer.is_special(1));
    assert_eq!(tokenizer.decode(&[2400]).unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn half_characters_wait() {
    let tokenizer = golden();
    let mut stream = StreamDecoder::new(&tokenizer);
    let byte = |b: u8| 3 + u32::from(b);
    let texts: Vec<String> = "好"
        .bytes()
        .chain([0xF0, 0x9F, b'!', 0xE4])
        .map(|b| stream.push(byte(b)).unwrap().to_owned())
        .collect();
    assert_eq!(texts, ["", "", "好", "", "", "\u{fffd}\u{fffd}!", ""]);
    assert_eq!(stream.pending(), [0xE4]);
    let mut fork = stream.clone();
    assert_eq!(fork.push(593).unwrap(), "\u{fffd} H");
    assert_eq!(stream.finish(), "\u{fffd}");
}

#[test]
fn metadata_round_trip() {
    for template in [None, Some("{{ messages }}".to_owned())] {
        let pad = template.as_ref().map(|_| 0);
        let vocab = Vocab { pad, chat_template: template, add_bos: true, ..Fixture::parse(FABLE).vocab() };
        let mut metadata = Metadata::new();
        vocab.to_metadata(&mut metadata).unwrap();
        assert_eq!(Vocab::from_metadata(&metadata).unwrap(), vocab);
    }
}

#[test]
fn unusable_metadata_is_refused() {
    let mut good = Metadata::new();
    golden().vocab().to_metadata(&mut good).unwrap();
    let required =
        ["model", "tokens", "scores", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id"];
    for key in required.map(|name| format!("tokenizer.ggml.{name}")) {
        let mut metadata = good.clone();
        metadata.remove(&key).unwrap();
        let error = Vocab::from_metadata(&metadata).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Model);
        assert!(error.to_string().contains(&key), "{error}");
        metadata.insert(key, Value::F64(0.0));
        assert_eq!(Vocab::from_metadata(&metadata).unwrap_err().kind(), ErrorKind::Model);
    }
    let unsupported = [("model", Value::from("gpt2")), ("remove_extra_whitespaces", Value::Bool(true))];
    for (name, value) in unsupported {
        let mut metadata = good.clone();
        metadata.insert(format!("tokenizer.ggml.{name}"), value);
        assert_eq!(Vocab::from_metadata(&metadata).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}

/// What is wrong with a vocabulary, the change that makes it so, and what the error names.
type Defect = (&'static str, fn(&mut Vocab), &'static str);

#[test]
fn unusable_vocabularies_are_refused() {
    let defects: &[Defect] = &[
        ("empty", |v| v.pieces.clear(), "tokens: 0 pieces"),
        ("short scores", |v| v.scores.truncate(9), "scores: 9 values"),
        ("long types", |v| v.types.push(PieceType::Normal), "token_type: 2401 values"),
        ("score", |v| v.scores[7] = f32::NAN, "piece 7 has score NaN"),
        ("score", |v| v.scores[7] = f32::NEG_INFINITY, "piece 7 has score -inf"),
        ("no text", |v| v.pieces[300].clear(), "piece 300 has 0 bytes"),
        ("long text", |v| v.pieces[300] = "x".repeat(2000), "piece 300 has 2000 bytes"),
        ("twice", |v| v.pieces[300] = v.pieces[299].clone(), "pieces 299 and 300"),
        ("byte sign", |v| v.pieces[3] = "<0x-1>".into(), "byte piece 3"),
        ("byte case", |v| v.pieces[13] = "<0x0a>".into(), "byte piece 13"),
        ("byte length", |v| v.pieces[3] = "<0x000>".into(), "byte piece 3"),
        ("byte char", |v| v.pieces[3] = "<0xé>".into(), "byte piece 3"),
        ("two unknown", |v| v.types[300] = PieceType::Unknown, "second unknown piece"),
        ("no unknown", |v| v.types[0] = PieceType::Control, "unknown_token_id"),
        ("far eos", |v| v.eos = 2400, "eos_token_id: 2400"),
        ("far bos", |v| v.bos = u32::MAX, "bos_token_id"),
        ("far pad", |v| v.pad = Some(2400), "padding_token_id"),
        ("plain eos", |v| v.eos = 300, "eos_token_id: piece 300 has type Normal"),
        ("unused but spelled", |v| v.types[259] = PieceType::Unused, "unused piece \"▁▁\""),
    ];
    let fixture = Fixture::parse(GOLDEN);
    for (name, damage, message) in defects {
        let mut vocab = fixture.vocab();
        damage(&mut vocab);
        let error = Tokenizer::new(vocab).expect_err(name);
        assert!(matches!(error.kind(), ErrorKind::Tokenizer | ErrorKind::Unsupported), "{name}: {error}");
        assert!(error.to_string().contains(message), "{name}: {error}");
    }
    assert_eq!(PieceType::from_gguf(0).unwrap_err().kind(), ErrorKind::Tokenizer);
    assert_eq!(PieceType::from_gguf(7).unwrap_err().kind(), ErrorKind::Tokenizer);
}

#[test]
fn a_large_set_of_control_pieces_is_refused() {
    let mut vocab = Fixture::parse(GOLDEN).vocab();
    for i in 0..1100 {
        vocab.pieces.push(format!("<{i:01022}>"));
        vocab.scores.push(0.0);
        vocab.types.push(PieceType::Control);
    }
    assert!(Tokenizer::new(vocab).unwrap_err().to_string().contains("control and user-defined pieces have"));
}

fn any_ids() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(prop_oneof![0..5u32, 3..259u32, 0..2400u32], 0..40)
}

proptest! {
    #[test]
    fn text_survives(text in any::<String>()) {
        let tokenizer = golden();
        let ids = tokenizer.encode(&text, false, false).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text.replace('▁', " "));
    }

    #[test]
    fn streams_join_to_the_decoded_text(ids in any_ids(), at in 0..40usize) {
        let tokenizer = golden();
        let at = at.min(ids.len());
        let mut stream = StreamDecoder::new(&tokenizer);
        let mut texts = Vec::new();
        for &id in &ids {
            texts.push(stream.push(id).unwrap().to_owned());
            prop_assert!(stream.pending().len() < 4);
        }
        let mut resumed = StreamDecoder::after(&tokenizer, &ids[..at]).unwrap();
        for (id, text) in ids.iter().zip(&texts).skip(at) {
            prop_assert_eq!(resumed.push(*id).unwrap(), text);
        }
        let tail = stream.finish();
        prop_assert_eq!(resumed.finish(), tail.clone());
        prop_assert_eq!(texts.concat() + &tail, tokenizer.decode(&ids).unwrap());
    }
}

#[test]
fn shared_between_threads() {
    fn check<T: Send + Sync>(_: &T) {}
    check(&golden());
}
