//! What a session is but for the means to compute: a value that is copied, kept and stored.

use super::ledger::Ledger;
use crate::{hparams::Hparams, state::State};

/// What a sequence has read, what it remembers of that, and what it expects next. They never separate.
#[derive(Clone)]
pub(crate) struct Past {
    pub state: State,
    pub ledger: Ledger,
    /// (V) after the last token, or empty: before the first token, and where reading ended half-way.
    pub logits: Vec<f32>,
}

impl Past {
    /// That of a sequence which has read nothing, of a model of this shape.
    pub fn new(hparams: &Hparams, window: usize) -> Self {
        Self { state: State::new(hparams), ledger: Ledger::new(window), logits: Vec::new() }
    }

    /// Becomes `other`, which is of the same model and window, without taking memory.
    pub fn copy_from(&mut self, other: &Self) {
        self.state.values_mut().copy_from_slice(other.state.values());
        self.ledger.copy_from(&other.ledger);
        self.logits.clear();
        self.logits.extend_from_slice(&other.logits);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.state.clear();
        self.ledger.clear();
        self.logits.clear();
    }
}
