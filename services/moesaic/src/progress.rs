//! Progress bars on stderr; silent where stderr is no terminal, but for a line at the start and the end.
use indicatif::{ProgressBar, ProgressStyle};
use moesaic_model::decoder::{Part, Progress};
use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// A bar over bytes.
pub struct Bar {
    bar: Option<ProgressBar>,
    what: String,
    started: Instant,
}

impl Bar {
    /// Starts a bar that says what is done.
    pub fn new(what: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template("{msg} [{wide_bar}] {bytes}/{total_bytes} {eta}")
                .expect("the template is a constant that parses");
            bar.set_style(style.progress_chars("=> "));
            bar.set_message(what.to_owned());
            bar
        });
        Self { bar, what: what.to_owned(), started: Instant::now() }
    }

    /// `done` of `total` bytes.
    pub fn set(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
    }

    /// Layers that are loaded.
    pub fn layers(&self, progress: Progress) {
        let part = match progress.part {
            Part::Decoder => "load layers",
            Part::Experts => "load experts",
        };
        if let Some(bar) = &self.bar {
            bar.set_style(ProgressStyle::with_template("{msg} [{wide_bar}] {pos}/{len}").expect("a constant parses"));
            bar.set_message(part);
            bar.set_length(progress.layers_total as u64);
            bar.set_position(progress.layers_done as u64);
        }
    }

    /// Ends the bar.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        tracing::info!(what = self.what, seconds = self.started.elapsed().as_secs_f32(), "done");
    }
}

/// Tells of a model's loading, each time that it is loaded.
pub fn loading() -> impl Fn(Progress) + Send + Sync {
    let bar: Mutex<Option<Bar>> = Mutex::new(None);
    move |progress| {
        let mut bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
        bar.get_or_insert_with(|| Bar::new("load")).layers(progress);
        // the decoder comes last
        if progress.part == Part::Decoder && progress.layers_done == progress.layers_total {
            bar.take().into_iter().for_each(Bar::finish);
        }
    }
}
