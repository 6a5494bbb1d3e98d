//! A child process that ends with this one, whatever ends this one: it has the other end of a pipe as its standard input.
use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use tokio::process::{Child as Process, ChildStdin, Command};

/// What is started.
#[derive(Clone, Debug)]
pub struct Start {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Variables besides this process's, of which those that set anything of ours are left out.
    pub environment: Vec<(String, String)>,
}

/// A running child, killed where it is dropped.
#[derive(Debug)]
pub struct Child {
    process: Process,
    /// The child and all that it started; ctrl-c in the terminal does not reach them.
    group: Pid,
    has_ended: bool,
    _life: Option<ChildStdin>,
}

impl Child {
    /// Starts it; what it writes goes to the end of a file.
    ///
    /// # Errors
    /// When the program cannot be run or the file not be written.
    pub fn start(start: &Start, log: &Path) -> Result<Self> {
        let named = || format!("write the log {}", log.display());
        let file = OpenOptions::new().create(true).append(true).open(log).with_context(named)?;
        let errors = file.try_clone().with_context(named)?;
        let mut command = Command::new(&start.program);
        for (name, _) in std::env::vars_os() {
            let is_setting = name.to_str().is_some_and(|name| {
                let is_standard = moesaic_config::STANDARD_VARIABLES.iter().any(|(variable, _)| *variable == name);
                is_standard || name.starts_with(moesaic_config::ENV_PREFIX)
            });
            if is_setting {
                command.env_remove(name);
            }
        }
        let mut process = command
            .args(&start.arguments)
            .envs(start.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(file)
            .stderr(errors)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {}", start.program.display()))?;
        let id = process.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let group = id.context("the child has no process id")?;
        // out of the process, which would close it before it waits
        let life = process.stdin.take();
        Ok(Self { process, group, has_ended: false, _life: life })
    }

    /// Its process id.
    pub fn id(&self) -> i32 {
        self.group.as_raw_nonzero().get()
    }

    /// Waits for its end. Cancel-safe.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub async fn ended(&mut self) -> Result<ExitStatus> {
        let status = self.process.wait().await.context("wait for the process")?;
        if !self.has_ended {
            self.has_ended = true;
            // what it started may be left, where it was killed itself
            self.signal_group(Signal::KILL);
        }
        Ok(status)
    }

    /// Asks it to end (SIGTERM).
    pub fn terminate(&self) {
        if !self.has_ended {
            // it may have ended meanwhile, which is found by waiting for it
            let _ = kill_process(self.group, Signal::TERM);
        }
    }

    /// Ends it at once, and all that it started (SIGKILL).
    pub fn kill(&self) {
        if !self.has_ended {
            self.signal_group(Signal::KILL);
        }
    }

    fn signal_group(&self, signal: Signal) {
        // there may be nobody left
        let _ = kill_process_group(self.group, signal);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The last lines of a log, for a message; empty where there are none.
pub fn last_lines(log: &Path, count: usize) -> String {
    const BYTES: u64 = 8192;
    let read = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
        let mut bytes = Vec::new();
        file.take(BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
