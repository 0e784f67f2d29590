//! `tn bench`: speed of reading and of generating, at several depths.

use std::{
    collections::HashMap,
    io::{self, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::value_parser;
use serde::Serialize;
use transnormer::{DType, Isa, Model, Session, SessionOptions, weights::Matrix};

use crate::shared::{Bytes, Failure, count, open, threads};

mod limit;

/// Measures tokens per second
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP, allow_negative_numbers = true)]
pub struct Args {
    /// Model file (GGUF)
    model: PathBuf,

    /// Tokens to read at once (pp); 0 leaves the test out
    #[arg(short = 'p', long, value_name = "N,...", value_delimiter = ',', default_value = "512", value_parser = tokens)]
    n_prompt: Vec<usize>,

    /// Tokens to generate one by one (tg); 0 leaves the test out
    #[arg(short = 'n', long, value_name = "N,...", value_delimiter = ',', default_value = "128", value_parser = tokens)]
    n_gen: Vec<usize>,

    /// Tokens to read before each test
    #[arg(short = 'd', long, value_name = "N,...", value_delimiter = ',', default_value = "0,4096,32768", value_parser = tokens)]
    n_depth: Vec<usize>,

    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = value_parser!(u32).range(1..))]
    repetitions: u32,

    /// Threads [default: one for each performance core]
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', value_parser = threads)]
    threads: Vec<usize>,

    /// A JSON array instead of a table
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  tn bench model.gguf
  tn bench model.gguf -p 512 -n 128 -d 0,4096,32768 -t 1,2
  tn bench model.gguf -p 0 -n 64 -r 20 --json

