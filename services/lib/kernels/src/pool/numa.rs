//! Which CPUs a pool's threads run on where a machine has several NUMA nodes.
//!
//! That is all that is done. Memory is not placed: weights lie where the thread that loaded them first touched them (or
//! where the system keeps the mapped file), not with the workers that read them. Any worker takes any task. The engine's
//! own thread, the caller, is not bound. So a pool over several nodes reads weights across them; a process for each
//! node, bound from outside, does not.
use std::path::Path;

/// For each of `threads` threads the CPUs of its node: the threads stand in one row, and each node gets a contiguous
/// part of it in proportion to its CPUs, so that threads with neighbouring numbers share memory and caches. Empty (no
/// thread is bound) when there are fewer than two nodes.
///
/// Place 0 is the caller's: it counts, so that the first node is not overfull, but its thread is not bound.
pub fn plan(threads: usize, nodes: &[Vec<usize>]) -> Vec<Vec<usize>> {
    if nodes.len() < 2 {
        return Vec::new();
    }
    let all: usize = nodes.iter().map(Vec::len).sum();
    (0..threads)
        .map(|thread| {
            // the middle of the thread's share of all CPUs
            let mut at = (2 * thread + 1) * all / (2 * threads);
            let node = nodes.iter().find(|cpus| {
                let here = at < cpus.len();
                at = at.saturating_sub(cpus.len());
                here
            });
            node.cloned().unwrap_or_default()
        })
        .collect()
}

/// The nodes' CPUs out of the system's `nodeN` lists, without the CPUs that are not allowed, without nodes that are
/// left empty, by node number. A list that cannot be read counts as no nodes at all.
pub fn allowed_nodes(mut lists: Vec<(usize, String)>, allowed: impl Fn(usize) -> bool) -> Vec<Vec<usize>> {
    lists.sort_unstable_by_key(|(node, _)| *node);
    let nodes: Option<Vec<_>> = lists.iter().map(|(_, list)| parse_cpu_list(list)).collect();
    let allowed =
        nodes.unwrap_or_default().into_iter().map(|cpus| cpus.into_iter().filter(|cpu| allowed(*cpu)).collect());
    allowed.filter(|cpus: &Vec<usize>| !cpus.is_empty()).collect()
}

/// Reads a list such as `0-3,8,10-11`; an empty one is a node with memory only.
pub fn parse_cpu_list(list: &str) -> Option<Vec<usize>> {
    let list = list.trim();
    let mut cpus = Vec::new();
    for part in list.split(',').filter(|_| !list.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        // more CPUs than any system has means that this is not such a list
        if last < first || last >= 1 << 20 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

fn read_lists(folder: &Path) -> Vec<(usize, String)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let list = |entry: std::fs::DirEntry| {
        let node = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
        Some((node, std::fs::read_to_string(entry.path().join("cpulist")).ok()?))
    };
    entries.filter_map(list).collect()
}

/// The nodes with CPUs that this thread may use; none where the system does not say.
#[cfg(target_os = "linux")]
pub fn nodes() -> Vec<Vec<usize>> {
    // SAFETY: a `cpu_set_t` is plain bits, for which zero is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is as large as is said; 0 is this thread.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) } != 0 {
        return Vec::new();
    }
    let allowed = |cpu| {
        // SAFETY: the CPU is below the number of bits of the set.
        cpu < libc::CPU_SETSIZE as usize && unsafe { libc::CPU_ISSET(cpu, &set) }
    };
    allowed_nodes(read_lists(Path::new("/sys/devices/system/node")), allowed)
}

/// Binds this thread to the CPUs. It is a wish: where the system refuses, the thread runs as before.
#[cfg(target_os = "linux")]
pub fn bind(cpus: &[usize]) {
    // SAFETY: a `cpu_set_t` is plain bits, for which zero is a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus.iter().filter(|&&cpu| cpu < libc::CPU_SETSIZE as usize) {
        // SAFETY: the CPU is below the number of bits of the set.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the set is as large as is said; 0 is this thread.
    let _ = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
}

/// This system does not say.
#[cfg(not(target_os = "linux"))]
pub fn nodes() -> Vec<Vec<usize>> {
    let _ = read_lists;
    Vec::new()
}

/// There is nothing to bind to.
#[cfg(not(target_os = "linux"))]
pub fn bind(_cpus: &[usize]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_cpus_is_read() {
        assert_eq!(parse_cpu_list("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(parse_cpu_list("5"), Some(vec![5]));
        assert_eq!(parse_cpu_list("\n"), Some(vec![]));
        for broken in ["a", "1-", "-1", "3-1", "1,,2", "0-9999999999", "1;2"] {
            assert_eq!(parse_cpu_list(broken), None, "{broken}");
        }
    }

    #[test]
    fn only_nodes_with_allowed_cpus_count() {
        let lists =
            || [(10, "6-7"), (0, "0-3"), (1, ""), (2, "4-5")].map(|(node, list)| (node, list.to_owned())).to_vec();
        assert_eq!(allowed_nodes(lists(), |_| true), [vec![0, 1, 2, 3], vec![4, 5], vec![6, 7]]);
        assert_eq!(allowed_nodes(lists(), |cpu| cpu == 1 || cpu == 7), [[1], [7]]);
        assert_eq!(allowed_nodes(lists(), |_| false), Vec::<Vec<usize>>::new());
        let mut broken = lists();
        broken.push((3, "?".to_owned()));
        assert_eq!(allowed_nodes(broken, |_| true), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn one_node_binds_nothing() {
        assert!(plan(8, &[(0..8).collect()]).is_empty());
        assert!(plan(8, &[]).is_empty());
    }

    #[test]
    fn threads_stand_in_contiguous_runs_in_proportion_to_the_nodes() {
        let places = |threads, nodes: &[Vec<usize>]| -> Vec<usize> {
            let node = |cpus: &Vec<usize>| nodes.iter().position(|node| node == cpus).expect("a node's CPUs, whole");
            plan(threads, nodes).iter().map(node).collect()
        };
        let even = [vec![0, 1, 4, 5], vec![2, 3, 6, 7]];
        assert_eq!(places(8, &even), [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(places(4, &even), [0, 0, 1, 1]);
        assert_eq!(places(16, &even), [[0; 8], [1; 8]].concat());
        assert_eq!(places(2, &even), [0, 1]);
        let uneven = [vec![0, 1], vec![2, 3, 4, 5, 6, 7], vec![8, 9, 10, 11]];
        assert_eq!(places(12, &uneven), [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
        assert_eq!(places(6, &uneven), [0, 1, 1, 1, 2, 2]);
        for threads in 1..70 {
            let places = places(threads, &uneven);
            assert_eq!(places.len(), threads);
            assert!(places.is_sorted(), "{threads} threads: {places:?}");
            for (node, cpus) in uneven.iter().enumerate() {
                let here = places.iter().filter(|place| **place == node).count();
                let share = threads as f64 * cpus.len() as f64 / 12.0;
                assert!((here as f64 - share).abs() <= 1.0, "{threads} threads: {here} of {share} on node {node}");
            }
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_is_bound_to_cpus_that_it_may_use() {
        let before = nodes().concat();
        let Some(&cpu) = before.last() else { return };
        let inside = std::thread::spawn(move || {
            bind(&[cpu]);
            nodes().concat()
        });
        assert_eq!(inside.join().expect("the thread ends"), [cpu]);
        assert_eq!(nodes().concat(), before, "other threads are not bound");
    }
}
