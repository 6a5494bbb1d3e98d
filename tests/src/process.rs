//! A `moesaic up` of its own, ended when it is dropped.
use crate::{http, root};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const START: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

/// The binary beside the tests' own.
///
/// # Errors
/// Says how to build it where it is not there.
pub fn binary() -> Result<PathBuf> {
    let tests = std::env::current_exe()?;
    let found = tests.ancestors().map(|folder| folder.join("moesaic")).find(|path| path.is_file());
    found.context("the moesaic binary is not built; run `cargo build -p moesaic`, or the tests by tests/run")
}

/// A running server.
pub struct Server {
    /// The HTTP door.
    pub http: SocketAddr,
    /// The gRPC door.
    pub grpc: SocketAddr,
    child: Child,
    folder: TempDir,
}

impl Server {
    /// Starts `moesaic up` with the demo model and further flags, and waits until it is ready.
    ///
    /// # Errors
    /// With the server's log when it does not become ready.
    pub fn start(flags: &[&str]) -> Result<Self> {
        // both are held until both are chosen, so that they differ
        let doors = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
        let [http, grpc] = [doors[0].local_addr()?, doors[1].local_addr()?];
        drop(doors);
        let folder = tempfile::tempdir()?;
        let log = File::create(folder.path().join("log"))?;
        let child = Command::new(binary()?)
            .args(["up", "--http", &http.to_string(), "--grpc", &grpc.to_string(), "--model"])
            .arg(root().join("deploy/models/demo-moe"))
            .args(flags)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start moesaic up")?;
        let mut server = Self { http, grpc, child, folder };
        let deadline = Instant::now() + START;
        while http::get(http, "/ready").is_err() {
            if Instant::now() > deadline || server.child.try_wait()?.is_some() {
                bail!("moesaic up did not become ready:\n{}", server.log());
            }
            std::thread::sleep(POLL); // between two looks at the condition
        }
        Ok(server)
    }

    /// What the server wrote.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
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

    /// A metric's value by its name and labels as they are printed; `None` where it is not there.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn metric(&self, name: &str) -> Result<Option<f64>> {
        let text = http::get(self.http, "/metrics")?;
        let line = text.lines().find(|line| line.starts_with(name) && !line.starts_with('#'));
        Ok(line.and_then(|line| line.rsplit(' ').next()).and_then(|value| value.parse().ok()))
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// When it does not end within a minute.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal("TERM")?;
        self.ended()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it does not come within a minute.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("the server did not end:\n{}", self.log());
            }
            std::thread::sleep(POLL); // between two looks at the condition
        }
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
}

impl Drop for Server {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
