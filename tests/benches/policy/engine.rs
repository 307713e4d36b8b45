//! In this process: the code that hostd runs, with a real module and real maps.

use super::{LOCAL, ROUNDS, timed};
use abi::{AddressKey, Identity};
use harness::{Namespace, in_netns};
use hostd::{
    config::{Attach, Maps, Wasm},
    datapath::{Datapath, Settings, shape},
    identity::{IdentityKey, Layout, Registry},
    plan::Generation,
    stack::{Stack, Start},
    store::records::ModuleRecord,
    wasm::{Compiled, Compiler, Overrides, Placement, Pod, Tier, WasmError},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr},
};
use wasmgate_tests::report::Samples;

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

/// The rounds put together: what, how much, unit.
fn summary(rounds: &[Round]) -> Vec<(&'static str, Samples, &'static str)> {
    let lines = rounds[0].iter().enumerate();
    lines
        .map(|(line, (what, _, unit))| {
            (
                what.trim_end(),
                rounds.iter().map(|round| round[line].1).collect(),
                *unit,
            )
        })
        .collect()
}

pub fn in_process(identities: usize) -> anyhow::Result<Value> {
    let netns = Namespace::new("policy")?;
    let folder = harness::folder()?;
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
        for (what, samples, unit) in &lines {
            let (median, least, most) = (samples.median(), samples.least(), samples.most());
            println!("  {what:<32} {median:>12.3} {unit:<4} ({least:.3} to {most:.3})");
        }
        let lines = lines.iter().map(|(what, samples, unit)| {
            let mut line = samples.json();
            line["what"] = json!(what);
            line["unit"] = json!(unit);
            line
        });
        Ok(json!({"identities": identities, "lines": lines.collect::<Vec<_>>()}))
    })?;
    harness::run("umount", &[&bpffs.display().to_string()])?;
    measured
}
