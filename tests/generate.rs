//! Generation through the library: what is given out, what the session has read, and how it ends.

mod common;

use std::{ops::ControlFlow, path::Path, sync::OnceLock, thread};

use common::greedy_options;
use transnormer::{
    CancelToken, Done, ErrorKind, Event, GenerateOptions, Model, Prompt, SamplerOptions, Session,
    SessionOptions, StopReason, Token, sampler::log_prob,
};

const PROMPT: &str = "Once upon a time";

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/fable-8m/fable-8m-Q8_0.gguf");
        Model::open(path).unwrap()
    })
}

fn session() -> Session {
    Session::new(model(), &SessionOptions { threads: 1, ..Default::default() }).unwrap()
}

/// Everything that a generation gives out.
fn collect(events: impl Iterator<Item = transnormer::Result<Event>>) -> (Vec<Token>, String, Done) {
    let (mut tokens, mut text, mut done) = (Vec::new(), String::new(), None);
    for event in events {
        assert!(done.is_none(), "an event after Done");
        match event.unwrap() {
            Event::Token(token) => {
                text.push_str(&token.text);
                tokens.push(token);
            }
            Event::Done(end) => {
                text.push_str(&end.text);
                done = Some(end);
            }
        }
    }
    (tokens, text, done.expect("a generation ends with Done"))
}

fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

#[test]
fn texts_are_the_decoded_tokens_and_the_callback_sees_the_same() {
    let mut first = session();
    let (tokens, text, done) = collect(first.generate(PROMPT, greedy_options(6)).unwrap());
    assert_eq!((tokens.len(), done.reason), (6, StopReason::MaxTokens));
    assert_eq!((done.stats.tokens, done.stats.prompt_tokens), (6, first.tokens().len() - 6));
    let whole = model().tokenizer().decode(first.tokens()).unwrap();
    assert_eq!(whole, format!("{PROMPT}{text}"));

    let mut second = session();
    let mut seen = Vec::new();
    let end = second.generate_with(PROMPT, greedy_options(6), |token| {
        seen.push(token);
        ControlFlow::Continue(())
    });
    assert_eq!((seen, end.unwrap().reason), (tokens, StopReason::MaxTokens));
    assert_eq!(second.tokens(), first.tokens());
}

#[test]
fn a_finished_generation_goes_on_where_it_ended() {
    let mut straight = session();
    let (wanted, ..) = collect(straight.generate(PROMPT, greedy_options(6)).unwrap());
    let mut parts = session();
    let (mut tokens, ..) = collect(parts.generate(PROMPT, greedy_options(2)).unwrap());
    tokens.extend(collect(parts.generate(&[], greedy_options(4)).unwrap()).0);
    assert_eq!(ids(&tokens), ids(&wanted));
    assert_eq!(parts.tokens(), straight.tokens());
    assert_eq!(parts.logits(), straight.logits());
}

#[test]
fn a_stop_string_across_tokens_is_not_given_out() {
    let mut plain = session();
    let (tokens, text, _) = collect(plain.generate(PROMPT, greedy_options(6)).unwrap());
    // From the middle of the second token's text to the middle of the fifth's.
    let border = |n: usize| tokens[..n].iter().map(|token| token.text.len()).sum::<usize>();
    let (start, end) = (border(1) + 1, border(4) + 1);
    let stop = text[start..end].to_owned();
    let start = text.find(&stop).unwrap();

    let mut stopped = session();
    let options = GenerateOptions { stop: vec!["@@@".into(), stop], ..greedy_options(6) };
    let (given, before, done) = collect(stopped.generate(PROMPT, options).unwrap());
    assert_eq!((before.as_str(), done.reason), (&text[..start], StopReason::Stop));
    assert_eq!(given.len(), done.stats.tokens);
    assert_eq!(ids(&given), ids(&tokens)[..given.len()]);
    // All but the token that completed the stop string.
    let read = done.stats.prompt_tokens + given.len() - 1;
    assert_eq!(stopped.tokens(), &plain.tokens()[..read]);
}

#[test]
fn cancelling_leaves_the_session_at_a_token_boundary() {
    let mut straight = session();
    let (wanted, ..) = collect(straight.generate(PROMPT, greedy_options(6)).unwrap());

    let mut cancelled = session();
    let cancel = CancelToken::new();
    let options = GenerateOptions { max_tokens: None, cancel: cancel.clone(), ..greedy_options(0) };
    let mut generation = cancelled.generate(PROMPT, options).unwrap();
    let mut tokens = Vec::new();
    for _ in 0..2 {
        let Some(Ok(Event::Token(token))) = generation.next() else { panic!("a token") };
        tokens.push(token);
    }
    thread::spawn(move || cancel.cancel()).join().unwrap();
    let (rest, _, done) = collect(&mut generation);
    assert_eq!((rest.len(), done.reason, done.stats.tokens), (0, StopReason::Cancelled, 2));
    assert!(generation.next().is_none());

    tokens.extend(collect(cancelled.generate(&[], greedy_options(4)).unwrap()).0);
    assert_eq!(ids(&tokens), ids(&wanted));
    assert_eq!(cancelled.tokens(), straight.tokens());

    let mut broken = session();
    let done = broken.generate_with(PROMPT, greedy_options(6), |_| ControlFlow::Break(())).unwrap();
    assert_eq!((done.reason, done.stats.tokens), (StopReason::Cancelled, 1));
    assert_eq!(broken.tokens(), &straight.tokens()[..done.stats.prompt_tokens + 1]);
}

