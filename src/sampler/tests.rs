use super::*;

fn sampler(options: SamplerOptions) -> Sampler {
    Sampler::new(options).unwrap()
}

/// No step but the draw.
fn plain() -> SamplerOptions {
    SamplerOptions { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(1), ..Default::default() }
}

fn frequencies(options: SamplerOptions, logits: &[f32], draws: usize) -> Vec<f64> {
    let mut sampler = sampler(options);
    let mut counts = vec![0.0; logits.len()];
    for _ in 0..draws {
        counts[sampler.sample(logits, &[]).unwrap() as usize] += 1.0 / draws as f64;
    }
    counts
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let mut greedy = sampler(SamplerOptions::greedy());
    assert_eq!(greedy.sample(&[1.0, 3.0, 2.0, 3.0], &[]).unwrap(), 1);
    assert_eq!(greedy.sample(&[f32::NEG_INFINITY, -5.0], &[]).unwrap(), 1);
}

#[test]
fn draws_follow_the_distribution() {
    let shares = [0.5, 0.3, 0.15, 0.05];
    let logits = shares.map(|p: f64| p.ln() as f32);
    for (drawn, share) in frequencies(plain(), &logits, 40_000).iter().zip(shares) {
        assert!((drawn - share).abs() < 0.015, "{drawn} {share}");
    }
    // Temperature 1/2 squares the shares.
    let squares = shares.map(|p| p * p / shares.iter().map(|p| p * p).sum::<f64>());
    let cold = SamplerOptions { temperature: 0.5, ..plain() };
    for (drawn, share) in frequencies(cold, &logits, 40_000).iter().zip(squares) {
        assert!((drawn - share).abs() < 0.015, "{drawn} {share}");
    }
}

#[test]
fn steps_drop_what_they_should() {
    let logits = [0.5f32, 0.3, 0.15, 0.05].map(f32::ln);
    let cases = [
        (SamplerOptions { top_k: 2, ..plain() }, 2),
        (SamplerOptions { top_p: 0.9, ..plain() }, 3),
        (SamplerOptions { min_p: 0.5, ..plain() }, 2),
        (SamplerOptions { top_k: 1, ..plain() }, 1),
        // top-p looks at what top-k left: 0.5 and 0.3 are 0.625 and 0.375 there.
        (SamplerOptions { top_k: 2, top_p: 0.6, ..plain() }, 1),
        (plain(), 4),
    ];
    for (options, kept) in cases {
        let drawn = frequencies(options.clone(), &logits, 2000);
        assert_eq!(drawn.iter().filter(|share| **share > 0.0).count(), kept, "{options:?}");
        assert!(drawn[kept..].iter().all(|share| *share == 0.0));
    }
}

#[test]
fn penalties_look_at_the_window_only() {
    let greedy = SamplerOptions::greedy();
    let logits = [2.0, 1.5, -1.0];
    // Repetition: 2 / 1.5 < 1.5.
    let mut repeat = sampler(SamplerOptions { repeat_penalty: 1.5, repeat_last_n: 2, ..greedy.clone() });
    assert_eq!(repeat.sample(&logits, &[0]).unwrap(), 1);
    assert_eq!(repeat.sample(&logits, &[0, 2, 2]).unwrap(), 0);
    // A negative logit moves down too.
    assert_eq!(repeat.sample(&[-1.0, -1.2], &[0]).unwrap(), 1);
    // Frequency counts, presence does not.
    let mut frequency = sampler(SamplerOptions { frequency_penalty: 0.2, ..greedy.clone() });
    assert_eq!(frequency.sample(&logits, &[0, 0]).unwrap(), 0);
    assert_eq!(frequency.sample(&logits, &[0, 0, 0]).unwrap(), 1);
    let mut presence = sampler(SamplerOptions { presence_penalty: 0.4, ..greedy.clone() });
    assert_eq!(presence.sample(&logits, &[0, 0, 0, 0]).unwrap(), 0);
    // No window, no penalty; ids without a logit are passed over.
    let mut none = sampler(SamplerOptions { repeat_penalty: 9.0, repeat_last_n: 0, ..greedy.clone() });
    assert_eq!(none.sample(&logits, &[0]).unwrap(), 0);
    assert_eq!(repeat.sample(&logits, &[77]).unwrap(), 0);
}

