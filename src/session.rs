//! One sequence: its state and the tokens that the state stands for, which never separate.

use crate::{
    engine::Engine,
    error::{Error, ErrorKind, Result},
    graph::{Logits, Segment},
    model::Model,
    state::State,
};

/// How a session computes.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// Threads; 0 means one for each core.
    pub threads: usize,
    /// Tokens of a prompt that are computed together. More is faster up to a point and takes more memory.
    pub block: usize,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { threads: 0, block: 256 }
    }
}

/// One sequence over a [`Model`]: the recurrent state, and the ledger of tokens it has read.
///
/// Time and memory per token do not depend on the position, but for the ledger's four bytes.
pub struct Session {
    model: Model,
    engine: Engine,
    state: State,
    tokens: Vec<u32>,
    logits: Vec<f32>,
    block: usize,
}

impl Session {
    /// An empty session. Errors with [`ErrorKind::InvalidArgument`] or [`ErrorKind::Backend`].
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Self> {
        if options.block == 0 {
            return Err(Error::new(ErrorKind::InvalidArgument, "a block has at least one token"));
        }
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        Ok(Self {
            model: model.clone(),
            engine: Engine::new(model, threads)?,
            state: State::new(model.hparams()),
            tokens: Vec::new(),
            logits: Vec::new(),
            block: options.block,
        })
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
            // Those of an earlier token must not outlive an end in the middle.
            self.logits.clear();
            let logits = if i + 1 == blocks { Logits::Last } else { Logits::None };
            self.advance(block, logits, |session, logits| session.logits.extend_from_slice(logits))?;
        }
        Ok(tokens.len())
    }

    /// Reads `tokens` and gives `visit` the logits after each: the token's index in `tokens`, and (V) values.
    pub fn read_all(&mut self, tokens: &[u32], mut visit: impl FnMut(usize, &[f32])) -> Result<()> {
        self.check(tokens)?;
        // Logits of a block are block × V: a smaller block keeps them in bounds.
        let size = self.block.min(32);
        let vocab_size = self.model.hparams().vocab_size;
        for (i, block) in tokens.chunks(size).enumerate() {
            self.advance(block, Logits::All, |session, logits| {
                let mut last = &[][..];
                for (j, row) in logits.chunks_exact(vocab_size).enumerate() {
                    visit(i * size + j, row);
                    last = row;
                }
                session.logits.clear();
                session.logits.extend_from_slice(last);
            })?;
        }
        Ok(())
    }

    /// Logits (V) after the last token read; empty before the first.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The tokens that the state stands for.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of tokens read.
    pub fn position(&self) -> u64 {
        self.tokens.len() as u64
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The recurrent state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.engine.threads()
    }

    /// Bytes of intermediate results that the session holds.
    pub fn buffer_bytes(&self) -> usize {
        self.engine.buffer_bytes()
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.state.clear();
        self.tokens.clear();
        self.logits.clear();
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

    /// Runs one block through the model and adds it to the ledger.
    fn advance(&mut self, block: &[u32], logits: Logits, take: impl FnOnce(&mut Self, &[f32])) -> Result<()> {
        let segment = Segment {
            state: self.state.values_mut().as_mut_ptr(),
            position: self.position(),
            tokens: block.len(),
        };
        // SAFETY: the state is this session's own and of the model's shape.
        let result = unsafe {
            self.engine.run(logits, |batch| {
                batch.ids.extend_from_slice(block);
                batch.segments.push(segment);
            })
        }?;
        let result: *const [f32] = result;
        self.tokens.extend_from_slice(block);
        // SAFETY: the result lives in the engine's graph, which `take` cannot reach to run again.
        take(self, unsafe { &*result });
        Ok(())
    }
}
