//! Stop texts: found across pieces, never shown, and nothing that may begin one is shown too early.

/// Looks for stop texts in a text that comes in pieces.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    held: String,
}

impl StopMatcher {
    /// A matcher of some texts; empty ones are ignored. `include`: the text that was found is shown.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), include, held: String::new() }
    }

    /// Takes a piece; what can be shown now, and whether a stop text ended the answer. A stop text that is complete
    /// before it `may_end` the answer is text as any other.
    pub fn push(&mut self, piece: &str, may_end: bool) -> (String, bool) {
        if self.stops.is_empty() {
            return (piece.to_owned(), false);
        }
        self.held.push_str(piece);
        let stops = self.stops.iter().filter(|_| may_end);
        let found = stops.filter_map(|stop| Some((self.held.find(stop.as_str())?, stop.len()))).min();
        if let Some((at, len)) = found {
            self.held.truncate(if self.include { at + len } else { at });
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, at the answer's end.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` with which `stop` begins.
fn overlap(text: &str, stop: &str) -> usize {
    let starts = stop.char_indices().map(|(at, _)| at).filter(|at| *at > 0);
    starts.rev().find(|at| text.ends_with(&stop[..*at])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        run_with(false, stops, pieces)
    }

    fn run_with(include: bool, stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect(), include);
        let mut shown = String::new();
        for piece in pieces {
            let (text, stopped) = matcher.push(piece, true);
            shown += &text;
            if stopped {
                return (shown, true);
            }
        }
        (shown + &matcher.flush(), false)
    }

    #[test]
    fn a_stop_text_over_several_pieces_is_not_shown() {
        assert_eq!(run(&["END"], &["one E", "N", "D two"]), ("one ".into(), true));
        assert_eq!(run(&["END"], &["one E", "N", "d"]), ("one ENd".into(), false));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b", "c"]), ("a".into(), true));
        assert_eq!(run(&["é!", "xyz"], &["caf", "é", "?"]), ("café?".into(), false));
        assert_eq!(run(&["b", "abc"], &["xabc"]), ("x".into(), true));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), false));
        assert_eq!(run_with(true, &["END"], &["one E", "ND two"]), ("one END".into(), true));
    }

    #[test]
    fn a_stop_text_that_comes_too_early_is_text() {
        let mut matcher = StopMatcher::new(vec!["END".into()], false);
        assert_eq!(matcher.push("END one EN", false), ("END one ".into(), false));
        assert_eq!(matcher.push("D two E", false), ("END two ".into(), false));
        assert_eq!(matcher.push("ND three", true), (String::new(), true), "its end counts");
    }

    #[test]
    fn nothing_is_held_longer_than_it_must() {
        let mut matcher = StopMatcher::new(vec!["\n\n".into()], false);
        assert_eq!(matcher.push("line\n", true), ("line".into(), false));
        assert_eq!(matcher.push("next", true), ("\nnext".into(), false));
    }
}
