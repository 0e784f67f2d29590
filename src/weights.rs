//! The weights of a model: every tensor that the hyper-parameters call for, found in the file and checked.

use std::{collections::HashSet, fmt::Display, ops::Range, sync::Arc};

use crate::{
    dtype::DType,
    error::{Error, ErrorKind, Result},
    ggml,
    gguf::{Gguf, TensorInfo},
    hparams::Hparams,
    kernels::matmul::tiles,
    mapping::Mapping,
};

/// Metadata key: where it is 16, the matrices of types that have tiles are stored in tile order (MODEL.md).
pub const TILE_ROWS_KEY: &str = "transnormer.tile_rows";

/// A matrix of `rows` rows of `columns` elements: row by row, or, where its type has [`tiles`], in tiles of 16
/// rows, padded with zeros to a whole tile.
#[derive(Debug, Clone)]
pub struct Matrix {
    file: Arc<Mapping>,
    range: Range<usize>,
    /// Element type.
    pub dtype: DType,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
}

impl Matrix {
    /// A matrix of `rows` rows in ggml's order. Types that have tiles are copied into tile order, others stay.
    fn from_rows(
        file: &Arc<Mapping>,
        range: Range<usize>,
        dtype: DType,
        rows: usize,
        columns: usize,
    ) -> Self {
        let mut matrix = Self { file: file.clone(), range, dtype, rows, columns };
        if tiles::tileable(dtype) {
            let tile_bytes = tiles::ROWS * matrix.row_bytes();
            let mut tiled = vec![0; rows.div_ceil(tiles::ROWS) * tile_bytes];
            let mut padded = vec![0; tile_bytes];
            for (source, tile) in matrix.bytes().chunks(tile_bytes).zip(tiled.chunks_mut(tile_bytes)) {
                padded[..source.len()].copy_from_slice(source);
                padded[source.len()..].fill(0);
                tiles::to_tile(dtype, &padded, tile);
            }
            matrix.range = 0..tiled.len();
            matrix.file = Arc::new(Mapping::from_bytes(tiled));
        }
        matrix
    }

    /// A matrix of its own, quantized from `values`.
    #[cfg(test)]
    pub(crate) fn from_values(dtype: DType, columns: usize, values: &[f32]) -> Self {
        let mut bytes = Vec::new();
        match dtype {
            DType::F32 => values.iter().for_each(|value| bytes.extend(value.to_le_bytes())),
            _ => ggml::quantize(dtype, values, columns, None, &mut bytes).expect("whole blocks"),
        }
        let range = 0..bytes.len();
        Self::from_rows(&Arc::new(Mapping::from_bytes(bytes)), range, dtype, values.len() / columns, columns)
    }

    /// The stored bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.file[self.range.clone()]
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.columns as u64).expect("rows are whole blocks") as usize
    }

    /// Dequantizes row `row` into `out`, `columns` values. Panics if there is no such row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let row_bytes = self.row_bytes();
        if tiles::tileable(self.dtype) {
            let tile_bytes = tiles::ROWS * row_bytes;
            let tile = &self.bytes()[row / tiles::ROWS * tile_bytes..][..tile_bytes];
            let mut bytes = vec![0; row_bytes];
            tiles::row_of_tile(self.dtype, tile, row % tiles::ROWS, &mut bytes);
            ggml::dequantize(self.dtype, &bytes, out)
        } else {
            ggml::dequantize(self.dtype, &self.bytes()[row * row_bytes..][..row_bytes], out)
        }
        .expect("a row has `columns` elements");
    }
}

/// The weights of one layer. Shapes: D residual, H hidden, G feed-forward width.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Rows q, k, v, u of H each: (4H, D).
    pub qkvu: Matrix,
    /// (D, H)
    pub output: Matrix,
    /// LRPE angles, (heads, head_dim); empty where the layer has none.
    pub theta: Vec<f32>,
    /// l1, (G, D)
    pub gate: Matrix,
    /// l2, (G, D)
    pub up: Matrix,
    /// l3, (D, G)
    pub down: Matrix,
    /// Biases of the five projections; empty where the model has none.
    pub bias: Biases,
}

/// Biases, one value per row of the matrix of the same name; empty slices where the model has none.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct Biases {
    pub qkvu: Vec<f32>,
    pub output: Vec<f32>,
    pub gate: Vec<f32>,
    pub up: Vec<f32>,
    pub down: Vec<f32>,
}

/// All weights.
#[derive(Debug, Clone)]
pub struct Weights {
    /// Embedding, (V, D).
    pub embedding: Matrix,
    /// Output head, (V, D): the embedding where they are tied.
    pub head: Matrix,
    /// The layers, first to last.
    pub layers: Vec<Layer>,
}

