//! Lightning Attention (SPEC section 3.4): per head `S ← λS + kᵀv`, `o = qS`, over a run of tokens.
//!
//! One token at a time the recurrent form is used. Longer runs are cut into blocks of [`BLOCK`] tokens; in
//! a block of m tokens with local index a the result is, with D[a][b] = λ^(a-b) for b ≤ a,
//!
//! ```text
//! O = ((Q Kᵀ) ∘ D) V + diag(λ^(a+1)) Q S
//! S ← λ^m S + Kᵀ diag(λ^(m-1-a)) V
//! ```
//!
//! Everything is f32: unnormalised sums of q·k overflow f16 with real models.

use super::{
    dispatch,
    isa::Isa,
    rows::activate,
    simd,
    simd::Simd,
    tile::{Tile, accumulate, tiles},
};
use crate::hparams::Activation;

/// Tokens in a block. The score matrix (64, 64) and a slice of the state stay in the first-level cache.
pub(crate) const BLOCK: usize = 64;

/// Runs shorter than this go through the recurrent form.
const SHORTEST_BLOCK: usize = 8;

/// One head over a run of tokens. The pointers step by `stride` floats from token to token.
pub(crate) struct Run<'a> {
    /// Projections before the activation function, (tokens, head_dim) each.
    pub q: *const f32,
    pub k: *const f32,
    pub v: *const f32,
    /// Floats from one token's q, k, v to the next token's.
    pub stride: usize,
    /// Result, (tokens, head_dim).
    pub out: *mut f32,
    /// Floats from one token's result to the next.
    pub out_stride: usize,
    /// The head's past, (key_dim, head_dim), updated in place. All zero means: nothing seen yet.
    pub state: *mut f32,
    pub tokens: usize,
    pub head_dim: usize,
    /// LRPE angles (head_dim), or null where the layer has none. With angles the key is twice as wide.
    pub theta: *const f32,
    /// Position of the first token.
    pub position: u64,
    pub decay: &'a Decay,
    pub activation: Activation,
}

/// A head's decay: its state shrinks by λ = exp(-r) with each token.
pub(crate) struct Decay {
    /// r
    rate: f64,
    /// λ - 1: in the last layers λ is so near 1 that rounding it to f32 would change the decay by a percent, and
    /// λS is computed as S + (λ - 1) S.
    less_one: f32,
    /// λ^(BLOCK-1-i) for i below BLOCK, then BLOCK zeros: row a of the mask D starts at BLOCK-1-a.
    powers: [f32; 2 * BLOCK],
}

impl Decay {
    /// The decay of rate `r`.
    pub fn new(r: f64) -> Self {
        let power = |i: usize| if i < BLOCK { (-r * (BLOCK - 1 - i) as f64).exp() as f32 } else { 0.0 };
        Self { rate: r, less_one: (-r).exp_m1() as f32, powers: std::array::from_fn(power) }
    }

    /// λ^n for n below BLOCK.
    fn power(&self, n: usize) -> f32 {
        self.powers[BLOCK - 1 - n]
    }
}

impl Run<'_> {
    fn key_dim(&self) -> usize {
        if self.theta.is_null() { self.head_dim } else { 2 * self.head_dim }
    }
}

/// Computes one head; `scratch` grows once and is kept by the caller.
///
/// # Safety
/// The pointers of `run` are valid for its shapes and nothing else writes to them meanwhile.
pub(crate) unsafe fn attend(isa: Isa, run: &Run<'_>, scratch: &mut Vec<f32>) {
    // SAFETY: the caller's promise; narrower vectors are part of every wider instruction set.
    unsafe {
        match narrowed(isa, run.head_dim) {
            Some(isa) => attend_dispatched(isa, run, scratch),
            None => attend_of::<simd::Single>(run, scratch),
        }
    }
}

