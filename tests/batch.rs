//! Sequences that are computed together are what they are alone.

mod common;

use std::collections::HashMap;

use common::{CASES, Case, error, greedy_options, session, small_model};
use proptest::{collection::vec, option, prelude::*, test_runner::Config};
use tn_quantize::policy::Preset;
use transnormer::{
    Batch, CancelToken, DType, Done, ErrorKind, Event, GenerateOptions, Model, Prompt, SamplerOptions,
    SequenceId, Session, SessionOptions, StopReason,
};

/// Rounding in f32, where sums are taken in another order; relative to the largest value.
const ROUNDING: f64 = 2e-5;

fn batch(model: &Model, block: usize, threads: usize) -> Batch {
    Batch::new(model, &SessionOptions { threads, block, ..SessionOptions::default() }).expect("valid options")
}

/// What a sequence gave out.
#[derive(Debug, Default)]
struct Given {
    ids: Vec<u32>,
    text: String,
    done: Option<Done>,
}

impl Given {
    fn take(&mut self, event: Event) {
        assert!(self.done.is_none(), "an event after Done");
        match event {
            Event::Token(token) => {
                self.ids.push(token.id);
                self.text.push_str(&token.text);
            }
            Event::Done(done) => {
                self.text.push_str(&done.text);
                self.done = Some(done);
            }
        }
    }
}

fn alone(session: &mut Session, prompt: &[u32], options: GenerateOptions) -> Given {
    let mut given = Given::default();
    session.generate(prompt, options).unwrap().for_each(|event| given.take(event.unwrap()));
    given
}

/// Runs the batch to its end.
fn run(batch: &mut Batch, given: &mut HashMap<SequenceId, Given>) {
    while batch.running() > 0 {
        for (id, event) in batch.step().unwrap() {
            given.entry(id).or_default().take(event.unwrap());
        }
    }
}

fn assert_equal(found: &Session, wanted: &Session) {
    assert_close(found, wanted, ROUNDING);
}

fn assert_close(found: &Session, wanted: &Session, limit: f64) {
    assert_eq!((found.tokens(), found.position()), (wanted.tokens(), wanted.position()));
    let errors =
        [error(found.logits(), wanted.logits()), error(found.state().values(), wanted.state().values())];
    assert!(errors.iter().all(|&error| error <= limit), "errors {errors:?}");
}

#[test]
fn every_architecture_and_format_agrees_with_single_sessions() {
    for case in CASES.map(Case::open) {
        // Where inputs are rounded to int8, a difference in the last bit may become one of a step.
        for (preset, limit) in [(Preset::F32, ROUNDING), (Preset::Q8_0, 0.05)] {
            let (model, ids) = (case.model_of(DType::F32, preset), case.ids("input_ids"));
            let mut batch = batch(&model, 32, 2);
            let prompts = [&ids[..1], &ids[1..80], &ids[80..82], &ids[5..40]];
            let names: Vec<_> = prompts
                .iter()
                .enumerate()
                .map(|(i, prompt)| batch.join(batch.session(), *prompt, greedy_options(3 + i)).unwrap())
                .collect();
            let mut given = HashMap::new();
            run(&mut batch, &mut given);
            for (i, (prompt, name)) in prompts.iter().zip(names).enumerate() {
                let mut single = session(&model, 32, 1);
                let wanted = alone(&mut single, prompt, greedy_options(3 + i));
                assert_eq!(given[&name].ids, wanted.ids, "{}, {}", case.name, preset.name());
                let done = given[&name].done.as_ref().expect("every sequence ends");
                assert_eq!((done.reason, done.stats.prompt_tokens), (StopReason::MaxTokens, prompt.len()));
                assert_close(&batch.leave(name).expect("it is in the batch"), &single, limit);
            }
        }
    }
}