impl Weights {
    /// Finds every tensor of MODEL.md's table in `gguf`; refuses missing, unexpected and misshapen ones with
    /// [`ErrorKind::Model`].
    pub fn from_gguf(gguf: &Gguf, file: &Arc<Mapping>, hparams: &Hparams) -> Result<Self> {
        let tiled = match gguf.metadata.u32(TILE_ROWS_KEY)? {
            None => false,
            Some(rows) if rows as usize == tiles::ROWS => true,
            Some(rows) => {
                let message =
                    format!("{TILE_ROWS_KEY}: {rows}; this build reads tiles of {} rows", tiles::ROWS);
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
        };
        let mut finder = Finder { gguf, file, tiled, used: HashSet::new() };
        let Hparams { vocab_size: v, embedding: d, hidden: h, feed_forward: g, .. } = *hparams;
        let embedding = finder.matrix("token_embd.weight", v, d)?;
        let head = if hparams.tied { embedding.clone() } else { finder.matrix("output.weight", v, d)? };
        let mut layers = Vec::with_capacity(hparams.layers);
        for i in 0..hparams.layers {
            let mut matrix =
                |name: &str, rows, columns| finder.matrix(&format!("blk.{i}.{name}.weight"), rows, columns);
            let (qkvu, output) = (matrix("attn_qkvu", 4 * h, d)?, matrix("attn_output", d, h)?);
            let (gate, up, down) =
                (matrix("ffn_gate", g, d)?, matrix("ffn_up", g, d)?, matrix("ffn_down", d, g)?);
            let theta = match hparams.lrpe[i] {
                true => finder.vector(
                    &format!("blk.{i}.attn_lrpe.theta"),
                    &[hparams.head_dim() as u64, hparams.heads as u64],
                )?,
                false => Vec::new(),
            };
            let bias = match hparams.bias {
                true => finder.biases(i, hparams)?,
                false => Biases::default(),
            };
            layers.push(Layer { qkvu, output, theta, gate, up, down, bias });
        }
        finder.refuse_unused()?;
        Ok(Self { embedding, head, layers })
    }
}

struct Finder<'a> {
    gguf: &'a Gguf,
    file: &'a Arc<Mapping>,
    tiled: bool,
    used: HashSet<&'a str>,
}

impl<'a> Finder<'a> {
    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<Matrix> {
        let info = self.tensor(name, &[columns as u64, rows as u64])?;
        let dtype = info.dtype;
        if self.tiled && tiles::stored_in_tiles(dtype, rows) {
            return Ok(Matrix { file: self.file.clone(), range: range(info), dtype, rows, columns });
        }
        Ok(Matrix::from_rows(self.file, range(info), dtype, rows, columns))
    }

    /// A small f32 tensor, copied.
    fn vector(&mut self, name: &str, shape: &[u64]) -> Result<Vec<f32>> {
        let info = self.tensor(name, shape)?;
        if info.dtype != DType::F32 {
            return Err(invalid(name, format_args!("type {}, but it must be F32", info.dtype)));
        }
        let values: Vec<f32> = self.file[range(info)]
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().expect("chunks of four")))
            .collect();
        match values.iter().position(|value| !value.is_finite()) {
            Some(i) => Err(invalid(name, format_args!("element {i} is not finite"))),
            None => Ok(values),
        }
    }

    fn biases(&mut self, layer: usize, hparams: &Hparams) -> Result<Biases> {
        let mut bias =
            |name: &str, len: usize| self.vector(&format!("blk.{layer}.{name}.bias"), &[len as u64]);
        Ok(Biases {
            qkvu: bias("attn_qkvu", 4 * hparams.hidden)?,
            output: bias("attn_output", hparams.embedding)?,
            gate: bias("ffn_gate", hparams.feed_forward)?,
            up: bias("ffn_up", hparams.feed_forward)?,
            down: bias("ffn_down", hparams.embedding)?,
        })
    }

    fn tensor(&mut self, name: &str, shape: &[u64]) -> Result<&'a TensorInfo> {
        let info = self.gguf.tensor(name).ok_or_else(|| invalid(name, "missing"))?;
        if info.shape != shape {
            return Err(invalid(
                name,
                format_args!("shape {:?}, but the metadata call for {shape:?}", info.shape),
            ));
        }
        self.used.insert(&info.name);
        Ok(info)
    }

    fn refuse_unused(&self) -> Result<()> {
        match self.gguf.tensors.iter().find(|info| !self.used.contains(info.name.as_str())) {
            Some(info) => Err(invalid(&info.name, "not a tensor of this architecture")),
            None => Ok(()),
        }
    }
}

/// The tensor's bytes in the file; the GGUF reader has checked that they lie inside.
fn range(info: &TensorInfo) -> Range<usize> {
    info.offset as usize..(info.offset + info.nbytes) as usize
}

fn invalid(name: &str, problem: impl Display) -> Error {
    Error::new(ErrorKind::Model, format_args!("tensor {name}: {problem}"))
}
