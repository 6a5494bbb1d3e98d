//! Hosts for processes: each has an address of its own and, where the system lets us, a network namespace, joined with
//! the others by a bridge, so that packets between two of them can be lost without either being told.
use anyhow::{Context, Result, bail};
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A host, by its place in [`Hosts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host(usize);

/// All hosts of a cluster. Gone with their namespaces when they are dropped.
pub struct Hosts {
    names: Vec<String>,
    network: Network,
    /// What does not reach whom, by cut: packets from the first host are lost at the second.
    cuts: Vec<Vec<(Host, Host)>>,
    slow: Vec<Host>,
}

enum Network {
    /// Addresses of the loopback interface: faults of the network cannot be made.
    Loopback { octet: u8 },
    /// Namespaces whose names start with `prefix`.
    Namespaces { prefix: String, octets: [u8; 2] },
}

/// What all names of ours in the system start with; the process's id follows.
const PREFIX: &str = "mchaos";

/// Counts the networks of this process.
fn next() -> u32 {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed)
}

/// The rate of a slow link: a tenth of what one stream of activations of the demo model wants.
const SLOW_RATE: &str = "2mbit";

/// What a slow link holds back before it loses packets, and the share that it loses at random.
const SLOW_QUEUE: &str = "200ms";
const SLOW_LOSS: &str = "0.02";

impl Hosts {
    /// The loopback interface: for faults of processes.
    pub fn loopback() -> Self {
        let octet = u8::try_from((std::process::id() + next()) % 199).unwrap_or(0) + 2;
        Self { names: Vec::new(), cuts: Vec::new(), slow: Vec::new(), network: Network::Loopback { octet } }
    }

    /// A network of namespaces; an error says why there is none, where the system has none for us.
    ///
    /// # Errors
    /// When a command fails.
    pub fn namespaces() -> Result<Result<Self, String>> {
        if let Err(error) = try_out() {
            return Ok(Err(format!("{error:#}")));
        }
        remove_left_over()?;
        let (id, number) = (std::process::id(), next());
        let prefix = format!("{PREFIX}{id}x{number}");
        // 198.18.0.0/15 is for tests of networks (RFC 2544)
        let octets = [18 + u8::try_from(id / 256 % 2)?, u8::try_from((id + number) % 256)?];
        let hosts = Self {
            names: Vec::new(),
            cuts: Vec::new(),
            slow: Vec::new(),
            network: Network::Namespaces { prefix: prefix.clone(), octets },
        };
        let switch = format!("{prefix}-switch");
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "bridge", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "bridge", "up"])?;
        // this process is a host as well
        ip(&["-n", &switch, "link", "add", "test", "type", "veth", "peer", "name", &prefix, "netns", &id.to_string()])?;
        ip(&["-n", &switch, "link", "set", "test", "master", "bridge", "up"])?;
        ip(&["addr", "add", &format!("{}/24", address(octets, 1)), "dev", &prefix])?;
        ip(&["link", "set", &prefix, "up"])?;
        Ok(Ok(hosts))
    }

    /// Makes a host; `name` has 10 letters at most.
    ///
    /// # Errors
    /// When a command fails.
    pub fn add(&mut self, name: &str) -> Result<Host> {
        let host = Host(self.names.len());
        self.names.push(name.to_owned());
        if let (Some(namespace), Some(switch)) = (self.namespace(host), self.switch()) {
            ip(&["netns", "add", &namespace])?;
            ip(&["-n", &switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", &namespace])?;
            ip(&["-n", &switch, "link", "set", name, "master", "bridge", "up"])?;
            ip(&["-n", &namespace, "addr", "add", &format!("{}/24", self.address(host)), "dev", "eth0"])?;
            ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        }
        Ok(host)
    }

    /// A host's address.
    pub fn address(&self, host: Host) -> IpAddr {
        let number = u8::try_from(host.0 + 10).unwrap_or(u8::MAX);
        match self.network {
            Network::Loopback { octet } => Ipv4Addr::new(127, 77, octet, number).into(),
            Network::Namespaces { octets, .. } => address(octets, number),
        }
    }

    /// A command that will run on a host.
    pub fn command(&self, host: Host, program: &std::path::Path) -> Command {
        match self.namespace(host) {
            None => Command::new(program),
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", &namespace]).arg(program);
                command
            }
        }
    }

    /// Loses all packets between two hosts, without a word to either.
    ///
    /// # Errors
    /// When a command fails.
    pub fn cut(&mut self, one: Host, other: Host) -> Result<()> {
        self.lose_all(&[(one, other), (other, one)])
    }

    /// Loses what one host sends to another; the way back stays open.
    ///
    /// # Errors
    /// When a command fails.
    pub fn lose(&mut self, from: Host, to: Host) -> Result<()> {
        self.lose_all(&[(from, to)])
    }

    fn lose_all(&mut self, ways: &[(Host, Host)]) -> Result<()> {
        self.cuts.push(ways.to_vec());
        ways.iter().try_for_each(|&(from, to)| {
            let address = self.address(from).to_string();
            self.on(to, &["iptables", "-w", "-A", "INPUT", "-s", &address, "-j", "DROP"]).map(drop)
        })
    }

    /// Whether each cut lost packets so far, and each slow link had some to slow down.
    ///
    /// # Errors
    /// Names those that disturbed nobody.
    pub fn disturb(&self) -> Result<()> {
        for cut in &self.cuts {
            let lost = cut.iter().map(|&(from, to)| self.lost(from, to)).sum::<Result<u64>>()?;
            if lost == 0 {
                let ways = cut.iter().map(|(from, to)| format!("{} to {}", self.names[from.0], self.names[to.0]));
                bail!("nothing was sent from {} meanwhile", ways.collect::<Vec<_>>().join(" or "));
            }
        }
        for &host in &self.slow {
            let namespace = self.namespace(host).context("no network")?;
            let said = run("tc", &["-n", &namespace, "-s", "qdisc", "show", "dev", "eth0", "root"])?;
            let packets = said.split_once(" bytes ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
            if packets.with_context(|| format!("no packets in {said:?}"))? == 0 {
                bail!("{} sent nothing meanwhile", self.names[host.0]);
            }
        }
        Ok(())
    }

    /// Packets of a host that were dropped at another.
    fn lost(&self, from: Host, to: Host) -> Result<u64> {
        let (rules, address) = (self.on(to, &["iptables", "-w", "-nvxL", "INPUT"])?, self.address(from).to_string());
        let packets = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            // packets, bytes, target, protocol, options, in, out, source
            let is_of_cut = words.get(2) == Some(&"DROP") && words.get(7) == Some(&&*address);
            if is_of_cut { words[0].parse::<u64>().ok() } else { None }
        };
        let counts: Vec<u64> = rules.lines().filter_map(packets).collect();
        if counts.is_empty() {
            bail!("no rule drops what {address} sends:\n{rules}");
        }
        Ok(counts.iter().sum())
    }

    /// Pulls a host's plug: it reaches nobody, and nobody reaches it.
    ///
    /// # Errors
    /// When a command fails.
    pub fn unplug(&self, host: Host) -> Result<()> {
        let switch = self.switch().context("no network")?;
        ip(&["-n", &switch, "link", "set", &self.names[host.0], "down"])
    }

    /// Puts it in again.
    ///
    /// # Errors
    /// When a command fails.
    pub fn plug_in(&self, host: Host) -> Result<()> {
        let switch = self.switch().context("no network")?;
        ip(&["-n", &switch, "link", "set", &self.names[host.0], "up"])
    }

    /// Makes a host's link slow and lossy, in both directions.
    ///
    /// # Errors
    /// When a command fails.
    pub fn slow(&mut self, host: Host) -> Result<()> {
        self.slow.push(host);
        let (switch, namespace) = self.switch().zip(self.namespace(host)).context("no network")?;
        for (at, device) in [(&namespace, "eth0"), (&switch, self.names[host.0].as_str())] {
            let limit = ["rate", SLOW_RATE, "burst", "8kb", "latency", SLOW_QUEUE];
            let to = ["-n", at.as_str(), "qdisc", "add", "dev", device, "root", "tbf"];
            run("tc", &[&to[..], &limit[..]].concat())?;
        }
        let at_random = ["-m", "statistic", "--mode", "random", "--probability", SLOW_LOSS, "-j", "DROP"];
        self.on(host, &[&["iptables", "-w", "-A", "INPUT"][..], &at_random[..]].concat()).map(drop)
    }

    /// Ends what [`Self::cut`], [`Self::lose`] and [`Self::slow`] did.
    ///
    /// # Errors
    /// When a command fails.
    pub fn heal(&mut self) -> Result<()> {
        let switch = self.switch().context("no network")?;
        let slow = std::mem::take(&mut self.slow);
        let cut = std::mem::take(&mut self.cuts).into_iter().flatten().map(|(_, to)| to);
        for host in cut.chain(slow.iter().copied()).collect::<Vec<_>>() {
            self.on(host, &["iptables", "-w", "-F", "INPUT"])?;
        }
        for host in slow {
            for (at, device) in [(self.namespace(host).as_ref(), "eth0"), (Some(&switch), &self.names[host.0])] {
                run("tc", &["-n", at.context("no network")?, "qdisc", "del", "dev", device, "root"])?;
            }
        }
        Ok(())
    }

    /// What a command on a host says.
    fn on(&self, host: Host, command: &[&str]) -> Result<String> {
        let namespace = self.namespace(host).context("no network")?;
        run("ip", &[&["netns", "exec", &namespace][..], command].concat())
    }

    fn namespace(&self, host: Host) -> Option<String> {
        match &self.network {
            Network::Loopback { .. } => None,
            Network::Namespaces { prefix, .. } => Some(format!("{prefix}-{}", self.names[host.0])),
        }
    }

    fn switch(&self) -> Option<String> {
        match &self.network {
            Network::Loopback { .. } => None,
            Network::Namespaces { prefix, .. } => Some(format!("{prefix}-switch")),
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        let hosts = (0..self.names.len()).filter_map(|number| self.namespace(Host(number)));
        for namespace in hosts.chain(self.switch()).collect::<Vec<_>>() {
            // what is left is removed by the next run
            let _ = ip(&["netns", "del", &namespace]);
        }
    }
}

fn address([second, third]: [u8; 2], last: u8) -> IpAddr {
    Ipv4Addr::new(198, second, third, last).into()
}

fn ip(arguments: &[&str]) -> Result<()> {
    run("ip", arguments).map(drop)
}

/// What a command says.
fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let shown = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program).args(arguments).output().with_context(shown)?;
    if !output.status.success() {
        bail!("{}: {}", shown(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Makes one of everything that is needed.
fn try_out() -> Result<()> {
    let name = format!("{PREFIX}{}x{}-probe", std::process::id(), next());
    ip(&["netns", "add", &name])?;
    let tried = (|| {
        ip(&["-n", &name, "link", "add", "bridge", "type", "bridge"])?;
        ip(&["-n", &name, "link", "add", "one", "type", "veth", "peer", "name", "two"])?;
        run("ip", &["netns", "exec", &name, "iptables", "-w", "-A", "INPUT", "-s", "198.18.0.1", "-j", "DROP"])?;
        run(
            "tc",
            &[
                "-n", &name, "qdisc", "add", "dev", "one", "root", "tbf", "rate", "1mbit", "burst", "8kb", "latency",
                "1ms",
            ],
        )
    })();
    ip(&["netns", "del", &name])?;
    tried.map(drop)
}

/// Removes namespaces of tests that were killed, and ends what still runs in them: else they would be there without a
/// name.
fn remove_left_over() -> Result<()> {
    let output = Command::new("ip").args(["netns", "list"]).output()?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split(['x', '-']).next());
        let is_over = owner.is_some_and(|id| !std::path::Path::new("/proc").join(id).exists());
        if is_over {
            let processes = run("ip", &["netns", "pids", name])?;
            for process in processes.split_whitespace() {
                // it may have ended meanwhile
                let _ = run("kill", &["-KILL", process]);
            }
            ip(&["netns", "del", name])?;
        }
    }
    Ok(())
}
