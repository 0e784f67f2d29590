//! The forward pass as a ggml graph of the engine's operations.
//!
//! A layer is nine nodes (SPEC section 3; T tokens, D residual, H hidden, G feed-forward width):
//!
//! ```text
//! a = prepare(norm(x))            z = Wqkvu a          o = attention(z)      g = prepare(u · norm(o))
//! x = x + Wout g                  b = prepare(norm(x)) f = (W1 b) · (W2 b)   c = prepare(f)
//! x = x + W3 c
//! ```
//!
//! *prepare* makes the rows that the next matrix product reads ([`operand`](crate::kernels::operand)).

use std::{
    cell::{RefCell, UnsafeCell},
    sync::Arc,
};

use crate::{
    error::Result,
    ggml::{Graph, GraphBuilder, Op, OpArgs, Tensor},
    hparams::{Activation, Hparams},
    kernels::{
        attention::{self, Decay, Run},
        isa::Isa,
        matmul::{self, Inputs, Outputs, Reads},
        operand::{self, Format},
        rows,
    },
    model::Model,
    threads::ThreadPool,
    weights::Matrix,
};

/// Which tokens of a batch get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Logits {
    /// None: the batch only moves the state on.
    None,
    /// So many of the last tokens'.
    Last(usize),
    /// Every token's.
    All,
}

/// One sequence's part of a batch.
pub(crate) struct Segment {
    /// The state of all layers, updated in place; see [`State`](crate::state::State) for the layout.
    pub state: *mut f32,
    /// Position of the first token.
    pub position: u64,
    /// Tokens in the batch.
    pub tokens: usize,
}

// SAFETY: a handle; each head's part of the state is used by one thread at a time.
unsafe impl Sync for Segment {}

/// What changes from one run of a graph to the next.
#[derive(Default)]
pub(crate) struct Batch {
    /// Token ids of all segments, one segment after the other.
    pub ids: Vec<u32>,
    /// The sequences.
    pub segments: Vec<Segment>,
}

/// A [`Batch`] that the graph's operations read while the graph runs and its owner writes in between.
#[derive(Default)]
pub(crate) struct BatchCell(UnsafeCell<Batch>);

// SAFETY: written only through `set` while no graph runs; read only by operations while one runs.
unsafe impl Send for BatchCell {}
// SAFETY: as above.
unsafe impl Sync for BatchCell {}

impl BatchCell {
    /// Replaces the batch.
    ///
    /// # Safety
    /// No graph that shares this cell is running, and the states stay valid until the next run is over.
    pub unsafe fn set(&self, fill: impl FnOnce(&mut Batch)) {
        // SAFETY: the caller's promise makes this the only reference.
        fill(unsafe { &mut *self.0.get() })
    }

    /// The batch, for operations of a running graph.
    fn get(&self) -> &Batch {
        // SAFETY: nothing writes while a graph runs.
        unsafe { &*self.0.get() }
    }
}

