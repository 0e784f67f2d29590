//! What the commands have in common: options, failures, and facts for people.

use std::{
    fmt, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{self, ExitCode},
};

use clap::value_parser;
use transnormer::{CancelToken, ErrorKind, Isa, Model, SamplerOptions, Session, SessionOptions, Stats};

/// Exit code after an interrupt: 128 and the number of SIGINT.
const INTERRUPTED: u8 = 130;

/// Why a command ends early.
#[derive(Debug)]
pub enum Failure {
    /// The arguments make no sense.
    Usage(String),
    /// The work failed.
    Failed(String),
    /// Standard output cannot be written.
    Output(io::Error),
    /// Ctrl-C.
    Interrupted,
}

impl Failure {
    /// Tells the user and gives the exit code.
    pub fn report(self) -> ExitCode {
        let (message, code) = match self {
            Failure::Usage(message) => (message, 2),
            Failure::Failed(message) => (message, 1),
            // The reader, such as `head`, has seen enough.
            Failure::Output(e) if e.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
            Failure::Output(e) => (format!("standard output: {e}"), 1),
            Failure::Interrupted => return ExitCode::from(INTERRUPTED),
        };
        note(format_args!("tn: {message}"));
        ExitCode::from(code)
    }
}

impl From<transnormer::Error> for Failure {
    fn from(error: transnormer::Error) -> Self {
        match error.kind() {
            ErrorKind::InvalidArgument => Failure::Usage(error.to_string()),
            _ => Failure::Failed(error.to_string()),
        }
    }
}

/// Only for errors of standard output; others name their file.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Output(error)
    }
}

/// The model and how to run it.
#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// Model file (GGUF)
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,

    /// Threads [default: one for each performance core]
    #[arg(short, long, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
}

impl ModelArgs {
    /// Opens the model and starts a session.
    pub fn session(&self) -> Result<Session, Failure> {
        let threads = self.threads.unwrap_or(0);
        Ok(Session::new(&open(&self.model)?, &SessionOptions { threads, ..Default::default() })?)
    }
}

/// How to choose tokens.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Sampling, in the order of its steps")]
pub struct SamplingArgs {
    /// Divide the logits of recent tokens by this; 1 is off
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repeat_penalty: f32,

    /// Subtract this from recent tokens' logits for each occurrence
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,

    /// Subtract this from recent tokens' logits
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,

    /// How many tokens are recent
    #[arg(long, value_name = "N", default_value_t = 64)]
    repeat_last_n: usize,

    /// Always take the likeliest token, as --temp 0 does
    #[arg(long, conflicts_with = "temp")]
    greedy: bool,

    /// Keep the N likeliest tokens; 0 keeps all
    #[arg(long, value_name = "N", default_value_t = 40)]
    top_k: usize,

    /// Keep the most typical tokens with together this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    typical: f32,

    /// Keep the likeliest tokens with together this probability
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,

    /// Keep tokens at least this many times as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    min_p: f32,

    /// Temperature: lower is safer, higher more varied
    #[arg(long, alias = "temperature", value_name = "T", default_value_t = 0.8)]
    temp: f32,

    /// Seed, for the same text again [default: another each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// The options of the library.
    pub fn options(&self) -> SamplerOptions {
        SamplerOptions {
            temperature: if self.greedy { 0.0 } else { self.temp },
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical,
            repeat_penalty: self.repeat_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            repeat_last_n: self.repeat_last_n,
            logit_bias: Vec::new(),
            seed: self.seed,
        }
    }
}

/// Parses a number of threads.
pub fn threads(text: &str) -> Result<usize, String> {
    let n = text.parse::<usize>().map_err(|e| e.to_string())?;
    if (1..=512).contains(&n) { Ok(n) } else { Err(format!("{n} is not in 1..=512")) }
}

