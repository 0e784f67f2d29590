//! The tensors of a TransNormerLLM: what each is called in a checkpoint and in a GGUF file, and its shape.

use crate::checkpoint::Config;

/// What a tensor does; the type policy decides by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Token embedding, [V, D]; also the output head where both are tied.
    Embedding,
    /// Output head, [V, D].
    Head,
    /// The projections q, k, v, u of a layer as one matrix, [4H, D].
    Qkvu,
    /// Output projection of the token mixer, [D, H].
    AttentionOutput,
    /// LRPE angles per head and channel, [h, 1, D / h].
    Theta,
    /// First factor of the channel mixer (`l1`), [G, D].
    Gate,
    /// Second factor of the channel mixer (`l2`), [G, D].
    Up,
    /// Output projection of the channel mixer (`l3`), [D, G].
    Down,
    /// Bias of any of the layer's projections.
    Bias,
}

/// A tensor that a model of a given configuration has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelTensor {
    /// Name in the checkpoint (SPEC §2).
    pub source: String,
    /// Name in the GGUF file.
    pub target: String,
    /// Dimensions in the checkpoint, slowest first.
    pub shape: Vec<u64>,
    /// What it does.
    pub role: Role,
    /// The layer it belongs to.
    pub layer: Option<u32>,
}

impl ModelTensor {
    /// Dimensions in the GGUF file: fastest first, without LRPE's empty middle one.
    pub fn target_shape(&self) -> Vec<u64> {
        match self.role {
            Role::Theta => vec![self.shape[2], self.shape[0]],
            _ => self.shape.iter().rev().copied().collect(),
        }
    }
}

/// Checkpoint name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Checkpoint name of the output head.
pub const HEAD: &str = "lm_head.weight";

/// The matrices of a layer: name in the checkpoint, name in the GGUF file, role.
const PROJECTIONS: [(&str, &str, Role); 5] = [
    ("token_mixer.qkvu_proj", "attn_qkvu", Role::Qkvu),
    ("token_mixer.out_proj", "attn_output", Role::AttentionOutput),
    ("channel_mixer.l1", "ffn_gate", Role::Gate),
    ("channel_mixer.l2", "ffn_up", Role::Up),
    ("channel_mixer.l3", "ffn_down", Role::Down),
];

/// Every tensor of a model of this configuration, in the order of the GGUF file. `separate_head`: whether the
/// output head is a tensor of its own.
pub fn model_tensors(config: &Config, separate_head: bool) -> Vec<ModelTensor> {
    let outer = |source: &str, target: &str, role| ModelTensor {
        source: source.to_owned(),
        target: target.to_owned(),
        shape: vec![config.vocab_size.into(), config.embed_dim.into()],
        role,
        layer: None,
    };
    let mut tensors = vec![outer(EMBEDDING, "token_embd.weight", Role::Embedding)];
    if separate_head {
        tensors.push(outer(HEAD, "output.weight", Role::Head));
    }
    (0..config.layers).for_each(|layer| push_layer(config, layer, &mut tensors));
    tensors
}

fn push_layer(config: &Config, layer: u32, tensors: &mut Vec<ModelTensor>) {
    let mut push = |source: String, target: String, shape, role| {
        let (source, target) = (format!("model.layers.{layer}.{source}"), format!("blk.{layer}.{target}"));
        tensors.push(ModelTensor { source, target, shape, role, layer: Some(layer) });
    };
    for (source, target, role) in PROJECTIONS {
        let [rows, columns] = projection_shape(config, role);
        push(format!("{source}.weight"), format!("{target}.weight"), vec![rows, columns], role);
        if config.bias {
            push(format!("{source}.bias"), format!("{target}.bias"), vec![rows], Role::Bias);
        }
    }
    if config.lrpe[layer as usize] {
        let (heads, width) = (u64::from(config.heads), u64::from(config.embed_dim / config.heads));
        let shape = vec![heads, 1, width];
        push("token_mixer.lrpe.theta".to_owned(), "attn_lrpe.theta".to_owned(), shape, Role::Theta);
    }
}

/// Rows and columns of a projection, [output features, input features].
fn projection_shape(config: &Config, role: Role) -> [u64; 2] {
    let [d, h, g] = [config.embed_dim, config.hidden_dim, config.glu_dim].map(u64::from);
    match role {
        Role::Qkvu => [4 * h, d],
        Role::AttentionOutput => [d, h],
        Role::Gate | Role::Up => [g, d],
        Role::Down => [d, g],
        Role::Embedding | Role::Head | Role::Theta | Role::Bias => unreachable!("not in PROJECTIONS"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::{self, Shape};

    #[test]
    fn parameter_counts_are_those_of_the_specification() {
        let counts = [
            (Shape::M385, [398_984_192, 464_520_192]),
            (Shape::B1, [1_020_266_496, 1_151_338_496]),
            (Shape::B7, [6_836_719_616, 7_098_863_616]),
        ];
        for (shape, expected) in counts {
            let config = synthetic::config(&shape.config_json()).unwrap();
            let count = |separate_head| -> u64 {
                model_tensors(&config, separate_head)
                    .iter()
                    .map(|tensor| tensor.shape.iter().product::<u64>())
                    .sum()
            };
            assert_eq!([count(false), count(true)], expected, "{shape:?}");
        }
    }

    #[test]
    fn biases_and_angles_only_where_configured() {
        let mut config = synthetic::config(&synthetic::tiny_config_json()).unwrap();
        let names = |config: &Config| -> Vec<String> {
            model_tensors(config, true).into_iter().map(|tensor| tensor.target).collect()
        };
        let plain = names(&config);
        assert_eq!(plain[..2], ["token_embd.weight", "output.weight"]);
        assert!(plain.contains(&"blk.0.attn_lrpe.theta".to_owned()));
        assert!(!plain.contains(&"blk.1.attn_lrpe.theta".to_owned()));
        assert!(!plain.iter().any(|name| name.ends_with(".bias")));
        config.bias = true;
        assert_eq!(names(&config).len(), plain.len() + 10);
    }
}
