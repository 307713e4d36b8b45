//! `cargo xtask bench policy`: what a policy costs, by the number of identities.
//!
//! In this process, with a real module, real maps and the code that hostd runs: a full load, one identity more, one
//! less, one relabelled. In a real hostd, with so many pods in its store: its memory and a load. In the kernel: a packet
//! that policy denies, at 100 and at 60,000 identities in turn.
#![expect(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a benchmark, which fails as a whole"
)]

use abi::{
    AddressKey, Endpoint, Family, Identity, IpcacheEntry, NodeConfig, map, node::TUNNEL_PORT, policy::FIRST_POD_COLUMN,
};
use anyhow::{Context, ensure};
use aya::{
    Ebpf, TestRunOptions,
    maps::{Array, HashMap},
    programs::{SchedClassifier, TestRun},
};
use harness::{Cluster, Namespace, Options, in_netns, wait_until};
use hostd::{
    config::{Attach, Maps, Wasm},
    datapath::{Constants, Datapath, Settings, load_programs, shape},
    identity::{IdentityKey, Layout, Registry},
    plan::Generation,
    stack::{Stack, Start},
    store::{
        Collection, Expect, FileStore, Key,
        records::{self, ModuleRecord, NodeRecord, PodRecord},
    },
    wasm::{Compiled, Compiler, Overrides, Placement, Pod, Tier, WasmError},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

/// Identities of this node's pods.
const LOCAL: usize = 250;
/// Times that everything is measured; the median is shown, with the range.
const ROUNDS: usize = 5;

fn pod(number: usize, app: &str) -> (AddressKey, Pod) {
    let address = Ipv4Addr::from(0x0a00_0000 + u32::try_from(number).unwrap());
    let pod = Pod {
        namespace: "shop".to_owned(),
        name: format!("pod-{number}"),
        labels: BTreeMap::from([
            ("app".to_owned(), app.to_owned()),
            ("noise".to_owned(), number.to_string()),
        ]),
        namespace_labels: BTreeMap::new(),
        service_account: String::new(),
        addresses: vec![address.into()],
        ports: Vec::new(),
    };
    (AddressKey::from(IpAddr::V4(address)), pod)
}

fn record() -> ModuleRecord {
    ModuleRecord {
        placement: Placement {
            name: "default".to_owned(),
            tier: Tier::Tenant,
            priority: 500,
            tenant: None,
        },
        file: "web-app".to_owned(),
        audit: false,
        overrides: Overrides::default(),
        sha256: String::new(),
        config: String::new(),
    }
}

/// Seconds that something takes.
fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let began = Instant::now();
    let result = work();
    (began.elapsed().as_secs_f64(), result)
}

/// What one round has measured, in the order of its lines.
type Round = Vec<(&'static str, f64, &'static str)>;

struct Bench {
    compiled: Result<Compiled, WasmError>,
    datapath: Datapath,
    maps: Maps,
}

impl Bench {
    fn number(registry: &mut Registry, key: Option<&IdentityKey>) -> Identity {
        key.map_or(Identity::INIT, |key| registry.assign(key).unwrap())
    }

    /// One identity more for this generation; the answer is seconds and calls.
    fn assign(
        &mut self,
        stack: &mut Stack,
        generation: &mut Generation,
        registry: &mut Registry,
        pod: (AddressKey, Pod),
        local: bool,
    ) -> (f64, u64) {
        let before = stack.calls();
        let (seconds, ()) = timed(|| {
            stack.begin();
            let key = stack.identify(&[pod.1]).remove(0).unwrap();
            let identity = Self::number(registry, key.as_ref());
            stack.learn(identity, registry.shared(identity));
            let change = generation.assign(pod.0, identity, local, stack).unwrap();
            self.datapath.write(0, &change).unwrap();
            let released = generation.release();
            self.datapath.write(0, &released).unwrap();
        });
        (seconds, stack.calls() - before)
    }