#[test]
fn bias_moves_and_rules_out() {
    let bias = |logit_bias: Vec<_>| sampler(SamplerOptions { logit_bias, ..SamplerOptions::greedy() });
    let logits = [1.0, 2.0, 3.0];
    assert_eq!(bias(vec![(0, 2.5)]).sample(&logits, &[]).unwrap(), 0);
    assert_eq!(bias(vec![(2, f32::NEG_INFINITY)]).sample(&logits, &[]).unwrap(), 1);
    let error = bias(vec![(3, 1.0)]).sample(&logits, &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("token 3"), "{error}");
    let all = (0..3).map(|id| (id, f32::NEG_INFINITY)).collect::<Vec<_>>();
    assert!(bias(all.clone()).sample(&logits, &[]).unwrap_err().to_string().contains("ruled out"));
    assert!(sampler(SamplerOptions { logit_bias: all, ..plain() }).sample(&logits, &[]).is_err());
}

#[test]
fn seeds_and_states_repeat() {
    let logits: Vec<f32> = (0..100).map(|i| (i % 10) as f32 / 5.0).collect();
    let draw = |sampler: &mut Sampler| -> Vec<u32> {
        (0..50).map(|_| sampler.sample(&logits, &[]).unwrap()).collect()
    };
    let mut first = sampler(plain());
    let tokens = draw(&mut first);
    assert_eq!(draw(&mut sampler(plain())), tokens);
    assert_ne!(draw(&mut sampler(SamplerOptions { seed: Some(2), ..plain() })), tokens);
    let (state, mut copy) = (first.state(), first.clone());
    let next = draw(&mut first);
    assert_eq!(draw(&mut copy), next);
    let mut other = sampler(SamplerOptions { seed: Some(99), ..plain() });
    other.set_state(state).unwrap();
    assert_eq!(draw(&mut other), next);
    assert!(other.set_state([0; 4]).is_err());
    let random = sampler(SamplerOptions { seed: None, ..plain() });
    assert_eq!(
        draw(&mut sampler(SamplerOptions { seed: Some(random.seed()), ..plain() })),
        draw(&mut { random })
    );
}

#[test]
fn damaged_logits_are_an_error_and_use_nothing_up() {
    let mut sampler = sampler(plain());
    let state = sampler.state();
    for bad in [f32::NAN, f32::INFINITY] {
        let error = sampler.sample(&[0.0, bad, 1.0], &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Backend);
        assert!(error.to_string().contains("token 1"), "{error}");
    }
    assert!(sampler.sample(&[], &[]).is_err());
    assert_eq!(sampler.state(), state);
}

#[test]
fn options_out_of_range_are_named() {
    let cases = [
        (SamplerOptions { temperature: -1.0, ..plain() }, "temperature"),
        (SamplerOptions { temperature: f32::NAN, ..plain() }, "temperature"),
        (SamplerOptions { temperature: f32::INFINITY, ..plain() }, "temperature"),
        (SamplerOptions { top_p: 1.5, ..plain() }, "top_p"),
        (SamplerOptions { min_p: -0.1, ..plain() }, "min_p"),
        (SamplerOptions { typical_p: f32::NAN, ..plain() }, "typical_p"),
        (SamplerOptions { repeat_penalty: 0.0, ..plain() }, "repeat_penalty"),
        (SamplerOptions { frequency_penalty: f32::NAN, ..plain() }, "frequency_penalty"),
        (SamplerOptions { presence_penalty: f32::INFINITY, ..plain() }, "presence_penalty"),
        (SamplerOptions { logit_bias: vec![(5, f32::NAN)], ..plain() }, "logit_bias of token 5"),
    ];
    for (options, name) in cases {
        let error = Sampler::new(options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().starts_with(name), "{error}");
    }
}

#[test]
fn log_probabilities_sum_to_one() {
    let logits = [900.0, 899.0, -900.0, f32::NEG_INFINITY];
    let sum: f64 = (0..4).map(|id| f64::from(log_prob(&logits, id)).exp()).sum();
    assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    assert!((log_prob(&logits, 0) - -0.313_261_7).abs() < 1e-6);
    assert_eq!(log_prob(&logits, 4), f32::NEG_INFINITY);
}
