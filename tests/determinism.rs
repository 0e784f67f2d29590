//! The same calls give the same bits: again, and on any number of threads.

mod common;

use common::{CASES, Case, read_all, session, turn};
use tn_quantize::policy::Preset;
use transnormer::{DType, Model};

/// The bits of everything that a session computes: a prompt in two parts, then token by token.
fn bits(model: &Model, ids: &[u32], block: usize, threads: usize) -> Vec<u32> {
    let mut session = session(model, block, threads);
    let mut values = read_all(&mut session, &ids[..40]);
    session.read(&ids[40..200]).expect("valid ids");
    values.extend_from_slice(session.logits());
    for id in &ids[200..208] {
        session.read(&[*id]).expect("a valid id");
        values.extend_from_slice(session.logits());
    }
    values.extend_from_slice(session.state().values());
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn threads_do_not_change_a_bit() {
    let _turn = turn();
    for case in CASES.map(Case::open) {
        for preset in [Preset::F32, Preset::Q4_K_M] {
            let (model, ids) = (case.model_of(DType::F32, preset), case.ids("input_ids"));
            for (block, threads) in [(256, 1), (256, 2), (33, 2)] {
                let one = bits(&model, &ids, block, 1);
                let found = bits(&model, &ids, block, threads);
                assert!(found == one, "{}, {}, {threads} threads", case.name, preset.name());
            }
        }
    }
}

/// More threads than items of work, and than this machine may have cores: one case, as they wait for each other.
#[test]
fn many_threads_do_not_change_a_bit() {
    let _turn = turn();
    let case = Case::open(CASES[1]);
    let (model, ids) = (case.model(), case.ids("input_ids"));
    assert!(bits(&model, &ids, 256, 5) == bits(&model, &ids, 256, 1));
}

#[test]
fn sessions_do_not_disturb_each_other() {
    let _turn = turn();
    let case = Case::open(CASES[0]);
    let (model, ids) = (case.model(), case.ids("input_ids"));
    let alone = bits(&model, &ids, 64, 1);
    std::thread::scope(|scope| {
        for threads in [1, 2, 1] {
            let (model, ids, alone) = (&model, &ids, &alone);
            scope.spawn(move || {
                for _ in 0..5 {
                    assert!(bits(model, ids, 64, threads) == *alone, "{threads} threads beside others");
                }
            });
        }
    });
}

#[test]
fn converting_and_loading_again_does_not_change_a_bit() {
    let _turn = turn();
    let case = Case::open(CASES[2]);
    let ids = case.ids("input_ids");
    assert!(bits(&case.model(), &ids, 256, 2) == bits(&case.model(), &ids, 256, 2));
}
