//! Many sequences in one pass: the weights, whose reading is what generation waits for, are read once for
//! all.

use std::time::Instant;

use crate::{
    engine::SharedEngine,
    error::Result,
    generate::{Chooser, Event, GenerateOptions, Prompt},
    graph::{Logits, Segment},
    model::Model,
    session::{Session, SessionOptions},
};

/// Names a sequence of a [`Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(u64);

/// Generations of several sessions of one model that go on together, each with its own prompt, sampler and
/// end. They join and leave between any two passes.
///
/// A sequence's events are those of [`Session::generate`] on its session. Its logits may differ from those by
/// rounding, as sums are taken in another order where there are more tokens.
///
/// ```no_run
/// use transnormer::{Batch, Event, GenerateOptions, Model, SessionOptions};
///
/// let model = Model::open("model.gguf")?;
/// let mut batch = Batch::new(&model, &SessionOptions::default())?;
/// for prompt in ["Once upon a time", "In a small village"] {
///     batch.join(batch.session(), prompt, GenerateOptions::default())?;
/// }
/// while batch.running() > 0 {
///     for (id, event) in batch.step()? {
///         match event? {
///             Event::Token(token) => println!("{id:?}: {}", token.text),
///             Event::Done(_) => drop(batch.leave(id)),
///         }
///     }
/// }
/// # Ok::<(), transnormer::Error>(())
/// ```
pub struct Batch {
    model: Model,
    engine: SharedEngine,
    options: SessionOptions,
    sequences: Vec<Sequence>,
    joined: u64,
}

struct Sequence {
    id: SequenceId,
    session: Session,
    chooser: Chooser,
}

impl Batch {
    /// An empty batch. Of a prompt, [`SessionOptions::block`] tokens are read in a pass, less one for each
    /// sequence that generates meanwhile.
    ///
    /// # Errors
    /// Those of [`Session::new`].
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Self> {
        options.validate()?;
        let engine = SharedEngine::new(model, options.threads)?;
        Ok(Self { model: model.clone(), engine, options: options.clone(), sequences: Vec::new(), joined: 0 })
    }

    /// An empty session that, while it is not in the batch, shares the batch's threads and buffers.
    pub fn session(&self) -> Session {
        Session::on(&self.engine, &self.model, &self.options)
    }

    /// Adds a generation; the first [`step`](Self::step) starts to read the prompt.
    ///
    /// # Errors
    /// Those of [`Session::generate`], and [`InvalidArgument`](crate::ErrorKind::InvalidArgument) if the
    /// session is of another model. The session is dropped then.
    pub fn join<'p>(
        &mut self,
        session: Session,
        prompt: impl Into<Prompt<'p>>,
        options: GenerateOptions,
    ) -> Result<SequenceId> {
        if !session.model().is(&self.model) {
            return Err(crate::Error::new(
                crate::ErrorKind::InvalidArgument,
                "the session is not of the batch's model: open the model once and share it",
            ));
        }
        let chooser = Chooser::new(&session, prompt.into(), options)?;
        let id = SequenceId(self.joined);
        self.joined += 1;
        self.sequences.push(Sequence { id, session, chooser });
        Ok(id)
    }

    /// Takes a sequence out, at its end or before. Its session has read what [`Session::generate`] says; the
    /// token given out last is not read if more events were to come. `None` if it is not in the batch.
    pub fn leave(&mut self, id: SequenceId) -> Option<Session> {
        let index = self.sequences.iter().position(|sequence| sequence.id == id)?;
        Some(self.sequences.remove(index).session)
    }

    /// Sequences whose last event has not come. Others stay until they [`leave`](Self::leave).
    pub fn running(&self) -> usize {
        self.sequences.iter().filter(|sequence| !sequence.chooser.is_over()).count()
    }

    /// One pass: reads the next tokens of all sequences, then gives an event of each that has read its
    /// prompt. An error among them ends only its own sequence. Nothing to do gives no events.
    ///
    /// # Errors
    /// [`Backend`](crate::ErrorKind::Backend) if the pass failed: the sessions in the batch are not usable
    /// then.
    pub fn step(&mut self) -> Result<Vec<(SequenceId, Result<Event>)>> {
        self.read()?;
        let mut events = Vec::new();
        for Sequence { id, session, chooser } in &mut self.sequences {
            if !chooser.is_over() && (chooser.unread().is_empty() || chooser.is_cancelled()) {
                events.push((*id, chooser.event(session)));
            }
        }
        Ok(events)
    }

    /// Reads the next tokens of all sequences. Those with more than one left, in the middle of a prompt, come
    /// first and need no logits; then those with one.
    fn read(&mut self) -> Result<()> {
        let start = Instant::now();
        let running =
            |sequence: &&mut Sequence| !sequence.chooser.is_over() && !sequence.chooser.is_cancelled();
        let (mut prompts, mut singles) = (Vec::new(), Vec::new());
        for sequence in self.sequences.iter_mut().filter(running) {
            match sequence.chooser.unread().len() {
                0 => {}
                1 => singles.push((sequence, 1)),
                left => prompts.push((sequence, left - 1)),
            }
        }
        let mut room = self.options.block.saturating_sub(singles.len()).max(1);
        prompts.retain_mut(|(_, count)| {
            *count = room.min(*count);
            room -= *count;
            *count > 0
        });
        let wanted = if singles.is_empty() { Logits::None } else { Logits::Last(singles.len()) };
        let first_single = prompts.len();
        let mut parts = prompts;
        parts.append(&mut singles);
        if parts.is_empty() {
            return Ok(());
        }
        let mut engine = self.engine.lock();
        // SAFETY: each state is its session's own, which the batch has, and of the model's shape.
        let logits = unsafe {
            engine.run(wanted, |batch| {
                for (sequence, count) in &mut parts {
                    let Sequence { session, chooser, .. } = &mut **sequence;
                    batch.ids.extend_from_slice(&chooser.unread()[..*count]);
                    let position = session.position();
                    let state = session.past_mut().state.values_mut().as_mut_ptr();
                    batch.segments.push(Segment { state, position, tokens: *count });
                }
            })
        }?;
        let time = start.elapsed();
        let mut rows = logits.chunks_exact(self.model.hparams().vocab_size);
        for (i, (Sequence { session, chooser, .. }, count)) in parts.into_iter().enumerate() {
            let past = session.past_mut();
            past.ledger.extend(&chooser.unread()[..count]);
            past.logits.clear();
            if i >= first_single {
                past.logits.extend_from_slice(rows.next().expect("logits for each"));
            }
            chooser.has_read(count, time);
        }
        Ok(())
    }
}
