//! The command line of `tn-quantize`.

use std::{num::NonZero, path::PathBuf};

use clap::Parser;
use tn_quantize::policy::Preset;

/// Converts an official TransNormerLLM checkpoint to a quantized GGUF file.
#[derive(Debug, Parser)]
#[command(name = "tn-quantize", version, after_help = AFTER_HELP)]
pub struct Args {
    /// Folder with config.json, the weights (safetensors or .bin, whole or sharded) and tokenizer.model
    pub checkpoint: PathBuf,

    /// File to write; it appears complete or not at all
    #[arg(value_name = "OUT.gguf", required_unless_present = "dry_run")]
    pub out: Option<PathBuf>,

    /// Types of the weights
    #[arg(long = "type", value_name = "TYPE", ignore_case = true, default_value = "Q4_K_M")]
    pub preset: Preset,

    /// Show what would be written, and write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Replace OUT.gguf if it exists
    #[arg(long)]
    pub force: bool,

    /// Write quantized rows in ggml's order, for other GGUF tools; the engine then copies the weights as it loads
    #[arg(long)]
    pub plain: bool,

    /// Threads that quantize [default: one for each core]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZero<u16>>,

    /// Print the report as one line of JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  tn-quantize TransNormerLLM-385M tnl-385m.gguf --type Q4_K_M
  tn-quantize TransNormerLLM-7B tnl-7b.gguf --type Q8_0 --threads 8
  tn-quantize TransNormerLLM-1B --dry-run

The table and the JSON go to standard output; progress, warnings and errors to standard error.

Exit codes:
  0    the file is complete, or the dry run found no fault
  1    failed; nothing was written, a file that was there before is unchanged
  2    wrong usage
  130  interrupted; nothing was written";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn types_are_read_in_any_case() {
        let parse = |preset: &str| Args::try_parse_from(["tn-quantize", "in", "out", "--type", preset]);
        assert_eq!(parse("q4_k_m").unwrap().preset, Preset::Q4_K_M);
        assert_eq!(parse("BF16").unwrap().preset, Preset::BF16);
        assert!(parse("Q9").is_err());
    }

    #[test]
    fn only_a_dry_run_needs_no_output() {
        assert!(Args::try_parse_from(["tn-quantize", "in"]).is_err());
        assert!(Args::try_parse_from(["tn-quantize", "in", "--dry-run"]).is_ok());
    }
}