/// Builds the graph for batches of `tokens` tokens.
pub(crate) fn build(
    model: &Model,
    tokens: usize,
    logits: Logits,
    batch: &Arc<BatchCell>,
    pool: &Arc<ThreadPool>,
) -> Result<Graph> {
    let (hparams, weights) = (model.hparams(), model.weights());
    let mut net = Net { builder: GraphBuilder::new(9 * hparams.layers + 3, pool)?, tokens, isa: Isa::best() };
    let embedding =
        Embed { matrix: weights.embedding.clone(), scale: hparams.embedding_scale, batch: batch.clone() };
    let mut x = net.builder.custom(embedding, [hparams.embedding, tokens], &[]);
    let mut state_offset = 0;
    for (i, layer) in weights.layers.iter().enumerate() {
        let Hparams { hidden, .. } = *hparams;
        let a = net.prepare(Source::Norm, x, None, 0, &[&layer.qkvu]);
        let z = net.linear(&layer.qkvu, &layer.bias.qkvu, a, None);
        let attention = Attention {
            isa: net.isa,
            heads: hparams.heads,
            head_dim: hparams.head_dim(),
            theta: layer.theta.clone(),
            decay: (0..hparams.heads).map(|head| Decay::new(hparams.decay(i, head))).collect(),
            activation: hparams.activation,
            state_offset,
            batch: batch.clone(),
        };
        state_offset += hparams.state_len(i);
        let o = net.builder.custom(attention, [hidden, tokens], &[z]);
        let g = net.prepare(Source::GatedNorm { hidden }, o, Some(z), 0, &[&layer.output]);
        x = net.linear(&layer.output, &layer.bias.output, g, Some(x));
        let b = net.prepare(Source::Norm, x, None, 0, &[&layer.gate, &layer.up]);
        let f = net.gated_unit((&layer.gate, &layer.bias.gate), (&layer.up, &layer.bias.up), b);
        let c = net.prepare(Source::Plain, f, None, 0, &[&layer.down]);
        x = net.linear(&layer.down, &layer.bias.down, c, Some(x));
    }
    let first = match logits {
        Logits::None => return net.builder.finish(x),
        Logits::Last(count) => tokens - count,
        Logits::All => 0,
    };
    net.tokens = tokens - first;
    let n = net.prepare(Source::Norm, x, None, first, &[&weights.head]);
    let y = net.linear(&weights.head, &[], n, None);
    net.builder.finish(y)
}

struct Net {
    builder: GraphBuilder,
    tokens: usize,
    isa: Isa,
}

impl Net {
    /// Rows for the `readers`, from token `first` of `x` on.
    fn prepare(
        &mut self,
        source: Source,
        x: Tensor,
        gate: Option<Tensor>,
        first: usize,
        readers: &[&Matrix],
    ) -> Tensor {
        let reads = |form| readers.iter().any(|matrix| Reads::of(matrix.dtype) == form);
        let format = Format { len: readers[0].columns, float: reads(Reads::Float), int8: reads(Reads::Int8) };
        let shape = [format.row_bytes(), self.tokens];
        let inputs: Vec<Tensor> = std::iter::once(x).chain(gate).collect();
        self.builder.custom_bytes(Prepare { isa: self.isa, source, format, first }, shape, &inputs)
    }

    /// `W a + bias`, plus `residual` where given.
    fn linear(&mut self, matrix: &Matrix, bias: &[f32], a: Tensor, residual: Option<Tensor>) -> Tensor {
        let op = Linear {
            isa: self.isa,
            matrix: matrix.clone(),
            bias: bias.to_vec(),
            residual: residual.is_some(),
        };
        let inputs: Vec<Tensor> = std::iter::once(a).chain(residual).collect();
        self.builder.custom(op, [matrix.rows, self.tokens], &inputs)
    }

    /// `(W1 b + bias1) · (W2 b + bias2)`.
    fn gated_unit(&mut self, gate: (&Matrix, &[f32]), up: (&Matrix, &[f32]), b: Tensor) -> Tensor {
        let rows = gate.0.rows;
        let [gate, up] = [gate, up].map(|(matrix, bias)| (matrix.clone(), bias.to_vec()));
        self.builder.custom(GatedUnit { isa: self.isa, gate, up }, [rows, self.tokens], &[b])
    }
}

/// Rows of the embedding, times its scale: (T, D).
struct Embed {
    matrix: Matrix,
    scale: f32,
    batch: Arc<BatchCell>,
}

impl Op for Embed {
    fn run(&self, args: &OpArgs<'_>) {
        let (ids, width) = (&self.batch.get().ids, self.matrix.columns);
        args.each(ids.len(), |t| {
            // SAFETY: the output is (T, D), and each token is one thread's.
            let row =
                unsafe { std::slice::from_raw_parts_mut(args.output.data::<f32>().add(t * width), width) };
            self.matrix.row(ids[t] as usize, row);
            row.iter_mut().for_each(|value| *value *= self.scale);
        });
    }
}

/// What [`Prepare`] does to its input before quantizing it.
#[derive(Clone, Copy)]
enum Source {
    Plain,
    /// SRMSNorm.
    Norm,
    /// SRMSNorm times the gate u, which the second input holds in its last quarter: rows of q, k, v, u.
    GatedNorm {
        hidden: usize,
    },
}

