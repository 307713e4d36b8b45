//! A policy module that misbehaves as its configuration says, a JSON string such as `"identify loop"`. It is written
//! against the WIT itself: the SDK would not let it answer such things.
#![cfg(target_arch = "wasm32")]

use policy_sdk::guest::bindings::{
    self,
    exports::wasmgate::policy::policy::{
        Action, AddressBlock, Class, Decision, Guest, Label, Matrix, Network, Peer, Placement, Pod, PortRange,
        Protocol, Rule, Side,
    },
    wasmgate::policy::log,
};
use std::cell::RefCell;

thread_local! {
    static DEED: RefCell<String> = const { RefCell::new(String::new()) };
}

struct Hostile;

fn deed() -> String {
    DEED.with(|deed| deed.borrow().clone())
}

/// What can be done in any call.
fn misbehave(call: &str) {
    let deed = deed();
    let Some(what) = deed.strip_prefix(call).map(str::trim) else {
        return;
    };
    match what {
        "loop" => loop {
            std::hint::black_box(());
        },
        "trap" => core::arch::wasm32::unreachable(),
        "memory" => {
            let mut all: Vec<Vec<u8>> = Vec::new();
            loop {
                all.push(vec![1; 1 << 20]);
                std::hint::black_box(&all);
            }
        }
        "stack" => {
            std::hint::black_box(recurse(1));
        }
        _ => {}
    }
}

#[allow(unconditional_recursion, reason = "that is the deed")]
fn recurse(depth: u64) -> u64 {
    let room = std::hint::black_box([depth; 64]);
    recurse(depth + 1) + room[0]
}

const fn all(action: Action) -> Decision {
    Decision {
        rules: Vec::new(),
        otherwise: action,
        reason: String::new(),
    }
}

fn identify(pod: Pod) -> Result<Class, String> {
    let label = |n: usize| Label {
        key: n.to_string(),
        value: String::new(),
    };
    let (tenant, labels) = match deed().as_str() {
        "refuse pod" => return Err(format!("{} is not welcome", pod.name)),
        "refuse foreign" if pod.namespace != "red" => return Err(format!("{} is not mine", pod.name)),
        "long tenant" => ("t".repeat(64), Vec::new()),
        "no tenant" => (String::new(), Vec::new()),
        "huge tenant" => ("t".repeat(40 << 20), Vec::new()),
        "many labels" => (pod.namespace, (0..65).map(label).collect()),
        "same label" => (pod.namespace, vec![label(1), label(1)]),
        "control" => ("a\nb".to_owned(), Vec::new()),
        // Makes an identity of every pod.
        "explode" => {
            let key = pod.name.clone();
            let value = String::new();
            return Ok(Class {
                tenant: None,
                labels: vec![Label { key, value }],
            });
        }
        // Claims everybody's pods.
        "conquer" => ("red".to_owned(), Vec::new()),
        _ => (pod.namespace, Vec::new()),
    };
    Ok(Class {
        tenant: Some(tenant),
        labels,
    })
}

impl Guest for Hostile {
    fn configure(config: String, _placement: Placement) -> Result<(), String> {
        DEED.with(|deed| *deed.borrow_mut() = config.trim_matches('"').to_owned());
        misbehave("configure");
        match deed().as_str() {
            "refuse" => Err("the moon is in the wrong phase".to_owned()),
            "flood" => {
                for number in 0..10_000 {
                    log::write(log::Level::Info, &format!("flood {number}"));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn networks() -> Vec<Network> {
        misbehave("networks");
        let network = |name: &str, cidr: &str, except: &[&str]| {
            vec![Network {
                name: name.to_owned(),
                blocks: vec![AddressBlock {
                    cidr: cidr.to_owned(),
                    except: except.iter().map(|one| (*one).to_owned()).collect(),
                }],
            }]
        };
        match deed().as_str() {
            "no cidr" => network("a", "10.0.0.0/33", &[]),
            "foreign exception" => network("a", "10.0.0.0/8", &["11.0.0.0/16"]),
            "same network" => [network("a", "10.0.0.0/8", &[]), network("a", "11.0.0.0/8", &[])].concat(),
            "many tenants blocks" => {
                let mut many = network("a", "10.0.0.0/8", &[]);
                let block = many[0].blocks[0].clone();
                many[0].blocks.resize(65, block);
                many
            }
            "many blocks" => {
                let mut many = network("a", "10.0.0.0/8", &[]);
                let block = many[0].blocks[0].clone();
                many[0].blocks.resize(17_000, block);
                many
            }
            _ => Vec::new(),
        }
    }

    fn identify(pods: Vec<Pod>) -> Vec<Result<Class, String>> {
        misbehave("identify");
        if deed() == "few classes" {
            return Vec::new();
        }
        if deed() == "foreign trap" && pods.iter().any(|pod| pod.namespace != "red") {
            core::arch::wasm32::unreachable();
        }
        pods.into_iter().map(identify).collect()
    }

    fn learn(_peers: Vec<Peer>) {
        misbehave("learn");
    }

    fn decide(_side: Side, subjects: Vec<u32>, peers: Vec<u32>) -> Matrix {
        misbehave("decide");
        let mut matrix = Matrix {
            decisions: vec![all(Action::Allow)],
            cells: vec![0; subjects.len() * peers.len()],
        };
        let rule = |first: u16, last: u16, reason: &str| Rule {
            ports: PortRange {
                protocol: Protocol::Tcp,
                first,
                last,
            },
            action: Action::Allow,
            reason: reason.to_owned(),
        };
        let mut decision = all(Action::Pass);
        match deed().as_str() {
            "index" => matrix.cells.iter_mut().for_each(|cell| *cell = 1),
            "short row" => matrix.cells.truncate(matrix.cells.len() - 1),
            "many rules" => decision.rules = (0..16_385).map(|_| rule(1, 1, "")).collect(),
            "backward ports" => decision.rules = vec![rule(2, 1, "")],
            "long reason" => decision.rules = vec![rule(1, 2, &"r".repeat(513))],
            // More breakpoints than the pool has.
            "scattered ports" => decision.rules = (0..16_000).map(|port| rule(port * 4, port * 4, "")).collect(),
            _ => return matrix,
        }
        if !decision.rules.is_empty() {
            matrix.decisions = vec![decision];
        }
        matrix
    }
}

bindings::export!(Hostile with_types_in bindings);
