//! Runs batches of tokens through a model: graphs, built once per shape and kept, and the threads they run on.

use std::{collections::HashMap, sync::Arc};

use crate::{
    error::{Error, ErrorKind, Result},
    ggml::Graph,
    graph::{self, Batch, BatchCell, Logits, Segment},
    model::Model,
    threads::{self, ThreadPool},
};

/// Graphs that are kept, beside the decode graph: prompts come in all lengths, but a few shapes recur.
const KEPT_GRAPHS: usize = 4;

/// A model's graphs and threads. One batch runs at a time.
pub(crate) struct Engine {
    model: Model,
    pool: Arc<ThreadPool>,
    batch: Arc<BatchCell>,
    graphs: HashMap<(usize, Logits), Graph>,
}

impl Engine {
    /// An engine with `threads` threads.
    pub fn new(model: &Model, threads: usize) -> Result<Self> {
        if !(1..=threads::MAX_THREADS).contains(&threads) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format_args!("{threads} threads; choose 1 to {}", threads::MAX_THREADS),
            ));
        }
        let pool = ThreadPool::new(threads)
            .map_err(|error| Error::new(ErrorKind::Backend, format_args!("cannot start {threads} threads: {error}")))?;
        let pool = Arc::new(pool);
        Ok(Self { model: model.clone(), pool, batch: Arc::default(), graphs: HashMap::new() })
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs a batch; `fill` sets its ids and segments. Returns the logits asked for, (rows, V).
    ///
    /// # Safety
    /// The segments' states are valid for the model's shape and nobody else uses them during the call.
    pub unsafe fn run(&mut self, logits: Logits, fill: impl FnOnce(&mut Batch)) -> Result<&[f32]> {
        let mut tokens = 0;
        let mut bad_id = None;
        let vocab_size = self.model.hparams().vocab_size;
        // SAFETY: graphs only run inside this method, which has exclusive access.
        unsafe {
            self.batch.set(|batch| {
                batch.ids.clear();
                batch.segments.clear();
                fill(batch);
                tokens = batch.ids.len();
                bad_id = batch.ids.iter().copied().find(|&id| id as usize >= vocab_size);
                debug_assert_eq!(batch.segments.iter().map(|s: &Segment| s.tokens).sum::<usize>(), tokens);
            });
        }
        if let Some(id) = bad_id {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format_args!("token id {id} is not below the vocabulary's size {vocab_size}"),
            ));
        }
        let key = (tokens, logits);
        if !self.graphs.contains_key(&key) {
            if self.graphs.len() > KEPT_GRAPHS {
                self.graphs.retain(|&(tokens, _), _| tokens == 1);
            }
            self.graphs.insert(key, graph::build(&self.model, tokens, logits, &self.batch, &self.pool)?);
        }
        let graph = self.graphs.get_mut(&key).expect("just inserted");
        graph.compute()?;
        Ok(if logits == Logits::None { &[] } else { graph.result() })
    }

    /// Bytes of intermediate results in all kept graphs.
    pub fn buffer_bytes(&self) -> usize {
        self.graphs.values().map(Graph::buffer_bytes).sum()
    }
}