struct Prepare {
    isa: Isa,
    source: Source,
    format: Format,
    /// First token that is prepared.
    first: usize,
}

impl Op for Prepare {
    fn run(&self, args: &OpArgs<'_>) {
        let len = self.format.len;
        args.each(args.output.len(1), |t| {
            // SAFETY: inputs are (T, len) and, for the gate, (T, 4 hidden); the output has a row for each token.
            unsafe {
                let x = args.input(0).data::<f32>().add((self.first + t) * len);
                let row = args.output.data::<u8>().add(t * args.output.len(0));
                with_scratch(|scratch| {
                    let normed =
                        if self.format.float { row.cast::<f32>() } else { grown(scratch, len).as_mut_ptr() };
                    match self.source {
                        Source::Plain => return operand::prepare(self.isa, &self.format, x, row),
                        Source::Norm => rows::norm(self.isa, x, normed, len),
                        Source::GatedNorm { hidden } => {
                            let u = args.input(1).data::<f32>().add((4 * (self.first + t) + 3) * hidden);
                            rows::gated_norm(self.isa, x, u, normed, len);
                        }
                    }
                    operand::prepare(self.isa, &self.format, normed, row);
                });
            }
        });
    }
}

/// Rows of weights that a thread takes at a time, at least: a whole number of the kernels' panels.
const SMALLEST_CHUNK: usize = 64;
/// Chunks for each thread, about: enough to even out threads of different speed. More would break up the
/// stream that a thread reads.
const CHUNKS_PER_THREAD: usize = 4;

/// Rows in a chunk of a matrix of `rows` rows.
fn chunk_rows(rows: usize, threads: usize) -> usize {
    rows.div_ceil(threads * CHUNKS_PER_THREAD).next_multiple_of(SMALLEST_CHUNK)
}

struct Linear {
    isa: Isa,
    matrix: Matrix,
    bias: Vec<f32>,
    residual: bool,
}

impl Op for Linear {
    fn run(&self, args: &OpArgs<'_>) {
        let (rows, tokens) = (self.matrix.rows, args.output.len(1));
        let inputs = inputs_of(args, self.matrix.columns, &[self.matrix.dtype]);
        let outputs = Outputs { data: args.output.data(), stride: rows };
        let size = chunk_rows(rows, args.threads());
        args.each(rows.div_ceil(size), |chunk| {
            let range = chunk * size..rows.min((chunk + 1) * size);
            // SAFETY: the input was prepared for this matrix; chunks do not overlap.
            unsafe {
                with_scratch(|scratch| {
                    matmul::multiply(self.isa, &self.matrix, range.clone(), inputs, outputs, scratch)
                });
                add_bias(&self.bias, range.clone(), tokens, outputs);
                if self.residual {
                    let residual = args.input(1).data::<f32>();
                    for t in 0..tokens {
                        for r in range.clone() {
                            *outputs.data.add(t * rows + r) += *residual.add(t * rows + r);
                        }
                    }
                }
            }
        });
    }
}

/// The channel mixer's gated linear unit, which has no activation (SPEC section 3.2): (T, G).
struct GatedUnit {
    isa: Isa,
    gate: (Matrix, Vec<f32>),
    up: (Matrix, Vec<f32>),
}

