//! Finds stop strings in text that comes in pieces.

use crate::error::{Error, ErrorKind, Result};

/// Passes text on up to the first stop string; holds back what may turn out to be the start of one.
///
/// The result does not depend on how the text is cut: of several stop strings the one that is complete first
/// counts, and of those that end together the longest.
#[derive(Debug, Clone)]
pub(super) struct StopFilter {
    stops: Vec<String>,
    /// Text that is not passed on yet.
    held: String,
    stopped: bool,
}

impl StopFilter {
    /// Errors with [`ErrorKind::InvalidArgument`] if a stop string is empty.
    pub fn new(stops: Vec<String>) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::new(ErrorKind::InvalidArgument, "a stop string is empty"));
        }
        Ok(Self { stops, held: String::new(), stopped: false })
    }

    /// Takes `text`, and gives the text that is certain to come before any stop string.
    pub fn push(&mut self, text: &str) -> String {
        self.held.push_str(text);
        if let Some(start) = self.find() {
            self.held.truncate(start);
            self.stopped = true;
            return std::mem::take(&mut self.held);
        }
        let undecided = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - undecided);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop string was found. Nothing may be pushed then.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The text held back, now that nothing comes after it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start of the stop string that is complete first.
    fn find(&self) -> Option<usize> {
        let matches = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop.len())));
        matches.min_by_key(|&(start, len)| (start + len, start)).map(|(start, _)| start)
    }
}

/// Bytes at the end of `text` that are a beginning of `stop`, short of all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let starts = stop.char_indices().map(|(i, _)| i).rev();
    starts.into_iter().find(|&len| text.as_bytes().ends_with(&stop.as_bytes()[..len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(stops: &[&str]) -> StopFilter {
        StopFilter::new(stops.iter().map(ToString::to_string).collect()).unwrap()
    }

    /// The text passed on when `text` comes in the given parts, and whether it was stopped.
    fn run(stops: &[&str], parts: &[&str]) -> (String, bool) {
        let mut filter = filter(stops);
        let mut out = String::new();
        for part in parts {
            out.push_str(&filter.push(part));
            if filter.stopped() {
                return (out, true);
            }
        }
        (out + &filter.finish(), false)
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop_string() {
        let mut filter = filter(&["###"]);
        assert_eq!(filter.push("a#"), "a");
        assert_eq!(filter.push("#"), "");
        assert_eq!(filter.push("b##"), "##b");
        assert_eq!(filter.push("#c"), "");
        assert!(filter.stopped());
    }

    #[test]
    fn does_not_depend_on_the_cuts() {
        let cases: [(&[&str], &str, &str, bool); 8] = [
            (&["stop"], "go on stop here", "go on ", true),
            (&["abcd", "c"], "xabcd", "xab", true),
            (&["bc", "c"], "abcd", "a", true),
            (&["aab"], "aaaab", "aa", true),
            (&["never"], "nev nevr", "nev nevr", false),
            (&["。\n"], "好。好。\n好", "好。好", true),
            (&[], "as it is", "as it is", false),
            (&["end"], "to the en", "to the en", false),
        ];
        for (stops, text, wanted, stopped) in cases {
            let wanted = (wanted.to_owned(), stopped);
            assert_eq!(run(stops, &[text]), wanted);
            let letters: Vec<String> = text.chars().map(String::from).collect();
            assert_eq!(run(stops, &letters.iter().map(String::as_str).collect::<Vec<_>>()), wanted);
            for (cut, _) in text.char_indices() {
                assert_eq!(run(stops, &[&text[..cut], &text[cut..]]), wanted, "{text} at {cut}");
            }
        }
    }

    #[test]
    fn empty_stop_strings_are_refused() {
        assert_eq!(StopFilter::new(vec![String::new()]).unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
}
