//! Text, token by token: [`Session::generate`].
//!
//! # What the session has read
//! A token is read into the session when the *next* event is asked for. So when [`Event::Done`] has come, the
//! session has read the prompt and every token that was given out, and the next call goes on from there, with
//! two exceptions: the end-of-document token is neither given out nor read, and the token that completes a stop
//! string is given out with the text before the stop string but not read (tokens before it are, even where
//! their text belongs to the stop string). When a [`Generation`] is dropped early, the token given out last is
//! not read. In every case [`Session::tokens`] says what the state stands for.

mod stop;

use std::{
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use self::stop::StopFilter;
use crate::{
    error::{Error, ErrorKind, Result},
    sampler::{Sampler, SamplerOptions, log_prob},
    session::Session,
    tokenizer::StreamDecoder,
};

/// What to read before generating.
#[derive(Debug, Clone, Copy)]
pub enum Prompt<'a> {
    /// Token ids. None go on from what the session has read.
    Ids(&'a [u32]),
    /// Text, encoded as a segment of its own; control pieces written in it are plain text. In an empty session
    /// it starts a document, with the begin id if the vocabulary wants one. No text starts a document too: where
    /// the vocabulary wants no begin id, with the end id, as documents follow one another in training.
    Text(&'a str),
}

impl<'a> From<&'a [u32]> for Prompt<'a> {
    fn from(ids: &'a [u32]) -> Self {
        Prompt::Ids(ids)
    }
}

impl<'a> From<&'a Vec<u32>> for Prompt<'a> {
    fn from(ids: &'a Vec<u32>) -> Self {
        Prompt::Ids(ids)
    }
}

impl<'a, const N: usize> From<&'a [u32; N]> for Prompt<'a> {
    fn from(ids: &'a [u32; N]) -> Self {
        Prompt::Ids(ids)
    }
}

impl<'a> From<&'a str> for Prompt<'a> {
    fn from(text: &'a str) -> Self {
        Prompt::Text(text)
    }
}

impl<'a> From<&'a String> for Prompt<'a> {
    fn from(text: &'a String) -> Self {
        Prompt::Text(text)
    }
}

/// How to generate.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// How to choose tokens.
    pub sampler: SamplerOptions,
    /// Most tokens to generate; `None` for no limit.
    pub max_tokens: Option<usize>,
    /// Texts that end the generation. They are not given out. The prompt is not searched.
    pub stop: Vec<String>,
    /// Rules the end-of-document token out, so that only the limits above end the text.
    pub ignore_eos: bool,
    /// Whether to compute [`Token::log_prob`].
    pub log_probs: bool,
    /// Stops the work from elsewhere.
    pub cancel: CancelToken,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            sampler: SamplerOptions::default(),
            max_tokens: Some(256),
            stop: Vec::new(),
            ignore_eos: false,
            log_probs: false,
            cancel: CancelToken::default(),
        }
    }
}

/// Cancels a generation from another thread. Clones share the request.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token without a request.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for an end: within one token while generating, within one block while reading the prompt.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether an end was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Takes the request back, to use the token again.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// One step of a generation. The texts of all events in order are the generated text.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token was chosen.
    Token(Token),
    /// The generation is over.
    Done(Done),
}

/// A token that was chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Text that is certain now: whole characters, and nothing that may yet become a stop string. Often but not
    /// always the token's own.
    pub text: String,
    /// Natural logarithm of the model's probability for the token, before the sampler's steps; only if
    /// [`GenerateOptions::log_probs`] asks for it.
    pub log_prob: Option<f32>,
}

/// The end of a generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Done {
    /// Why it ended.
    pub reason: StopReason,
    /// Text that was held back.
    pub text: String,
    /// What it took.
    pub stats: Stats,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopReason {
    /// The model ended the document.
    Eos,
    /// A stop string came up.
    Stop,
    /// [`GenerateOptions::max_tokens`] were generated.
    MaxTokens,
    /// The [`CancelToken`] asked for it. If that happened inside the prompt, [`Session::position`] says how much
    /// was read, and the rest has to be read before more can be generated.
    Cancelled,
}

/// Counts and times of a generation. Time that the caller spends between events is not included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Prompt tokens read.
    pub prompt_tokens: usize,
    /// Time to read them.
    pub prompt_time: Duration,
    /// Tokens generated.
    pub tokens: usize,
    /// Time to choose and read them.
    pub time: Duration,
}

