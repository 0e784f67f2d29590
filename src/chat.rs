//! The prompt format that the authors fine-tune their chat models with (SPEC section 6).
//!
//! Their data are single questions with answers that end in `</s>`. Conversations are made of the same parts: a
//! turn after the first begins with `</s>`, where the answer before it ended, so each turn looks to the model
//! as in training, with the conversation in its state.

use crate::{error::Result, session::Session};

/// What a base model, or a tuned one that lost its way, writes instead of ending its answer: a stop string.
pub const STOP: &str = "\nHuman:";

/// Text of one turn: `message`, after an instruction if there is one. The answer follows directly.
pub fn turn(instruction: Option<&str>, message: &str) -> String {
    match instruction {
        Some(instruction) => format!("{instruction}\nHuman:\n{message}\nAssistant:\n"),
        None => format!("Human:\n{message}\nAssistant:\n"),
    }
}

/// Ids of the turn that goes on in `session`; its instruction, if any, belongs into the first turn.
///
/// # Errors
/// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) if the text cannot be encoded.
pub fn turn_ids(session: &Session, instruction: Option<&str>, message: &str) -> Result<Vec<u32>> {
    let tokenizer = session.model().tokenizer();
    let first = session.position() == 0;
    let text = turn(instruction, message);
    let mut ids = if first { Vec::new() } else { vec![tokenizer.eos()] };
    ids.extend(tokenizer.encode(&text, first, false)?);
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_have_the_form_of_the_fine_tuning_data() {
        assert_eq!(turn(None, "Hi"), "Human:\nHi\nAssistant:\n");
        assert_eq!(turn(Some("Be brief."), "Hi"), "Be brief.\nHuman:\nHi\nAssistant:\n");
    }
}
