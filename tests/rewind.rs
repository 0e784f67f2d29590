//! Forks, checkpoints and syncing: whatever a session has been through, it computes what it would have
//! computed had it never stopped.

mod common;

use std::{collections::HashMap, sync::LazyLock, thread};

use common::{CASES, Case, error, session, small_model};
use proptest::{prelude::*, sample::Index, test_runner::Config};
use transnormer::{CheckpointId, ErrorKind, Model, Session, SessionOptions, SyncReport};

/// Rounding in f32, where sums are taken in another order; relative to the largest value.
const ROUNDING: f64 = 2e-5;

static MODEL: LazyLock<Model> = LazyLock::new(|| small_model(1));

fn keeping(checkpoints: usize) -> Session {
    let options = SessionOptions { threads: 1, checkpoints, ..SessionOptions::default() };
    Session::new(&MODEL, &options).expect("valid options")
}

fn bits(session: &Session) -> Vec<u32> {
    session.state().values().iter().chain(session.logits()).map(|value| value.to_bits()).collect()
}

/// The calls that a session has been given, or would have been, had it never stopped.
type Calls = Vec<Vec<u32>>;

/// Compares with a new session that gets the same calls.
fn assert_straight(session: &Session, calls: &Calls) {
    let mut straight = keeping(0);
    calls.iter().for_each(|call| straight.read(call).expect("valid ids"));
    assert_eq!(session.tokens(), calls.concat());
    assert_eq!(session.position(), straight.position());
    assert!(bits(session) == bits(&straight), "other bits than without stopping, after {calls:?}");
}

#[derive(Debug, Clone)]
enum Step {
    Read(Vec<u32>),
    Fork,
    Checkpoint,
    Rewind(Index),
    Undo,
    /// Stores one session and loads it into another.
    Load {
        file: bool,
        into: Index,
    },
    /// Goes on with another session.
    Switch(Index),
    Drop,
}

fn any_step() -> impl Strategy<Value = Step> {
    let token = 0_u32..128;
    prop_oneof![
        6 => token.clone().prop_map(|token| Step::Read(vec![token])),
        1 => proptest::collection::vec(token, 0..20).prop_map(Step::Read),
        1 => Just(Step::Fork),
        2 => Just(Step::Checkpoint),
        2 => any::<Index>().prop_map(Step::Rewind),
        1 => Just(Step::Undo),
        1 => (any::<bool>(), any::<Index>()).prop_map(|(file, into)| Step::Load { file, into }),
        2 => any::<Index>().prop_map(Step::Switch),
        1 => Just(Step::Drop),
    ]
}

/// A session, and what should have become of it and its checkpoints.
struct Walker {
    session: Session,
    calls: Calls,
    kept: HashMap<CheckpointId, Calls>,
}

impl Walker {
    fn new(session: Session, calls: Calls) -> Self {
        Self { session, calls, kept: HashMap::new() }
    }
}

