//! `moesaic keep`: runs a program that knows nothing of its parent, and ends it when that is gone.
//!
//! On Linux it does not outlive its keeper either, however that ends: a second `moesaic keep` asks the kernel for that and
//! becomes the program.
use super::service::wait_for_end_of_stdin;
use crate::args::Keep;
use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, Stdio};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

pub fn run(args: Keep) -> Result<ExitCode> {
    #[cfg(target_os = "linux")]
    if let Some(keeper) = args.kept_by {
        return become_kept(keeper, &args.program);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let ended = runtime.block_on(keep(args));
    // the thread that reads standard input may still do so
    runtime.shutdown_background();
    ended
}

async fn keep(args: Keep) -> Result<ExitCode> {
    let program = args.program.first().context("name a program")?;
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let mut child = command(&args.program)?
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

/// What is started. The kernel ends a program with the thread that started it: that is the main one here, which stays.
#[cfg(target_os = "linux")]
fn command(program: &[OsString]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("find this program")?);
    command.args(["keep", "--kept-by", &std::process::id().to_string(), "--"]).args(program);
    Ok(command)
}

/// What is started.
#[cfg(not(target_os = "linux"))]
fn command(program: &[OsString]) -> Result<Command> {
    let (program, arguments) = program.split_first().context("name a program")?;
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(command)
}

/// Becomes the program; answers only where that cannot be.
#[cfg(target_os = "linux")]
fn become_kept(keeper: i32, program: &[OsString]) -> Result<ExitCode> {
    use std::os::unix::process::CommandExt;
    let (program, arguments) = program.split_first().context("name a program")?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("ask to end with the keeper")?;
    // it may have ended before that was asked for
    if rustix::process::getppid() != Pid::from_raw(keeper) {
        return Ok(ExitCode::FAILURE);
    }
    let error = std::process::Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("start {}", program.display()))
}

fn pass_on(child: &Child, signal: Signal) {
    let id = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    // it may have ended meanwhile, which is found by waiting for it
    let _ = id.map(|id| kill_process(id, signal));
}
