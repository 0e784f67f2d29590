//! The forward pass again, slow and obvious: the oracle of the tests, and the shortest description of the model.
//!
//! Nothing here is shared with the engine but the weights, the hyper-parameters and the layout of the state: no
//! graph, no threads, no SIMD, no blocks. Values are f32 and sums f64, one after the other in the order of
//! SPEC section 3, whose names and numbers the comments use. Two forms of attention are written out:
//!
//! * [`Form::Recurrent`]: what makes the model cheap to run. One matrix S per head stands for the whole past.
//! * [`Form::Parallel`]: what the authors define. Every token looks at every earlier one.
//!
//! Both are the same function; so is the engine's blocked form (`kernels::attention`).

use crate::{
    hparams::{Activation, Hparams},
    model::Model,
    state::State,
    weights::Matrix,
};

/// How attention is computed (SPEC section 3.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `S ← λS + kᵀv`, `o = qS`, token by token: time T, memory 1.
    Recurrent,
    /// `O = ((Q Kᵀ) ∘ D) V` with `D[i][j] = λ^(i-j)` for j ≤ i: time T².
    Parallel,
}

/// Receives intermediate values: a name as in `layer0.qkvu`, and the values of all tokens.
///
/// Names and shapes are those of the golden vectors (T tokens, D residual, H hidden, h heads): `embed` (T, D); for
/// each layer `token_norm` (T, D), `qkvu` (T, 4H), `lrpe_q` and `lrpe_k` (h, T, key_dim) where LRPE is used,
/// `attn`, `attn_norm`, `gated` (T, H), `mixer_out`, `channel_norm`, `glu_out`, `out` (T, D); `final_norm` (T, D).
pub type Trace<'a> = &'a mut dyn FnMut(&str, &[f32]);

/// One sequence, computed the slow way.
pub struct Reference {
    model: Model,
    form: Form,
    state: State,
    position: u64,
}

/// One row of values per token.
type Rows = Vec<Vec<f32>>;

impl Reference {
    /// An empty sequence, computed in recurrent form.
    pub fn new(model: &Model) -> Self {
        Self::with_form(model, Form::Recurrent)
    }

    /// An empty sequence, computed in the given form.
    pub fn with_form(model: &Model, form: Form) -> Self {
        Self { model: model.clone(), form, state: State::new(model.hparams()), position: 0 }
    }

    /// The state after the tokens read so far.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Reads `ids` after what was read before; returns the logits (V) after each. Panics if an id is not below V.
    pub fn forward(&mut self, ids: &[u32]) -> Vec<Vec<f32>> {
        self.forward_traced(ids, &mut |_, _| {})
    }

    /// [`forward`](Self::forward), showing every intermediate value to `trace`.
    pub fn forward_traced(&mut self, ids: &[u32], trace: Trace<'_>) -> Vec<Vec<f32>> {
        let model = self.model.clone();
        let mut x = embed(&model, ids);
        trace("embed", &x.concat());
        for layer in 0..model.hparams().layers {
            let trace: Trace<'_> = &mut |name, values| trace(&format!("layer{layer}.{name}"), values);
            self.token_mixer(layer, &mut x, trace);
            channel_mixer(&model, layer, &mut x, trace);
            trace("out", &x.concat());
        }
        self.position += ids.len() as u64;
        let x = srms(&x);
        trace("final_norm", &x.concat());
        linear(&model.weights().head, &[], &x)
    }

    /// Gated linear attention, SPEC section 3.1.
    fn token_mixer(&mut self, layer: usize, x: &mut Rows, trace: Trace<'_>) {
        let model = self.model.clone();
        let (weights, hidden) = (&model.weights().layers[layer], model.hparams().hidden);
        // 1. The four projections of the normed input.
        let y = srms(x);
        let z = linear(&weights.qkvu, &weights.bias.qkvu, &y);
        trace("token_norm", &y.concat());
        trace("qkvu", &z.concat());
        // 2 to 5. Attention, head by head.
        let o = self.attention(layer, &z, trace);
        // 6. The norm runs over all heads together.
        let a = srms(&o);
        // 7. The gate u, without activation, and the way back into the residual stream.
        let gated: Rows = a
            .iter()
            .zip(&z)
            .map(|(a, z)| a.iter().zip(&z[3 * hidden..]).map(|(a, u)| u * a).collect())
            .collect();
        let mixed = linear(&weights.output, &weights.bias.output, &gated);
        trace("attn", &o.concat());
        trace("attn_norm", &a.concat());
        trace("gated", &gated.concat());
        trace("mixer_out", &mixed.concat());
        add(x, &mixed);
    }

