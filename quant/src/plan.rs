//! What a conversion will write: every tensor with its type and size, before a weight is read.

use std::collections::HashSet;

use transnormer::{
    dtype::DType,
    error::{Error, ErrorKind, Result},
    gguf::TensorSpec,
    tiles,
};

use crate::{
    checkpoint::{Checkpoint, SourceTensor},
    names::{self, ModelTensor},
    policy::{self, Preset},
};

/// Elements compared at a time.
const COMPARE_STEP: u64 = 4 << 20;

/// Where the output head comes from (SPEC §2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// It is the embedding.
    Tied,
    /// It is a tensor of its own.
    Separate,
    /// config.json ties it to the embedding, but the checkpoint has another one: that one is used.
    SeparateAgainstConfig,
}

impl Head {
    /// Decides by the configuration, and by comparing both tensors where it ties them and both exist.
    ///
    /// # Errors
    /// Those of reading the two tensors.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        if !checkpoint.config().tie_word_embeddings {
            return Ok(Self::Separate);
        }
        match (checkpoint.tensor(names::EMBEDDING), checkpoint.tensor(names::HEAD)) {
            (Some(embedding), Some(head)) if !same_values(checkpoint, embedding, head)? => {
                Ok(Self::SeparateAgainstConfig)
            }
            _ => Ok(Self::Tied),
        }
    }
}

/// One tensor of the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Where its elements come from.
    pub source: SourceTensor,
    /// Name in the GGUF file.
    pub name: String,
    /// Dimensions in the GGUF file, fastest first.
    pub shape: Vec<u64>,
    /// The type that the policy asks for.
    pub wanted: DType,
    /// The type that is written; another than `wanted` where the rows are not whole blocks of that.
    pub dtype: DType,
    /// Whether its rows are written in tiles of 16, the order that the engine reads without a copy.
    pub tiled: bool,
    /// Size in the file, without padding.
    pub bytes: u64,
}

impl PlannedTensor {
    /// Elements of one row, the unit of quantization.
    pub fn row_len(&self) -> u64 {
        self.shape[0]
    }
}

/// The whole output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The mix of types.
    pub preset: Preset,
    /// The tensors, in file order.
    pub tensors: Vec<PlannedTensor>,
    /// Where the output head comes from.
    pub head: Head,
}

impl Plan {
    /// Plans the conversion of `checkpoint`, whose head is `head`, to `preset`.
    ///
    /// # Errors
    /// [`ErrorKind::Model`] where a tensor that config.json calls for is missing or has another shape, or
    /// the checkpoint holds a tensor that it does not call for.
    pub fn new(checkpoint: &Checkpoint, head: Head, preset: Preset) -> Result<Self> {
        let config = checkpoint.config();
        let expected = names::model_tensors(config, head != Head::Tied);
        let tensors: Result<Vec<_>> = expected
            .iter()
            .map(|tensor| {
                let source = find(checkpoint, tensor)?;
                let shape = tensor.target_shape();
                let wanted = preset.wanted(tensor.role, tensor.layer, config.layers);
                let dtype = policy::fitting(wanted, shape[0]);
                let row_bytes =
                    dtype.row_bytes(shape[0]).expect("fitting returns a type whose blocks divide the row");
                let bytes = row_bytes * (source.elements / shape[0]);
                Ok(PlannedTensor {
                    source: source.clone(),
                    name: tensor.target.clone(),
                    shape,
                    wanted,
                    dtype,
                    tiled: false,
                    bytes,
                })
            })
            .collect();
        let tensors = tensors?;
        refuse_unexpected(checkpoint, &expected)?;
        Ok(Self { preset, tensors, head })
    }

    /// Has every tensor that can be in tiles written so ([`transnormer::tiles`]). Only this engine reads such
    /// a file; without this call the rows are in ggml's order, and the engine puts them into tiles as it loads.
    #[must_use]
    pub fn in_tiles(mut self) -> Self {
        for tensor in &mut self.tensors {
            let rows = tensor.source.elements / tensor.row_len();
            tensor.tiled = tiles::stored_in_tiles(tensor.dtype, rows as usize);
        }
        self
    }

    /// Number of parameters.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.source.elements).sum()
    }

    /// Bytes of all tensors, without padding.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// Average bits for a parameter.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.bytes() as f64 / self.parameters() as f64
    }

    /// The tensors as the GGUF writer wants them.
    pub fn specs(&self) -> Vec<TensorSpec> {
        let spec = |tensor: &PlannedTensor| TensorSpec {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            dtype: tensor.dtype,
        };
        self.tensors.iter().map(spec).collect()
    }
}

fn find<'a>(checkpoint: &'a Checkpoint, expected: &ModelTensor) -> Result<&'a SourceTensor> {
    let ModelTensor { source: name, shape, .. } = expected;
    let Some(found) = checkpoint.tensor(name) else {
        let reason = if name == names::HEAD { ", and config.json has tie_word_embeddings false" } else { "" };
        return Err(invalid(checkpoint, format_args!("tensor {name:?} is missing{reason}")));
    };
    if found.shape != *shape {
        let file = checkpoint.files()[found.file].path().display();
        return Err(Error::new(
            ErrorKind::Model,
            format_args!(
                "{file}: tensor {name:?} has shape {:?}, config.json calls for {shape:?}",
                found.shape
            ),
        ));
    }
    Ok(found)
}

/// A tensor that nobody asked for means another architecture, or another version of it.
fn refuse_unexpected(checkpoint: &Checkpoint, expected: &[ModelTensor]) -> Result<()> {
    let mut known: HashSet<&str> = expected.iter().map(|tensor| tensor.source.as_str()).collect();
    known.insert(names::HEAD);
    match checkpoint.tensors().find(|tensor| !known.contains(tensor.name.as_str())) {
        None => Ok(()),
        Some(SourceTensor { name, .. }) => Err(invalid(
            checkpoint,
            format_args!("tensor {name:?} is not part of the model that config.json describes"),
        )),
    }
}

fn same_values(checkpoint: &Checkpoint, a: &SourceTensor, b: &SourceTensor) -> Result<bool> {
    if (a.file, a.range(), a.dtype) == (b.file, b.range(), b.dtype) {
        return Ok(true);
    }
    if a.elements != b.elements {
        return Ok(false);
    }
    let mut scratch = Vec::new();
    for start in (0..a.elements).step_by(COMPARE_STEP as usize) {
        let range = start..a.elements.min(start + COMPARE_STEP);
        let left = checkpoint.read_f32(a, range.clone(), &mut scratch)?;
        if left != checkpoint.read_f32(b, range, &mut scratch)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn invalid(checkpoint: &Checkpoint, message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Model, format_args!("{}: {message}", checkpoint.dir().display()))
}
