//! However a text is split, into calls and into blocks, it means the same.

mod common;

use std::sync::LazyLock;

use common::{CASES, Case, error, greedy, read_all, session};
use proptest::{collection::vec, prelude::*, sample::select, test_runner::Config};
use transnormer::{Model, Session};

/// Rounding in f32, where sums are taken in another order; relative to the largest value.
const ROUNDING: f64 = 2e-5;

/// A case's model and text, and what reading it in one call gives.
struct Whole {
    name: &'static str,
    model: Model,
    ids: Vec<u32>,
    logits: Vec<f32>,
    state: Vec<f32>,
    text: Vec<u32>,
}

static WHOLE: LazyLock<[Whole; 4]> = LazyLock::new(|| {
    CASES.map(Case::open).map(|case| {
        let (model, ids) = (case.model(), case.ids("input_ids"));
        let mut session = session(&model, 256, 1);
        session.read(&ids).expect("valid ids");
        let (logits, state) = (session.logits().to_vec(), session.state().values().to_vec());
        Whole { name: case.name, text: greedy(&mut session, 32), model, ids, logits, state }
    })
});

impl Whole {
    /// Compares a session that has read the text with the one that read it in one call.
    fn assert_equal(&self, session: &mut Session) {
        assert_eq!(session.tokens(), self.ids, "{}: ledger", self.name);
        let errors = [error(session.logits(), &self.logits), error(session.state().values(), &self.state)];
        assert!(errors.iter().all(|&error| error <= ROUNDING), "{}: errors {errors:?}", self.name);
        assert_eq!(greedy(session, 32), self.text, "{}: text", self.name);
    }
}

proptest! {
    #![proptest_config(Config { cases: 48, failure_persistence: None, ..Config::default() })]

    #[test]
    fn random_splits_agree(
        case in 0..CASES.len(),
        cuts in vec(0_usize..600, 0..12),
        block in select(&[1_usize, 5, 7, 8, 17, 63, 64, 65, 100, 256][..]),
    ) {
        let whole = &WHOLE[case];
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(whole.ids.len())).collect();
        cuts.extend([0, whole.ids.len()]);
        cuts.sort_unstable();
        let mut session = session(&whole.model, block, 1);
        for (i, cut) in cuts.windows(2).enumerate() {
            let part = &whole.ids[cut[0]..cut[1]];
            // Both ways of reading, mixed.
            if i % 3 == 1 {
                session.read_all(part, |_, _| {}).expect("valid ids");
            } else {
                session.read(part).expect("valid ids");
            }
        }
        whole.assert_equal(&mut session);
    }
}

#[test]
fn every_position_around_a_block_is_a_good_split() {
    for whole in &*WHOLE {
        for cut in [1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 255, 256, 257] {
            let mut session = session(&whole.model, 256, 1);
            session.read(&whole.ids[..cut]).expect("valid ids");
            session.read(&whole.ids[cut..]).expect("valid ids");
            whole.assert_equal(&mut session);
        }
    }
}

#[test]
fn asking_for_all_logits_changes_nothing() {
    for whole in &*WHOLE {
        let ids = &whole.ids[..64];
        let vocab_size = whole.model.hparams().vocab_size;
        let (mut all, mut last) = (session(&whole.model, 16, 1), session(&whole.model, 16, 1));
        let logits = read_all(&mut all, ids);
        for (part, logits) in ids.chunks(16).zip(logits.chunks_exact(16 * vocab_size)) {
            last.read(part).expect("valid ids");
            // One row or many: the head's sums are taken in another order.
            let error = error(last.logits(), &logits[15 * vocab_size..]);
            assert!(error <= ROUNDING, "{}: error {error:e}", whole.name);
        }
        assert!(all.state() == last.state(), "{}: the state is the same, bit for bit", whole.name);
    }
}