    /// Attention of all heads on rows of q, k, v, u; (T, H). Moves the layer's state on.
    fn attention(&mut self, layer: usize, z: &Rows, trace: Trace<'_>) -> Rows {
        let hparams = self.model.hparams();
        let (d, key_dim, hidden) = (hparams.head_dim(), hparams.key_dim(layer), hparams.hidden);
        let mut out = vec![Vec::with_capacity(hidden); z.len()];
        let (mut all_q, mut all_k) = (Vec::new(), Vec::new());
        for (head, state) in self.state.layer_mut(layer).chunks_exact_mut(key_dim * d).enumerate() {
            let part = |i: usize| z.iter().map(move |row| row[i * hidden + head * d..][..d].to_vec());
            // 2. Activation of q and k; neither is scaled.  3. LRPE.
            let theta = self.model.weights().layers[layer].theta.get(head * d..(head + 1) * d);
            let prepare = |rows: Rows| -> Rows {
                let tokens = rows.into_iter().zip(self.position..);
                tokens.map(|(row, p)| lrpe(&activate(hparams.activation, &row), theta, p)).collect()
            };
            let (q, k, v) = (prepare(part(0).collect()), prepare(part(1).collect()), part(2).collect());
            if theta.is_some() {
                all_q.extend(q.concat());
                all_k.extend(k.concat());
            }
            // 4. λ^n = exp(-rn).  5. Attention.
            let decay = Decay { rate: hparams.decay(layer, head) };
            let o = match self.form {
                Form::Recurrent => recurrent(decay, &q, &k, &v, state),
                Form::Parallel => parallel(decay, &q, &k, &v, state),
            };
            // 6. The heads side by side.
            out.iter_mut().zip(o).for_each(|(out, o)| out.extend(o));
        }
        if !all_q.is_empty() {
            trace("lrpe_q", &all_q);
            trace("lrpe_k", &all_k);
        }
        out
    }
}

/// 3.0: rows of the embedding, scaled.
fn embed(model: &Model, ids: &[u32]) -> Rows {
    let Hparams { embedding, embedding_scale, .. } = *model.hparams();
    let row = |&id: &u32| {
        let mut row = vec![0.0; embedding];
        model.weights().embedding.row(id as usize, &mut row);
        row.iter().map(|value| value * embedding_scale).collect()
    };
    ids.iter().map(row).collect()
}

/// SRMSNorm of each row: `z / sqrt(mean(z²) + 1e-6)`. It has no weights.
fn srms(rows: &Rows) -> Rows {
    let norm = |row: &Vec<f32>| {
        let mean = dot(row, row) / row.len() as f64;
        let scale = 1.0 / (mean + 1e-6).sqrt();
        row.iter().map(|&value| (f64::from(value) * scale) as f32).collect()
    };
    rows.iter().map(norm).collect()
}

/// `x Wᵀ + bias` for each row x; `bias` may be empty.
fn linear(matrix: &Matrix, bias: &[f32], rows: &Rows) -> Rows {
    let mut out = vec![Vec::with_capacity(matrix.rows); rows.len()];
    let mut weights = vec![0.0; matrix.columns];
    for i in 0..matrix.rows {
        matrix.row(i, &mut weights);
        let bias = f64::from(bias.get(i).copied().unwrap_or(0.0));
        for (out, row) in out.iter_mut().zip(rows) {
            out.push((dot(&weights, row) + bias) as f32);
        }
    }
    out
}

fn activate(activation: Activation, row: &[f32]) -> Vec<f32> {
    let shift = match activation {
        Activation::Exp => row.iter().copied().fold(f32::NEG_INFINITY, f32::max),
        _ => 0.0,
    };
    row.iter().map(|&value| activation.apply(value - shift)).collect()
}

