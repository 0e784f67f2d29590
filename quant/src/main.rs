//! `tn-quantize`: an official TransNormerLLM checkpoint in, a quantized GGUF file out.

mod cli;

use std::{
    fs,
    io::{self, Write},
    num::NonZero,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use clap::Parser;
use cli::Args;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use tn_quantize::{
    checkpoint::{Checkpoint, tokenizer},
    convert, metadata,
    names::HEAD,
    plan::{Head, Plan},
    report,
};
use transnormer::error::{Error, ErrorKind, Result};

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tn-quantize: {error}");
            ExitCode::from(if error.kind() == ErrorKind::Cancelled { 130 } else { 1 })
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    if let Some(out) = &args.out {
        check_output(out, &args.checkpoint, args.force || args.dry_run)?;
    }
    let head = Head::of(&checkpoint)?;
    if head == Head::SeparateAgainstConfig {
        eprintln!(
            "tn-quantize: warning: config.json ties {HEAD} to the embedding, but their weights differ: both are kept"
        );
    }
    let plan = Plan::new(&checkpoint, head, args.preset)?;
    let plan = if args.plain { plan } else { plan.in_tiles() };
    let vocab = tokenizer::read(checkpoint.dir(), checkpoint.config())?;
    let metadata = metadata::build(&checkpoint, &plan, &vocab)?;
    let out = match &args.out {
        Some(out) if !args.dry_run => out,
        _ => return print_report(args, &plan, None),
    };

    let cancel = cancel_on_interrupt()?;
    let progress = progress_bar(convert::source_bytes(&plan));
    let threads = args.threads.map_or_else(default_threads, |threads| usize::from(threads.get()));
    let start = Instant::now();
    let converted = convert::convert(&checkpoint, &plan, &metadata, out, threads, &progress, &cancel);
    progress.finish_and_clear();
    let file_bytes = converted?;
    print_report(args, &plan, Some(file_bytes))?;
    eprintln!("{}: {} in {:.1} s", out.display(), HumanBytes(file_bytes), start.elapsed().as_secs_f64());
    Ok(())
}

/// Refuses an output that would overwrite something of value. A part of the checkpoint is never overwritten,
/// by whatever name or link it is called.
fn check_output(out: &Path, checkpoint: &Path, may_replace: bool) -> Result<()> {
    if fs::symlink_metadata(out).is_err() {
        return Ok(());
    }
    let refuse = |message: &str| {
        Err(Error::new(ErrorKind::InvalidArgument, format_args!("{}: {message}", out.display())))
    };
    for entry in fs::read_dir(checkpoint).map_err(|source| Error::io(checkpoint, source))? {
        let path = entry.map_err(|source| Error::io(checkpoint, source))?.path();
        if same_file::is_same_file(&path, out).unwrap_or(false) {
            return refuse("is part of the checkpoint; name another output");
        }
    }
    if may_replace { Ok(()) } else { refuse("exists; --force replaces it") }
}

/// A flag that Ctrl-C and the system's request to end set.
fn cancel_on_interrupt() -> Result<Arc<AtomicBool>> {
    let cancel = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&cancel);
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed))
        .map_err(|error| Error::new(ErrorKind::Io, format_args!("cannot catch Ctrl-C: {error}")))?;
    Ok(cancel)
}

/// A bar on standard error; invisible where that is not a terminal.
fn progress_bar(bytes: u64) -> ProgressBar {
    let template = "{msg:24!} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    ProgressBar::new(bytes).with_style(style)
}

fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

fn print_report(args: &Args, plan: &Plan, file_bytes: Option<u64>) -> Result<()> {
    let text = if args.json { format!("{}\n", report::json(plan, file_bytes)) } else { report::table(plan) };
    match io::stdout().write_all(text.as_bytes()) {
        // The reader has seen enough, as `head` has after ten lines.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(|source| Error::io(Path::new("standard output"), source)),
    }
}
