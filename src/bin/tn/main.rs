//! The `tn` command: runs, examines and measures TransNormerLLM models.

mod bench;
mod chat;
mod inspect;
mod logits;
mod run;
mod shared;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs TransNormerLLM models: linear attention, constant memory and time per token.
#[derive(Debug, Parser)]
#[command(name = "tn", version, args_override_self = true, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::Args),
    Chat(chat::Args),
    Inspect(inspect::Args),
    Logits(logits::Args),
    Bench(bench::Args),
}

const AFTER_HELP: &str = "\
Examples:
  tn run model.gguf \"Once upon a time\"
  tn chat model.gguf
  tn inspect model.gguf --tensors
  tn bench model.gguf -p 512 -n 128 -d 0,4096

tn COMMAND --help says more about each. tn-quantize makes model files from checkpoints.

Exit codes:
  0    success
  1    failed
  2    wrong usage
  130  interrupted";

fn main() -> ExitCode {
    if let Some(message) = shared::unknown_isa() {
        eprintln!("tn: {message}");
    }
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    result.map_or_else(shared::Failure::report, |()| ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