#[test]
fn a_prompt_can_be_cancelled_between_blocks() {
    let options = SessionOptions { threads: 1, block: 2, ..Default::default() };
    let mut session = Session::new(model(), &options).unwrap();
    let prompt = [300, 301, 302, 303, 304];
    let mut asked = 0;
    let read = session.read_while(&prompt, || {
        asked += 1;
        asked < 3
    });
    assert_eq!((read.unwrap(), session.tokens(), session.logits().len()), (4, &prompt[..4], 0));
    session.read(&prompt[4..]).unwrap();

    let cancel = CancelToken::new();
    cancel.cancel();
    let options = GenerateOptions { cancel: cancel.clone(), ..greedy_options(2) };
    let (tokens, _, done) = collect(session.generate(&prompt, options.clone()).unwrap());
    assert_eq!((tokens.len(), done.reason, done.stats.prompt_tokens), (0, StopReason::Cancelled, 0));
    assert_eq!(session.position(), 5);
    cancel.reset();
    assert_eq!(collect(session.generate(&prompt, options).unwrap()).0.len(), 2);
    assert_eq!(session.position(), 5 + 5 + 2);
}

#[test]
fn a_dropped_generation_leaves_its_last_token_unread() {
    let mut session = session();
    let mut generation = session.generate(&[300, 301], greedy_options(6)).unwrap();
    let first = match generation.next() {
        Some(Ok(Event::Token(token))) => token.id,
        other => panic!("{other:?}"),
    };
    assert!(matches!(generation.next(), Some(Ok(Event::Token(_)))));
    drop(generation);
    assert_eq!(session.tokens(), [300, 301, first]);
}

#[test]
fn the_end_of_the_document_ends_the_text_unless_ignored() {
    let eos = model().tokenizer().eos();
    let wish = SamplerOptions { logit_bias: vec![(eos, 1e4)], ..SamplerOptions::greedy() };
    let options = GenerateOptions { sampler: wish, ignore_eos: false, ..greedy_options(2) };
    let mut session = session();
    let (tokens, text, done) = collect(session.generate(&[300], options.clone()).unwrap());
    assert_eq!((tokens.len(), text.as_str(), done.reason), (0, "", StopReason::Eos));
    assert_eq!(session.tokens(), [300]);

    let ignored = GenerateOptions { ignore_eos: true, ..options };
    let (tokens, _, done) = collect(session.generate(&[], ignored).unwrap());
    assert_eq!(done.reason, StopReason::MaxTokens);
    assert!(!ids(&tokens).contains(&eos));
}

#[test]
fn half_a_character_is_given_out_as_broken_at_the_end() {
    let tokenizer = model().tokenizer();
    let byte = (0..tokenizer.vocab_size() as u32).find(|&id| tokenizer.piece(id) == Some("<0xE4>")).unwrap();
    let wish = SamplerOptions { logit_bias: vec![(byte, 1e4)], ..SamplerOptions::greedy() };
    let options = GenerateOptions { sampler: wish, ..greedy_options(1) };
    let (tokens, text, done) = collect(session().generate(&[300], options).unwrap());
    assert_eq!((ids(&tokens), tokens[0].text.as_str()), (vec![byte], ""));
    assert_eq!((text.as_str(), done.text.as_str()), ("\u{FFFD}", "\u{FFFD}"));
}

#[test]
fn log_probabilities_are_the_models_own() {
    let mut session = session();
    let options = GenerateOptions {
        log_probs: true,
        sampler: SamplerOptions { seed: Some(3), ..Default::default() },
        ..greedy_options(1)
    };
    let (tokens, ..) = collect(session.generate(&[300, 301], options).unwrap());
    session.reset();
    session.read(&[300, 301]).unwrap();
    assert_eq!(tokens[0].log_prob, Some(log_prob(session.logits(), tokens[0].id)));
    let (tokens, ..) = collect(session.generate(&[], greedy_options(1)).unwrap());
    assert_eq!(tokens[0].log_prob, None);
}

#[test]
fn seeds_repeat() {
    let run = |seed| {
        let sampler = SamplerOptions { temperature: 2.0, top_k: 0, seed: Some(seed), ..Default::default() };
        ids(&collect(session().generate(PROMPT, GenerateOptions { sampler, ..greedy_options(5) }).unwrap()).0)
    };
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn no_tokens_and_no_text() {
    let mut session = session();
    let (tokens, text, done) = collect(session.generate("", greedy_options(0)).unwrap());
    assert_eq!((tokens.len(), text.as_str(), done.reason), (0, "", StopReason::MaxTokens));
    // A document begins where another ends.
    assert_eq!(session.tokens(), [model().tokenizer().eos()]);
    collect(session.generate("", greedy_options(0)).unwrap());
    assert_eq!(session.position(), 1);
}

#[test]
fn arguments_out_of_range_are_refused() {
    let mut session = session();
    let mut kind = |prompt: Prompt, options| session.generate(prompt, options).map(drop).unwrap_err().kind();
    let empty_stop = GenerateOptions { stop: vec![String::new()], ..greedy_options(1) };
    let cold = SamplerOptions { temperature: -1.0, ..Default::default() };
    let invalid = ErrorKind::InvalidArgument;
    assert_eq!(kind(Prompt::Ids(&[]), greedy_options(1)), invalid);
    assert_eq!(kind("a".into(), empty_stop), invalid);
    assert_eq!(kind("a".into(), GenerateOptions { sampler: cold, ..greedy_options(1) }), invalid);
    assert_eq!(kind(Prompt::Ids(&[1 << 20]), greedy_options(1)), invalid);
    assert_eq!(session.position(), 0);
}
