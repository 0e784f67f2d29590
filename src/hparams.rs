//! Hyper-parameters: read from GGUF metadata, checked once, trusted afterwards.

use crate::{
    error::{Error, ErrorKind, Result},
    gguf::Metadata,
};

/// Value of `general.architecture` and prefix of all model keys.
pub const ARCHITECTURE: &str = "transnormer";

/// Most f32 values in a state: 1 GiB, sixteen times what the largest published model has.
const MAX_STATE: u64 = 1 << 28;
/// Most heads in all layers together; the largest published model has 960.
const MAX_HEADS: usize = 1 << 15;

/// Activation function of q and k (SPEC section 1, `linear_act_fun`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Activation {
    Silu,
    OnePlusElu,
    TwoPlusElu,
    Elu,
    Relu,
    Gelu,
    Sigmoid,
    /// Leaky ReLU with slope 0.01.
    Leak,
    /// `exp(x - max(x))`, the maximum taken over the head.
    Exp,
    Sine,
    Identity,
}

impl Activation {
    const NAMES: [(&'static str, Activation); 12] = [
        ("silu", Activation::Silu),
        ("swish", Activation::Silu),
        ("1+elu", Activation::OnePlusElu),
        ("2+elu", Activation::TwoPlusElu),
        ("elu", Activation::Elu),
        ("relu", Activation::Relu),
        ("gelu", Activation::Gelu),
        ("sigmoid", Activation::Sigmoid),
        ("leak", Activation::Leak),
        ("exp", Activation::Exp),
        ("sine", Activation::Sine),
        ("identity", Activation::Identity),
    ];

    /// The function of this name, as config.json and GGUF metadata spell it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, activation)| *activation)
    }

    /// The name stored in GGUF metadata.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, known)| *known == self).expect("NAMES lists every activation").0
    }

    /// The function on one value. [`Activation::Exp`] expects the head's maximum already subtracted.
    pub fn apply(self, x: f32) -> f32 {
        let elu = |x: f32| if x > 0.0 { x } else { x.exp_m1() };
        match self {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::OnePlusElu => 1.0 + elu(x),
            Activation::TwoPlusElu => 2.0 + elu(x),
            Activation::Elu => elu(x),
            Activation::Relu => x.max(0.0),
            Activation::Gelu => {
                (0.5 * f64::from(x) * (1.0 + erf(f64::from(x) / std::f64::consts::SQRT_2))) as f32
            }
            Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Activation::Leak => {
                if x > 0.0 {
                    x
                } else {
                    0.01 * x
                }
            }
            Activation::Exp => x.exp(),
            Activation::Sine => x.sin(),
            Activation::Identity => x,
        }
    }
}

/// The shape of a model. Every value is in range once this exists.
#[derive(Debug, Clone, PartialEq)]
pub struct Hparams {
    /// Rows of the embedding, V.
    pub vocab_size: usize,
    /// Residual width, D.
    pub embedding: usize,
    /// Number of layers, L; at least 2.
    pub layers: usize,
    /// Attention heads, h.
    pub heads: usize,
    /// Total width of q, k, v and u, H.
    pub hidden: usize,
    /// Width of the channel mixer, G.
    pub feed_forward: usize,
    /// Which layers use LRPE; their keys are twice as wide.
    pub lrpe: Vec<bool>,
    /// Activation of q and k.
    pub activation: Activation,
    /// Factor on the embedding's output: √D or 1.
    pub embedding_scale: f32,
    /// Whether the projections have a bias.
    pub bias: bool,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// Tokens in a training sequence; the model itself has no limit.
    pub context_length: u64,
}

