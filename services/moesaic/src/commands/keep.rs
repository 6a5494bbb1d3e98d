//! `moesaic keep`: runs a program that knows nothing of its parent, and ends it when that is gone.
use super::service::wait_for_end_of_stdin;
use crate::args::Keep;
use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, Stdio};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

pub fn run(args: Keep) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let ended = runtime.block_on(keep(args));
    // the thread that reads standard input may still do so
    runtime.shutdown_background();
    ended
}

async fn keep(args: Keep) -> Result<ExitCode> {
    let (program, arguments) = args.program.split_first().context("name a program")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("start {}", program.display()))?;
    let (ended, mut end) = oneshot::channel();
    std::thread::spawn(move || {
        wait_for_end_of_stdin();
        // nobody may wait any longer
        let _ = ended.send(());
    });
    loop {
        // all are cancel-safe
        tokio::select! {
            status = child.wait() => {
                let status = status.context("wait for the program")?;
                // as a shell says it
                let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
                return Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)));
            }
            _ = &mut end => {
                child.kill().await.context("kill the program")?;
                return Ok(ExitCode::FAILURE);
            }
            _ = terminate.recv() => pass_on(&child, Signal::TERM),
            _ = interrupt.recv() => pass_on(&child, Signal::INT),
        }
    }
}

fn pass_on(child: &Child, signal: Signal) {
    let id = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    // it may have ended meanwhile, which is found by waiting for it
    let _ = id.map(|id| kill_process(id, signal));
}
