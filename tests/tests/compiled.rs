//! Real modules, compiled: what the maps would hold is what the modules say, pair by pair and port by port, however the
//! cluster came to be as it is. Needs no kernel.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use abi::{
    AddressKey, Direction, Identity,
    policy::{CELL_ALLOW, CELL_DENY, CELL_PORT_SET, port_key},
};
use hostd::{
    config::Wasm,
    identity::{Layout, Registry},
    plan::{Action, Change, Generation, Ruling, Shape},
    stack::{Stack, Start},
    store::records::ModuleRecord,
    wasm::{Compiled, Compiler, Limits, Overrides, Placement, Pod, Tier, WasmError},
};
use proptest::prelude::*;
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    fs,
    net::{IpAddr, Ipv4Addr},
};

const SHAPE: Shape = Shape {
    rows: 32,
    columns: 128,
    port_sets: 64,
    breakpoints: 1024,
};

const POLICIES: &str = r#"[
    {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "a", "namespace": "red"},
     "spec": {"podSelector": {"matchLabels": {"app": "db"}},
              "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "backend"}}}], "ports": [{"port": "sql"}]},
                          {"from": [{"ipBlock": {"cidr": "10.0.0.0/29", "except": ["10.0.0.4/31"]}}],
                           "ports": [{"port": 80, "endPort": 90}, {"protocol": "UDP"}]}]}},
    {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "b", "namespace": "blue"},
     "spec": {"podSelector": {}, "policyTypes": ["Egress"],
              "egress": [{"to": [{"namespaceSelector": {"matchLabels": {"team": "x"}}}], "ports": [{"port": 5432}]}]}},
    {"apiVersion": "wasmgate.dev/v1", "kind": "Defaults", "unselected": "Pass"}
]"#;

fn record(name: &str, tier: Tier, config: &str) -> ModuleRecord {
    ModuleRecord {
        placement: Placement {
            name: name.to_owned(),
            tier,
            priority: 1,
            tenant: None,
        },
        file: name.to_owned(),
        audit: false,
        overrides: Overrides::default(),
        sha256: String::new(),
        config: config.to_owned(),
    }
}

type Module = (ModuleRecord, Result<Compiled, WasmError>);

thread_local! {
    /// Compiled once.
    static MODULES: RefCell<Option<Vec<Module>>> = const { RefCell::new(None) };
}

fn modules() -> Vec<Module> {
    MODULES.with(|modules| {
        let compile = || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let compiler = Compiler::new(harness::hostd().unwrap(), Wasm::default().into(), None).unwrap();
            let compile = |name: &str| {
                let module = fs::read(harness::policy(name).unwrap()).unwrap();
                Ok(runtime.block_on(compiler.compile(&module)).unwrap())
            };
            vec![
                (record("np", Tier::Tenant, POLICIES), compile("network-policy")),
                (record("web", Tier::Tenant, ""), compile("web-app")),
                (record("base", Tier::Baseline, ""), compile("tenant-isolation")),
            ]
        };
        modules.borrow_mut().get_or_insert_with(compile).clone()
    })
}

fn start() -> Stack {
    let modules = modules();
    let starts: Vec<Start<'_>> = modules
        .iter()
        .map(|(record, compiled)| Start {
            record,
            compiled,
            limits: Limits::from(Wasm::default()),
            strict: true,
        })
        .collect();
    Stack::start(&starts).unwrap()
}

/// The kernel's side: what was written so far.
#[derive(Default)]
struct Kernel {
    cells: HashMap<u32, u16>,
    sets: HashMap<u32, Ruling>,
}

impl Kernel {
    fn apply(&mut self, change: &Change) {
        for write in &change.port_sets {
            self.sets
                .insert(write.number, Ruling::from_breakpoints(&write.breakpoints));
        }
        for block in &change.blocks {
            let places = block
                .rows
                .iter()
                .flat_map(|row| block.columns.iter().map(move |column| (*row, *column)));
            for ((row, column), cell) in places.zip(&block.cells) {
                self.cells.insert(SHAPE.index(block.direction, row, column), *cell);
            }
        }
    }

    fn passes(&self, index: u32, key: u32) -> bool {
        match self.cells.get(&index).copied().unwrap_or(CELL_DENY) {
            CELL_DENY => false,
            CELL_ALLOW => true,
            set => self.sets[&u32::from(set - CELL_PORT_SET)].at(key),
        }
    }
}

/// A cluster that changes.
struct Cluster {
    stack: Stack,
    registry: Registry,
    generation: Generation,
    kernel: Kernel,
}

