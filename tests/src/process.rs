//! Processes of the project's own, ended when they are dropped, or when the test's process is killed.
use crate::{http, root, until};
use anyhow::{Context, Result, bail};
use moesaic_testkit::servers::ports;
use moesaic_testkit::servers::process::Watchdog;
use std::ffi::OsString;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use tempfile::TempDir;

/// A binary beside the tests' own.
///
/// # Errors
/// Says how to build it where it is not there.
pub fn program(name: &str) -> Result<PathBuf> {
    let tests = std::env::current_exe()?;
    let found = tests.ancestors().map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not built; run `cargo build --workspace`, or the tests by tests/run"))
}

/// The all-in-one binary.
///
/// # Errors
/// As [`program`].
pub fn binary() -> Result<PathBuf> {
    program("moesaic")
}

/// A running process that writes to a log.
pub struct Process {
    child: Child,
    /// Ends it where this process is killed; `None` once it is waited for.
    watchdog: Option<Watchdog>,
    log: PathBuf,
}

impl Process {
    /// Starts a program in `folder`; what it writes goes to the end of `folder/log_name`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &str, arguments: &[OsString], folder: &Path, log_name: &str) -> Result<Self> {
        let mut command = Command::new(program(name)?);
        command.args(arguments);
        Self::spawn(command, folder, log_name).with_context(|| format!("start {name}"))
    }

    /// The same with a command of the caller's.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(mut command: Command, folder: &Path, log_name: &str) -> Result<Self> {
        let log = folder.join(log_name);
        let file = File::options().create(true).append(true).open(&log)?;
        command.current_dir(folder).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn()?;
        // of one that cannot be watched, nothing is left
        let mut process = Self { child, watchdog: None, log };
        process.watchdog = Some(Watchdog::over(&process.child).context("start a watchdog")?);
        Ok(process)
    }

    /// What it wrote, in this life and those before under the same name.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// Where the system does not tell.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.status()?.is_some())
    }

    fn status(&mut self) -> Result<Option<ExitStatus>> {
        let status = self.child.try_wait()?;
        if status.is_some() {
            self.watchdog = None;
        }
        Ok(status)
    }

    /// Waits until `path` answers with 200 at `address`.
    ///
    /// # Errors
    /// With its log when it ends before, or does not in time.
    pub fn answers(&mut self, address: SocketAddr, path: &str) -> Result<()> {
        let answered = until(path, || {
            if self.has_ended()? {
                bail!("it ended");
            }
            Ok(http::get(address, path).is_ok())
        });
        answered.with_context(|| format!("the process's log:\n{}", self.log()))
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// Where the system does not tell.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS line")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    }

    /// Sends a signal to this process alone.
    ///
    /// # Errors
    /// When `kill` cannot be run.
    pub fn signal(&self, name: &str) -> Result<()> {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status()?;
        if !status.success() {
            bail!("kill -{name}: {status}");
        }
        Ok(())
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// With its log when it does not come in time.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        let mut status = None;
        let ended = until("the end", || {
            status = self.status()?;
            Ok(status.is_some())
        });
        ended.with_context(|| format!("the process's log:\n{}", self.log()))?;
        status.context("it has ended")
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> Result<()> {
        self.watchdog = None;
        // it may have ended already
        let _ = self.child.kill();
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // it is gone, or nobody can say
        let _ = self.kill();
    }
}

/// A metric's value: the sum over all its labels; `None` where it is not there.
///
/// # Errors
/// When nobody answers.
pub fn metric(address: SocketAddr, name: &str) -> Result<Option<f64>> {
    Ok(sum(&http::get(address, "/metrics")?, name))
}

/// The sum of all samples of this very name. What is printed first differs from one answer to the next.
fn sum(text: &str, name: &str) -> Option<f64> {
    let of_this = text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
    of_this.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).reduce(|sum, value| sum + value)
}

/// A running `moesaic up`.
pub struct Server {
    /// The HTTP door.
    pub http: SocketAddr,
    /// The gRPC door.
    pub grpc: SocketAddr,
    process: Process,
    _folder: TempDir,
}

impl Server {
    /// Starts `moesaic up` with the demo model and further flags, and waits until it is ready.
    ///
    /// # Errors
    /// With the server's log when it does not become ready.
    pub fn start(flags: &[&str]) -> Result<Self> {
        let [http, grpc] = [ports::free(), ports::free()].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let folder = tempfile::tempdir()?;
        let (at_http, at_grpc) = (http.to_string(), grpc.to_string());
        let fixed = ["up", "--http", &at_http, "--grpc", &at_grpc, "--model"];
        let mut arguments: Vec<OsString> = fixed.iter().map(OsString::from).collect();
        arguments.push(root().join("deploy/models/demo-moe").into());
        arguments.extend(flags.iter().map(OsString::from));
        let mut process = Process::start("moesaic", &arguments, folder.path(), "log")?;
        process.answers(http, "/ready")?;
        Ok(Self { http, grpc, process, _folder: folder })
    }

    /// What the server wrote.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    /// Where the system does not tell.
    pub fn resident_bytes(&self) -> Result<u64> {
        self.process.resident_bytes()
    }

    /// A metric's value, as [`metric`] has it.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn metric(&self, name: &str) -> Result<Option<f64>> {
        metric(self.http, name)
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal("TERM")?;
        self.ended()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        self.process.ended()
    }

    /// Sends a signal to this process alone.
    ///
    /// # Errors
    /// When `kill` cannot be run.
    pub fn signal(&self, name: &str) -> Result<()> {
        self.process.signal(name)
    }
}
