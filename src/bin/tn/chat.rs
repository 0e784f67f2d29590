//! `tn chat`: a conversation in the terminal.

use std::io::{self, BufRead, IsTerminal, Write};

use transnormer::{CancelToken, Event, GenerateOptions, Session, Stats, chat};

use crate::shared::{Failure, ModelArgs, SamplingArgs, cancel_on_interrupt, note, predict};

/// Holds a conversation, in the format of the authors' fine-tuned models
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP, allow_negative_numbers = true)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// Instruction before the first message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Most tokens in an answer; -1 for no limit
    #[arg(short = 'n', long, value_name = "N", default_value_t = -1, allow_negative_numbers = true,
          value_parser = predict())]
    predict: i64,

    #[command(flatten)]
    sampling: SamplingArgs,
}

const AFTER_HELP: &str = "\
Examples:
  tn chat model.gguf
  tn chat model.gguf --system \"Answer in one sentence.\" --temp 0.5
  echo \"What is a llama?\" | tn chat model.gguf --greedy

A line is a message. Lines that begin with / are commands: /help lists them.
Ctrl-C ends the answer; at the prompt it ends the program, as Ctrl-D does.";

const HELP: &str = "\
/reset  forget the conversation
/stats  what the last answer took
/quit   end the program
/help   this list";

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut session = args.model.session()?;
    // An idle program has nothing to cancel: Ctrl-C ends it.
    let cancel = cancel_on_interrupt()?;
    cancel.cancel();
    let interactive = io::stdin().is_terminal();
    if interactive {
        note("Type a message, or /help.");
    }
    let mut stats = Stats::default();
    while let Some(line) = read_line(interactive)? {
        match line.trim() {
            "" => {}
            "/quit" => break,
            "/help" => writeln!(io::stdout(), "{HELP}")?,
            "/reset" => session.reset(),
            "/stats" => show(&stats, &session)?,
            command if command.starts_with('/') => {
                note(format_args!("{command}: no such command; try /help"))
            }
            message => stats = answer(args, &mut session, message, &cancel)?,
        }
    }
    Ok(())
}

/// The next line, without its end; `None` at the end of the input.
fn read_line(interactive: bool) -> Result<Option<String>, Failure> {
    if interactive {
        let mut out = io::stdout();
        write!(out, "> ")?;
        out.flush()?;
    }
    let mut line = String::new();
    let input = |e| Failure::Failed(format!("standard input: {e}"));
    Ok((io::stdin().lock().read_line(&mut line).map_err(input)? > 0).then_some(line))
}

fn answer(args: &Args, session: &mut Session, message: &str, cancel: &CancelToken) -> Result<Stats, Failure> {
    let system = args.system.as_deref().filter(|_| session.position() == 0);
    let prompt = chat::turn_ids(session, system, message)?;
    let options = GenerateOptions {
        sampler: args.sampling.options(),
        max_tokens: usize::try_from(args.predict).ok(),
        stop: vec![chat::STOP.to_owned()],
        cancel: cancel.clone(),
        ..Default::default()
    };
    let mut out = io::stdout().lock();
    let mut stats = Stats::default();
    cancel.reset();
    for event in session.generate(&prompt, options)? {
        let text = match event? {
            Event::Token(token) => token.text,
            Event::Done(done) => {
                stats = done.stats;
                done.text
            }
        };
        out.write_all(text.as_bytes())?;
        out.flush()?;
    }
    cancel.cancel();
    writeln!(out)?;
    Ok(stats)
}

fn show(stats: &Stats, session: &Session) -> io::Result<()> {
    let mut out = io::stdout();
    writeln!(out, "read      {} tokens at {:.1} tokens/s", stats.prompt_tokens, stats.prompt_rate())?;
    writeln!(out, "answered  {} tokens at {:.1} tokens/s", stats.tokens, stats.rate())?;
    writeln!(out, "in all    {} tokens", session.position())
}