impl Stats {
    /// Prompt tokens per second; 0 if there were none.
    pub fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_time)
    }

    /// Generated tokens per second; 0 if there were none.
    pub fn rate(&self) -> f64 {
        rate(self.tokens, self.time)
    }
}

impl Session {
    /// Reads `prompt`, then generates; the [module](self) says what the session has read when.
    ///
    /// The work is done as events are asked for.
    ///
    /// ```no_run
    /// use transnormer::{Event, GenerateOptions, Model, Session, SessionOptions};
    ///
    /// let model = Model::open("model.gguf")?;
    /// let mut session = Session::new(&model, &SessionOptions::default())?;
    /// for event in session.generate("Once upon a time", GenerateOptions::default())? {
    ///     match event? {
    ///         Event::Token(token) => print!("{}", token.text),
    ///         Event::Done(done) => println!("{}", done.text),
    ///     }
    /// }
    /// # Ok::<(), transnormer::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if an option is out of range, a stop string is empty, or there are neither
    /// prompt ids nor a token that the session has read.
    pub fn generate<'p>(
        &mut self,
        prompt: impl Into<Prompt<'p>>,
        options: GenerateOptions,
    ) -> Result<Generation<'_>> {
        let chooser = Chooser::new(self, prompt.into(), options)?;
        Ok(Generation { session: self, chooser })
    }

    /// [`generate`](Self::generate) as a callback. `visit` ends the generation by `Break`, as a [`CancelToken`]
    /// does; the token it has seen last is still read.
    ///
    /// # Errors
    /// Those of [`generate`](Self::generate) and of its events.
    pub fn generate_with<'p>(
        &mut self,
        prompt: impl Into<Prompt<'p>>,
        options: GenerateOptions,
        mut visit: impl FnMut(Token) -> ControlFlow<()>,
    ) -> Result<Done> {
        let mut generation = self.generate(prompt, options)?;
        loop {
            match generation.advance()? {
                Event::Token(token) => {
                    if visit(token).is_break() {
                        // Not the caller's token: others may share it.
                        generation.chooser.cancel = CancelToken::new();
                        generation.chooser.cancel.cancel();
                    }
                }
                Event::Done(done) => return Ok(done),
            }
        }
    }

    fn prompt_ids(&self, prompt: Prompt<'_>) -> Result<Vec<u32>> {
        let tokenizer = self.model().tokenizer();
        match prompt {
            Prompt::Ids(ids) => Ok(ids.to_vec()),
            Prompt::Text(text) => {
                let start = self.position() == 0;
                let mut ids = tokenizer.encode(text, start, false)?;
                if start && ids.is_empty() {
                    ids.push(tokenizer.eos());
                }
                Ok(ids)
            }
        }
    }
}

/// A running generation: an iterator over its events, the last of which is [`Event::Done`] or an error.
pub struct Generation<'s> {
    session: &'s mut Session,
    chooser: Chooser,
}

impl Generation<'_> {
    /// The sampler: its seed and state.
    pub fn sampler(&self) -> &Sampler {
        &self.chooser.sampler
    }

    /// The sampler, to go on from a saved [state](Sampler::set_state).
    pub fn sampler_mut(&mut self) -> &mut Sampler {
        &mut self.chooser.sampler
    }

    /// What it took so far.
    pub fn stats(&self) -> Stats {
        self.chooser.stats
    }

    fn advance(&mut self) -> Result<Event> {
        let Self { session, chooser } = self;
        let start = Instant::now();
        let (unread, cancel) = (chooser.unread(), &chooser.cancel);
        // A token that was given out is read even if the generation was cancelled since.
        let in_prompt = chooser.phase == Phase::Prompt;
        let read = session.read_while(unread, || !(in_prompt && cancel.is_cancelled()))?;
        chooser.has_read(read, start.elapsed());
        chooser.event(session)
    }
}

/// All of a generation but the reading, which is someone else's work: of a [`Generation`], or of a
/// [`Batch`](crate::Batch) for many.
pub(crate) struct Chooser {
    sampler: Sampler,
    decoder: StreamDecoder,
    stops: StopFilter,
    cancel: CancelToken,
    max_tokens: Option<usize>,
    log_probs: bool,
    /// The rest of the prompt, later the token given out last.
    unread: Vec<u32>,
    phase: Phase,
    stats: Stats,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Prompt,
    Tokens,
    Over,
}

