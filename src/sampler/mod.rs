//! From logits to the next token.
//!
//! The steps, in this order; each is left out where its option says so:
//!
//! 1. The logit bias is added.
//! 2. Penalties on the tokens among the last `repeat_last_n`: the repetition penalty divides a positive logit
//!    and multiplies a negative one; then the frequency penalty, once for each occurrence, and the presence
//!    penalty are subtracted.
//! 3. At temperature 0 the largest logit wins, of equals the lowest id. Otherwise:
//! 4. top-k, 5. typical, 6. top-p, 7. min-p drop tokens; shares are those at temperature 1 among the tokens
//!    still in play, and at least one token stays.
//! 8. The temperature divides the logits, and one random number draws a token.
//!
//! Equal seeds, options, logits and histories give equal tokens.

mod candidates;
mod rng;

use self::{
    candidates::{Candidate, min_p, pick, top_k, top_p, typical},
    rng::{Rng, random_seed},
};
use crate::error::{Error, ErrorKind, Result};

/// How to choose among tokens; the [module](self) says in which order.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerOptions {
    /// Below 1 sharpens the distribution, above 1 flattens it; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the likeliest tokens that together have this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this many times as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Keep the tokens of most typical surprise that together have this probability; 1 keeps all.
    pub typical_p: f32,
    /// Divides the logits of recent tokens; 1 is none.
    pub repeat_penalty: f32,
    /// Subtracted from a recent token's logit once for each occurrence; 0 is none.
    pub frequency_penalty: f32,
    /// Subtracted from a recent token's logit; 0 is none.
    pub presence_penalty: f32,
    /// How many of the last tokens, those of the prompt included, the penalties look at.
    pub repeat_last_n: usize,
    /// Added to the logits of single tokens; -∞ rules a token out.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers; `None` takes another each time.
    pub seed: Option<u64>,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: 64,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

impl SamplerOptions {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    fn validate(&self) -> Result<()> {
        let share = |x: f32| (0.0..=1.0).contains(&x);
        let rules = [
            ("temperature", self.temperature, self.temperature >= 0.0, "a number from 0"),
            ("top_p", self.top_p, share(self.top_p), "from 0 to 1"),
            ("min_p", self.min_p, share(self.min_p), "from 0 to 1"),
            ("typical_p", self.typical_p, share(self.typical_p), "from 0 to 1"),
            ("repeat_penalty", self.repeat_penalty, self.repeat_penalty > 0.0, "a number above 0"),
            ("frequency_penalty", self.frequency_penalty, true, "a number"),
            ("presence_penalty", self.presence_penalty, true, "a number"),
        ];
        for (name, value, in_range, wanted) in rules {
            if !(in_range && value.is_finite()) {
                return Err(invalid(format_args!("{name} is {value}, must be {wanted}")));
            }
        }
        match self.logit_bias.iter().find(|(_, bias)| bias.is_nan() || *bias == f32::INFINITY) {
            Some((id, bias)) => Err(invalid(format_args!(
                "logit_bias of token {id} is {bias}, must be a number or minus infinity"
            ))),
            None => Ok(()),
        }
    }
}

/// Chooses tokens. A clone goes on with the same random numbers.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    seed: u64,
    rng: Rng,
    /// The logits after bias and penalties. This and the following are kept to allocate once.
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
    window: Vec<u32>,
}

impl Sampler {
    /// A sampler. Errors with [`ErrorKind::InvalidArgument`] naming the option that is out of range.
    pub fn new(options: SamplerOptions) -> Result<Self> {
        options.validate()?;
        let seed = options.seed.unwrap_or_else(random_seed);
        let (logits, candidates, window) = Default::default();
        Ok(Self { options, seed, rng: Rng::new(seed), logits, candidates, window })
    }

    /// Chooses the token to follow `history`, whose end the penalties look at.
    ///
    /// # Errors
    /// [`ErrorKind::Backend`] if a logit is NaN or +∞: the weights or the state are damaged, and any choice would
    /// hide it. [`ErrorKind::InvalidArgument`] if a bias names a token that has no logit, or if every token is
    /// ruled out. No random number is used up then.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        self.adjust(logits, history)?;
        let Self { options, candidates, logits, .. } = self;
        if options.temperature == 0.0 {
            return argmax(logits).ok_or_else(nothing_left);
        }
        top_k(candidates, logits, options.top_k);
        if candidates.is_empty() {
            return Err(nothing_left());
        }
        if options.typical_p < 1.0 {
            typical(candidates, options.typical_p);
        }
        if options.top_p < 1.0 {
            top_p(candidates, options.top_p);
        }
        if options.min_p > 0.0 {
            min_p(candidates, options.min_p);
        }
        Ok(pick(candidates, options.temperature, self.rng.next_f64()))
    }

    /// The options.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// The seed in use, drawn at random if the options have none.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// State of the random numbers; with the options and the history it is all there is to save.
    pub fn state(&self) -> [u64; 4] {
        self.rng.state()
    }

    /// Goes on from a saved [`state`](Self::state).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if all words are zero, which no generator's state is.
    pub fn set_state(&mut self, state: [u64; 4]) -> Result<()> {
        self.rng = Rng::from_state(state).ok_or_else(|| invalid("sampler state is all zero"))?;
        Ok(())
    }

    /// Copies the logits, applying bias and penalties.
    fn adjust(&mut self, logits: &[f32], history: &[u32]) -> Result<()> {
        if let Some(id) = logits.iter().position(|&logit| logit.is_nan() || logit == f32::INFINITY) {
            return Err(Error::new(
                ErrorKind::Backend,
                format_args!(
                    "the logit of token {id} is {}: the weights or the state are damaged",
                    logits[id]
                ),
            ));
        }
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        for &(id, bias) in &self.options.logit_bias {
            let logit = self.logits.get_mut(id as usize).ok_or_else(|| {
                invalid(format_args!("logit_bias names token {id}, but there are {}", logits.len()))
            })?;
            *logit += bias;
        }
        self.penalize(history);
        Ok(())
    }

    fn penalize(&mut self, history: &[u32]) {
        let o = &self.options;
        if o.repeat_penalty == 1.0 && o.frequency_penalty == 0.0 && o.presence_penalty == 0.0 {
            return;
        }
        self.window.clear();
        self.window.extend_from_slice(&history[history.len().saturating_sub(o.repeat_last_n)..]);
        self.window.sort_unstable();
        for same in self.window.chunk_by(|a, b| a == b) {
            if let Some(logit) = self.logits.get_mut(same[0] as usize) {
                *logit = if *logit > 0.0 { *logit / o.repeat_penalty } else { *logit * o.repeat_penalty };
                *logit -= same.len() as f32 * o.frequency_penalty + o.presence_penalty;
            }
        }
    }
}

/// Natural logarithm of the probability that `logits` give to token `id`; -∞ if it has no logit.
pub fn log_prob(logits: &[f32], id: u32) -> f32 {
    let Some(&logit) = logits.get(id as usize) else { return f32::NEG_INFINITY };
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
    let sum: f64 = logits.iter().map(|&x| f64::from((x - max).exp())).sum();
    (f64::from(logit - max) - sum.ln()) as f32
}

/// The largest logit, of equals the lowest id; `None` if all are -∞.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best = (None, f32::NEG_INFINITY);
    for (id, &logit) in (0..).zip(logits) {
        if logit > best.1 {
            best = (Some(id), logit);
        }
    }
    best.0
}

fn nothing_left() -> Error {
    invalid("every token is ruled out by logit_bias")
}

fn invalid(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

#[cfg(test)]
mod tests;
