//! A replica in two stages beside a whole one: whoever of it is lost, its streams go on at the other.
use crate::cluster::{Cluster, Kind};
use crate::hosts::Hosts;
use crate::network;
use crate::processes::works;
use crate::suite::{Fault, GENERATED, MIGRATIONS, Suite};
use anyhow::Result;

#[test]
fn a_replica_in_two_stages() {
    let (hosts, apart) = match Hosts::namespaces().unwrap() {
        Ok(hosts) => (hosts, Ok(())),
        Err(why) => (Hosts::loopback(), Err(why)),
    };
    let mut suite = Suite::start("5-stages", two_replicas(hosts).unwrap()).unwrap();
    suite.undisturbed();
    let fault = |how: &str| {
        let fault = Fault::new(how, "the replica's streams go on at the other");
        fault.goes_on().grows(&["g0"], MIGRATIONS).leaves_one(&["r0"]).then_works("s0", GENERATED)
    };
    let begin = |make: fn(&mut Cluster) -> Result<()>| {
        move |c: &mut Cluster| {
            works(c, "s0")?;
            make(c)
        }
    };
    let second = "kill -9 the second stage of a replica";
    suite.fault(fault(second).lasting_shortly(), begin(|c| c.kill("s0-1")), |c| c.start("s0-1"));
    let first = "kill -9 the first stage of a replica";
    suite.fault(fault(first).lasting_shortly(), begin(|c| c.kill("s0")), |c| c.start("s0"));
    let second = "SIGSTOP the second stage of a replica";
    suite.fault(fault(second), begin(|c| c.signal("s0-1", "STOP")), |c| c.signal("s0-1", "CONT"));
    let what = "cut: the two stages of a replica";
    match apart {
        Ok(()) => network::cut(&mut suite, fault(what), &[("s0", "s0-1")]),
        Err(why) => suite.skip(what, &why),
    }
    suite.finish().unwrap();
}

/// One in two stages, the other whole.
fn two_replicas(hosts: Hosts) -> Result<Cluster> {
    let mut cluster = Cluster::new(hosts, None)?;
    cluster.add(Kind::Scheduler, "s0", &["scheduler.stages=2"])?;
    let second = ["scheduler.stages=2", "scheduler.stage=1", "scheduler.stage_of=s0"];
    cluster.add(Kind::Scheduler, "s0-1", &second)?;
    cluster.add(Kind::Scheduler, "s1", &[])?;
    cluster.add(Kind::Router, "r0", &[])?;
    cluster.add(Kind::Gateway, "g0", &[])?;
    Ok(cluster)
}
