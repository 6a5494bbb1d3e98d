//! Which processes a cluster has, and what each is told: plain data, from the counts, the settings and the cores.
use crate::args::Counts;
use crate::config::Config;
use moesaic_types::cluster::Service;
use std::time::Duration;

/// How long a process may take to end beyond the time that its running work has.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Copies of hot experts in each layer where the settings say none and there are several groups of shards: few of the
/// experts that models have, so that the memory for them is there, and most of what copies bring to the balance.
const REDUNDANT_EXPERTS: usize = 4;

/// One service's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name in the cluster and in the log.
    pub name: String,
    /// What it is.
    pub service: Service,
    /// What it is told besides the settings that all have: keys and values.
    pub settings: Vec<(&'static str, String)>,
    /// How long it may take to end.
    pub grace: Duration,
    /// Its turn when all end, the door first: nothing is lost where those who are needed go last.
    pub ends: usize,
}

/// Threads of the maths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threads {
    /// Of each scheduler.
    pub scheduler: usize,
    /// Of each shard.
    pub shard: usize,
}

impl Threads {
    /// Divides the cores: one half is the shards', for they execute the experts while schedulers compute attention for
    /// other tokens; the schedulers share what is left.
    pub fn divide(cores: usize, schedulers: usize, shards: usize) -> Self {
        let shard = (cores / 2).checked_div(shards).map_or(0, |each| each.max(1));
        let left = cores.saturating_sub(shard * shards);
        Self { scheduler: (left / schedulers.max(1)).max(1), shard: shard.max(1) }
    }
}

