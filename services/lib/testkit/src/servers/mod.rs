//! Real `redis-server` and `nats-server` processes for tests, on free loopback ports, with a folder of their own.
//!
//! A server is ready when its constructor returns, and gone with all that it wrote when it is dropped; the process is
//! gone even where the test was killed. `tests/servers` installs the programs where they are missing.
pub mod ports;
pub mod process;
mod ready;

use process::Process;
use std::path::PathBuf;
use std::time::Instant;
use tempfile::TempDir;

/// Starts a Redis that keeps what it acknowledged when it is killed and restarted.
///
/// # Panics
/// When it cannot be started, saying why.
pub fn redis() -> Server {
    Server::start(Kind::Redis)
}

/// Starts a NATS server with JetStream.
///
/// # Panics
/// When it cannot be started, saying why.
pub fn nats() -> Server {
    Server::start(Kind::Nats)
}

/// The path of `redis-server` or `nats-server`: on `PATH`, else where `tests/servers` puts it.
///
/// # Panics
/// When it is in neither place, saying how to get it.
pub fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    // the test's binary is in the target folder, wherever that is
    let in_target = || {
        let test = std::env::current_exe().ok()?;
        test.ancestors().map(|folder| folder.join("servers/bin").join(name)).find(|file| file.is_file())
    };
    let missing = || panic!("{name} is neither on PATH nor in the target folder's servers/bin; run tests/servers");
    on_path.or_else(in_target).unwrap_or_else(missing)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Redis,
    Nats,
}

/// A server process of the test's own.
#[derive(Debug)]
pub struct Server {
    kind: Kind,
    port: u16,
    folder: TempDir,
    /// `None` after a kill.
    process: Option<Process>,
}

impl Server {
    fn start(kind: Kind) -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let mut server = Self { kind, port: 0, folder, process: None };
        // Another process may take the port between our look and the server's start.
        for _ in 0..20 {
            server.port = ports::free();
            if server.launch().is_ok() {
                return server;
            }
        }
        panic!("{kind:?} did not start:\n{}", server.log());
    }

    /// Its address, as clients want it.
    pub fn url(&self) -> String {
        let scheme = match self.kind {
            Kind::Redis => "redis",
            Kind::Nats => "nats",
        };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// Its port; the same over all restarts.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What it wrote to its standard output and error.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Freezes it (SIGSTOP); returns when it stands still. Its connections stay open.
    ///
    /// # Panics
    /// When it is not running.
    pub fn stop(&self) {
        self.process.as_ref().expect("the server runs").stop();
    }

    /// Lets a frozen server go on (SIGCONT).
    ///
    /// # Panics
    /// When it is not running.
    pub fn cont(&self) {
        self.process.as_ref().expect("the server runs").cont();
    }

    /// Starts it again, on its port and with what it stored; kills it first where it runs.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.kill();
        if let Err(reason) = self.launch() {
            panic!("{:?} did not start again: {reason}\n{}", self.kind, self.log());
        }
    }

    /// Starts it again, on its port and with nothing stored.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart_empty(&mut self) {
        self.kill();
        let data = self.data();
        if data.exists() {
            std::fs::remove_dir_all(data).expect("what the server stored can be removed");
        }
        self.restart();
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The name by which a NATS server tells that it is this one.
    fn name(&self) -> String {
        format!("testkit-{}-{}", std::process::id(), self.port)
    }

    fn arguments(&self) -> Vec<String> {
        let (port, data) = (self.port.to_string(), self.data().display().to_string());
        match self.kind {
            Kind::Redis => {
                let settings = [
                    ("--bind", "127.0.0.1"),
                    ("--port", &port),
                    ("--dir", &data),
                    ("--save", ""),
                    ("--appendonly", "yes"),
                    // what is in the kernel's hands survives the process
                    ("--appendfsync", "no"),
                ];
                settings.iter().flat_map(|(name, value)| [(*name).to_owned(), (*value).to_owned()]).collect()
            }
            Kind::Nats => {
                let config = format!(
                    "listen: \"127.0.0.1:{port}\"\nserver_name: \"{}\"\n\
                     jetstream {{ store_dir: \"{data}\", sync_interval: always }}\n",
                    self.name()
                );
                let file = self.folder.path().join("nats.conf");
                std::fs::write(&file, config).expect("the folder takes a file");
                vec!["--config".to_owned(), file.display().to_string()]
            }
        }
    }

    /// Starts the process and waits until it serves.
    fn launch(&mut self) -> Result<(), String> {
        std::fs::create_dir_all(self.data()).map_err(|error| error.to_string())?;
        let program = program(match self.kind {
            Kind::Redis => "redis-server",
            Kind::Nats => "nats-server",
        });
        let mut process = Process::start(&program, &self.arguments(), &self.folder.path().join("log"))?;
        let deadline = Instant::now() + crate::DEADLINE;
        loop {
            let ready = match self.kind {
                Kind::Redis => ready::redis(self.port, process.id()),
                Kind::Nats => ready::nats(self.port, &self.name()),
            };
            match ready {
                Ok(()) => break,
                Err(reason) if process.has_ended() => return Err(format!("it ended; last: {reason}")),
                Err(reason) if Instant::now() > deadline => return Err(reason),
                // between two looks at the condition
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(2)),
            }
        }
        self.process = Some(process);
        Ok(())
    }
}
