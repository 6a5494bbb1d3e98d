//! Shards that are lost and whose experts nobody else has: requests wait for them, and no longer than they may.
use crate::cluster::Cluster;
use crate::hosts::Hosts;
use crate::network;
use crate::processes::two_of_everything;
use crate::suite::{EXPERT_TOKENS, Fault, STEP_RETRIES, Suite};
use anyhow::{Result, bail};
use moesaic_tests::http;
use serde_json::json;
use std::time::{Duration, Instant};

#[test]
fn shards_without_copies() {
    let (hosts, apart) = match Hosts::namespaces().unwrap() {
        Ok(hosts) => (hosts, Ok(())),
        Err(why) => (Hosts::loopback(), Err(why)),
    };
    let mut suite = Suite::start("4-no-copies", two_of_everything(hosts, 1).unwrap()).unwrap();
    suite.undisturbed();
    let fault = |how: &str| {
        let fault =
            Fault::new(format!("{how} a shard, nobody has its experts"), "streams wait until it is back and go on");
        fault.grows(&["s0", "s1"], STEP_RETRIES).then_works("e0", EXPERT_TOKENS)
    };
    suite.fault(fault("kill -9"), |c| c.kill("e0"), |c| c.start("e0"));
    suite.fault(fault("SIGSTOP"), |c| c.signal("e0", "STOP"), |c| c.signal("e0", "CONT"));
    let late = Fault::new(
        "kill -9 a shard, nobody has its experts; requests with a deadline of 3 s",
        "they end at their deadline with deadline_exceeded; others wait and go on",
    );
    let begin = |c: &mut Cluster| {
        c.kill("e0")?;
        ends_at_its_deadline(c, true)?;
        ends_at_its_deadline(c, false)
    };
    suite.fault(late.lasting(Duration::ZERO), begin, |c| c.start("e0"));
    let what = "cut: the schedulers and a shard, nobody has its experts";
    match apart {
        Ok(()) => {
            let fault = Fault::new(what, "streams wait until it is back and go on");
            let fault = fault.grows(&["s0", "s1"], STEP_RETRIES);
            network::cut(&mut suite, fault, &[("s0", "e0"), ("s1", "e0")]);
        }
        Err(why) => suite.skip(what, &why),
    }
    suite.finish().unwrap();
}

const DEADLINE: Duration = Duration::from_secs(3);

/// The shard is away all the time: what ends the request is its deadline.
fn ends_at_its_deadline(cluster: &Cluster, is_stream: bool) -> Result<()> {
    let begun = Instant::now();
    let body = json!({"prompt": "Too late", "max_tokens": 200, "temperature": 0, "ignore_eos": true,
        "deadline_ms": DEADLINE.as_millis() as u64, "stream": is_stream});
    let mut answer = http::send(cluster.doors()[0], "POST", "/v1/completions", Some(body.to_string().as_bytes()))?;
    let (status, text) = (answer.status, answer.text()?);
    let took = begun.elapsed();
    let expected = if is_stream { 200 } else { 504 };
    if status != expected || !text.contains("\"deadline_exceeded\"") {
        bail!("{status} after {took:?}: {text}");
    }
    if took < DEADLINE {
        bail!("the deadline of {DEADLINE:?} was told after {took:?}");
    }
    Ok(())
}