    fn round(&mut self, size: usize) -> Round {
        let record = record();
        let limits = hostd::wasm::Limits::from(Wasm::default());
        let pods: Vec<(AddressKey, Pod)> = (1..=size).map(|n| pod(n, &format!("app-{n}"))).collect();
        let (mut registry, mut lines) = (Registry::new(Layout { tenant_bits: 8 }), Round::new());

        let (start, mut stack) = timed(|| {
            let start = Start {
                record: &record,
                compiled: &self.compiled,
                limits,
                strict: true,
            };
            Stack::start(&[start]).unwrap()
        });
        let facts: Vec<Pod> = pods.iter().map(|(_, pod)| pod.clone()).collect();
        let (asking, keys) = timed(|| {
            stack.begin();
            stack.identify(&facts)
        });
        let (number, members) = timed(|| -> Vec<_> {
            let keys = keys.into_iter().zip(&pods).enumerate();
            keys.map(|(index, (key, (address, _)))| {
                let key = key.unwrap();
                let identity = Self::number(&mut registry, key.as_ref());
                stack.learn(identity, registry.shared(identity));
                (*address, identity, index < LOCAL)
            })
            .collect()
        });
        let (compile, (mut generation, change)) = timed(|| {
            stack.begin();
            Generation::compile_all(shape(&self.maps), members, [], &mut stack).unwrap()
        });
        let cells = change.cells();
        let (write, ()) = timed(|| {
            self.datapath.clear(0);
            self.datapath.write(0, &change).unwrap();
        });
        lines.push(("cells", cells as f64, ""));
        lines.push(("calls of the module", stack.calls() as f64, ""));
        lines.push(("start the module", start * 1e3, "ms"));
        lines.push(("identify", asking * 1e3, "ms"));
        lines.push(("number", number * 1e3, "ms"));
        lines.push(("compile", compile * 1e3, "ms"));
        lines.push(("write the maps", write * 1e3, "ms"));
        lines.push(("full load", (start + asking + number + compile + write) * 1e3, "ms"));
        lines.push(("cells a second, compiled", cells as f64 / compile / 1e6, "M/s"));
        drop(change);

        let next = size + 1;
        let mut step = |what: &'static str, calls: &'static str, pod: (AddressKey, Pod), local: bool| {
            let (seconds, count) = self.assign(&mut stack, &mut generation, &mut registry, pod, local);
            lines.push((what, seconds * 1e3, "ms"));
            lines.push((calls, count as f64, ""));
        };
        step("one identity more, elsewhere", "… calls", pod(next, "new-1"), false);
        step("one identity more, here", "… calls ", pod(next + 1, "new-2"), true);
        step("one pod relabelled, elsewhere", "… calls  ", pod(next, "new-3"), false);
        step("one pod relabelled, here", "… calls   ", pod(next + 1, "new-4"), true);
        step(
            "one more pod of an identity",
            "… calls    ",
            pod(next + 2, "app-1"),
            false,
        );
        let (seconds, ()) = timed(|| {
            generation.remove(&pod(next + 1, "").0);
            let released = generation.release();
            self.datapath.write(0, &released).unwrap();
        });
        lines.push(("one identity less, here", seconds * 1e3, "ms"));
        lines
    }
}

