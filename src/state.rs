//! The past of a sequence: one matrix per head and layer, whose size does not depend on what was read.

use crate::hparams::Hparams;

/// The recurrent state of one sequence: for each layer (heads, key_dim, head_dim) f32.
///
/// All zero is the valid state of a sequence that has read nothing.
#[derive(Clone, PartialEq)]
pub struct State {
    values: Vec<f32>,
    /// Start of each layer's values, and the end of the last.
    offsets: Vec<usize>,
}

impl State {
    /// The empty state of a model of this shape.
    pub fn new(hparams: &Hparams) -> Self {
        let mut offsets = vec![0];
        for layer in 0..hparams.layers {
            offsets.push(offsets[layer] + hparams.state_len(layer));
        }
        Self { values: vec![0.0; offsets[hparams.layers]], offsets }
    }

    /// One layer's state, (heads, key_dim, head_dim).
    pub fn layer(&self, layer: usize) -> &[f32] {
        &self.values[self.offsets[layer]..self.offsets[layer + 1]]
    }

    /// One layer's state, for writing.
    pub fn layer_mut(&mut self, layer: usize) -> &mut [f32] {
        &mut self.values[self.offsets[layer]..self.offsets[layer + 1]]
    }

    /// All layers, one after the other.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All layers, for writing.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.values[..])
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.values.fill(0.0);
    }
}
