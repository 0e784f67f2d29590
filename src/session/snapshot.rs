//! A session in a file.
//!
//! All numbers are little-endian. A section is a number of 32-bit words and the BLAKE3 digest of them:
//!
//! | section | content |
//! |---|---|
//! | header | magic `TNSN`, version 1, length of the header in bytes; fingerprint of the model (32 bytes), position (u64), digest of all tokens (32 bytes); number of words in each section that follows |
//! | tokens | the newest tokens |
//! | logits | f32, after the last token; or nothing |
//! | state | f32, layer after layer |
//! | sampler | four u64, state of the random numbers; or nothing |
//!
//! A digest of all these digests ends the file, so that sections of two snapshots do not mix.
//!
//! Reading checks everything before the session changes, and the lengths before it takes memory.

use std::{
    io::{self, BufReader, Read},
    path::Path,
};

use super::{MAX_LEDGER, Past, Session, ledger::TokensDigest};
use crate::{
    atomic_file::AtomicFile,
    error::{Error, ErrorKind, Result},
    mapping::open_regular,
    model::Model,
    sampler::Sampler,
};

const MAGIC: [u8; 4] = *b"TNSN";
const VERSION: u32 = 1;
/// Magic, version, length; fingerprint, position, digest; four counts.
const HEADER_BYTES: usize = 3 * 4 + 32 + 8 + 32 + 4 * 4;
const DIGEST_BYTES: usize = 32;
const SECTIONS: [&str; 4] = ["tokens", "logits", "state", "sampler state"];
/// Words that are converted at a time.
const STEP: usize = 2048;

/// What is to be stored of a session.
pub struct Snapshot<'a> {
    session: &'a Session,
    sampler: Option<[u64; 4]>,
}

impl Session {
    /// The session's past, to be stored: its position, newest [`tokens`](Self::tokens), logits and state. The
    /// checkpoints are not part of it.
    pub fn snapshot(&self) -> Snapshot<'_> {
        Snapshot { session: self, sampler: None }
    }

    /// Stores the session in the file `path`, which appears whole or not at all: [`Snapshot::save`] without a
    /// sampler.
    ///
    /// # Errors
    /// Those of [`Snapshot::save`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.snapshot().save(path)
    }

    /// Takes on the past that the file `path` stores. Gives the sampler's state, if it is stored too, for
    /// [`Sampler::set_state`]. The session's checkpoints stay.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Format`] if the file is not a snapshot or damaged in any way;
    /// [`ErrorKind::Unsupported`] if another version wrote it; [`ErrorKind::Model`] if it is that of another
    /// model. The session is unchanged then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<Option<[u64; 4]>> {
        let path = path.as_ref();
        let (file, len) = open_regular(path)?;
        self.restore_from(BufReader::new(file), len).map_err(|error| error.context(path.display()))
    }

    /// [`load`](Self::load) from memory: what [`Snapshot::to_bytes`] gave.
    ///
    /// # Errors
    /// Those of [`load`](Self::load).
    pub fn restore(&mut self, bytes: &[u8]) -> Result<Option<[u64; 4]>> {
        self.restore_from(bytes, bytes.len() as u64)
    }

    fn restore_from(&mut self, input: impl Read, len: u64) -> Result<Option<[u64; 4]>> {
        let mut past = Past::new(self.model.hparams(), self.past.ledger.window());
        let sampler = Reader { input, digests: blake3::Hasher::new() }.past(len, &self.model, &mut past)?;
        self.past = past;
        Ok(sampler)
    }
}

