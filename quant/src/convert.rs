//! The conversion itself: reads, checks, quantizes on all cores and writes, a few megabytes at a time.

use std::{
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use indicatif::ProgressBar;
use transnormer::{
    dtype::DType,
    error::{Error, ErrorKind, Result},
    ggml,
    gguf::{Metadata, Writer},
    tiles,
};

use crate::{
    checkpoint::{self, Checkpoint},
    plan::{Plan, PlannedTensor},
};

/// Elements that one thread converts at a time: 1 MiB as f32, which stays in its cache.
const PIECE: u64 = 256 << 10;
/// Pieces for each thread between two writes. Memory is bounded by threads × pieces × about 2 MiB.
const PIECES_PER_THREAD: u64 = 8;
/// Largest magnitude that an F16 holds; block scales are F16 too.
const F16_MAX: f32 = 65504.0;
/// Largest magnitude that rounds to a finite BF16.
const BF16_MAX: f32 = f32::from_bits(0x7F7F_7FFF);

/// Writes `plan` with `metadata` to the new file `out`, which appears complete or not at all. `progress`
/// counts source bytes. `cancel` is looked at between chunks.
///
/// # Errors
/// [`ErrorKind::Format`] naming the tensor and the element for a weight that is not finite or does not fit
/// its type, [`ErrorKind::Cancelled`], and those of reading and writing. The old file stays.
pub fn convert(
    checkpoint: &Checkpoint,
    plan: &Plan,
    metadata: &Metadata,
    out: &Path,
    threads: usize,
    progress: &ProgressBar,
    cancel: &AtomicBool,
) -> Result<u64> {
    let mut writer = Writer::create(out, metadata, &plan.specs())?;
    let mut raw = Vec::new();
    let mut pieces = Vec::new();
    for tensor in &plan.tensors {
        progress.set_message(tensor.name.clone());
        let row_len = tensor.row_len();
        let piece_len =
            (PIECE / row_len).next_multiple_of(tiles::ROWS as u64).max(tiles::ROWS as u64) * row_len;
        let chunk_len = piece_len * PIECES_PER_THREAD * threads as u64;
        for start in (0..tensor.source.elements).step_by(chunk_len as usize) {
            if cancel.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Cancelled, format_args!("{}: interrupted", out.display())));
            }
            let end = tensor.source.elements.min(start + chunk_len);
            checkpoint.read_bytes(&tensor.source, start..end, &mut raw)?;
            convert_chunk(tensor, &raw, piece_len, threads, &mut pieces).map_err(|fault| {
                let file = checkpoint.files()[tensor.source.file].path();
                fault.into_error(file, tensor, start)
            })?;
            pieces.iter().try_for_each(|piece: &Vec<u8>| writer.write(piece))?;
            progress.inc(raw.len() as u64);
        }
    }
    progress.set_message("syncing");
    writer.finish()
}

/// Source bytes that [`convert`] will read.
pub fn source_bytes(plan: &Plan) -> u64 {
    let bytes = |tensor: &PlannedTensor| tensor.source.range().end - tensor.source.range().start;
    plan.tensors.iter().map(bytes).sum()
}

/// Why an element cannot be converted, at which index in its chunk.
#[derive(Debug)]
enum Fault {
    NotFinite(u64, f32),
    TooLarge(u64, f32),
    Other(Error),
}

impl Fault {
    fn into_error(self, file: &Path, tensor: &PlannedTensor, start: u64) -> Error {
        let name = &tensor.source.name;
        let message = match self {
            Self::NotFinite(index, value) => {
                format!("element {} is {value}: the checkpoint is damaged", start + index)
            }
            Self::TooLarge(index, value) => {
                format!(
                    "element {} is {value}, too large for {}: use BF16 or F32",
                    start + index,
                    tensor.dtype
                )
            }
            Self::Other(error) => return error.context(format_args!("tensor {name:?}")),
        };
        Error::new(ErrorKind::Format, format_args!("{}: tensor {name:?}: {message}", file.display()))
    }

    fn index(&self) -> u64 {
        match self {
            Self::NotFinite(index, _) | Self::TooLarge(index, _) => *index,
            Self::Other(_) => 0,
        }
    }
}

/// Converts the source bytes `raw` in pieces of `piece_len` elements into `pieces`, on all threads. Of several
/// faults the first one in the tensor is returned, whichever thread met it.
fn convert_chunk(
    tensor: &PlannedTensor,
    raw: &[u8],
    piece_len: u64,
    threads: usize,
    pieces: &mut Vec<Vec<u8>>,
) -> Result<(), Fault> {
    let sources = raw.chunks((piece_len * tensor.source.dtype.block_bytes()) as usize);
    pieces.resize_with(sources.len(), Vec::new);
    let workers = threads.min(pieces.len());
    let work = Mutex::new((0..).step_by(piece_len as usize).zip(sources.zip(pieces)));
    let fault = Mutex::new(None::<Fault>);
    let run = || {
        let mut values = Vec::new();
        loop {
            let next = work.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((start, (source, piece))) = next else { return };
            if let Err(found) = convert_piece(tensor, source, start, &mut values, piece) {
                let mut first = fault.lock().unwrap_or_else(PoisonError::into_inner);
                if first.as_ref().is_none_or(|first| found.index() < first.index()) {
                    *first = Some(found);
                }
            }
        }
    };
    thread::scope(|scope| {
        // Where the system gives no more threads, those that there are do the work.
        (1..workers).for_each(|_| drop(thread::Builder::new().spawn_scoped(scope, run)));
        run();
    });
    fault.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Converts one piece, which begins at element `start` of its chunk; `values` is scratch.
fn convert_piece(
    tensor: &PlannedTensor,
    source: &[u8],
    start: u64,
    values: &mut Vec<f32>,
    piece: &mut Vec<u8>,
) -> Result<(), Fault> {
    values.resize(source.len() / tensor.source.dtype.block_bytes() as usize, 0.0);
    checkpoint::decode(tensor.source.dtype, source, values);
    let limit = match tensor.dtype {
        DType::F32 => f32::MAX,
        DType::BF16 => BF16_MAX,
        _ => F16_MAX,
    };
    if let Some(index) = values.iter().position(|value| value.is_nan() || value.abs() > limit) {
        let (at, value) = (start + index as u64, values[index]);
        return Err(if value.is_finite() { Fault::TooLarge(at, value) } else { Fault::NotFinite(at, value) });
    }
    piece.clear();
    ggml::quantize(tensor.dtype, values, tensor.row_len() as usize, None, piece).map_err(Fault::Other)?;
    if tensor.tiled {
        let tile_bytes = tiles::ROWS * (piece.len() / (values.len() / tensor.row_len() as usize));
        let mut tile = vec![0; tile_bytes];
        for rows in piece.chunks_exact_mut(tile_bytes) {
            tiles::to_tile(tensor.dtype, rows, &mut tile);
            rows.copy_from_slice(&tile);
        }
    }
    Ok(())
}
