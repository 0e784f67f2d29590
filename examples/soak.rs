//! Decodes many tokens in one session and shows that neither memory nor time per token grows:
//! `cargo run --release --example soak -- MODEL [TOKENS [THREADS]]`
//!
//! Fails where memory after the last token is 1 MiB or more above memory after token 1,000. Linux only, for it
//! reads /proc/self/status.

use std::{
    error::Error,
    fs,
    hint::black_box,
    process::ExitCode,
    time::{Duration, Instant},
};

use transnormer::{Model, Session, SessionOptions};

/// Tokens before the first window, and tokens in each window.
const WINDOW: usize = 1000;
const MOST_GROWTH_KIB: u64 = 1024;
const USAGE: &str = "usage: soak MODEL [TOKENS [THREADS]], with at least 3000 tokens; 100000 where not given";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether memory stayed within bounds.
fn run() -> Result<bool, Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or(USAGE)?;
    let tokens: usize = args.next().map_or(Ok(100_000), |arg| arg.parse()).map_err(|_| USAGE)?;
    let threads = args.next().map_or(Ok(0), |arg| arg.parse()).map_err(|_| USAGE)?;
    if tokens < 3 * WINDOW || args.next().is_some() {
        return Err(USAGE.into());
    }

    let model = Model::open(&path)?;
    let mut session = Session::new(&model, &SessionOptions { threads, ..Default::default() })?;
    // Rows of the embedding that are met for the first time late on would look like growth.
    black_box(model.weights().embedding.bytes().iter().map(|&byte| u64::from(byte)).sum::<u64>());

    let mut first = Vec::with_capacity(WINDOW);
    let mut last = Vec::with_capacity(WINDOW);
    let mut early = Memory::default();
    let mut id = 1;
    for count in 1..=tokens {
        let start = Instant::now();
        session.read(&[id])?;
        let time = start.elapsed();
        id = likeliest(session.logits());
        if count == WINDOW {
            early = Memory::now()?;
        } else if (WINDOW + 1..=2 * WINDOW).contains(&count) {
            first.push(time);
        } else if count > tokens - WINDOW {
            last.push(time);
        }
        if count % 10_000 == 0 {
            eprintln!("{count} of {tokens}");
        }
    }
    let late = Memory::now()?;
    println!("{path}, {} threads, state {} bytes", session.threads(), session.state().bytes());
    report(WINDOW, early, "tokens 1001..=2000", &mut first);
    report(tokens, late, "the last 1000 tokens", &mut last);
    let grown = late.resident.saturating_sub(early.resident);
    println!("memory grew by {grown} KiB; time per token {:.3} times the first", ratio(&last, &first));
    Ok(grown < MOST_GROWTH_KIB)
}

fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(id, _)| id as u32)
}

fn report(tokens: usize, memory: Memory, window: &str, times: &mut [Duration]) {
    times.sort();
    let [low, median, high] = [1, 2, 3].map(|i| times[times.len() * i / 4].as_secs_f64() * 1e3);
    println!(
        "after {tokens:>7} tokens: resident {} KiB, of which anonymous {} KiB; {window}: median {median:.3} ms, \
         middle half {low:.3} to {high:.3}",
        memory.resident, memory.anonymous
    );
}

/// Of the medians of sorted times.
fn ratio(a: &[Duration], b: &[Duration]) -> f64 {
    a[a.len() / 2].as_secs_f64() / b[b.len() / 2].as_secs_f64()
}

/// Memory of the process in KiB.
#[derive(Clone, Copy, Default)]
struct Memory {
    resident: u64,
    /// Without mapped files.
    anonymous: u64,
}

impl Memory {
    fn now() -> Result<Self, Box<dyn Error>> {
        let status = fs::read_to_string("/proc/self/status")?;
        let kib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let value = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
            value.ok_or_else(|| format!("/proc/self/status: no {key}"))
        };
        Ok(Self { resident: kib("VmRSS:")?, anonymous: kib("RssAnon:")? })
    }
}