impl Op for GatedUnit {
    fn run(&self, args: &OpArgs<'_>) {
        let (rows, tokens) = (self.gate.0.rows, args.output.len(1));
        let inputs = inputs_of(args, self.gate.0.columns, &[self.gate.0.dtype, self.up.0.dtype]);
        let outputs = Outputs { data: args.output.data(), stride: rows };
        let size = chunk_rows(rows, args.threads());
        args.each(rows.div_ceil(size), |chunk| {
            let range = chunk * size..rows.min((chunk + 1) * size);
            // SAFETY: the input was prepared for both matrices; chunks do not overlap; `up` has a chunk's rows
            // for each token, addressed by their numbers in the whole matrix.
            unsafe {
                with_scratch(|scratch| {
                    matmul::multiply(self.isa, &self.gate.0, range.clone(), inputs, outputs, scratch)
                });
                add_bias(&self.gate.1, range.clone(), tokens, outputs);
                UP.with_borrow_mut(|up| {
                    let up = grown(up, size * tokens).as_mut_ptr();
                    let up = Outputs { data: up.wrapping_sub(range.start), stride: size };
                    with_scratch(|scratch| {
                        matmul::multiply(self.isa, &self.up.0, range.clone(), inputs, up, scratch)
                    });
                    add_bias(&self.up.1, range.clone(), tokens, up);
                    for t in 0..tokens {
                        let gate = outputs.data.add(t * rows + range.start);
                        let up = up.data.wrapping_add(t * size + range.start);
                        rows::product(self.isa, gate, up, gate, range.len());
                    }
                });
            }
        });
    }
}

/// Lightning Attention on the projections (T, 4H): q, k, v, u. Result (T, H), the state is updated in place.
struct Attention {
    isa: Isa,
    heads: usize,
    head_dim: usize,
    /// (heads, head_dim), or empty.
    theta: Vec<f32>,
    /// One for each head.
    decay: Vec<Decay>,
    activation: Activation,
    /// Where the layer's state starts in a sequence's state.
    state_offset: usize,
    batch: Arc<BatchCell>,
}

impl Op for Attention {
    fn run(&self, args: &OpArgs<'_>) {
        let (d, hidden) = (self.head_dim, self.heads * self.head_dim);
        let key_dim = if self.theta.is_empty() { d } else { 2 * d };
        let segments = &self.batch.get().segments;
        args.each(segments.len() * self.heads, |item| {
            let (segment, head) = (item / self.heads, item % self.heads);
            let first: usize = segments[..segment].iter().map(|segment| segment.tokens).sum();
            let segment = &segments[segment];
            // SAFETY: z is (T, 4H), the output (T, H), the state (heads, key_dim, d) from the layer's offset on;
            // each segment's head is one thread's.
            unsafe {
                let z = args.input(0).data::<f32>().add(first * 4 * hidden + head * d);
                let run = Run {
                    q: z,
                    k: z.add(hidden),
                    v: z.add(2 * hidden),
                    stride: 4 * hidden,
                    out: args.output.data::<f32>().add(first * hidden + head * d),
                    out_stride: hidden,
                    state: segment.state.add(self.state_offset + head * key_dim * d),
                    tokens: segment.tokens,
                    head_dim: d,
                    theta: self
                        .theta
                        .get(head * d..)
                        .filter(|theta| !theta.is_empty())
                        .map_or(std::ptr::null(), <[f32]>::as_ptr),
                    position: segment.position,
                    decay: &self.decay[head],
                    activation: self.activation,
                };
                with_scratch(|scratch| attention::attend(self.isa, &run, scratch));
            }
        });
    }
}

fn inputs_of(args: &OpArgs<'_>, columns: usize, dtypes: &[crate::DType]) -> Inputs {
    let reads = |form| dtypes.iter().any(|&dtype| Reads::of(dtype) == form);
    let format = Format { len: columns, float: reads(Reads::Float), int8: reads(Reads::Int8) };
    Inputs { format, rows: args.input(0).data(), tokens: args.output.len(1) }
}

/// # Safety
/// `outputs` has rows `range` of `tokens` tokens; `bias` is empty or has a value for each row.
unsafe fn add_bias(bias: &[f32], range: std::ops::Range<usize>, tokens: usize, outputs: Outputs) {
    if bias.is_empty() {
        return;
    }
    for t in 0..tokens {
        for r in range.clone() {
            // SAFETY: the caller's promise.
            unsafe { *outputs.data.wrapping_add(t * outputs.stride + r) += bias[r] };
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// The second product of a [`GatedUnit`].
    static UP: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Gives a kernel this thread's scratch memory: ggml's callback has none.
fn with_scratch<R>(f: impl FnOnce(&mut Vec<f32>) -> R) -> R {
    SCRATCH.with_borrow_mut(f)
}

/// At least `len` values.
fn grown(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    &mut scratch[..len]
}