/// All processes of the services.
pub fn members(counts: &Counts, config: &Config, cores: usize) -> Vec<Member> {
    let count = |count: u16| usize::from(count);
    let (replicas, stages) = (count(counts.replicas), count(counts.stages));
    let (groups, ranks) = (count(counts.expert_groups), count(counts.expert_ranks));
    let threads = Threads::divide(cores, replicas * stages, groups * ranks);
    let mut list = Vec::new();
    let mut add = |name: String, service, ends, drain: Duration, settings| {
        list.push(Member { name, service, settings, grace: drain + LAST_WORDS, ends });
    };
    let drain = config.gateway.drain_timeout.get();
    add("gateway".into(), Service::Gateway, 0, drain, vec![("gateway.http", config.gateway.http.clone())]);
    for number in 0..count(counts.routers) {
        let groups = groups.max(config.router.placement.min_groups).to_string();
        let mut settings = vec![("router.placement.min_groups", groups)];
        // copies of hot experts cost little where they can be in several groups
        if count(counts.expert_groups) > 1 && config.router.placement.redundant_experts == 0 {
            settings.push(("router.placement.redundant_experts", REDUNDANT_EXPERTS.to_string()));
        }
        add(format!("router-{number}"), Service::Router, 1, config.router.drain_timeout.get(), settings);
    }
    let experts = if groups == 0 { "own" } else { "shards" };
    for replica in 0..replicas {
        for stage in 0..stages {
            let first = format!("scheduler-{replica}");
            let mut settings = vec![
                ("model.threads", threads.scheduler.to_string()),
                ("scheduler.experts", experts.to_owned()),
                ("scheduler.stages", stages.to_string()),
                ("scheduler.stage", stage.to_string()),
            ];
            let mut name = first.clone();
            if stage > 0 {
                settings.push(("scheduler.stage_of", first));
                name += &format!("-stage-{stage}");
            }
            add(name, Service::Scheduler, 1, config.scheduler.drain_timeout.get(), settings);
        }
    }
    for group in 0..groups {
        for rank in 0..ranks {
            let settings = vec![
                ("model.threads", threads.shard.to_string()),
                ("expert_shard.group", group.to_string()),
                ("expert_shard.rank", rank.to_string()),
                ("expert_shard.ranks", ranks.to_string()),
            ];
            let name = format!("expert-shard-{group}-{rank}");
            add(name, Service::ExpertShard, 2, config.expert_shard.drain_timeout.get(), settings);
        }
    }
    for number in 0..count(counts.kv_stores) {
        let name = format!("kv-store-{number}");
        // a folder is one process's alone
        let folder = config.kv_store.disk_folder.as_ref().map(|folder| folder.join(&name).display().to_string());
        let settings = folder.map(|folder| ("kv_store.disk_folder", folder)).into_iter().collect();
        add(name, Service::KvStore, 2, config.kv_store.drain_timeout.get(), settings);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn counts() -> Counts {
        Counts { replicas: 2, stages: 1, expert_groups: 2, expert_ranks: 2, kv_stores: 2, routers: 1, logs: None }
    }

    fn settings(members: &[Member], name: &str) -> String {
        let member = members.iter().find(|member| member.name == name).expect("it is there");
        member.settings.iter().map(|(key, value)| format!("{key}={value} ")).collect()
    }

    #[test]
    fn the_default_is_the_cluster_of_the_compose_file() {
        let compose = include_str!("../../../../docker-compose.yml");
        let services = compose.split("\nservices:\n").nth(1).expect("it has services");
        let names = services.lines().filter_map(|line| line.strip_prefix("  ")?.strip_suffix(':'));
        let is_member = |name: &&str| {
            ["gateway", "router", "scheduler-", "expert-shard-", "kv-store-"]
                .iter()
                .any(|start| name.starts_with(start))
        };
        let compose: BTreeSet<&str> = names.filter(is_member).collect();
        let members = members(&counts(), &Config::default(), 8);
        // there is but one router there, which has no number
        let ours: BTreeSet<&str> = members.iter().map(|member| member.name.trim_start_matches("router-0")).collect();
        let ours = ours.into_iter().map(|name| if name.is_empty() { "router" } else { name }).collect();
        assert_eq!(compose, ours);
    }

    #[test]
    fn each_shard_has_its_slice_and_each_stage_its_replica() {
        let all = members(&counts(), &Config::default(), 8);
        let shard = settings(&all, "expert-shard-1-0");
        assert_eq!(shard, "model.threads=1 expert_shard.group=1 expert_shard.rank=0 expert_shard.ranks=2 ");
        assert!(settings(&all, "router-0").contains("min_groups=2"));
        assert!(settings(&all, "router-0").contains("redundant_experts=4"));
        assert!(
            settings(&all, "scheduler-1").starts_with("model.threads=2 scheduler.experts=shards scheduler.stages=1")
        );

        let mut config = Config::default();
        config.kv_store.disk_folder = Some("/data".into());
        let counts = Counts { stages: 3, expert_groups: 0, ..counts() };
        let all = members(&counts, &config, 8);
        let stage = settings(&all, "scheduler-1-stage-2");
        assert!(stage.contains("experts=own") && stage.contains("stage=2 scheduler.stage_of=scheduler-1 "), "{stage}");
        assert_eq!(all.iter().filter(|member| member.service == Service::Scheduler).count(), 6);
        assert!(!all.iter().any(|member| member.service == Service::ExpertShard));
        assert_eq!(settings(&all, "kv-store-1"), "kv_store.disk_folder=/data/kv-store-1 ");
    }

    #[test]
    fn the_door_ends_first_and_those_that_are_needed_last() {
        let all = members(&counts(), &Config::default(), 8);
        let turn = |service| all.iter().filter(|member| member.service == service).map(|member| member.ends).max();
        assert!(turn(Service::Gateway) < turn(Service::Scheduler));
        assert!(turn(Service::Scheduler) < turn(Service::ExpertShard));
        assert!(turn(Service::Scheduler) < turn(Service::KvStore));
    }

    #[test]
    fn cores_are_divided_and_each_process_has_one() {
        let divide = |cores, schedulers, shards| {
            let Threads { scheduler, shard } = Threads::divide(cores, schedulers, shards);
            (scheduler, shard)
        };
        assert_eq!(divide(1, 2, 4), (1, 1));
        assert_eq!(divide(2, 2, 4), (1, 1));
        assert_eq!(divide(8, 2, 4), (2, 1));
        assert_eq!(divide(16, 2, 4), (4, 2));
        assert_eq!(divide(64, 2, 4), (16, 8));
        assert_eq!(divide(8, 2, 0), (4, 1));
        assert_eq!(divide(7, 3, 2), (1, 1));
    }
}