dispatch! {
    unsafe fn attend_dispatched(run: &Run<'_>, scratch: &mut Vec<f32>) = attend_of;
}

/// The widest instruction set whose registers divide the head.
fn narrowed(isa: Isa, head_dim: usize) -> Option<Isa> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Vnni if !head_dim.is_multiple_of(16) => narrowed(Isa::Avx2, head_dim),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => head_dim.is_multiple_of(4).then_some(isa),
        _ => head_dim.is_multiple_of(8).then_some(isa),
    }
}

#[inline(always)]
unsafe fn attend_of<S: Simd>(run: &Run<'_>, scratch: &mut Vec<f32>) {
    let (d, dk) = (run.head_dim, run.key_dim());
    let mut buffers = Buffers::carve(scratch, d, dk);
    let mut start = 0;
    while start < run.tokens {
        let left = run.tokens - start;
        // SAFETY: start + m never passes run.tokens; the buffers are sized for BLOCK tokens.
        unsafe {
            if left < SHORTEST_BLOCK {
                recurrent_step::<S>(run, start, &mut buffers);
                start += 1;
            } else {
                let m = left.min(BLOCK);
                block::<S>(run, start, m, &mut buffers);
                start += m;
            }
        }
    }
}

/// Slices of the scratch memory.
struct Buffers<'a> {
    /// Activated queries, (BLOCK, dk).
    q: &'a mut [f32],
    /// One activated key, (dk).
    k: &'a mut [f32],
    /// Activated keys transposed, (dk, BLOCK).
    kt: &'a mut [f32],
    /// Values times λ^(m-1-a), (BLOCK, d).
    v: &'a mut [f32],
    /// Scores with their decay, (BLOCK, BLOCK).
    scores: &'a mut [f32],
    /// Cosines and sines of one position's angles, (2, d).
    angles: &'a mut [f32],
}

impl<'a> Buffers<'a> {
    fn carve(scratch: &'a mut Vec<f32>, d: usize, dk: usize) -> Self {
        let sizes = [BLOCK * dk, dk, dk * BLOCK, BLOCK * d, BLOCK * BLOCK, 2 * d];
        let total = sizes.iter().sum();
        if scratch.len() < total {
            scratch.resize(total, 0.0);
        }
        let mut rest = &mut scratch[..];
        let mut take = |len: usize| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(len);
            rest = tail;
            head
        };
        let [q, k, kt, v, scores, angles] = sizes.map(&mut take);
        Self { q, k, kt, v, scores, angles }
    }
}

/// Activates token `t`'s query into `buffers.q[row]` and its key into `buffers.k`, with LRPE where the layer has it:
/// `x → [x·cos(θp), x·sin(θp)]` (SPEC section 3.1, step 3).
#[inline(always)]
unsafe fn prepare<S: Simd>(run: &Run<'_>, t: usize, row: usize, buffers: &mut Buffers<'_>) {
    let (d, dk) = (run.head_dim, run.key_dim());
    let q = buffers.q[row * dk..][..dk].as_mut_ptr();
    let k = buffers.k.as_mut_ptr();
    // SAFETY: rows of d, and of dk = 2d where theta is given.
    unsafe {
        activate::<S>(run.activation, run.q.add(t * run.stride), q, d);
        activate::<S>(run.activation, run.k.add(t * run.stride), k, d);
        if run.theta.is_null() {
            return;
        }
        let (cos, sin) = buffers.angles.split_at_mut(d);
        fill_angles(std::slice::from_raw_parts(run.theta, d), run.position + t as u64, cos, sin);
        for row in [q, k] {
            for i in (0..d).step_by(S::LANES) {
                let x = S::load(row.add(i));
                S::store(row.add(d + i), S::mul(x, S::load(sin.as_ptr().add(i))));
                S::store(row.add(i), S::mul(x, S::load(cos.as_ptr().add(i))));
            }
        }
    }
}

