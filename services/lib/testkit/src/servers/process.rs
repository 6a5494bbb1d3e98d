//! A child process that does not outlive the test, whatever ends the test.
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A shell that waits for the end of its input, which comes with the end of this process, and then kills another.
#[derive(Debug)]
pub struct Watchdog(Child);

impl Watchdog {
    /// Watches over a child of this process. Drop it before the child is waited for: the child's process id may be given
    /// to another then.
    ///
    /// # Errors
    /// Where there is no `sh`.
    pub fn over(child: &Child) -> std::io::Result<Self> {
        let watchdog = Command::new("sh")
            .args(["-c", "read -r _; kill -9 \"$1\"", "watchdog", &child.id().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        watchdog.map(Self)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

/// Killed on drop.
#[derive(Debug)]
pub struct Process {
    server: Child,
    /// `None` once the server is to be waited for.
    watchdog: Option<Watchdog>,
}

impl Process {
    /// Starts a program whose output goes to the end of a file.
    pub fn start(program: &Path, arguments: &[String], log: &Path) -> Result<Self, String> {
        let failed = |what: &Path, error: std::io::Error| format!("{}: {error}", what.display());
        let log_file = OpenOptions::new().create(true).append(true).open(log).map_err(|error| failed(log, error))?;
        let errors = log_file.try_clone().map_err(|error| failed(log, error))?;
        let mut server = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log_file)
            .stderr(errors)
            .spawn()
            .map_err(|error| failed(program, error))?;
        match Watchdog::over(&server) {
            Ok(watchdog) => Ok(Self { server, watchdog: Some(watchdog) }),
            Err(error) => {
                end(&mut server);
                Err(failed(Path::new("sh"), error))
            }
        }
    }

    /// The server's process id.
    pub fn id(&self) -> u32 {
        self.server.id()
    }

    /// Whether it ended by itself.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.server.try_wait(), Ok(None))
    }

    /// SIGSTOP; returns when the process stands still.
    pub fn stop(&self) {
        let pid = self.signal(Signal::STOP);
        waitpid(Some(pid), WaitOptions::UNTRACED).expect("the server is a child of ours");
    }

    /// SIGCONT.
    pub fn cont(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) -> Pid {
        let pid = Pid::from_child(&self.server);
        kill_process(pid, signal).expect("the server is a child of ours");
        pid
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.watchdog = None;
        end(&mut self.server);
    }
}

fn end(child: &mut Child) {
    // it may have ended already
    let _ = child.kill();
    let _ = child.wait();
}
