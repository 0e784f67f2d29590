//! `tn logits`: what the model expects after given tokens, to compare with other implementations.

use std::io::{self, Write};

use transnormer::{Session, sampler::log_prob};

use crate::shared::{Failure, ModelArgs};

/// Prints the logits after the last token, or after each
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP, allow_negative_numbers = true)]
#[group(id = "input", required = true, multiple = false, args = ["ids", "text"])]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// Token ids to read
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',')]
    ids: Vec<u32>,

    /// Text to encode and read
    #[arg(long, value_name = "TEXT")]
    text: Option<String>,

    /// After each token, not only after the last
    #[arg(long)]
    all: bool,

    /// All logits as JSON: {"ids": [...], "logits": [...]}, one array for each token with --all
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  tn logits model.gguf --text \"Once upon a\"
  tn logits model.gguf --ids 1,2,3 --json
  tn logits model.gguf --ids 1,2,3 --all --json

Without --json the ten likeliest tokens are shown.";

/// Tokens in a table.
const SHOWN: usize = 10;

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut session = args.model.session()?;
    let ids = match &args.text {
        Some(text) => session.model().tokenizer().encode(text, true, false)?,
        None => args.ids.clone(),
    };
    if ids.is_empty() {
        return Err(Failure::Usage("no tokens to read: the text is empty".into()));
    }
    let mut out = io::BufWriter::new(io::stdout().lock());
    if args.json {
        json(args, &mut session, &ids, &mut out)?
    } else {
        table(args, &mut session, &ids, &mut out)?
    }
    out.flush()?;
    Ok(())
}

fn json(args: &Args, session: &mut Session, ids: &[u32], out: &mut impl Write) -> Result<(), Failure> {
    // Written row by row: all logits of a long text would not fit in memory.
    let mut started = false;
    read(args, session, ids, |i, row, _| {
        if !std::mem::replace(&mut started, true) {
            write!(
                out,
                "{{\"ids\":{},\"logits\":{}",
                serde_json::to_string(ids)?,
                if args.all { "[" } else { "" }
            )?;
        } else if i > 0 {
            write!(out, ",")?;
        }
        serde_json::to_writer(&mut *out, row)?;
        Ok(())
    })?;
    writeln!(out, "{}}}", if args.all { "]" } else { "" })?;
    Ok(())
}

fn table(args: &Args, session: &mut Session, ids: &[u32], out: &mut impl Write) -> Result<(), Failure> {
    let tokenizer = session.model().tokenizer().clone();
    let piece = |id: u32| format!("{:?}", tokenizer.piece(id).unwrap_or_default());
    read(args, session, ids, |i, row, id| {
        writeln!(out, "after token {}: {id} {}", i + 1, piece(id))?;
        writeln!(out, "{:>8}  {:<24} {:>10} {:>12}", "id", "piece", "logit", "probability")?;
        let mut order: Vec<u32> = (0..row.len() as u32).collect();
        order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
        for &id in order.iter().take(SHOWN) {
            let probability = log_prob(row, id).exp();
            writeln!(out, "{id:>8}  {:<24} {:>10.4} {probability:>12.6}", piece(id), row[id as usize])?;
        }
        Ok(())
    })
}

/// Gives `visit` the index, the logits and the id of each token that the user asked for.
fn read(
    args: &Args,
    session: &mut Session,
    ids: &[u32],
    mut visit: impl FnMut(usize, &[f32], u32) -> io::Result<()>,
) -> Result<(), Failure> {
    if !args.all {
        session.read(ids)?;
        let last = ids.len() - 1;
        return Ok(visit(last, session.logits(), ids[last])?);
    }
    let mut result = Ok(());
    session.read_all(ids, |i, row| {
        if result.is_ok() {
            result = visit(i, row, ids[i]);
        }
    })?;
    Ok(result?)
}