proptest! {
    #![proptest_config(Config { cases: 200, failure_persistence: None, ..Config::default() })]

    #[test]
    fn random_walks_agree_with_the_straight_run(steps in proptest::collection::vec(any_step(), 1..40)) {
        const DEPTH: usize = 2;
        let folder = tempfile::tempdir().expect("there is room for temporary files");
        let path = folder.path().join("walk.tns");
        let mut walkers = vec![Walker::new(keeping(DEPTH), Vec::new())];
        // Of all sessions, also those that are gone.
        let mut ids = Vec::new();
        let mut current = 0;
        for step in steps {
            let count = walkers.len();
            let walker = &mut walkers[current];
            match step {
                Step::Read(tokens) => {
                    walker.session.read(&tokens).expect("valid ids");
                    // An empty call is no call.
                    walker.calls.extend((!tokens.is_empty()).then_some(tokens));
                }
                Step::Fork => {
                    let fork = Walker::new(walker.session.fork(), walker.calls.clone());
                    walkers.push(fork);
                }
                Step::Checkpoint => {
                    let id = walker.session.checkpoint().expect("checkpoints are kept");
                    walker.kept.insert(id, walker.calls.clone());
                    ids.push(id);
                }
                Step::Rewind(which) if !ids.is_empty() => {
                    let id = ids[which.index(ids.len())];
                    let there = walker.session.checkpoints().any(|(other, _)| other == id);
                    prop_assert_eq!(walker.session.rewind(id).is_ok(), there);
                    if there {
                        walker.calls = walker.kept[&id].clone();
                    }
                }
                Step::Undo => {
                    let newest = walker.session.checkpoints().next_back().map(|(id, _)| id);
                    prop_assert_eq!(walker.session.undo(), newest.is_some());
                    if let Some(id) = newest {
                        walker.calls = walker.kept[&id].clone();
                    }
                }
                Step::Load { file, into } => {
                    let (calls, bytes) = (walker.calls.clone(), walker.session.snapshot().to_bytes());
                    walker.session.save(&path).expect("the folder is writable");
                    let target = &mut walkers[into.index(count)];
                    let session = &mut target.session;
                    let sampler = if file { session.load(&path) } else { session.restore(&bytes) };
                    prop_assert_eq!(sampler.expect("an intact snapshot"), None);
                    target.calls = calls;
                }
                Step::Switch(which) => current = which.index(count),
                Step::Drop if count > 1 => {
                    walkers.remove(current);
                    current = 0;
                }
                Step::Rewind(_) | Step::Drop => {}
            }
        }
        for walker in &walkers {
            prop_assert!(walker.session.checkpoints().len() <= DEPTH);
            assert_straight(&walker.session, &walker.calls);
        }
    }
}

#[test]
fn a_fork_is_independent_of_its_origin() {
    let mut origin = keeping(2);
    origin.read(&[1, 2, 3]).unwrap();
    origin.checkpoint().unwrap();
    let mut fork = origin.fork();
    assert_eq!((fork.checkpoints().len(), origin.checkpoints().len()), (0, 1));
    fork.read(&[4]).unwrap();
    origin.read(&[5]).unwrap();
    assert_straight(&fork, &vec![vec![1, 2, 3], vec![4]]);
    assert_straight(&origin, &vec![vec![1, 2, 3], vec![5]]);
    drop(origin);
    fork.read(&[6]).unwrap();
    assert_straight(&fork, &vec![vec![1, 2, 3], vec![4], vec![6]]);
}

#[test]
fn forks_on_several_threads_take_turns() {
    let mut origin = session(&MODEL, 4, 2);
    origin.read(&[1, 2, 3]).unwrap();
    thread::scope(|scope| {
        for token in 4..8 {
            let mut fork = origin.fork();
            scope.spawn(move || {
                // A callback may use another fork.
                let mut other = fork.fork();
                fork.read_all(&[token; 9], |_, _| other.read(&[token]).unwrap()).unwrap();
                assert_straight(&other, &[vec![vec![1, 2, 3]], vec![vec![token]; 9]].concat());
                assert_eq!(fork.tokens(), other.tokens());
                assert!(error(fork.logits(), other.logits()) < ROUNDING);
            });
        }
    });
}