proptest! {
    #![proptest_config(Config { cases: 32, failure_persistence: None, ..Config::default() })]

    #[test]
    fn joining_and_leaving_at_any_token(
        arrivals in vec((0_usize..4, vec(0_u32..128, 1..30), 0_usize..12, option::of(0_usize..20)), 1..8),
        block in 1_usize..20,
    ) {
        let model = small_model(1);
        let mut batch = batch(&model, block, 1);
        let mut given: HashMap<SequenceId, Given> = HashMap::new();
        // Name, prompt, most tokens, steps until it leaves.
        let mut running = Vec::new();
        let mut left: Vec<(SequenceId, Vec<u32>, usize, Session)> = Vec::new();
        let mut arrivals = arrivals.into_iter().peekable();
        let mut wait = 0;
        while arrivals.peek().is_some() || batch.running() > 0 {
            while let Some((_, prompt, max, patience)) = arrivals.next_if(|(pause, ..)| *pause <= wait) {
                let name = batch.join(batch.session(), &prompt, greedy_options(max)).unwrap();
                running.push((name, prompt, max, patience));
                wait = 0;
            }
            wait += 1;
            for (name, event) in batch.step().unwrap() {
                given.entry(name).or_default().take(event.unwrap());
            }
            running.retain_mut(|(name, prompt, max, patience)| {
                let over = given.get(name).is_some_and(|given| given.done.is_some());
                let impatient = *patience == Some(0);
                *patience = patience.map(|steps| steps.saturating_sub(1));
                if over || impatient {
                    left.push((*name, std::mem::take(prompt), *max, batch.leave(*name).unwrap()));
                }
                !(over || impatient)
            });
        }
        for (name, prompt, max, found) in left {
            prop_assert!(batch.leave(name).is_none());
            let given = given.remove(&name).unwrap_or_default();
            let mut single = session(&model, block, 1);
            if given.done.is_some() {
                let wanted = alone(&mut single, &prompt, greedy_options(max));
                prop_assert_eq!((given.ids, given.text), (wanted.ids, wanted.text));
            } else {
                // It left early: what it has read is a beginning of prompt and text.
                let all = [&prompt[..], &given.ids[..]].concat();
                let read = found.tokens();
                prop_assert!(all.starts_with(read), "{:?} of {:?}", read, all);
                // Of what was given out, all but the last.
                prop_assert!(given.ids.is_empty() || read.len() + 1 == all.len());
                single.read(found.tokens()).unwrap();
            }
            prop_assert_eq!(found.tokens(), single.tokens());
            if found.position() > 0 {
                prop_assert!(error(found.state().values(), single.state().values()) <= ROUNDING);
            }
        }
    }
}

#[test]
fn each_has_its_own_sampler_stop_and_cancellation() {
    let model = Case::open(CASES[0]).model();
    let seeded = |seed| GenerateOptions {
        sampler: SamplerOptions { temperature: 1.5, seed: Some(seed), ..Default::default() },
        log_probs: true,
        ..greedy_options(12)
    };
    let prompt = [9, 8, 7];
    let plain = alone(&mut session(&model, 256, 1), &prompt, greedy_options(12));
    let stop =
        GenerateOptions { stop: vec![plain.text[plain.text.len() / 2..].to_owned()], ..greedy_options(50) };
    let cancel = CancelToken::new();
    let endless = GenerateOptions { max_tokens: None, cancel: cancel.clone(), ..greedy_options(0) };
    let cancelled = CancelToken::new();
    cancelled.cancel();
    let never = GenerateOptions { cancel: cancelled, ..greedy_options(5) };

    let mut batch = batch(&model, 256, 1);
    let mut join = |options: &GenerateOptions| batch.join(batch.session(), &prompt, options.clone()).unwrap();
    let names = [&seeded(1), &seeded(2), &stop, &endless, &never].map(&mut join);
    let mut given: HashMap<SequenceId, Given> = HashMap::new();
    for step in 0.. {
        for (name, event) in batch.step().unwrap() {
            given.entry(name).or_default().take(event.unwrap());
        }
        if step == 30 {
            cancel.cancel();
        }
        if batch.running() == 0 {
            break;
        }
    }
    for (name, options) in names.into_iter().zip([seeded(1), seeded(2), stop]) {
        let mut single = session(&model, 256, 1);
        let wanted = alone(&mut single, &prompt, options);
        let (found, done) = (&given[&name], wanted.done.unwrap());
        assert_eq!((&found.ids, &found.text), (&wanted.ids, &wanted.text));
        assert_eq!(found.done.as_ref().unwrap().reason, done.reason);
        assert_equal(&batch.leave(name).unwrap(), &single);
    }
    assert_ne!(given[&names[0]].ids, given[&names[1]].ids);
    let reasons = names.map(|name| given[&name].done.as_ref().unwrap().reason);
    assert_eq!(reasons[2..], [StopReason::Stop, StopReason::Cancelled, StopReason::Cancelled]);
    assert!((29..=31).contains(&given[&names[3]].ids.len()), "cancelled within one token");
    assert_eq!(batch.leave(names[4]).unwrap().position(), 0);
}