impl Hparams {
    /// Reads and checks the keys that MODEL.md documents. Errors with [`ErrorKind::Model`] naming the key.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self> {
        let architecture = metadata.str("general.architecture")?.unwrap_or("none");
        if architecture != ARCHITECTURE {
            return Err(invalid(format_args!(
                "general.architecture is '{architecture}', not '{ARCHITECTURE}': this engine runs TransNormerLLM models only"
            )));
        }
        let keys = Keys(metadata);
        let layers = keys.size("block_count", 2..=512)?;
        let embedding = keys.size("embedding_length", 1..=1 << 16)?;
        let activation =
            keys.required("attention.activation", metadata.str(&key("attention.activation"))?)?;
        let lrpe =
            keys.required("attention.lrpe_layers", metadata.u32_array(&key("attention.lrpe_layers"))?)?;
        let hparams = Self {
            vocab_size: keys.size("vocab_size", 1..=1 << 20)?,
            embedding,
            layers,
            heads: keys.size("attention.head_count", 1..=1024)?,
            hidden: keys.size("attention.hidden_length", 1..=1 << 16)?,
            feed_forward: keys.size("feed_forward_length", 1..=1 << 18)?,
            lrpe: lrpe.iter().map(|&flag| flag != 0).collect(),
            activation: Activation::from_name(activation).ok_or_else(|| {
                invalid(format_args!("{}: unknown function '{activation}'", key("attention.activation")))
            })?,
            embedding_scale: keys.required("embedding_scale", metadata.f32(&key("embedding_scale"))?)?,
            bias: metadata.bool(&key("use_bias"))?.unwrap_or(false),
            tied: metadata.bool(&key("tie_embeddings"))?.unwrap_or(true),
            context_length: metadata.u64(&key("context_length"))?.unwrap_or(2048),
        };
        hparams.check(metadata)?;
        Ok(hparams)
    }

    /// Width of one head's q, k, v: H / h.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Width of one head's key in `layer`: twice the head's where LRPE is used.
    pub fn key_dim(&self, layer: usize) -> usize {
        if self.lrpe[layer] { 2 * self.head_dim() } else { self.head_dim() }
    }

    /// f32 values in the state of `layer`: (heads, key_dim, head_dim).
    pub fn state_len(&self, layer: usize) -> usize {
        self.heads * self.key_dim(layer) * self.head_dim()
    }

    /// Decay rate r of a head; its state decays by `exp(-r)` with each token (SPEC section 3.1, step 4).
    ///
    /// Slope and product are rounded to f32, as the official code does.
    pub fn decay(&self, layer: usize, head: usize) -> f64 {
        let slope = f64::from(slope(head, self.heads) as f32);
        let depth = 1.0 - layer as f64 / (self.layers - 1) as f64 + 1e-5;
        f64::from((slope * depth) as f32)
    }

    /// Weights in the model, the head counted once where it is the embedding.
    pub fn parameters(&self) -> u64 {
        let [v, d, h, g] =
            [self.vocab_size, self.embedding, self.hidden, self.feed_forward].map(|n| n as u64);
        let layer = 5 * d * h + 3 * d * g + if self.bias { 4 * h + 2 * d + 2 * g } else { 0 };
        let theta = self.lrpe.iter().filter(|&&used| used).count() as u64 * h;
        layer * self.layers as u64 + theta + v * d * if self.tied { 1 } else { 2 }
    }

    fn check(&self, metadata: &Metadata) -> Result<()> {
        if !self.hidden.is_multiple_of(self.heads) {
            return Err(invalid(format_args!(
                "{} heads do not divide the hidden width {}",
                self.heads, self.hidden
            )));
        }
        if self.lrpe.len() != self.layers {
            let len = self.lrpe.len();
            return Err(invalid(format_args!(
                "{}: {len} flags for {} layers",
                key("attention.lrpe_layers"),
                self.layers
            )));
        }
        if self.lrpe.contains(&true) && self.hidden != self.embedding {
            return Err(invalid(format_args!(
                "a layer with LRPE needs equal hidden and embedding widths, not {} and {}",
                self.hidden, self.embedding
            )));
        }
        if !(self.embedding_scale.is_finite() && self.embedding_scale > 0.0) {
            return Err(invalid(format_args!(
                "{}: {} is not a positive number",
                key("embedding_scale"),
                self.embedding_scale
            )));
        }
        // hidden · head_dim = heads · head_dim · head_dim
        let layer = (self.hidden * self.head_dim()) as u64;
        let state: u64 = self.lrpe.iter().map(|&lrpe| if lrpe { 2 * layer } else { layer }).sum();
        if state > MAX_STATE || self.layers * self.heads > MAX_HEADS {
            return Err(invalid(format_args!(
                "{} layers of {} heads have a state of {state} values; this engine takes up to {MAX_STATE} values and \
                 {MAX_HEADS} heads in all",
                self.layers, self.heads
            )));
        }
        let epsilon_key = key("attention.layer_norm_rms_epsilon");
        match metadata.f32(&epsilon_key)? {
            Some(epsilon) if epsilon != crate::kernels::rows::NORM_EPSILON => {
                Err(invalid(format_args!("{epsilon_key}: {epsilon}; this architecture has 1e-6")))
            }
            _ => Ok(()),
        }
    }
}

