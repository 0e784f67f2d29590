//! Going back to where a session has been.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{Past, Session};
use crate::error::{Error, ErrorKind, Result};

/// Names a checkpoint of one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckpointId(u64);

impl CheckpointId {
    /// An id that no other checkpoint of any session has, so that one session's is nothing to another.
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Session {
    /// Keeps the session's past as it is now. Where there are as many checkpoints as
    /// [`SessionOptions::checkpoints`](super::SessionOptions::checkpoints) allows, the oldest goes and its
    /// memory is used again.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the session was made to keep none.
    pub fn checkpoint(&mut self) -> Result<CheckpointId> {
        self.ring.push(&self.past).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidArgument,
                "this session keeps no checkpoints: set SessionOptions::checkpoints",
            )
        })
    }

    /// Goes back, or forward, to a checkpoint. All checkpoints stay.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if this session does not have this checkpoint, or has it no more;
    /// nothing changes then.
    pub fn rewind(&mut self, to: CheckpointId) -> Result<()> {
        let checkpoint = self.ring.get(to).ok_or_else(|| {
            let depth = self.ring.depth();
            Error::new(
                ErrorKind::InvalidArgument,
                format_args!("this session does not have the checkpoint; it keeps the newest {depth}"),
            )
        })?;
        self.past.copy_from(checkpoint);
        Ok(())
    }

    /// Goes back to the newest checkpoint and drops it, so that the next call goes back further. Nothing is
    /// copied. False if there is no checkpoint.
    pub fn undo(&mut self) -> bool {
        let newest = self.ring.pop();
        newest.map(|past| self.past = past).is_some()
    }

    /// The checkpoints and their positions, oldest first.
    pub fn checkpoints(&self) -> impl ExactSizeIterator<Item = (CheckpointId, u64)> + DoubleEndedIterator {
        self.ring.iter().map(|(id, past)| (*id, past.ledger.position()))
    }
}

/// A number of pasts, of which the oldest makes room for a new one.
pub(super) struct Ring {
    depth: usize,
    /// Oldest first.
    checkpoints: VecDeque<(CheckpointId, Past)>,
}

impl Ring {
    /// Room for `depth` pasts.
    pub fn new(depth: usize) -> Self {
        Self { depth, checkpoints: VecDeque::new() }
    }

    /// Most pasts that are kept.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Keeps a copy of `past`, unless there is room for none.
    pub fn push(&mut self, past: &Past) -> Option<CheckpointId> {
        let copy = if self.checkpoints.len() < self.depth {
            past.clone()
        } else {
            let (_, mut oldest) = self.checkpoints.pop_front()?;
            oldest.copy_from(past);
            oldest
        };
        let id = CheckpointId::next();
        self.checkpoints.push_back((id, copy));
        Some(id)
    }

    /// Takes the newest out.
    pub fn pop(&mut self) -> Option<Past> {
        self.checkpoints.pop_back().map(|(_, past)| past)
    }

    /// The past of this name.
    pub fn get(&self, id: CheckpointId) -> Option<&Past> {
        self.iter().find(|(other, _)| *other == id).map(|(_, past)| past)
    }

    /// All, oldest first.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &(CheckpointId, Past)> + DoubleEndedIterator {
        self.checkpoints.iter()
    }

    /// Drops all.
    pub fn clear(&mut self) {
        self.checkpoints.clear();
    }
}
