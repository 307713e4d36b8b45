//! A real hostd among many pods, and its memory.

use anyhow::{Context, ensure};
use aya::maps::MapData;
use harness::{Cluster, Node, Options, wait_until};
use hostd::store::{
    Collection, Expect, FileStore, Key,
    records::{self, NodeRecord, PodRecord},
};
use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, AsRawFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

/// A node with so many pods in its store, each with an identity of its own once a policy tells them apart. `local` of them
/// are here, the others on a node that does not exist.
///
/// # Errors
///
/// Where it can't be made, or hostd does not get to know all pods.
pub fn cluster(identities: usize, local: usize) -> anyhow::Result<Cluster> {
    let options = Options {
        nodes: 1,
        pod_cidr: "10.1.0.0/16".to_owned(),
        tables: format!(
            "[maps]\nidentities = {}\naddresses = 131072\n[wasm]\nevaluate_ms = 20000",
            (identities + 64).max(128)
        ),
        ..Options::default()
    };
    let mut cluster = Cluster::without_hostd(&options)?;
    let store = FileStore::open(&cluster.folder().join("store"))?;
    let runtime = tokio::runtime::Runtime::new()?;
    let other = NodeRecord {
        name: "elsewhere".to_owned(),
        underlay: "192.0.2.99".parse()?,
        pod_cidrs: vec!["10.2.0.0/15".parse()?],
    };
    let key = Key::new(Collection::Nodes, "elsewhere");
    runtime.block_on(records::put(&store, &key, &other, Expect::Any))?;
    for number in 0..identities - local {
        let address = IpAddr::V4(Ipv4Addr::from(0x0a02_0000 + u32::try_from(number)?));
        let record = PodRecord {
            namespace: "shop".to_owned(),
            name: format!("pod-{number}"),
            labels: Arc::new(BTreeMap::from([("app".to_owned(), format!("app-{number}"))])),
            address,
            second: None,
            node: "elsewhere".into(),
            service_account: "".into(),
            ports: Vec::new(),
            incarnation: u32::try_from(number)? + 1,
        };
        let key = Key::new(Collection::Pods, address);
        runtime.block_on(records::put(&store, &key, &record, Expect::Any))?;
    }
    cluster.nodes[0].start()?;
    for number in 0..local {
        cluster.add_pod(0, &format!("shop/here-{number}"), &[("app", &format!("here-{number}"))])?;
    }
    let node = &cluster.nodes[0];
    let known = wait_until(Duration::from_mins(2), || {
        node.json(&["status"])
            .is_ok_and(|status| status["maps"][1]["used"] == identities as u64 + 1)
    });
    ensure!(known, "hostd does not know all pods: {}", node.log());
    Ok(cluster)
}

/// Loads a policy on a node of such a cluster. The other node is not there, and does not answer: hostd says so, and loads it all
/// the same; where that takes longer than it waits for itself, it says that, too.
///
/// # Errors
///
/// Where it is not in force after a while.
pub fn load(node: &Node, policy: &str) -> anyhow::Result<()> {
    let file = harness::policy(policy)?.display().to_string();
    let before = node.json(&["policy", "list"])?;
    let answer = node.json(&["load-policy", &file, "--skip-unreachable"]);
    let loaded = wait_until(Duration::from_mins(5), || {
        node.json(&["policy", "list"]).is_ok_and(|after| after != before)
    });
    ensure!(loaded, "{policy} is not loaded: {answer:?}");
    Ok(())
}

/// Memory of a process, in MiB.
pub struct Memory {
    /// Resident, of which so much is shared with files and maps.
    pub resident: f64,
    pub shared: f64,
    /// Its BPF maps that have pins: all but the ring of events, the programs' constants, and a few KiB for each service.
    pub maps: f64,
}

impl Memory {
    /// Of a node's hostd.
    ///
    /// # Errors
    ///
    /// Where it does not run.
    pub fn of(node: &Node) -> anyhow::Result<Self> {
        let pid = node.pid().context("hostd does not run")?;
        Ok(Self {
            resident: status(pid, "VmRSS:")?,
            shared: status(pid, "RssFile:")? + status(pid, "RssShmem:")?,
            maps: maps(&node.bpffs().join("maps"))?,
        })
    }
}

/// A value of `/proc/PID/status`, in MiB.
fn status(pid: u32, key: &str) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find(|line| line.starts_with(key))
        .context("no such line")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no value")?.parse()?;
    Ok(kib / 1024.0)
}

/// Memory of the maps that are pinned in a folder, in MiB, as the kernel counts it (`bpf_map_show_fdinfo`,
/// `kernel/bpf/syscall.c`).
fn maps(pins: &Path) -> anyhow::Result<f64> {
    let mut bytes = 0.0;
    for pin in fs::read_dir(pins)? {
        let pin = pin?.path();
        // Beside the maps is one that says which version they are of.
        if pin
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("layout-"))
        {
            continue;
        }
        let map = MapData::from_pin(&pin).with_context(|| pin.display().to_string())?;
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd()))?;
        let line = info.lines().find(|line| line.starts_with("memlock:"));
        let value = line
            .and_then(|line| line.split_whitespace().nth(1))
            .context("no memlock")?;
        bytes += value.parse::<f64>()?;
    }
    Ok(bytes / f64::from(1 << 20))
}