/// ALiBi's slope of head `j` of `heads` (SPEC section 3.1, step 4).
fn slope(j: usize, heads: usize) -> f64 {
    if heads.is_power_of_two() {
        return (-8.0 * (j + 1) as f64 / heads as f64).exp2();
    }
    // The slopes of the next lower power of two, then every second one of the next higher.
    let lower = 1 << heads.ilog2();
    if j < lower { slope(j, lower) } else { slope(2 * (j - lower), 2 * lower) }
}

/// The error function, by its Maclaurin series near zero and its continued fraction elsewhere; 1e-12 or better.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a < 3.0 {
        let (mut term, mut sum) = (a, a);
        for n in 1..100 {
            term *= -a * a / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return (sum * std::f64::consts::FRAC_2_SQRT_PI).copysign(x);
    }
    let fraction = (1..60).rev().fold(a, |f, n| a + f64::from(n) / 2.0 / f);
    (1.0 - (-a * a).exp() / (fraction * std::f64::consts::PI.sqrt())).copysign(x)
}

struct Keys<'a>(&'a Metadata);

impl Keys<'_> {
    fn required<T>(&self, name: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| invalid(format_args!("{} is missing: convert the checkpoint again", key(name))))
    }

    fn size(&self, name: &str, range: std::ops::RangeInclusive<u32>) -> Result<usize> {
        let value = self.required(name, self.0.u32(&key(name))?)?;
        if !range.contains(&value) {
            let (low, high) = range.into_inner();
            return Err(invalid(format_args!("{}: {value} is not in {low}..={high}", key(name))));
        }
        Ok(value as usize)
    }
}

fn key(name: &str) -> String {
    format!("{ARCHITECTURE}.{name}")
}

fn invalid(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Model, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_follow_alibi() {
        assert_eq!((0..4).map(|j| slope(j, 4)).collect::<Vec<_>>(), [0.25, 0.0625, 0.015625, 0.00390625]);
        let six: Vec<f64> = (0..6).map(|j| 1.0 / slope(j, 6)).collect();
        assert_eq!(six, [4.0, 16.0, 64.0, 256.0, 2.0, 8.0]);
    }

    #[test]
    fn erf_matches_known_values() {
        for (x, y) in
            [(0.5, 0.520_499_877_813_046_5), (2.0, 0.995_322_265_018_952_7), (3.5, 0.999_999_256_901_627_7)]
        {
            assert!((erf(x) - y).abs() < 1e-12, "{x}: {}", erf(x));
            assert!((erf(-x) + y).abs() < 1e-12);
        }
    }

    #[test]
    fn activations_have_their_names() {
        for (name, activation) in Activation::NAMES {
            assert_eq!(Activation::from_name(name), Some(activation));
            assert_eq!(Activation::from_name(activation.name()), Some(activation));
        }
        assert_eq!(Activation::from_name("mish"), None);
        assert_eq!(Activation::OnePlusElu.apply(0.5), 1.5);
        assert!((Activation::Silu.apply(1.0) - 0.731_058_6).abs() < 1e-6);
    }
}
