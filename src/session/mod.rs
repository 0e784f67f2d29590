//! One sequence: its state and the tokens that the state stands for, which never separate.
//!
//! # The past is a value
//! What a session remembers of any number of tokens is a few megabytes: the [state](State), the logits, and a
//! ledger of the newest tokens. So it can be copied ([`Session::fork`]), kept ([`Session::checkpoint`],
//! [`Session::rewind`]), stored ([`Session::save`], [`Session::load`]) and matched against a text
//! ([`Session::sync`]). All of these are exact: what follows is the same, bit for bit, as if the session had
//! read its tokens in the same calls and never stopped.
//!
//! # Threads
//! A session computes on threads of its own; independent sessions run in parallel. Forks of a session share
//! its threads and buffers and take turns, block by block.

mod checkpoint;
mod ledger;
mod past;
mod snapshot;
mod sync;

use self::checkpoint::Ring;
pub(crate) use self::past::Past;
pub use self::{checkpoint::CheckpointId, snapshot::Snapshot, sync::SyncReport};
use crate::{
    engine::SharedEngine,
    error::{Error, ErrorKind, Result},
    graph::{Logits, Segment},
    model::Model,
    state::State,
};

/// Largest [`SessionOptions::ledger`].
const MAX_LEDGER: usize = 1 << 24;

/// How a session computes and what it keeps.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// Threads; 0 means one for each performance core.
    pub threads: usize,
    /// Tokens of a prompt that are computed together, 1 to 16,384. More is faster up to a point and takes more memory.
    pub block: usize,
    /// Most checkpoints that are kept; a new one takes the place of the oldest. Each takes as much memory as
    /// the state, the logits and the ledger, once it is made.
    pub checkpoints: usize,
    /// Newest tokens that [`Session::tokens`] gives, at most 2^24. Each takes eight bytes.
    pub ledger: usize,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { threads: 0, block: 256, checkpoints: 4, ledger: 1 << 16 }
    }
}

/// Most tokens that are computed together.
const MAX_BLOCK: usize = 1 << 14;

impl SessionOptions {
    /// Refuses what [`Session::new`] refuses.
    pub(crate) fn validate(&self) -> Result<()> {
        let problem = if !(1..=MAX_BLOCK).contains(&self.block) {
            format!("a block of {} tokens; choose 1 to {MAX_BLOCK}", self.block)
        } else if self.ledger > MAX_LEDGER {
            format!("a ledger of {} tokens; choose at most {MAX_LEDGER}", self.ledger)
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::InvalidArgument, problem))
    }
}

/// One sequence over a [`Model`]: the recurrent state, and the ledger of tokens it has read.
///
/// Neither time per token nor memory depends on the position. It can be forked, rewound, saved and matched
/// against a text; the methods of these names say more.
pub struct Session {
    model: Model,
    engine: SharedEngine,
    past: Past,
    ring: Ring,
    block: usize,
}

impl Session {
    /// An empty session. Errors with [`ErrorKind::InvalidArgument`] or [`ErrorKind::Backend`].
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Self> {
        options.validate()?;
        Ok(Self::on(&SharedEngine::new(model, options.threads)?, model, options))
    }

    /// An empty session on threads that are there already; the options are valid.
    pub(crate) fn on(engine: &SharedEngine, model: &Model, options: &SessionOptions) -> Self {
        Self {
            model: model.clone(),
            engine: engine.clone(),
            past: Past::new(model.hparams(), options.ledger),
            ring: Ring::new(options.checkpoints),
            block: options.block,
        }
    }