fn pod(number: u8, namespace: &str, app: &str, team: bool) -> Pod {
    let teams = if team {
        BTreeMap::from([("team".to_owned(), "x".to_owned())])
    } else {
        BTreeMap::new()
    };
    Pod {
        namespace: namespace.to_owned(),
        name: format!("pod-{number}"),
        labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
        namespace_labels: teams,
        service_account: String::new(),
        addresses: vec![IpAddr::V4(Ipv4Addr::new(10, 0, 0, number))],
        ports: vec![("sql".to_owned(), 6, 5000 + u16::from(number % 2))],
    }
}

fn address(number: u8) -> AddressKey {
    AddressKey::v4([10, 0, 0, number])
}

impl Cluster {
    fn new() -> Self {
        Self {
            stack: start(),
            registry: Registry::new(Layout { tenant_bits: 8 }),
            generation: Generation::new(SHAPE),
            kernel: Kernel::default(),
        }
    }

    fn put(&mut self, number: u8, pod: Pod, local: bool) {
        self.stack.begin();
        let key = self.stack.identify(&[pod]).remove(0).unwrap();
        let identity = key.map_or(Identity::INIT, |key| self.registry.assign(&key).unwrap());
        self.stack.learn(identity, self.registry.shared(identity));
        let change = self
            .generation
            .assign(address(number), identity, local, &mut self.stack)
            .unwrap();
        self.kernel.apply(&change);
        self.kernel.apply(&self.generation.release());
    }

    /// Every cell says what the modules say, one after the other.
    fn check(&mut self) {
        let keys = [
            (6, 80),
            (6, 90),
            (6, 91),
            (6, 443),
            (6, 5000),
            (6, 5001),
            (6, 5432),
            (6, 8080),
            (17, 53),
            (1, 8),
        ]
        .map(|(protocol, port)| port_key(protocol, port));
        let mut known: Vec<Identity> = Identity::RESERVED.iter().map(|(identity, _)| *identity).collect();
        known.extend(self.registry.iter().map(|(identity, _)| identity));
        known.retain(|identity| self.generation.column(*identity).is_some());
        self.stack.begin();
        for subject in &known {
            let Some(row) = self.generation.row(*subject) else {
                continue;
            };
            for peer in &known {
                let column = self.generation.column(*peer).unwrap();
                for side in [Direction::Egress, Direction::Ingress] {
                    for key in keys {
                        let steps = self.stack.steps(side, *subject, *peer, key).unwrap();
                        let decided = steps
                            .iter()
                            .map(|step| step.action)
                            .find(|action| *action != Action::Pass);
                        let expected = match decided {
                            Some(action) => action == Action::Allow,
                            None => side == Direction::Ingress && *peer == Identity::HOST,
                        };
                        let found = self.kernel.passes(SHAPE.index(side, row, column), key);
                        assert_eq!(
                            found,
                            expected,
                            "{} {side:?} {} at {key:#x}: {steps:?}",
                            self.registry.name(*subject),
                            self.registry.name(*peer)
                        );
                    }
                }
            }
        }
    }
}

const APPS: [&str; 5] = ["db", "backend", "frontend", "dns", "none"];

fn churn() -> impl Strategy<Value = Vec<(u8, bool, usize, bool, bool)>> {
    // Number, namespace, app, team, whether it is here.
    prop::collection::vec(
        (1..8_u8, any::<bool>(), 0..APPS.len(), any::<bool>(), any::<bool>()),
        1..14,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_look_up_in_the_maps_equals_asking_the_modules(steps in churn()) {
        let mut cluster = Cluster::new();
        for (number, red, app, team, local) in steps {
            cluster.put(number, pod(number, if red { "red" } else { "blue" }, APPS[app], team), local);
        }
        cluster.check();
    }
}

#[test]
fn the_same_modules_and_pods_give_the_same_bytes() {
    let plan = || {
        let mut stack = start();
        let mut registry = Registry::new(Layout { tenant_bits: 8 });
        let pods: Vec<Pod> = (1..8)
            .map(|number| {
                pod(
                    number,
                    if number % 2 == 0 { "red" } else { "blue" },
                    APPS[usize::from(number) % 5],
                    true,
                )
            })
            .collect();
        stack.begin();
        let keys = stack.identify(&pods);
        let members: Vec<_> = (1..8)
            .zip(keys)
            .map(|(number, key)| {
                let identity = registry.assign(&key.unwrap().unwrap()).unwrap();
                stack.learn(identity, registry.shared(identity));
                (address(number), identity, number < 5)
            })
            .collect();
        let (_, change) = Generation::compile_all(SHAPE, members, [], &mut stack).unwrap();
        change
    };
    assert_eq!(plan(), plan());
}
