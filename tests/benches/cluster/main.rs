//! `cargo xtask bench cluster`: two real nodes among a thousand that exist in etcd only. What hostd takes, how soon it is
//! there, and how soon changes are enforced.

mod add;
mod churn;
mod enforce;
mod fanout;
mod simulated;

use add::{Adds, Times};
use anyhow::{Context, ensure};
use enforce::Prober;
use harness::{Cluster, EtcdOptions, Listener, Node, Options, wait_until};
use serde_json::{Value, json};
use simulated::{Size, Writer};
use std::{
    fs,
    net::SocketAddr,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};
use wasmgate_tests::{
    crowd::Memory,
    report::{self, Measured, Samples},
};

const SIZE: Size = Size {
    nodes: 1000,
    pods: 100,
    namespaces: 20,
    apps: 500,
};
/// Changes of a real pod's labels, without and with the others' changes.
const RELABELS: usize = 400;
/// Pod changes a second, and the least time for which they go on.
const RATE: u32 = 40;
const CHURN: Duration = Duration::from_mins(3);
/// The pod whose labels change.
const ASKED: &str = "ns-0/asked";
/// Containers of the node while others come and go, and how many of those.
const PODS: usize = 100;
const ADDS: usize = 200;
/// hostd may take so long at its very first start.
const START: Duration = Duration::from_mins(10);

fn main() -> ExitCode {
    report::run(bench)
}

fn bench() -> anyhow::Result<Measured> {
    let options = Options {
        etcd: Some(EtcdOptions::default()),
        tables: "[maps]\nidentities = 16384\naddresses = 131072\n[wasm]\nevaluate_ms = 20000".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options)?;
    cluster.load("web-app")?;
    for (node, name) in [(0, ASKED), (0, "ns-0/near"), (1, "ns-0/far")] {
        cluster.add_pod(node, name, &[("app", "other")])?;
    }
    cluster.settle()?;
    let alone = memory(&cluster)?;
    let pods = SIZE.nodes * SIZE.pods;
    println!(
        "{} nodes, {pods} pods, {} identities in etcd, and two real nodes",
        SIZE.nodes,
        SIZE.namespaces * SIZE.apps
    );

    for node in &mut cluster.nodes {
        node.stop(false)?;
    }
    let began = Instant::now();
    Writer::with(&cluster, async |writer| writer.enter(SIZE).await)?;
    println!("entered in {:.1} s", began.elapsed().as_secs_f64());
    let first = start(&mut cluster)?;
    let fresh = memory(&cluster)?;
    for node in &mut cluster.nodes {
        node.stop(false)?;
    }
    let again = start(&mut cluster)?;
    println!("\nSTART                          NODE 1 s  NODE 2 s");
    println!("identities to be numbered      {:>8.1} {:>9.1}", first[0], first[1]);
    println!("restart                        {:>8.1} {:>9.1}", again[0], again[1]);
    let started = memory(&cluster)?;

    let asked = cluster.pod(ASKED);
    let _listener = Listener::new(asked.netns.name(), 53)?;
    let to = SocketAddr::new(asked.address, 53);
    let probers = ["ns-0/near", "ns-0/far"].map(|pod| Prober::start(cluster.pod(pod).netns.name(), to));
    let quiet = enforce::relabel(&cluster, &probers, ASKED, RELABELS)?;
    let (busy, churned, used) = under_churn(&cluster, &probers)?;
    drop(probers);
    print_enforced(&quiet, &busy, &churned);
    let churning = memory(&cluster)?;

    println!("\nCNI, ms, {PODS} pods on the node             p50    p99    MOST");
    let (times, full) = adds(&cluster, 0, "wasmgate-cni")?;
    attach_by_links(&mut cluster.nodes[1])?;
    let (links, _) = adds(&cluster, 1, "wasmgate-cni, attach = tcx")?;
    let fanout = fanout::measure(&cluster)?;
    println!(
        "\netcd: a pod's record has {} bytes; a change takes it {:.0} us of processor time, and {:.1} us for each node that hears \
         of it",
        fanout.record, fanout.change, fanout.event
    );

    println!("\nHOSTD, MIB RESIDENT (of it files and maps)   NODE 1          NODE 2");
    for (name, [one, other]) in [
        ("with 3 pods in the cluster", &alone),
        ("after its first start with all", &fresh),
        ("after a restart", &started),
        ("after the changes", &churning),
        ("with 103 pods of its own", &full),
    ] {
        println!(
            "{name:<42} {:>6.1} ({:>5.1}) {:>7.1} ({:>5.1})",
            one.resident, one.shared, other.resident, other.shared
        );
    }
    println!(
        "maps: {:.1} MiB; processor time during the changes: {:.1} % and {:.1} %",
        full[0].maps, used[0], used[1]
    );
    let mib = |all: &[Memory; 2]| {
        json!(
            all.each_ref()
                .map(|one| json!({"resident": one.resident, "shared": one.shared, "maps": one.maps}))
        )
    };
    Ok(json!({
        "nodes": SIZE.nodes, "pods": pods, "identities": SIZE.namespaces * SIZE.apps,
        "start_s": { "first": first, "again": again },
        "enforced_ms": { "quiet": figures(&quiet), "changes": figures(&busy), "others": figures(&churned) },
        "memory_mib": { "alone": mib(&alone), "first": mib(&fresh), "again": mib(&started), "changes": mib(&churning), "pods": mib(&full) },
        "processor_percent": used,
        "etcd": { "record_bytes": fanout.record, "change_us": fanout.change, "event_us": fanout.event },
        "cni_ms": { "auto": cni_figures(&times), "tcx": cni_figures(&links) },
    }).into())
}

