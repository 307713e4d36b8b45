//! A policy module that misbehaves as its configuration says, a JSON string such as `"identify loop"`. It is written
//! against the WIT itself: the SDK would not let it answer such things.
#![cfg(target_arch = "wasm32")]

use policy_sdk::guest::bindings::{
    self,
    exports::wasmgate::policy::policy::{Decision, Guest, Identity, Label, Peer, Pod, PortRange, Protocol, Row},
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

impl Guest for Hostile {
    fn configure(config: String) -> Result<(), String> {
        DEED.with(|deed| *deed.borrow_mut() = config.trim_matches('"').to_owned());
        misbehave("configure");
        if deed() == "refuse" {
            Err("the moon is in the wrong phase".to_owned())
        } else {
            Ok(())
        }
    }

    fn identify(pod: Pod) -> Result<Identity, String> {
        misbehave("identify");
        let label = |n: usize| Label {
            key: n.to_string(),
            value: String::new(),
        };
        let (tenant, labels) = match deed().as_str() {
            "refuse pod" => return Err(format!("{} is not welcome", pod.name)),
            "long tenant" => ("t".repeat(64), Vec::new()),
            "no tenant" => (String::new(), Vec::new()),
            "huge tenant" => ("t".repeat(40 << 20), Vec::new()),
            "many labels" => (pod.namespace, (0..17).map(label).collect()),
            "same label" => (pod.namespace, vec![label(1), label(1)]),
            "control" => ("a\nb".to_owned(), Vec::new()),
            _ => (pod.namespace, Vec::new()),
        };
        Ok(Identity { tenant, labels })
    }

    fn learn(_peers: Vec<Peer>) {
        misbehave("learn");
    }

    fn decide(_from: u32, to: Vec<u32>) -> Row {
        misbehave("decide");
        let port = |port: u16| PortRange {
            protocol: Protocol::Tcp,
            first: port * 2,
            last: port * 2,
        };
        let mut row = Row {
            decisions: vec![Decision::Allow],
            cells: vec![0; to.len()],
        };
        match deed().as_str() {
            "index" => row.cells.iter_mut().for_each(|cell| *cell = 1),
            "short row" => row.cells.truncate(1),
            "many ports" => row.decisions = vec![Decision::Ports((0..33).map(port).collect())],
            "backward ports" => {
                row.decisions = vec![Decision::Ports(vec![PortRange {
                    protocol: Protocol::Udp,
                    first: 2,
                    last: 1,
                }])];
            }
            _ => {}
        }
        row
    }
}

bindings::export!(Hostile with_types_in bindings);