impl Snapshot<'_> {
    /// With the state of the sampler's random numbers, so that a text goes on as it would have.
    #[must_use]
    pub fn with_sampler(self, sampler: &Sampler) -> Self {
        Self { sampler: Some(sampler.state()), ..self }
    }

    /// Stores the snapshot in the file `path`, which appears whole or not at all.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::InvalidArgument`] if `path` cannot name a file.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut file = AtomicFile::create(path.as_ref())?;
        self.write(|bytes| file.write(bytes))?;
        file.finish()
    }

    /// The snapshot in memory, for [`Session::restore`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        self.write(|bytes| {
            all.extend_from_slice(bytes);
            Ok(())
        })
        .expect("memory does not fail");
        all
    }

    fn write(&self, put: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let Past { state, ledger, logits } = &self.session.past;
        let sampler: Vec<u32> =
            self.sampler.iter().flatten().flat_map(|&word| [word as u32, (word >> 32) as u32]).collect();
        let counts = [ledger.tokens().len(), logits.len(), state.values().len(), sampler.len()];
        let header = Header {
            fingerprint: *self.session.model.fingerprint(),
            position: ledger.position(),
            digest: *ledger.digest(),
            counts: counts.map(|count| count as u32),
        };
        let mut writer = Writer { put, digests: blake3::Hasher::new() };
        writer.section(&mut header.encode().as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)))?;
        writer.section(&mut ledger.tokens().iter().copied())?;
        writer.section(&mut logits.iter().map(|value| value.to_bits()))?;
        writer.section(&mut state.values().iter().map(|value| value.to_bits()))?;
        writer.section(&mut sampler.into_iter())?;
        let digest = writer.digests.finalize();
        (writer.put)(digest.as_bytes())
    }
}

#[derive(Debug, Clone, Copy)]
struct Header {
    fingerprint: [u8; 32],
    position: u64,
    digest: TokensDigest,
    /// Words in each of [`SECTIONS`].
    counts: [u32; 4],
}

/// Beyond this, positions are not exact as f64, in which LRPE's angles are computed.
const MAX_POSITION: u64 = 1 << 53;

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((HEADER_BYTES as u32).to_le_bytes());
        bytes.extend(self.fingerprint);
        bytes.extend(self.position.to_le_bytes());
        bytes.extend(self.digest);
        self.counts.iter().for_each(|count| bytes.extend(count.to_le_bytes()));
        bytes
    }

    /// Reads what follows the length.
    fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = &bytes[12..];
        Self {
            fingerprint: take(&mut rest),
            position: u64::from_le_bytes(take(&mut rest)),
            digest: take(&mut rest),
            counts: std::array::from_fn(|_| u32::from_le_bytes(take(&mut rest))),
        }
    }

    /// Refuses what cannot be this model's, or is not as long as it says.
    fn check(&self, model: &Model, state_len: usize, file_len: u64) -> Result<()> {
        if self.fingerprint != *model.fingerprint() {
            return Err(Error::new(
                ErrorKind::Model,
                "this snapshot was taken with another model file: load that one, or read the text again",
            ));
        }
        if self.position > MAX_POSITION {
            return Err(damaged(format_args!("position {} is not possible", self.position)));
        }
        let [tokens, logits, state, sampler] = self.counts.map(|count| count as usize);
        let vocab_size = model.hparams().vocab_size;
        let rules = [
            tokens <= MAX_LEDGER && tokens as u64 <= self.position,
            [0, vocab_size].contains(&logits),
            state == state_len,
            [0, 8].contains(&sampler),
        ];
        if let Some(i) = rules.iter().position(|kept| !kept) {
            let (count, name) = (self.counts[i], SECTIONS[i]);
            return Err(damaged(format_args!("{count} words of {name} are not possible here")));
        }
        let words: u64 = self.counts.iter().map(|&count| u64::from(count)).sum();
        let len = HEADER_BYTES as u64 + 4 * words + (SECTIONS.len() as u64 + 2) * DIGEST_BYTES as u64;
        if file_len != len {
            return Err(damaged(format_args!("{file_len} bytes, not the {len} that the header calls for")));
        }
        Ok(())
    }
}

struct Writer<F> {
    put: F,
    digests: blake3::Hasher,
}

