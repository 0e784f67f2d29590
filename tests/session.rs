//! What a session refuses, and that it is unchanged by what it refused.

mod common;

use common::{A, Case, session};
use transnormer::{ErrorKind, Session, SessionOptions};

#[test]
fn ids_outside_the_vocabulary_are_refused_before_anything_changes() {
    let model = Case::open(A).model();
    let vocab_size = model.hparams().vocab_size as u32;
    let mut session = session(&model, 2, 1);
    session.read(&[3, 4, 5]).unwrap();
    let (state, logits) = (session.state().clone(), session.logits().to_vec());
    for ids in [&[vocab_size][..], &[u32::MAX], &[3, 4, 5, 6, vocab_size]] {
        for error in
            [session.read(ids).unwrap_err(), session.read_all(ids, |_, _| panic!("read")).unwrap_err()]
        {
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(error.to_string().contains(&vocab_size.to_string()), "{error}");
        }
    }
    assert_eq!(session.tokens(), [3, 4, 5]);
    assert_eq!(session.logits(), logits);
    assert!(*session.state() == state, "the state is unchanged");
    session.read(&[0, vocab_size - 1]).expect("the first and the last id");
}

#[test]
fn an_empty_text_changes_nothing() {
    let model = Case::open(A).model();
    let mut session = session(&model, 64, 1);
    session.read(&[]).unwrap();
    session.read_all(&[], |_, _| panic!("there is no token")).unwrap();
    assert_eq!((session.position(), session.logits()), (0, &[][..]));
    session.read(&[7]).unwrap();
    let logits = session.logits().to_vec();
    session.read(&[]).unwrap();
    session.read_all(&[], |_, _| panic!("there is no token")).unwrap();
    assert_eq!((session.position(), session.logits()), (1, &logits[..]));
}

#[test]
fn impossible_options_are_refused() {
    let model = Case::open(A).model();
    for (threads, block, ledger) in
        [(1, 0, 1), (10_000, 256, 1), (usize::MAX, 256, 1), (1, 256, (1 << 24) + 1), (1, 256, usize::MAX)]
    {
        let options = SessionOptions { threads, block, ledger, ..SessionOptions::default() };
        let Err(error) = Session::new(&model, &options) else {
            panic!("{options:?} is possible");
        };
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}

#[test]
fn zero_threads_means_one_for_each_core() {
    let model = Case::open(A).model();
    let mut session = session(&model, 256, 0);
    assert_eq!(session.threads(), std::thread::available_parallelism().unwrap().get());
    session.read(&[3]).unwrap();
}

#[test]
fn a_block_may_be_longer_than_the_text_but_not_without_limit() {
    let model = Case::open(A).model();
    let endless = SessionOptions { block: usize::MAX, ..SessionOptions::default() };
    assert_eq!(Session::new(&model, &endless).err().unwrap().kind(), ErrorKind::InvalidArgument);
    let mut session = session(&model, 1 << 14, 1);
    session.read(&[3; 300]).unwrap();
    assert_eq!(session.position(), 300);
}

#[test]
fn reset_forgets_everything() {
    let model = Case::open(A).model();
    let mut session = session(&model, 16, 1);
    session.read(&[9, 8, 7]).unwrap();
    let logits = session.logits().to_vec();
    session.reset();
    assert_eq!((session.tokens(), session.logits()), (&[][..], &[][..]));
    session.read(&[9, 8, 7]).unwrap();
    assert_eq!(session.logits(), logits);
}

#[test]
fn the_ledger_names_the_newest_tokens() {
    let model = Case::open(A).model();
    for ledger in [0, 1, 5] {
        let options = SessionOptions { threads: 1, block: 4, ledger, ..SessionOptions::default() };
        let (mut short, mut long) = (Session::new(&model, &options).unwrap(), session(&model, 4, 1));
        let ids: Vec<u32> = (3..60).collect();
        for part in ids.chunks(19) {
            short.read(part).unwrap();
            long.read(part).unwrap();
            assert_eq!(short.tokens(), &long.tokens()[long.tokens().len().saturating_sub(ledger)..]);
        }
        assert_eq!((short.position(), long.tokens()), (57, &ids[..]));
        assert!(short.state() == long.state() && short.logits() == long.logits());
    }
}
