//! In a real hostd: its memory, and a load.

use super::{ROUNDS, median};
use anyhow::{Context, ensure};
use harness::{Cluster, Options, wait_until};
use hostd::store::{
    Collection, Expect, FileStore, Key,
    records::{self, NodeRecord, PodRecord},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

/// A value of `/proc/PID/status`, in KiB.
fn memory(pid: u32, key: &str) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find(|line| line.starts_with(key))
        .context("no such line")?;
    Ok(line.split_whitespace().nth(1).context("no value")?.parse()?)
}

/// Memory of the maps that a process holds, in bytes, each once.
fn map_memory(pid: u32) -> anyhow::Result<u64> {
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let Ok(text) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        let value = |key: &str| -> Option<u64> {
            let line = text.lines().find(|line| line.starts_with(key))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        if let (Some(id), Some(bytes)) = (value("map_id:"), value("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    Ok(maps.values().sum())
}

/// A real hostd with so many pods in its store, of which `local` are here.
pub fn in_hostd(identities: usize, local: usize) -> anyhow::Result<Value> {
    let options = Options {
        nodes: 1,
        pod_cidr: "10.1.0.0/16".to_owned(),
        tables: format!(
            "[maps]\nidentities = {}\naddresses = 131072",
            (identities + 64).max(128)
        ),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options)?;
    let store = FileStore::open(&cluster.folder().join("store"))?;
    let runtime = tokio::runtime::Runtime::new()?;
    let other = NodeRecord {
        name: "elsewhere".to_owned(),
        underlay: "192.0.2.99".parse()?,
        pod_cidrs: vec!["10.2.0.0/16".parse()?],
    };
    let key = Key::new(Collection::Nodes, "elsewhere");
    runtime.block_on(records::put(&store, &key, &other, Expect::Any))?;
    for number in 0..identities - local {
        let address = IpAddr::V4(Ipv4Addr::from(0x0a02_0000 + u32::try_from(number)?));
        let record = PodRecord {
            namespace: "shop".to_owned(),
            name: format!("pod-{number}"),
            labels: BTreeMap::from([("app".to_owned(), format!("app-{number}"))]),
            address,
            second: None,
            node: "elsewhere".to_owned(),
            service_account: String::new(),
            ports: Vec::new(),
            incarnation: u32::try_from(number)? + 1,
        };
        let key = Key::new(Collection::Pods, address);
        runtime.block_on(records::put(&store, &key, &record, Expect::Any))?;
    }
    for number in 0..local {
        cluster.add_pod(0, &format!("shop/here-{number}"), &[("app", &format!("here-{number}"))])?;
    }
    let node = &cluster.nodes[0];
    let known = wait_until(Duration::from_mins(2), || {
        node.json(&["status"])
            .is_ok_and(|status| status["maps"][1]["used"] == identities as u64 + 1)
    });
    ensure!(known, "hostd does not know all pods: {}", node.log());
    let file = harness::policy("web-app")?.display().to_string();
    let mut loads = Vec::new();
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let report = node.json(&["load-policy", &file, "--skip-unreachable"]).or_else(|_| {
            // The node that is not there has not answered: the load is done all the same.
            node.json(&["policy", "list"])
        })?;
        loads.push(began.elapsed().as_secs_f64() * 1e3);
        ensure!(report.is_object(), "no answer");
    }
    let pid = node.pid().context("hostd does not run")?;
    let (middle, least, most) = median(&mut loads);
    let resident = memory(pid, "VmRSS:")? / 1024.0;
    let shared = (memory(pid, "RssFile:")? + memory(pid, "RssShmem:")?) / 1024.0;
    let maps = map_memory(pid)? as f64 / f64::from(1 << 20);
    println!("\n{identities} identities in a real hostd, {local} of them here: {ROUNDS} loads");
    println!("  load-policy, until it returns    {middle:>12.3} ms   ({least:.3} to {most:.3})");
    println!("  resident memory                  {resident:>12.1} MiB  (of it files and maps: {shared:.1})");
    println!("  memory of the maps               {maps:>12.1} MiB");
    Ok(json!({
        "identities": identities, "local": local, "load_ms": {"median": middle, "least": least, "most": most},
        "resident_mib": resident, "shared_mib": shared, "maps_mib": maps,
    }))
}