fn median(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

/// The rounds put together: what, median, least, most, unit.
fn summary(rounds: &[Round]) -> Vec<(String, f64, f64, f64, &'static str)> {
    (0..rounds[0].len())
        .map(|line| {
            let mut values: Vec<f64> = rounds.iter().map(|round| round[line].1).collect();
            let (middle, least, most) = median(&mut values);
            (rounds[0][line].0.to_owned(), middle, least, most, rounds[0][line].2)
        })
        .collect()
}

fn in_process(identities: usize) -> anyhow::Result<Value> {
    let netns = Namespace::new("policy")?;
    let folder = tempfile::tempdir()?;
    let bpffs = folder.path().join("bpf");
    let runtime = tokio::runtime::Runtime::new()?;
    let child = Compiler::new(harness::hostd()?, Wasm::default().into(), None)?;
    let module = fs::read(harness::policy("web-app")?)?;
    let compiled = runtime.block_on(child.compile(&module))?;
    let maps = Maps {
        identities: u32::try_from((identities + 64).max(128))?,
        local_identities: 256,
        ..Maps::default()
    };
    let settings = Settings {
        bpffs: bpffs.clone(),
        maps,
        attach: Attach::Auto,
        timeouts: abi::conntrack::Timeouts::default(),
    };
    let measured = in_netns(netns.name(), || -> anyhow::Result<Value> {
        let guard = runtime.enter();
        let (datapath, _events) = Datapath::load(&settings)?;
        let mut bench = Bench {
            compiled: Ok(compiled),
            datapath,
            maps,
        };
        let rounds: Vec<Round> = (0..ROUNDS).map(|_| bench.round(identities)).collect();
        drop(guard);
        let lines = summary(&rounds);
        println!(
            "\n{identities} identities, {} of them here: {ROUNDS} rounds",
            LOCAL.min(identities)
        );
        for (what, middle, least, most, unit) in &lines {
            let name = what.trim_end();
            println!("  {name:<32} {middle:>12.3} {unit:<4} ({least:.3} to {most:.3})");
        }
        let lines = lines.iter().map(|(what, middle, least, most, unit)| {
            json!({"what": what.trim_end(), "median": middle, "least": least, "most": most, "unit": unit})
        });
        Ok(json!({"identities": identities, "lines": lines.collect::<Vec<_>>()}))
    })?;
    harness::run("umount", &[&bpffs.display().to_string()])?;
    measured
}

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
fn in_hostd(identities: usize, local: usize) -> anyhow::Result<Value> {
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

/// Nanoseconds that a packet takes which policy denies, at so many identities: each packet to another one.
struct Packets {
    netns: Namespace,
    ebpf: Ebpf,
    frames: Vec<Vec<u8>>,
    ifindex: u32,
}

/// Frames that are sent in turn.
const FRAMES: usize = 64;
/// Packets in a row; short, so that rounds of both sizes are side by side.
const REPEAT: u32 = 2000;

impl Packets {
    fn new(identities: u32) -> anyhow::Result<Self> {
        let netns = Namespace::new("packets")?;
        netns.ip(&["link", "add", "va", "type", "veth", "peer", "name", "pa"])?;
        let shown = netns.ip(&["-o", "link", "show", "va"])?;
        let ifindex: u32 = shown.split(':').next().context("no index")?.parse()?;
        let maps = Maps {
            identities,
            local_identities: 256,
            ..Maps::default()
        };
        let constants = Constants {
            shape: shape(&maps),
            record_action: false,
        };
        let mut ebpf = load_programs(&maps, &constants, None)?;
        let config = NodeConfig {
            vxlan_ifindex: ifindex,
            report: 0,
            tunnel_port: TUNNEL_PORT,
            underlay_family: Family::V4 as u8,
            zero: 0,
            tunnel_mtu: 1450,
            timeouts: abi::conntrack::Timeouts::default(),
            conntrack_limit: u32::MAX,
            conntrack_share: u32::MAX,
        };
        Array::<_, NodeConfig>::try_from(ebpf.map_mut(map::CONFIG).context("no map")?)?.set(0, config, 0)?;
        let own = AddressKey::v4([10, 1, 0, 2]);
        let endpoint = Endpoint {
            first_stamp: 1,
            address: own.address,
            identity: [Identity(0x01_0001); 2],
            row: [1; 2],
            column: [FIRST_POD_COLUMN; 2],
            owner: 1,
            epoch: 1,
            ifindex,
            macs: abi::Macs {
                pod: [2, 0, 0, 0, 0, 1],
                gateway: [2, 0, 0, 0, 0, 2],
            },
            last_stamp: 1,
        };
        HashMap::<_, AddressKey, Endpoint>::try_from(ebpf.map_mut(map::ENDPOINTS).context("no map")?)?
            .insert(own, endpoint, 0)?;
        let mut ipcache =
            HashMap::<_, AddressKey, IpcacheEntry>::try_from(ebpf.map_mut(map::IPCACHE).context("no map")?)?;
        let mut frames = Vec::new();
        for number in 0..u32::try_from(FRAMES)? {
            let column = FIRST_POD_COLUMN + number * (identities - 1) / u32::try_from(FRAMES)?;
            let address = [10, 2, 0, u8::try_from(number)?];
            let entry = IpcacheEntry {
                first_stamp: 1,
                address: AddressKey::v4(address).address,
                identity: [Identity(0x02_0000 + number); 2],
                column: [column; 2],
                owner: number + 2,
                epoch: 1,
                tunnel_endpoint: AddressKey::v4([192, 0, 2, 2]).address,
                tunnel_family: Family::V4 as u8,
                flags: 0,
                zero: [0; 6],
                last_stamp: 1,
            };
            ipcache.insert(AddressKey::v4(address), entry, 0)?;
            frames.push(frame(address));
        }
        Ok(Self {
            netns,
            ebpf,
            frames,
            ifindex,
        })
    }

    fn round(&self) -> anyhow::Result<f64> {
        let program: &SchedClassifier = self.ebpf.program("from_pod").context("no program")?.try_into()?;
        let mut ctx = [0; 192];
        ctx[40..44].copy_from_slice(&self.ifindex.to_ne_bytes());
        let mut total = Duration::ZERO;
        for frame in &self.frames {
            let result = in_netns(self.netns.name(), || {
                program.test_run(TestRunOptions {
                    data_in: Some(frame),
                    ctx_in: Some(&ctx),
                    repeat: REPEAT,
                    ..TestRunOptions::default()
                })
            })??;
            ensure!(
                result.return_value == 2,
                "the packet was not denied: {}",
                result.return_value
            );
            total += result.duration;
        }
        Ok(total.as_nanos() as f64 / FRAMES as f64)
    }
}

/// A TCP SYN from 10.1.0.2. Nobody checks its sums.
fn frame(to: [u8; 4]) -> Vec<u8> {
    let ethernet = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    let ip = [0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 1, 0, 2];
    let tcp = [0x9c, 0x40, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0];
    [&ethernet[..], &ip, &to, &tcp].concat()
}

fn per_packet() -> anyhow::Result<Value> {
    let (few, many) = (Packets::new(100)?, Packets::new(60_000)?);
    let (mut few_ns, mut many_ns) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        few_ns.push(few.round()?);
        many_ns.push(many.round()?);
    }
    let (few, many) = (median(&mut few_ns), median(&mut many_ns));
    let ratio = many.0 / few.0;
    println!("\na packet that policy denies, in turn to {FRAMES} identities: 20 rounds side by side");
    println!(
        "  at    100 identities             {:>12.1} ns   ({:.1} to {:.1})",
        few.0, few.1, few.2
    );
    println!(
        "  at 60,000 identities             {:>12.1} ns   ({:.1} to {:.1})",
        many.0, many.1, many.2
    );
    println!("  ratio                            {ratio:>12.3}");
    Ok(json!({"at_100_ns": few.0, "at_60000_ns": many.0, "ratio": ratio}))
}

fn main() -> anyhow::Result<()> {
    // `cargo test` runs benchmarks too, to see that they run: this one takes its time.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        return Ok(());
    }
    if let Err(unsupported) = harness::check_support() {
        anyhow::bail!("this machine can't run it: {unsupported}");
    }
    harness::use_release();
    let sizes = [100, 1000, 10_000];
    let loads = sizes
        .iter()
        .map(|size| in_process(*size))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let hostd = [(100, 50), (1000, 100), (10_000, LOCAL)]
        .iter()
        .map(|(size, local)| in_hostd(*size, *local))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let all = json!({"loads": loads, "hostd": hostd, "packet": per_packet()?});
    if let Some(file) = arguments
        .iter()
        .position(|one| one == "--json")
        .and_then(|at| arguments.get(at + 1))
    {
        fs::write(file, format!("{all:#}\n"))?;
    }
    Ok(())
}