impl Chooser {
    /// Checks what [`Session::generate`] checks.
    pub fn new(session: &Session, prompt: Prompt<'_>, options: GenerateOptions) -> Result<Self> {
        let prompt = session.prompt_ids(prompt)?;
        if prompt.is_empty() && session.logits().is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "no prompt, and the session has read nothing to go on from",
            ));
        }
        let tokenizer = session.model().tokenizer();
        let mut sampler = options.sampler;
        if options.ignore_eos {
            sampler.logit_bias.push((tokenizer.eos(), f32::NEG_INFINITY));
        }
        let sampler = Sampler::new(sampler)?;
        let stops = StopFilter::new(options.stop)?;
        let mut decoder = StreamDecoder::after(tokenizer, session.tokens())?;
        for &id in &prompt {
            decoder.push(id)?;
        }
        Ok(Self {
            sampler,
            decoder,
            stops,
            cancel: options.cancel,
            max_tokens: options.max_tokens,
            log_probs: options.log_probs,
            phase: if prompt.is_empty() { Phase::Tokens } else { Phase::Prompt },
            unread: prompt,
            stats: Stats::default(),
        })
    }

    /// What the session has to read before the next token can be chosen.
    pub fn unread(&self) -> &[u32] {
        // The token that completes a stop string is never read.
        if self.stops.stopped() { &[] } else { &self.unread }
    }

    /// Whether the prompt is being read and that was cancelled: then there is an event at once.
    pub fn is_cancelled(&self) -> bool {
        self.phase == Phase::Prompt && self.cancel.is_cancelled()
    }

    /// Whether the last event has come.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// Takes note that the session has read the first `count` of [`unread`](Self::unread), and of the time it took.
    pub fn has_read(&mut self, count: usize, time: Duration) {
        self.unread.drain(..count);
        if self.phase == Phase::Prompt {
            self.stats.prompt_tokens += count;
            self.stats.prompt_time += time;
        } else {
            self.stats.time += time;
        }
        if self.unread.is_empty() && self.phase == Phase::Prompt {
            self.phase = Phase::Tokens;
        }
    }

    /// The next event, from the logits of the session, which has read all it has to unless that was cancelled.
    /// After an error there is none.
    pub fn event(&mut self, session: &Session) -> Result<Event> {
        let start = Instant::now();
        let next = self.next_token(session);
        self.stats.time += start.elapsed();
        match next {
            Ok(Ok(token)) => {
                self.stats.tokens += 1;
                Ok(Event::Token(token))
            }
            Ok(Err(reason)) => Ok(Event::Done(self.finish(reason))),
            Err(error) => {
                self.phase = Phase::Over;
                Err(error)
            }
        }
    }

    /// Chooses the next token, or says why there is none.
    fn next_token(&mut self, session: &Session) -> Result<Result<Token, StopReason>> {
        if self.stops.stopped() {
            return Ok(Err(StopReason::Stop));
        }
        if self.cancel.is_cancelled() {
            return Ok(Err(StopReason::Cancelled));
        }
        if self.max_tokens == Some(self.stats.tokens) {
            return Ok(Err(StopReason::MaxTokens));
        }
        let id = self.sampler.sample(session.logits(), session.tokens())?;
        if session.model().tokenizer().is_eog(id) {
            return Ok(Err(StopReason::Eos));
        }
        self.unread.push(id);
        let text = self.stops.push(self.decoder.push(id)?);
        let log_prob = self.log_probs.then(|| log_prob(session.logits(), id));
        Ok(Ok(Token { id, text, log_prob }))
    }

    fn finish(&mut self, reason: StopReason) -> Done {
        self.phase = Phase::Over;
        let mut text = self.stops.finish();
        if reason != StopReason::Stop {
            text.push_str(&self.decoder.clone().finish());
        }
        Done { reason, text, stats: self.stats }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.chooser.is_over() {
            return None;
        }
        let event = self.advance();
        if event.is_err() {
            self.chooser.phase = Phase::Over;
        }
        Some(event)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if tokens == 0 { 0.0 } else { tokens as f64 / time.as_secs_f64().max(1e-9) }
}
