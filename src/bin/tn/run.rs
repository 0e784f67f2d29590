//! `tn run`: reads a prompt and streams what follows.

use std::{
    fs,
    io::{self, IsTerminal, Read, Write},
    path::PathBuf,
};

use transnormer::{Event, GenerateOptions, StopReason};

use crate::shared::{Failure, ModelArgs, SamplingArgs, cancel_on_interrupt, predict, summarize};

/// Streams the text that follows a prompt
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP, allow_negative_numbers = true)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// Text to go on from; - or nothing reads standard input
    prompt: Option<String>,

    /// Read the prompt from this file
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,

    /// Most tokens to generate; -1 for no limit but the end of the document
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256, allow_negative_numbers = true,
          value_parser = predict())]
    predict: i64,

    /// End before this text; may be given more than once
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Go on where the model would end the document
    #[arg(long)]
    ignore_eos: bool,

    /// Print the prompt first
    #[arg(long)]
    echo: bool,

    /// No summary on standard error
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    sampling: SamplingArgs,
}

const AFTER_HELP: &str = "\
Examples:
  tn run model.gguf \"Once upon a time\"
  tn run model.gguf \"Once upon a time\" --greedy -n 100 --echo
  tn run model.gguf --file prompt.txt --stop \"The End\" --seed 7
  cat book.txt | tn run model.gguf -n 50 --quiet

The text goes to standard output, the summary to standard error. One line end at the end of a file or of
standard input does not count as part of the prompt. An empty prompt starts a document.
Ctrl-C ends the text after the current token; a second one ends the program at once.";

pub fn run(args: &Args) -> Result<(), Failure> {
    let prompt = prompt(args)?;
    let mut session = args.model.session()?;
    let cancel = cancel_on_interrupt()?;
    let options = GenerateOptions {
        sampler: args.sampling.options(),
        max_tokens: usize::try_from(args.predict).ok(),
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        cancel,
        ..Default::default()
    };
    let mut generation = session.generate(&prompt, options)?;
    let seed = generation.sampler().seed();

    let mut out = io::stdout().lock();
    if args.echo {
        out.write_all(prompt.as_bytes())?;
        out.flush()?;
    }
    let mut done = None;
    for event in &mut generation {
        let text = match event? {
            Event::Token(token) => token.text,
            Event::Done(end) => done.insert(end).text.clone(),
        };
        if !text.is_empty() {
            out.write_all(text.as_bytes())?;
            out.flush()?;
        }
    }
    writeln!(out)?;
    let done = done.expect("a generation without an error ends with Done");
    if !args.quiet {
        summarize(&done.stats, &session, seed);
    }
    if done.reason == StopReason::Cancelled { Err(Failure::Interrupted) } else { Ok(()) }
}

fn prompt(args: &Args) -> Result<String, Failure> {
    let (name, bytes) = match (&args.file, args.prompt.as_deref()) {
        (Some(path), _) => (path.display().to_string(), fs::read(path)),
        (None, Some(text)) if text != "-" => return Ok(text.to_owned()),
        (None, None) if io::stdin().is_terminal() => {
            return Err(Failure::Usage(
                "no prompt: give it as an argument, with --file, or on standard input".into(),
            ));
        }
        (None, _) => {
            let mut bytes = Vec::new();
            let result = io::stdin().lock().read_to_end(&mut bytes);
            ("standard input".to_owned(), result.map(|_| bytes))
        }
    };
    let bytes = bytes.map_err(|e| Failure::Failed(format!("{name}: {e}")))?;
    let mut text = String::from_utf8(bytes).map_err(|e| {
        Failure::Failed(format!("{name}: not UTF-8 at byte {}", e.utf8_error().valid_up_to()))
    })?;
    let line_end = ["\r\n", "\n"].into_iter().find(|end| text.ends_with(end)).unwrap_or_default();
    text.truncate(text.len() - line_end.len());
    Ok(text)
}