/// Cosines and sines of θ·p. The product and its reduction to ±π are f64, so that positions in the millions
/// keep their angle; what is left is f32.
pub(crate) fn fill_angles(theta: &[f32], position: u64, cos: &mut [f32], sin: &mut [f32]) {
    use std::f64::consts::TAU;
    for ((theta, cos), sin) in theta.iter().zip(cos).zip(sin) {
        let angle = f64::from(*theta) * position as f64;
        let reduced = (angle - (angle / TAU).round() * TAU) as f32;
        (*sin, *cos) = reduced.sin_cos();
    }
}

#[inline(always)]
unsafe fn recurrent_step<S: Simd>(run: &Run<'_>, t: usize, buffers: &mut Buffers<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        prepare::<S>(run, t, 0, buffers);
        let columns = run.head_dim / S::LANES;
        let mut column = 0;
        while column + 4 <= columns {
            recurrent_columns::<S, 4>(run, t, column * S::LANES, buffers);
            column += 4;
        }
        while column < columns {
            recurrent_columns::<S, 1>(run, t, column * S::LANES, buffers);
            column += 1;
        }
    }
}

/// `C` registers of columns of one recurrent step: the state is read and written once.
#[inline(always)]
unsafe fn recurrent_columns<S: Simd, const C: usize>(
    run: &Run<'_>,
    t: usize,
    column: usize,
    buffers: &Buffers<'_>,
) {
    let d = run.head_dim;
    // SAFETY: column + C * LANES <= d; the state is (dk, d).
    unsafe {
        let less = S::splat(run.decay.less_one);
        let v = run.v.add(t * run.stride + column);
        let (mut value, mut o) = ([S::splat(0.0); C], [S::splat(0.0); C]);
        for (c, value) in value.iter_mut().enumerate() {
            *value = S::load(v.add(c * S::LANES));
        }
        for i in 0..run.key_dim() {
            let state = run.state.add(i * d + column);
            let (q, k) = (S::splat(*buffers.q.get_unchecked(i)), S::splat(*buffers.k.get_unchecked(i)));
            for c in 0..C {
                let s = S::load(state.add(c * S::LANES));
                let s = S::fma(k, value[c], S::fma(less, s, s));
                S::store(state.add(c * S::LANES), s);
                o[c] = S::fma(q, s, o[c]);
            }
        }
        let out = run.out.add(t * run.out_stride + column);
        for (c, o) in o.into_iter().enumerate() {
            S::store(out.add(c * S::LANES), o);
        }
    }
}

#[inline(always)]
unsafe fn block<S: Simd>(run: &Run<'_>, start: usize, m: usize, buffers: &mut Buffers<'_>) {
    let (d, dk) = (run.head_dim, run.key_dim());
    // SAFETY: the caller's promise; all tiles stay inside (m, dk), (dk, BLOCK), (m, d) and (dk, d).
    unsafe {
        for a in 0..m {
            prepare::<S>(run, start + a, a, buffers);
            for (i, k) in buffers.k.iter().enumerate() {
                *buffers.kt.get_unchecked_mut(i * BLOCK + a) = *k;
            }
            let (v, scale) = (run.v.add((start + a) * run.stride), S::splat(run.decay.power(m - 1 - a)));
            let scaled = buffers.v.as_mut_ptr().add(a * d);
            for j in (0..d).step_by(S::LANES) {
                S::store(scaled.add(j), S::mul(scale, S::load(v.add(j))));
            }
        }
        // Columns past m, up to whole registers, are masked by the decay table; they must only be finite.
        let padded = m.next_multiple_of(S::LANES);
        for i in 0..dk {
            buffers.kt[i * BLOCK + m..i * BLOCK + padded].fill(0.0);
        }
        let (q, kt, scores) = (buffers.q.as_ptr(), buffers.kt.as_ptr(), buffers.scores.as_mut_ptr());
        let decay = run.decay.powers.as_ptr();
        tiles::<S>(m, padded, &Scores { q, kt, decay, scores, dk });
        let v = run.v.add(start * run.stride);
        let out = run.out.add(start * run.out_stride);
        tiles::<S>(m, d, &Outputs { q, scores, decay, v, run, out, m, dk });
        let scaled_v = buffers.v.as_ptr();
        tiles::<S>(
            dk,
            d,
            &States {
                kt,
                v: scaled_v,
                state: run.state,
                decay: (-run.decay.rate * m as f64).exp() as f32,
                m,
                d,
            },
        );
    }
}