impl<F: FnMut(&[u8]) -> Result<()>> Writer<F> {
    fn section(&mut self, words: &mut dyn Iterator<Item = u32>) -> Result<()> {
        let mut hasher = blake3::Hasher::new();
        let mut bytes = Vec::with_capacity(4 * STEP);
        loop {
            bytes.clear();
            words.take(STEP).for_each(|word| bytes.extend(word.to_le_bytes()));
            if bytes.is_empty() {
                break;
            }
            hasher.update(&bytes);
            (self.put)(&bytes)?;
        }
        let digest = hasher.finalize();
        self.digests.update(digest.as_bytes());
        (self.put)(digest.as_bytes())
    }
}

struct Reader<R> {
    input: R,
    digests: blake3::Hasher,
}

impl<R: Read> Reader<R> {
    /// Reads a snapshot of `len` bytes into an empty past; gives the sampler's state.
    fn past(mut self, len: u64, model: &Model, past: &mut Past) -> Result<Option<[u64; 4]>> {
        let header = self.header()?;
        header.check(model, past.state.values().len(), len)?;
        let [tokens, logits, _, sampler] = header.counts.map(|count| count as usize);
        let (mut ids, mut random) = (vec![0; tokens], vec![0; sampler]);
        past.logits.resize(logits, 0.0);
        self.section(0, &mut ids, |word| word)?;
        self.section(1, &mut past.logits, f32::from_bits)?;
        self.section(2, past.state.values_mut(), f32::from_bits)?;
        self.section(3, &mut random, |word| word)?;
        if self.array::<DIGEST_BYTES>()? != *self.digests.finalize().as_bytes() {
            return Err(damaged("its sections do not belong together"));
        }
        let vocab_size = model.hparams().vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(damaged(format_args!(
                "token id {id} is not below the vocabulary's size {vocab_size}"
            )));
        }
        past.ledger.restore(header.position, header.digest, &ids);
        let mut words =
            random.as_chunks().0.iter().map(|&[low, high]| u64::from(high) << 32 | u64::from(low));
        let state = std::array::from_fn(|_| words.next().unwrap_or(0));
        Ok((sampler > 0).then_some(state))
    }

    fn header(&mut self) -> Result<Header> {
        let mut bytes = [0; HEADER_BYTES];
        let (start, rest) = bytes.split_at_mut(12);
        self.fill(start)?;
        let mut fields = &start[..];
        if take(&mut fields) != MAGIC {
            return Err(Error::new(ErrorKind::Format, "not a snapshot of a session"));
        }
        let version = u32::from_le_bytes(take(&mut fields));
        if version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format_args!("snapshot version {version}; this build reads version {VERSION}"),
            ));
        }
        if u32::from_le_bytes(take(&mut fields)) as usize != HEADER_BYTES {
            return Err(damaged("the header has another length than in this version"));
        }
        self.fill(rest)?;
        self.check_digest(blake3::hash(&bytes), "header")?;
        Ok(Header::decode(&bytes))
    }

    /// Reads section `index` into `values`, one for each word.
    fn section<T>(&mut self, index: usize, values: &mut [T], convert: fn(u32) -> T) -> Result<()> {
        let mut hasher = blake3::Hasher::new();
        let mut bytes = [0; 4 * STEP];
        for values in values.chunks_mut(STEP) {
            let bytes = &mut bytes[..4 * values.len()];
            self.fill(bytes)?;
            hasher.update(bytes);
            for (value, &word) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = convert(u32::from_le_bytes(word));
            }
        }
        self.check_digest(hasher.finalize(), SECTIONS[index])
    }

    fn check_digest(&mut self, found: blake3::Hash, section: &str) -> Result<()> {
        self.digests.update(found.as_bytes());
        match self.array::<DIGEST_BYTES>()? == *found.as_bytes() {
            true => Ok(()),
            false => Err(damaged(format_args!("the {section} and the checksum differ"))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.input.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged("it ends too early"),
            _ => Error::new(ErrorKind::Io, error),
        })
    }
}

/// The next `N` bytes of a slice that has them.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (array, tail) = rest.split_first_chunk().expect("the header has a fixed size");
    *rest = tail;
    *array
}

fn damaged(problem: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Format, format_args!("damaged snapshot: {problem}"))
}