#[test]
fn sessions_come_with_their_past_and_leave_with_it() {
    let model = small_model(1);
    let mut single = session(&model, 16, 1);
    single.read(&[1, 2, 3]).unwrap();
    let mut batch = batch(&model, 16, 1);
    // One has threads of its own, one goes on without a prompt.
    let names = [
        batch.join(single.fork(), &[4, 5], greedy_options(4)).unwrap(),
        batch.join(single.fork(), &[], greedy_options(4)).unwrap(),
    ];
    run(&mut batch, &mut HashMap::new());
    for (name, prompt) in names.into_iter().zip([&[4, 5][..], &[]]) {
        let (mut wanted, mut found) = (single.fork(), batch.leave(name).unwrap());
        alone(&mut wanted, prompt, greedy_options(4));
        assert_equal(&found, &wanted);
        alone(&mut wanted, &[], greedy_options(2));
        alone(&mut found, &[], greedy_options(2));
        assert_equal(&found, &wanted);
    }
    assert_eq!((batch.running(), batch.step().unwrap().len()), (0, 0));
}

#[test]
fn what_a_session_would_refuse_is_refused() {
    let model = small_model(1);
    let mut batch = batch(&model, 16, 1);
    let mut kind = |session: Session, prompt: Prompt<'_>| {
        batch.join(session, prompt, greedy_options(1)).unwrap_err().kind()
    };
    let empty = || session(&model, 16, 1);
    assert_eq!(kind(empty(), Prompt::Ids(&[])), ErrorKind::InvalidArgument);
    assert_eq!(kind(empty(), Prompt::Ids(&[1 << 20])), ErrorKind::InvalidArgument);
    assert_eq!(kind(session(&small_model(1), 16, 1), Prompt::Ids(&[3])), ErrorKind::InvalidArgument);
    assert_eq!(batch.running(), 0);
    for (block, threads) in [(0, 1), (16, usize::MAX)] {
        let options = SessionOptions { threads, block, ..SessionOptions::default() };
        assert!(Batch::new(&model, &options).is_err_and(|error| error.kind() == ErrorKind::InvalidArgument));
    }
}

#[test]
fn an_error_ends_only_its_own_sequence() {
    let model = small_model(1);
    let mut batch = batch(&model, 16, 1);
    let biased = |id| SamplerOptions { logit_bias: vec![(id, 0.0)], ..SamplerOptions::greedy() };
    let wrong = GenerateOptions { sampler: biased(1 << 20), ..greedy_options(3) };
    let wrong = batch.join(batch.session(), &[3], wrong).unwrap();
    let right = batch.join(batch.session(), &[3], greedy_options(3)).unwrap();
    let (mut errors, mut given) = (Vec::new(), Given::default());
    while batch.running() > 0 {
        for (name, event) in batch.step().unwrap() {
            match event {
                Ok(event) if name == right => given.take(event),
                other => errors.push((name, other.unwrap_err().kind())),
            }
        }
    }
    assert_eq!(errors, [(wrong, ErrorKind::InvalidArgument)]);
    assert_eq!((given.ids.len(), given.done.is_some()), (3, true));
}