/// `(Q Kᵀ) ∘ D`, (m, m).
struct Scores {
    q: *const f32,
    kt: *const f32,
    decay: *const f32,
    scores: *mut f32,
    dk: usize,
}

impl Tile for Scores {
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const C: usize>(&self, row: usize, column: usize) {
        if column >= row + R {
            return; // above the diagonal: `Outputs` does not read it
        }
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[S::splat(0.0); C]; R];
            let (q, kt) = (self.q.add(row * self.dk), self.kt.add(column));
            accumulate::<S, R, C>(&mut sums, (q, self.dk), (kt, BLOCK), self.dk);
            for (r, sums) in sums.into_iter().enumerate() {
                let mask = self.decay.add(BLOCK - 1 - (row + r) + column);
                let scores = self.scores.add((row + r) * BLOCK + column);
                for (c, sum) in sums.into_iter().enumerate() {
                    // Columns beyond the diagonal may lie past the mask's end only where they are not read.
                    if column + c * S::LANES < row + R {
                        S::store(scores.add(c * S::LANES), S::mul(sum, S::load(mask.add(c * S::LANES))));
                    }
                }
            }
        }
    }
}

/// `diag(λ^(a+1)) Q S + scores V`, (m, d).
struct Outputs<'a> {
    q: *const f32,
    scores: *const f32,
    decay: *const f32,
    v: *const f32,
    run: &'a Run<'a>,
    out: *mut f32,
    m: usize,
    dk: usize,
}

impl Tile for Outputs<'_> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const C: usize>(&self, row: usize, column: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[S::splat(0.0); C]; R];
            let (q, state) = (self.q.add(row * self.dk), self.run.state.add(column));
            accumulate::<S, R, C>(&mut sums, (q, self.dk), (state, self.run.head_dim), self.dk);
            for (r, sums) in sums.iter_mut().enumerate() {
                // λ^(a+1) as λ^a · λ: the table ends at λ^(BLOCK-1).
                let scale = *self.decay.add(BLOCK - 1 - (row + r)) * *self.decay.add(BLOCK - 2);
                for sum in sums {
                    *sum = S::mul(*sum, S::splat(scale));
                }
            }
            let (scores, v) = (self.scores.add(row * BLOCK), self.v.add(column));
            let seen = (row + R).min(self.m);
            accumulate::<S, R, C>(&mut sums, (scores, BLOCK), (v, self.run.stride), seen);
            for (r, sums) in sums.into_iter().enumerate() {
                let out = self.out.add((row + r) * self.run.out_stride + column);
                for (c, sum) in sums.into_iter().enumerate() {
                    S::store(out.add(c * S::LANES), sum);
                }
            }
        }
    }
}

/// `λ^m S + Kᵀ (diag(λ^(m-1-a)) V)`, (dk, d), in place.
struct States {
    kt: *const f32,
    v: *const f32,
    state: *mut f32,
    decay: f32,
    m: usize,
    d: usize,
}

impl Tile for States {
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const C: usize>(&self, row: usize, column: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let state = self.state.add(row * self.d + column);
            let decay = S::splat(self.decay);
            let mut sums = [[decay; C]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                for (c, sum) in sums.iter_mut().enumerate() {
                    *sum = S::mul(decay, S::load(state.add(r * self.d + c * S::LANES)));
                }
            }
            accumulate::<S, R, C>(
                &mut sums,
                (self.kt.add(row * BLOCK), BLOCK),
                (self.v.add(column), self.d),
                self.m,
            );
            for (r, sums) in sums.into_iter().enumerate() {
                for (c, sum) in sums.into_iter().enumerate() {
                    S::store(state.add(r * self.d + c * S::LANES), sum);
                }
            }
        }
    }
}