fn print_enforced(quiet: &Samples, busy: &Samples, churned: &Samples) {
    println!("\nFROM THE CHANGE UNTIL IT HOLDS ON BOTH NODES, ms     TIMES    p50    p99    MOST");
    for (name, samples) in [
        ("a pod's label here, by packets", quiet),
        ("the same during 40 changes a second", busy),
        ("a pod of another node, in the kernel", churned),
    ] {
        let (median, high, most) = (samples.median(), samples.at(0.99), samples.most());
        println!(
            "{name:<52} {:>5} {median:>6.1} {high:>6.1} {most:>7.1}",
            samples.count()
        );
    }
}

fn cni_figures(times: &Times) -> Value {
    let of = |[add, del]: &[Samples; 2]| json!({ "add": figures(add), "del": figures(del) });
    json!({ "wasmgate": of(&times.ours), "ptp": of(&times.theirs) })
}

fn figures(samples: &Samples) -> Value {
    json!({"count": samples.count(), "p50": samples.median(), "p99": samples.at(0.99), "most": samples.most()})
}

/// What containers wait for on one node, and hostd's memory when it has them.
fn adds(cluster: &Cluster, at: usize, name: &str) -> anyhow::Result<(Times, [Memory; 2])> {
    let adds = Adds::new(cluster, at, PODS)?;
    let times = adds.measure(cluster, ADDS)?;
    for (index, command) in ["ADD", "DEL"].into_iter().enumerate() {
        for (name, samples) in [
            (name, &times.ours[index]),
            ("ptp with host-local", &times.theirs[index]),
        ] {
            println!(
                "{:<41} {:>6.1} {:>6.1} {:>7.1}",
                format!("{name}: {command}"),
                samples.median(),
                samples.at(0.99),
                samples.most()
            );
        }
    }
    Ok((times, memory(cluster)?))
}

/// Makes a node give new pods links at once, not filters first.
fn attach_by_links(node: &mut Node) -> anyhow::Result<()> {
    node.stop(false)?;
    let config = fs::read_to_string(node.config())?;
    fs::write(node.config(), format!("attach = \"tcx\"\n{config}"))?;
    node.launch()?;
    let ready = wait_until(START, || node.json(&["status"]).is_ok());
    ensure!(ready, "hostd does not come back");
    Ok(())
}

/// Starts hostd on both nodes at once; seconds until each is ready.
fn start(cluster: &mut Cluster) -> anyhow::Result<[f64; 2]> {
    let began = Instant::now();
    for node in &mut cluster.nodes {
        node.launch()?;
    }
    let mut ready = [None; 2];
    while ready.contains(&None) {
        for (node, ready) in cluster
            .nodes
            .iter()
            .zip(&mut ready)
            .filter(|(_, ready)| ready.is_none())
        {
            if node.json(&["status"]).is_ok() {
                *ready = Some(began.elapsed().as_secs_f64());
            }
        }
        ensure!(
            began.elapsed() < START,
            "hostd is not ready: {}",
            cluster.nodes[0].log()
        );
        thread::sleep(Duration::from_millis(20));
    }
    let expected = u64::from(SIZE.nodes * SIZE.pods) + 4;
    for node in &cluster.nodes {
        let used = &node.json(&["status"])?["maps"][1]["used"];
        ensure!(
            *used == expected,
            "{} knows {used} addresses, not {expected}",
            node.name
        );
    }
    Ok(ready.map(Option::unwrap_or_default))
}

fn memory(cluster: &Cluster) -> anyhow::Result<[Memory; 2]> {
    Ok([Memory::of(&cluster.nodes[0])?, Memory::of(&cluster.nodes[1])?])
}

/// Changes labels while other nodes' pods change; also milliseconds of those, and the processor time that each hostd takes, in
/// percent of one processor.
fn under_churn(cluster: &Cluster, probers: &[Prober]) -> anyhow::Result<(Samples, Samples, [f64; 2])> {
    let stop = AtomicBool::new(false);
    let before = both_seconds(cluster)?;
    let began = Instant::now();
    let (busy, churned) = thread::scope(|scope| {
        let churn = scope.spawn(|| churn::run(cluster, SIZE, RATE, &stop));
        let busy = enforce::relabel(cluster, probers, ASKED, RELABELS);
        while busy.is_ok() && began.elapsed() < CHURN && !churn.is_finished() {
            thread::sleep(Duration::from_millis(100));
        }
        stop.store(true, Ordering::Relaxed);
        let churned = churn.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        anyhow::Ok((busy?, churned?))
    })?;
    let (after, seconds) = (both_seconds(cluster)?, began.elapsed().as_secs_f64());
    let share = |node: usize| 100.0 * (after[node] - before[node]) / seconds;
    Ok((busy, churned, [share(0), share(1)]))
}

/// Processor time that a process has had, in seconds (`proc(5)`: fields 14 and 15 of `stat`, by `USER_HZ`, which is 100).
fn processor_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit(')').next().context("no fields")?;
    let field = |number: usize| -> anyhow::Result<f64> {
        Ok(fields.split_whitespace().nth(number - 3).context("no field")?.parse()?)
    };
    Ok((field(14)? + field(15)?) / 100.0)
}

fn both_seconds(cluster: &Cluster) -> anyhow::Result<[f64; 2]> {
    let of = |node: &Node| processor_seconds(node.pid().context("hostd does not run")?);
    Ok([of(&cluster.nodes[0])?, of(&cluster.nodes[1])?])
}