    /// Another session with the same past, and no checkpoints yet. The two go on independently, but share
    /// threads and buffers: while one computes a block, the other waits.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            model: self.model.clone(),
            engine: self.engine.clone(),
            past: self.past.clone(),
            ring: Ring::new(self.ring.depth()),
            block: self.block,
        }
    }

    /// Reads `tokens` after what was read before; then [`Session::logits`] predict what comes next.
    ///
    /// An id outside the vocabulary is refused before anything changes.
    pub fn read(&mut self, tokens: &[u32]) -> Result<()> {
        self.read_while(tokens, || true).map(drop)
    }

    /// [`read`](Self::read) that asks before each block whether to go on. Gives the number of tokens read; if
    /// those are not all, there are no logits until more is read.
    pub fn read_while(&mut self, tokens: &[u32], mut go_on: impl FnMut() -> bool) -> Result<usize> {
        self.check(tokens)?;
        let blocks = tokens.len().div_ceil(self.block);
        for (i, block) in tokens.chunks(self.block).enumerate() {
            if !go_on() {
                return Ok(i * self.block);
            }
            let wanted = if i + 1 == blocks { Logits::Last(1) } else { Logits::None };
            let mut logits = std::mem::take(&mut self.past.logits);
            self.advance(block, wanted, &mut logits)?;
            self.past.logits = logits;
        }
        Ok(tokens.len())
    }

    /// Reads `tokens` and gives `visit` the logits after each: the token's index in `tokens`, and (V) values.
    pub fn read_all(&mut self, tokens: &[u32], mut visit: impl FnMut(usize, &[f32])) -> Result<()> {
        self.check(tokens)?;
        // Logits of a block are block × V: a smaller block keeps them in bounds.
        let size = self.block.min(32);
        let vocab_size = self.model.hparams().vocab_size;
        let mut rows = Vec::new();
        for (i, block) in tokens.chunks(size).enumerate() {
            self.advance(block, Logits::All, &mut rows)?;
            self.past.logits.extend_from_slice(&rows[rows.len() - vocab_size..]);
            for (j, row) in rows.chunks_exact(vocab_size).enumerate() {
                visit(i * size + j, row);
            }
        }
        Ok(())
    }

    /// Logits (V) after the last token read; empty before the first.
    pub fn logits(&self) -> &[f32] {
        &self.past.logits
    }

    /// The newest of the tokens that the state stands for: all of them up to [`SessionOptions::ledger`], then
    /// that many; fewer where a session with a smaller ledger was saved and this one loaded it.
    /// [`Session::position`] counts them all.
    pub fn tokens(&self) -> &[u32] {
        self.past.ledger.tokens()
    }

    /// Number of tokens read.
    pub fn position(&self) -> u64 {
        self.past.ledger.position()
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The recurrent state.
    pub fn state(&self) -> &State {
        &self.past.state
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.engine.lock().threads()
    }

    /// Bytes of intermediate results that the session holds, together with its forks.
    pub fn buffer_bytes(&self) -> usize {
        self.engine.lock().buffer_bytes()
    }

    /// Forgets everything, checkpoints too.
    pub fn reset(&mut self) {
        self.past.clear();
        self.ring.clear();
    }

    /// What the session is but for the means to compute.
    pub(crate) fn past_mut(&mut self) -> &mut Past {
        &mut self.past
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.model.hparams().vocab_size;
        match tokens.iter().find(|&&id| id as usize >= vocab_size) {
            Some(id) => Err(Error::new(
                ErrorKind::InvalidArgument,
                format_args!("token id {id} is not below the vocabulary's size {vocab_size}"),
            )),
            None => Ok(()),
        }
    }

    /// Runs one block through the model, adds it to the ledger, and puts the `wanted` logits into `rows`. The
    /// session's own are gone then: those of an earlier token must not outlive an end in the middle.
    fn advance(&mut self, block: &[u32], wanted: Logits, rows: &mut Vec<f32>) -> Result<()> {
        self.past.logits.clear();
        let segment = Segment {
            state: self.past.state.values_mut().as_mut_ptr(),
            position: self.position(),
            tokens: block.len(),
        };
        let mut engine = self.engine.lock();
        // SAFETY: the state is this session's own and of the model's shape.
        let result = unsafe {
            engine.run(wanted, |batch| {
                batch.ids.extend_from_slice(block);
                batch.segments.push(segment);
            })
        };
        let values = match result {
            Ok(values) => values,
            Err(error) => {
                // Some layers may have moved on, so the state stands for no text any more.
                drop(engine);
                self.reset();
                return Err(error);
            }
        };
        rows.clear();
        rows.extend_from_slice(values);
        drop(engine);
        self.past.ledger.extend(block);
        Ok(())
    }
}