#[test]
fn the_ring_keeps_the_newest() {
    let mut session = keeping(2);
    let ids: Vec<_> = (0..3)
        .map(|token| {
            session.read(&[token]).unwrap();
            session.checkpoint().unwrap()
        })
        .collect();
    assert_eq!(session.checkpoints().collect::<Vec<_>>(), [(ids[1], 2), (ids[2], 3)]);
    let before = bits(&session);
    let refused = session.rewind(ids[0]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidArgument);
    assert!(bits(&session) == before);
    session.rewind(ids[1]).unwrap();
    assert_straight(&session, &vec![vec![0], vec![1]]);
    // Forward again.
    session.rewind(ids[2]).unwrap();
    assert_straight(&session, &vec![vec![0], vec![1], vec![2]]);

    session.read(&[9]).unwrap();
    assert!(session.undo() && session.position() == 3);
    assert!(session.undo() && session.position() == 2);
    assert!(!session.undo());
    assert_straight(&session, &vec![vec![0], vec![1]]);

    let id = session.checkpoint().unwrap();
    assert_eq!(session.fork().rewind(id).unwrap_err().kind(), ErrorKind::InvalidArgument);
    session.reset();
    assert_eq!(session.rewind(id).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(keeping(0).checkpoint().unwrap_err().kind(), ErrorKind::InvalidArgument);
}

fn report(reused: usize, recomputed: usize) -> SyncReport {
    SyncReport { reused, recomputed }
}

#[test]
fn syncing_reads_only_what_is_new() {
    let mut session = keeping(3);
    let first: Vec<u32> = (10..40).collect();
    assert_eq!(session.sync(&first).unwrap(), report(0, 30));
    assert_eq!(session.sync(&first).unwrap(), report(30, 0));
    // An answer is read, then the next turn comes.
    session.read(&[5]).unwrap();
    session.read(&[6]).unwrap();
    let mut second = session.tokens().to_vec();
    second.extend([7, 8]);
    assert_eq!(session.sync(&second).unwrap(), report(32, 2));
    assert_straight(&session, &vec![first.clone(), vec![5], vec![6], vec![7, 8]]);
    // Another answer to the first turn.
    let other = [&first[..], &[99, 98]].concat();
    assert_eq!(session.sync(&other).unwrap(), report(30, 2));
    assert_straight(&session, &vec![first.clone(), vec![99, 98]]);
    // Back to the second turn, which a checkpoint still knows.
    assert_eq!(session.sync(&second).unwrap(), report(34, 0));
    // Only a beginning that someone stopped at is of use: the state cannot be cut.
    assert_eq!(session.sync(&second[..33]).unwrap(), report(30, 3));
    assert_eq!(session.sync(&first[1..]).unwrap(), report(0, 29));
    assert_straight(&session, &vec![first[1..].to_vec()]);
    assert_eq!(session.sync(&[]).unwrap(), report(0, 0));
    assert_eq!((session.position(), session.logits().len()), (0, 0));
}

#[test]
fn syncing_works_without_checkpoints_and_beyond_the_ledger() {
    let options = SessionOptions { threads: 1, checkpoints: 0, ledger: 4, ..SessionOptions::default() };
    let mut session = Session::new(&MODEL, &options).unwrap();
    let mut text: Vec<u32> = (0..100).collect();
    assert_eq!(session.sync(&text).unwrap(), report(0, 100));
    assert_eq!(session.tokens(), &text[96..]);
    text.push(3);
    assert_eq!(session.sync(&text).unwrap(), report(100, 1));
    // The ledger does not see the difference any more.
    text[0] = 77;
    assert_eq!(session.sync(&text).unwrap(), report(0, 101));
    assert_eq!(session.position(), 101);
}

#[test]
fn a_text_that_was_cut_off_is_completed() {
    let options = SessionOptions { threads: 1, block: 8, ..SessionOptions::default() };
    let mut session = Session::new(&MODEL, &options).unwrap();
    let text: Vec<u32> = (0..20).collect();
    let mut blocks = 0;
    session
        .read_while(&text, || {
            blocks += 1;
            blocks < 3
        })
        .unwrap();
    // Without logits, the sixteen tokens read are of no use where they are all of the text.
    assert_eq!(session.fork().sync(&text[..16]).unwrap(), report(0, 16));
    assert_eq!(session.sync(&text).unwrap(), report(16, 4));
    assert_eq!(session.logits().len(), MODEL.hparams().vocab_size);
}

#[test]
fn an_impossible_text_changes_nothing() {
    let mut session = keeping(2);
    session.read(&[1, 2]).unwrap();
    let before = bits(&session);
    assert_eq!(session.sync(&[1, 2, 1 << 20]).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(session.sync(&[1 << 20]).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert!(bits(&session) == before && session.tokens() == [1, 2] && session.checkpoints().len() == 0);
}

#[test]
fn syncing_agrees_with_reading_in_every_architecture() {
    for case in CASES.map(Case::open) {
        let (model, ids) = (case.model(), case.ids("input_ids"));
        let mut whole = session(&model, 256, 1);
        whole.read(&ids).unwrap();
        let mut synced = session(&model, 256, 1);
        for end in [1, 50, 51, 200, ids.len()] {
            synced.sync(&ids[..end]).unwrap();
        }
        let errors =
            [error(synced.logits(), whole.logits()), error(synced.state().values(), whole.state().values())];
        assert!(errors.iter().all(|&error| error <= ROUNDING), "{}: {errors:?}", case.name);
    }
}
