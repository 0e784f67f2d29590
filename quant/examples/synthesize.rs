//! Writes a checkpoint of reproducible random weights in the official layout:
//! `synthesize 385m|1b|7b|CONFIG.json OUT_DIR [--seed N] [--dtype f32|f16|bf16] [--shard-bytes N] [--tokenizer FILE]`

use std::{fs, path::PathBuf, process::ExitCode};

use clap::Parser;
use tn_quantize::{
    checkpoint::json,
    synthetic::{self, Options, Shape},
};
use transnormer::{
    dtype::DType,
    error::{Error, Result},
};

/// Writes a checkpoint of reproducible random weights in the official layout.
#[derive(Debug, Parser)]
struct Args {
    /// Published size (385m, 1b, 7b), or a config.json
    model: String,

    /// Folder to write
    out: PathBuf,

    /// Seed of the weights
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Element type: f32, f16 or bf16
    #[arg(long, default_value = "f32")]
    dtype: DType,

    /// Most bytes in one weight file
    #[arg(long, default_value_t = u64::MAX)]
    shard_bytes: u64,

    /// SentencePiece model to copy; without it, one of the right size is made up
    #[arg(long)]
    tokenizer: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("synthesize: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let config = match Shape::from_name(&args.model) {
        Some(shape) => shape.config_json(),
        None => json::read_object(args.model.as_ref(), 1 << 20)?.into(),
    };
    let read = |path: &PathBuf| fs::read(path).map_err(|source| Error::io(path, source));
    let tokenizer = args.tokenizer.as_ref().map(read).transpose()?;
    let options = Options { seed: args.seed, dtype: args.dtype, shard_bytes: args.shard_bytes, tokenizer };
    synthetic::write_checkpoint(&args.out, &config, &options)
}
