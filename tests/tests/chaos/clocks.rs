//! Clocks that jump: leases, deadlines and generations must not depend on what a process takes for the time.
use crate::cluster::{Cluster, Kind};
use crate::disks::{STORES, disks};
use crate::hosts::Hosts;
use crate::processes::{add_two_of_everything, works};
use crate::suite::{Fault, GENERATED, MIGRATIONS, Suite};
use anyhow::{Result, bail};
use moesaic_tests::until;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

const HOUR: i64 = 3600;
const DAY_MINUTES: i64 = 24 * 60;

#[test]
fn full_and_corrupt_disks_and_jumping_clocks() {
    let library = faketime();
    let mut cluster = Cluster::new(Hosts::loopback(), library.clone()).unwrap();
    add_two_of_everything(&mut cluster, 2, STORES).unwrap();
    let mut suite = Suite::start("3-disks-and-clocks", cluster).unwrap();
    suite.undisturbed();
    disks(&mut suite);
    leases(&mut suite);
    match library {
        Some(_) => clocks(&mut suite),
        None => suite.skip("jumping clocks of services", "libfaketime is missing (apt-get install faketime)"),
    }
    suite.finish().unwrap();
}

/// libfaketime for processes with threads, where it is installed.
fn faketime() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let places = folders.chain([PathBuf::from("/usr/lib"), PathBuf::from("/usr/local/lib")]);
    places.map(|folder| folder.join("faketime/libfaketimeMT.so.1")).find(|file| file.is_file())
}

/// What a jump of its clock would do in Redis, where time is nothing but the end of keys: its clock stays, the ends of
/// keys move. libfaketime does not work in a Redis over jemalloc.
fn leases(suite: &mut Suite) {
    let each = |change: &str| {
        format!(
            "for _, key in ipairs(redis.call('keys', '*')) do local left = redis.call('pttl', key) \
             if left > 0 then {change} end end"
        )
    };
    let over = each("redis.call('del', key)");
    let fault = Fault::new("all leases end, as if Redis's clock jumped an hour forward", "they are taken again");
    let fault = fault.lasting_shortly().goes_on();
    let fault = fault.meanwhile(|watch| until("its lease is taken again", || watch.cluster.has_lease("s0")));
    suite.fault(fault, |c| c.member("redis").evaluate(&over).map(drop), |_| Ok(()));
    let longer = each("redis.call('pexpire', key, left + 3600000)");
    let fault = Fault::new(
        "a scheduler is killed, and its lease lasts as if Redis's clock jumped an hour back",
        "its streams go on at the other, which is asked from then on",
    );
    let fault =
        fault.goes_on().grows(&["g0", "g1"], MIGRATIONS).meanwhile(|watch| match watch.cluster.has_lease("s0")? {
            true => Ok(()),
            false => bail!("its lease is over"),
        });
    let begin = |c: &mut Cluster| {
        works(c, "s0")?;
        c.kill("s0")?;
        c.member("redis").evaluate(&longer).map(drop)
    };
    suite.fault(fault.then_works("s0", GENERATED), begin, |c| c.start("s0"));
}

fn clocks(suite: &mut Suite) {
    let services = |c: &Cluster| -> Vec<&'static str> {
        let is_service = |kind: Kind| !matches!(kind, Kind::Redis | Kind::Nats);
        c.members().iter().filter(|member| is_service(member.kind)).map(|member| member.name).collect()
    };
    for (how, offset) in [("forward", HOUR), ("back", -HOUR)] {
        let name = format!("the clocks of all services jump an hour {how}");
        let fault = Fault::new(name, "nothing: no lease or deadline is counted by them");
        let fault = fault.lasting_shortly().goes_on();
        suite.fault(fault, |c| jump(c, &services(c), offset), |c| jump(c, &services(c), 0));
    }
    let name = "a scheduler is killed and starts with a clock an hour back";
    let fault = Fault::new(name, "it is the later one all the same").goes_on();
    let begin = |c: &mut Cluster| {
        c.kill("s0")?;
        c.set_clock("s0", -HOUR)?;
        c.start("s0")
    };
    suite.fault(fault.then_works("s0", GENERATED), begin, |c| jump(c, &["s0"], 0));
}

/// Sets clocks and waits until the logs show it: each service tells its own when NATS comes back.
fn jump(cluster: &mut Cluster, names: &[&str], offset_s: i64) -> Result<()> {
    for name in names {
        cluster.set_clock(name, offset_s)?;
    }
    let is_off = |cluster: &Cluster, name: &&str| -> Result<bool> {
        let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() / 60)?;
        // a line that is half written has no time
        let Ok(logged) = cluster.last_logged(name) else { return Ok(false) };
        let off = (logged - now - offset_s / 60).rem_euclid(DAY_MINUTES);
        Ok(off.min(DAY_MINUTES - off) <= 1)
    };
    until(&format!("all clocks are off by {offset_s} s"), || {
        if names.iter().map(|name| is_off(cluster, name)).collect::<Result<Vec<_>>>()?.contains(&false) {
            cluster.kill("nats")?;
            cluster.start("nats")?;
            cluster.becomes_whole()?;
            return Ok(false);
        }
        Ok(true)
    })
}