/// Parser of `-n`: a number of tokens, or -1 for no limit.
pub fn predict() -> clap::builder::RangedI64ValueParser<i64> {
    value_parser!(i64).range(-1..)
}

/// Opens a model; says what to do where there is none.
pub fn open(path: &Path) -> Result<Model, Failure> {
    exists(path)?;
    Ok(Model::open(path)?)
}

/// Refuses a path that no model can be at.
pub fn exists(path: &Path) -> Result<(), Failure> {
    let shown = path.display();
    match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Failure::Failed(format!(
            "{shown}: no such file; `tn-quantize CHECKPOINT_DIR {shown}` makes a model file"
        ))),
        Ok(metadata) if metadata.is_dir() => Err(Failure::Failed(format!(
            "{shown}: is a folder; give a .gguf file, `tn-quantize {shown} OUT.gguf` makes one from a checkpoint"
        ))),
        _ => Ok(()),
    }
}

/// Makes Ctrl-C cancel the token that is returned; where it is cancelled already, Ctrl-C ends the program.
pub fn cancel_on_interrupt() -> Result<CancelToken, Failure> {
    let token = CancelToken::new();
    let handle = token.clone();
    ctrlc::set_handler(move || {
        if handle.is_cancelled() {
            note("");
            process::exit(INTERRUPTED.into());
        }
        handle.cancel();
    })
    .map_err(|e| Failure::Failed(format!("cannot handle Ctrl-C: {e}")))?;
    Ok(token)
}

/// Writes a line to standard error, where nothing can be done about a failure.
pub fn note(line: impl fmt::Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Tells what a generation took.
pub fn summarize(stats: &Stats, session: &Session, seed: u64) {
    let Stats { prompt_tokens, tokens, .. } = stats;
    note(format_args!("\nprompt   {prompt_tokens:>6} tokens {:>10.1} tokens/s", stats.prompt_rate()));
    note(format_args!("answer   {tokens:>6} tokens {:>10.1} tokens/s", stats.rate()));
    let state = Bytes(session.state().bytes() as u64);
    match peak_memory() {
        Some(peak) => note(format_args!("memory   {} at most, state {state}", Bytes(peak))),
        None => note(format_args!("memory   state {state}")),
    }
    note(format_args!("threads  {}, seed {seed}", session.threads()));
}

/// Bytes, written in binary units.
#[derive(Clone, Copy)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["KiB", "MiB", "GiB", "TiB"];
        let Some(last) = (self.0.max(1).ilog2() / 10).checked_sub(1) else {
            return f.pad(&format!("{} B", self.0));
        };
        let unit = (last as usize).min(units.len() - 1);
        f.pad(&format!("{:.2} {}", self.0 as f64 / 1024f64.powi(unit as i32 + 1), units[unit]))
    }
}

/// A count, written in thousands, millions or billions.
pub fn count(n: u64) -> String {
    match n {
        0..1_000 => n.to_string(),
        1_000..1_000_000 => format!("{:.2} K", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

/// The most memory that the process has had, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// What to say where `TRANSNORMER_ISA` names no instruction set of this machine.
pub fn unknown_isa() -> Option<String> {
    let wanted = std::env::var("TRANSNORMER_ISA").ok().filter(|name| !name.is_empty())?;
    let names: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
    let known = names.iter().any(|name| name.eq_ignore_ascii_case(&wanted));
    (!known).then(|| {
        let (best, names) = (Isa::best(), names.join(", "));
        format!("warning: TRANSNORMER_ISA={wanted} is none of {names}; using {best}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_written_in_units() {
        for (n, text) in [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 19, "1.50 MiB")] {
            assert_eq!(Bytes(n).to_string(), text);
        }
        assert_eq!(Bytes(u64::MAX).to_string(), "16777216.00 TiB");
        for (n, text) in [(999, "999"), (8_390_000, "8.39 M"), (7_000_000_000, "7.00 B")] {
            assert_eq!(count(n), text);
        }
    }
}