/// `[x·cos(θp), x·sin(θp)]`, so that q·k depends on positions by `cos(θ(i-j))`; without θ just x.
fn lrpe(x: &[f32], theta: Option<&[f32]>, position: u64) -> Vec<f32> {
    let Some(theta) = theta else { return x.to_vec() };
    let turned = |f: fn(f64) -> f64| {
        x.iter()
            .zip(theta)
            .map(move |(&x, &theta)| (f64::from(x) * f(f64::from(theta) * position as f64)) as f32)
    };
    turned(f64::cos).chain(turned(f64::sin)).collect()
}

/// How fast a head forgets.
#[derive(Clone, Copy)]
struct Decay {
    rate: f64,
}

impl Decay {
    /// λ^n.
    fn power(self, n: usize) -> f64 {
        (-self.rate * n as f64).exp()
    }
}

/// One head, token by token. The state is (key_dim, d), and decays *before* it takes in the new token.
fn recurrent(decay: Decay, q: &Rows, k: &Rows, v: &Rows, state: &mut [f32]) -> Rows {
    let (d, lambda) = (state.len() / k.first().map_or(1, Vec::len), decay.power(1));
    let step = |((q, k), v): ((&Vec<f32>, &Vec<f32>), &Vec<f32>)| {
        let mut o = vec![0.0; d];
        for (i, row) in state.chunks_exact_mut(d).enumerate() {
            for (j, s) in row.iter_mut().enumerate() {
                *s = (lambda * f64::from(*s) + f64::from(k[i]) * f64::from(v[j])) as f32;
                o[j] += f64::from(q[i]) * f64::from(*s);
            }
        }
        o.into_iter().map(|o| o as f32).collect()
    };
    q.iter().zip(k).zip(v).map(step).collect()
}

/// One head, all tokens at once: every token i looks at every token j ≤ i, itself included with weight 1, and at
/// the state (key_dim, d) of what came before, which lies i + 1 steps back.
fn parallel(decay: Decay, q: &Rows, k: &Rows, v: &Rows, state: &mut [f32]) -> Rows {
    let tokens = q.len();
    let d = state.len() / k.first().map_or(1, Vec::len);
    let attend = |(i, q): (usize, &Vec<f32>)| {
        let scores: Vec<f64> = (0..=i).map(|j| dot(q, &k[j]) * decay.power(i - j)).collect();
        let output = |c: usize| {
            let seen: f64 = scores.iter().zip(v).map(|(score, v)| score * f64::from(v[c])).sum();
            let past: f64 =
                q.iter().enumerate().map(|(r, q)| f64::from(*q) * f64::from(state[r * d + c])).sum();
            (seen + decay.power(i + 1) * past) as f32
        };
        (0..d).map(output).collect()
    };
    let out = q.iter().enumerate().map(attend).collect();
    for (index, s) in state.iter_mut().enumerate() {
        let (row, column) = (index / d, index % d);
        let seen = (0..tokens)
            .map(|t| decay.power(tokens - 1 - t) * f64::from(k[t][row]) * f64::from(v[t][column]))
            .sum::<f64>();
        *s = (decay.power(tokens) * f64::from(*s) + seen) as f32;
    }
    out
}

/// The gated linear unit, SPEC section 3.2. It has no activation.
fn channel_mixer(model: &Model, layer: usize, x: &mut Rows, trace: Trace<'_>) {
    let weights = &model.weights().layers[layer];
    let y = srms(x);
    let mut unit = linear(&weights.gate, &weights.bias.gate, &y);
    let up = linear(&weights.up, &weights.bias.up, &y);
    for (gate, up) in unit.iter_mut().zip(&up) {
        gate.iter_mut().zip(up).for_each(|(gate, up)| *gate *= up);
    }
    let mixed = linear(&weights.down, &weights.bias.down, &unit);
    trace("channel_norm", &y.concat());
    trace("glu_out", &mixed.concat());
    add(x, &mixed);
}

fn add(x: &mut Rows, y: &Rows) {
    for (x, y) in x.iter_mut().zip(y) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}
