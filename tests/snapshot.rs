//! Sessions in files: what comes back is the same bit for bit, and what is damaged is refused.

mod common;

use std::fs;

use common::{A, Case, session, small_model};
use tn_quantize::policy::Preset;
use transnormer::{
    DType, ErrorKind, GenerateOptions, Model, Sampler, SamplerOptions, Session, SessionOptions,
};

fn bits(session: &Session) -> (u64, Vec<u32>, Vec<u32>) {
    let values = session.state().values().iter().chain(session.logits());
    (session.position(), session.tokens().to_vec(), values.map(|value| value.to_bits()).collect())
}

fn sampler(seed: u64) -> Sampler {
    Sampler::new(SamplerOptions { temperature: 3.0, top_k: 0, seed: Some(seed), ..Default::default() })
        .unwrap()
}

/// The next tokens by chance.
fn go_on(session: &mut Session, sampler: &mut Sampler, count: usize) -> Vec<u32> {
    let mut next = || {
        let token = sampler.sample(session.logits(), session.tokens()).unwrap();
        session.read(&[token]).unwrap();
        token
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn every_flipped_bit_and_every_truncation_is_refused() {
    let model = small_model(1);
    let mut saved = session(&model, 16, 1);
    saved.read(&[3, 4, 5, 6]).unwrap();
    let good = saved.snapshot().with_sampler(&sampler(1)).to_bytes();
    let mut live = session(&model, 16, 1);
    live.read(&[7, 8]).unwrap();
    let before = bits(&live);

    let mut bad = good.clone();
    for bit in 0..8 * good.len() {
        bad[bit / 8] ^= 1 << (bit % 8);
        let refused = live.restore(&bad);
        let kind = refused.expect_err(&format!("bit {bit} of {} is flipped", 8 * good.len())).kind();
        assert!(matches!(kind, ErrorKind::Format | ErrorKind::Unsupported), "bit {bit}: {kind:?}");
        assert_eq!(bits(&live), before, "bit {bit}: the session changed");
        bad[bit / 8] ^= 1 << (bit % 8);
    }
    for len in 0..good.len() {
        let error = live.restore(&good[..len]).expect_err("a truncated snapshot");
        assert_eq!(error.kind(), ErrorKind::Format, "{len} bytes: {error}");
    }
    assert_eq!(live.restore(&[&good[..], &[0]].concat()).unwrap_err().kind(), ErrorKind::Format);
    assert_eq!(bits(&live), before, "the session changed");
    assert_eq!(live.restore(&good).expect("the intact snapshot"), Some(sampler(1).state()));
    assert_eq!(bits(&live), bits(&saved));
}

#[test]
fn snapshots_of_other_models_are_refused() {
    let case = Case::open(A);
    let (one, same, other) = (small_model(1), small_model(1), small_model(2));
    let shapes = [case.model_of(DType::F32, Preset::F32), case.model_of(DType::F32, Preset::Q8_0)];
    let bytes = |model: &Model| {
        let mut session = session(model, 16, 1);
        session.read(&[3, 4, 5]).unwrap();
        session.snapshot().to_bytes()
    };
    let mut live = session(&one, 16, 1);
    live.restore(&bytes(&same)).expect("an equal file is the same model");
    let before = bits(&live);
    for model in [&other, &shapes[0], &shapes[1]] {
        let error = live.restore(&bytes(model)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Model);
        assert!(error.to_string().contains("another model"), "{error}");
    }
    assert_eq!(bits(&live), before);
    let mut quantized = session(&shapes[1], 16, 1);
    assert_eq!(quantized.restore(&bytes(&shapes[0])).unwrap_err().kind(), ErrorKind::Model);
}

#[test]
fn a_text_goes_on_as_it_would_have() {
    for threads in [1, 2] {
        let model = Case::open(A).model();
        let mut straight = session(&model, 256, threads);
        straight.read(&[5; 70]).unwrap();
        let mut straight_sampler = sampler(9);
        go_on(&mut straight, &mut straight_sampler, 5);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("session.tns");
        straight.snapshot().with_sampler(&straight_sampler).save(&path).unwrap();
        let wanted = go_on(&mut straight, &mut straight_sampler, 20);

        let mut resumed = session(&model, 256, threads);
        resumed.read(&[1, 2, 3]).unwrap();
        let state = resumed.load(&path).unwrap().expect("the sampler was stored");
        let mut resumed_sampler = sampler(0);
        resumed_sampler.set_state(state).unwrap();
        assert_eq!(go_on(&mut resumed, &mut resumed_sampler, 20), wanted);
        assert_eq!(bits(&resumed), bits(&straight));
    }
}

#[test]
fn a_generation_goes_on_with_the_stored_sampler() {
    let model = small_model(1);
    let options = |max_tokens| GenerateOptions {
        sampler: SamplerOptions { temperature: 3.0, top_k: 0, seed: Some(9), ..Default::default() },
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        ..Default::default()
    };
    let mut straight = session(&model, 16, 1);
    straight.generate(&[5, 6, 7], options(12)).unwrap().for_each(|event| drop(event.unwrap()));

    let mut first = session(&model, 16, 1);
    let mut generation = first.generate(&[5, 6, 7], options(5)).unwrap();
    generation.by_ref().for_each(|event| drop(event.unwrap()));
    let sampler = generation.sampler().clone();
    let bytes = first.snapshot().with_sampler(&sampler).to_bytes();

    let mut second = session(&model, 16, 1);
    let state = second.restore(&bytes).unwrap().expect("the sampler was stored");
    let mut generation = second.generate(&[], options(7)).unwrap();
    generation.sampler_mut().set_state(state).unwrap();
    generation.for_each(|event| drop(event.unwrap()));
    assert_eq!(bits(&second), bits(&straight));
}

#[test]
fn an_empty_session_and_one_that_was_cut_off_are_stored_too() {
    let model = small_model(1);
    let mut live = session(&model, 2, 1);
    let empty = live.snapshot().to_bytes();
    let mut asked = 0;
    live.read_while(&[1, 2, 3, 4], || {
        asked += 1;
        asked < 2
    })
    .unwrap();
    let cut_off = (live.snapshot().to_bytes(), bits(&live));
    live.read(&[9]).unwrap();
    assert_eq!(live.restore(&cut_off.0).unwrap(), None);
    assert_eq!((bits(&live), live.logits()), (cut_off.1, &[][..]));
    live.restore(&empty).unwrap();
    assert_eq!(bits(&live), bits(&session(&model, 2, 1)));
}

#[test]
fn the_size_does_not_depend_on_the_position() {
    let model = small_model(1);
    let with_ledger = |ledger| {
        let options = SessionOptions { threads: 1, ledger, ..SessionOptions::default() };
        Session::new(&model, &options).unwrap()
    };
    let mut small = with_ledger(4);
    small.read(&[3; 10]).unwrap();
    let first = small.snapshot().to_bytes();
    small.read(&[4; 1000]).unwrap();
    let second = small.snapshot().to_bytes();
    assert_eq!(first.len(), second.len());

    // Into a larger ledger and back: the tokens that are known, and the true position.
    let mut large = with_ledger(100);
    large.restore(&second).unwrap();
    assert_eq!((large.tokens(), large.position()), (&[4; 4][..], 1010));
    large.read(&[5; 6]).unwrap();
    small.read(&[5; 6]).unwrap();
    assert_eq!((large.tokens(), large.position()), (&[4, 4, 4, 4, 5, 5, 5, 5, 5, 5][..], 1016));
    assert!(large.state() == small.state() && large.logits() == small.logits());
    small.restore(&large.snapshot().to_bytes()).unwrap();
    assert_eq!((small.tokens(), small.position()), (&[5; 4][..], 1016));
    // The whole text is still known by its digest.
    let text = [&[3; 10][..], &[4; 1000], &[5; 6]].concat();
    assert_eq!(small.sync(&text).unwrap().recomputed, 0);
}

#[test]
fn files_appear_whole_or_not_at_all() {
    let model = small_model(1);
    let mut live = session(&model, 16, 1);
    live.read(&[3, 4]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("session.tns");
    live.save(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), live.snapshot().to_bytes());
    live.read(&[5]).unwrap();
    live.save(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), live.snapshot().to_bytes());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary files");

    assert_eq!(live.save(folder.path()).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(live.save(folder.path().join("no/session.tns")).unwrap_err().kind(), ErrorKind::Io);
    for missing in [folder.path().join("none.tns"), folder.path().to_owned()] {
        assert_eq!(live.load(&missing).unwrap_err().kind(), ErrorKind::Io);
    }
    fs::write(&path, b"TNSN").unwrap();
    let error = live.load(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Format);
    assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
    fs::write(&path, [0; 4096]).unwrap();
    assert!(live.load(&path).unwrap_err().to_string().ends_with("not a snapshot of a session"));
    assert_eq!(live.tokens(), [3, 4, 5]);
}

#[test]
fn the_format_is_the_documented_one() {
    let model = small_model(1);
    let mut live = session(&model, 16, 1);
    live.read(&[3, 4]).unwrap();
    let bytes = live.snapshot().to_bytes();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!((&bytes[..4], word(4), word(8)), (&b"TNSN"[..], 1, 100));
    assert_eq!(&bytes[12..44], model.fingerprint());
    assert_eq!((word(44), word(48)), (2, 0), "position");
    assert_eq!([84, 88, 92, 96].map(word), [2, 128, live.state().values().len() as u32, 0], "counts");
    let tokens = 100 + 32;
    assert_eq!((word(tokens), word(tokens + 4)), (3, 4));
    let logits = tokens + 2 * 4 + 32;
    assert_eq!(word(logits), live.logits()[0].to_bits());
    let state = logits + 128 * 4 + 32;
    assert_eq!(word(state), live.state().values()[0].to_bits());
    assert_eq!(bytes.len(), state + live.state().bytes() + 32 + 32 + 32);

    let mut newer = bytes.clone();
    newer[4] = 2;
    let error = live.restore(&newer).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("version 2"), "{error}");
}