Tests: pp512 reads 512 tokens at once, tg128 computes 128 tokens one by one. At a depth (\"@ d4096\") that many
tokens are read first, outside the measured time; tests and repetitions go on from there. t/s is mean ±
standard deviation.

GB/s is the memory that generating reads and writes: the weights once and the state twice per token; \"of limit\"
is its share of the speed at which as many threads read the same weights without computing, measured in this
run. GOP/s counts multiplications and additions with weights while reading a prompt. All are from the median.";

/// A number of tokens; more than a million in one test says nothing that fewer do not.
fn tokens(arg: &str) -> Result<usize, String> {
    match arg.parse() {
        Ok(count) if count <= 1 << 20 => Ok(count),
        _ => Err(format!("a number from 0 to {}", 1 << 20)),
    }
}

/// One row of the result; names are those of llama-bench where it has the field.
#[derive(Debug, Serialize)]
struct Row {
    model_filename: String,
    model_type: String,
    model_size: u64,
    model_n_params: u64,
    /// Bytes of weights that each generated token reads.
    weight_bytes: u64,
    /// Bytes of state that each token reads and writes.
    state_bytes: u64,
    backend: String,
    n_threads: usize,
    n_prompt: usize,
    n_gen: usize,
    n_depth: usize,
    avg_ts: f64,
    stddev_ts: f64,
    median_ts: f64,
    samples_ns: Vec<u64>,
    samples_ts: Vec<f64>,
    /// Only of generating.
    gb_per_s: Option<f64>,
    /// What reading the weights alone reaches.
    limit_gb_per_s: f64,
    /// Only of prompts.
    gop_per_s: Option<f64>,
}

/// What is measured.
#[derive(Clone, Copy)]
enum Test {
    Prompt(usize),
    Generate(usize),
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let model = open(&args.model)?;
    let mut out = io::stdout().lock();
    let mut rows = Vec::new();
    if !args.json {
        header(&mut out, &model_type(args, &model))?;
    }
    let all_cores = [0];
    for &threads in if args.threads.is_empty() { &all_cores[..] } else { &args.threads } {
        let options = SessionOptions { threads, ..Default::default() };
        let mut bench = Bench::new(Session::new(&model, &options)?);
        for &depth in &args.n_depth {
            bench.descend(depth)?;
            let prompts = args.n_prompt.iter().map(|&n| Test::Prompt(n));
            let tests = prompts.chain(args.n_gen.iter().map(|&n| Test::Generate(n)));
            for test in tests.filter(|test| test.tokens() > 0) {
                let samples = bench.measure(test, depth, args.repetitions)?;
                let row = row(args, &bench, test, depth, &samples);
                if !args.json {
                    line(&mut out, &row)?;
                }
                rows.push(row);
            }
        }
    }
    if args.json {
        serde_json::to_writer_pretty(&mut out, &rows).map_err(io::Error::from)?;
        writeln!(out)?;
    }
    Ok(())
}

impl Test {
    fn tokens(self) -> usize {
        match self {
            Test::Prompt(n) | Test::Generate(n) => n,
        }
    }
}

struct Bench {
    session: Session,
    ids: Ids,
    /// Bytes per second.
    limit: f64,
}

impl Bench {
    fn new(session: Session) -> Self {
        let weights: Vec<&[u8]> = token_matrices(session.model()).map(Matrix::bytes).collect();
        let limit = limit::read_speed(&weights, session.threads());
        Self { session, ids: Ids(0), limit }
    }

    /// Reads `depth` tokens from the start.
    fn descend(&mut self, depth: usize) -> Result<(), Failure> {
        self.session.reset();
        let ids = self.ids.take(depth, self.session.model().hparams().vocab_size);
        Ok(self.session.read(&ids)?)
    }

    /// Times of `repetitions`, after one that warms up and does not count.
    fn measure(&mut self, test: Test, depth: usize, repetitions: u32) -> Result<Vec<Duration>, Failure> {
        self.once(match test {
            Test::Prompt(_) => test,
            Test::Generate(_) => Test::Generate(1),
        })?;
        let mut samples = Vec::new();
        for _ in 0..repetitions {
            // Deeper, each goes on from the last: reading again would take long, and no step depends on what
            // was read before.
            if depth == 0 {
                self.session.reset();
            }
            samples.push(self.once(test)?);
        }
        Ok(samples)
    }

    fn once(&mut self, test: Test) -> Result<Duration, Failure> {
        let vocab_size = self.session.model().hparams().vocab_size;
        let ids = self.ids.take(test.tokens(), vocab_size);
        let start = Instant::now();
        match test {
            Test::Prompt(_) => self.session.read(&ids)?,
            Test::Generate(_) => ids.chunks(1).try_for_each(|id| self.session.read(id))?,
        }
        Ok(start.elapsed())
    }
}

/// Token ids that look random and are the same in each run.
struct Ids(u64);

impl Ids {
    fn take(&mut self, n: usize, vocab_size: usize) -> Vec<u32> {
        (0..n)
            .map(|_| {
                // Knuth's MMIX generator; its high bits are good.
                self.0 =
                    self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((self.0 >> 33) % vocab_size as u64) as u32
            })
            .collect()
    }
}

fn row(args: &Args, bench: &Bench, test: Test, depth: usize, samples: &[Duration]) -> Row {
    let session = &bench.session;
    let model = session.model();
    let speeds: Vec<f64> = samples.iter().map(|t| test.tokens() as f64 / t.as_secs_f64().max(1e-9)).collect();
    let (n_prompt, n_gen) = match test {
        Test::Prompt(n) => (n, 0),
        Test::Generate(n) => (0, n),
    };
    let median_ts = median(&speeds);
    let weight_bytes = token_matrices(model).map(|matrix| matrix.bytes().len() as u64).sum();
    let state_bytes = session.state().bytes() as u64;
    let token_bytes = (weight_bytes + 2 * state_bytes) as f64;
    Row {
        model_filename: args.model.display().to_string(),
        model_type: model_type(args, model),
        model_size: model.file_bytes(),
        model_n_params: model.hparams().parameters(),
        weight_bytes,
        state_bytes,
        backend: format!("CPU {}", Isa::best()),
        n_threads: session.threads(),
        n_prompt,
        n_gen,
        n_depth: depth,
        avg_ts: mean(&speeds),
        stddev_ts: standard_deviation(&speeds),
        median_ts,
        samples_ns: samples.iter().map(|t| t.as_nanos() as u64).collect(),
        samples_ts: speeds,
        gb_per_s: matches!(test, Test::Generate(_)).then_some(token_bytes * median_ts / 1e9),
        limit_gb_per_s: bench.limit / 1e9,
        gop_per_s: match test {
            Test::Prompt(n) => Some(prompt_operations(model, n) * median_ts / n as f64 / 1e9),
            Test::Generate(_) => None,
        },
    }
}

/// The matrices that each generated token reads whole. Of the embedding it reads a row, unless it is the head.
fn token_matrices(model: &Model) -> impl Iterator<Item = &Matrix> {
    layer_matrices(model).chain([&model.weights().head])
}

fn layer_matrices(model: &Model) -> impl Iterator<Item = &Matrix> {
    model.weights().layers.iter().flat_map(|l| [&l.qkvu, &l.output, &l.gate, &l.up, &l.down])
}

/// Multiplications and additions with weights in a prompt of `n` tokens, of which only the last needs the head.
fn prompt_operations(model: &Model, n: usize) -> f64 {
    let weights = |matrix: &Matrix| 2.0 * matrix.rows as f64 * matrix.columns as f64;
    n as f64 * layer_matrices(model).map(weights).sum::<f64>() + weights(&model.weights().head)
}

/// The model's name, and the type that most of its bytes have.
fn model_type(args: &Args, model: &Model) -> String {
    let stem = || args.model.file_stem().unwrap_or_default().to_string_lossy();
    let name = match model.metadata().str("general.name") {
        Ok(Some(name)) => name.chars().filter(|c| !c.is_control() && *c != '|').collect(),
        _ => stem().into_owned(),
    };
    let mut bytes: HashMap<DType, usize> = HashMap::new();
    for matrix in layer_matrices(model).chain([&model.weights().embedding]) {
        *bytes.entry(matrix.dtype).or_default() += matrix.bytes().len();
    }
    let main = bytes.into_iter().max_by_key(|&(dtype, bytes)| (bytes, dtype.ggml_id()));
    format!("{name} {}", main.expect("a model has weights").0.name())
}

fn header(out: &mut impl Write, model: &str) -> io::Result<()> {
    let width = model.chars().count().max(5);
    writeln!(
        out,
        "| {:<width$} | {:>10} | {:>8} | {:<15} | {:>7} | {:>15} | {:>20} | {:>9} | {:>6} | {:>8} | {:>6} |",
        "model", "size", "params", "backend", "threads", "test", "t/s", "median", "GB/s", "of limit", "GOP/s"
    )?;
    let dash = |n: usize| "-".repeat(n);
    write!(out, "| {} | {}: | {}: | {} |", dash(width), dash(9), dash(7), dash(15))?;
    for width in [7, 15, 20, 9, 6, 8, 6] {
        write!(out, " {}: |", dash(width - 1))?;
    }
    writeln!(out)
}

fn line(out: &mut impl Write, row: &Row) -> io::Result<()> {
    let mut test = if row.n_gen == 0 { format!("pp{}", row.n_prompt) } else { format!("tg{}", row.n_gen) };
    if row.n_depth > 0 {
        test += &format!(" @ d{}", row.n_depth);
    }
    let speed = format!("{:.2} ± {:.2}", row.avg_ts, row.stddev_ts);
    let (size, params) = (Bytes(row.model_size), count(row.model_n_params));
    let gb = row.gb_per_s.map_or(String::new(), |gb| format!("{gb:.2}"));
    // Threads that outnumber the cores take turns: each then measures another limit.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = row.gb_per_s.filter(|_| row.n_threads <= cores);
    let share = share.map_or(String::new(), |gb| format!("{:.0} %", 100.0 * gb / row.limit_gb_per_s));
    let gop = row.gop_per_s.map_or(String::new(), |gop| format!("{gop:.1}"));
    let Row { model_type, backend, n_threads, median_ts, .. } = row;
    write!(
        out,
        "| {model_type:<5} | {size:>10} | {params:>8} | {backend:<15} | {n_threads:>7} | {test:>15} | "
    )?;
    writeln!(out, "{speed:>20} | {median_ts:>9.2} | {gb:>6} | {share:>8} | {gop:>6} |")?;
    out.flush()
}

fn mean(samples: &[f64]) -> f64 {
    samples.iter().sum::<f64>() / samples.len() as f64
}

/// Of the samples, with n - 1; 0 for a single one.
fn standard_deviation(samples: &[f64]) -> f64 {
    let mean = mean(samples);
    let squares: f64 = samples.iter().map(|x| (x - mean).powi(2)).sum();
    (squares / (samples.len() as f64 - 1.0).max(1.0)).sqrt()
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { (sorted[half - 1] + sorted[half]) / 2.0 } else { sorted[half] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_those_of_a_sample() {
        assert_eq!(mean(&[1.0, 2.0, 6.0]), 3.0);
        assert_eq!((median(&[6.0, 1.0, 2.0]), median(&[4.0, 1.0, 2.0, 9.0])), (2.0, 3.0));
        assert_eq!((standard_deviation(&[1.0, 2.0, 3.0]), standard_deviation(&[5.0])), (1.0, 0.0));
    }

    #[test]
    fn ids_repeat_and_stay_in_the_vocabulary() {
        let ids = Ids(0).take(1000, 50);
        assert_eq!(ids, Ids(0).take(1000, 50));
        assert!(ids.iter().all(|&id| id < 50));
        assert!(ids.iter().collect::<std::collections::HashSet<_>>().len() > 45);
    }
}
