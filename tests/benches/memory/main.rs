//! `cargo xtask bench memory`: what a node's hostd and its maps take, by the number of pods here and of identities in all.

use serde_json::json;
use std::process::ExitCode;
use wasmgate_tests::{
    crowd::{self, Memory},
    report::{self, Measured},
};

/// Identities, and pods of this node.
const CASES: [(usize, usize); 5] = [(1000, 10), (1000, 110), (1000, 250), (10_000, 110), (60_000, 110)];

fn main() -> ExitCode {
    report::run(bench)
}

fn bench() -> anyhow::Result<Measured> {
    println!("\nIDENTITIES  PODS HERE  MAPS MIB  HOSTD MIB  OF IT FILES AND MAPS");
    let mut rows = Vec::new();
    for (identities, pods) in CASES {
        let cluster = crowd::cluster(identities, pods)?;
        let node = &cluster.nodes[0];
        crowd::load(node, "web-app")?;
        let memory = Memory::of(node)?;
        println!(
            "{identities:>10} {pods:>10} {:>9.1} {:>10.1} {:>21.1}",
            memory.maps, memory.resident, memory.shared
        );
        rows.push(json!({"identities": identities, "pods": pods, "maps_mib": memory.maps,
                         "hostd_mib": memory.resident, "shared_mib": memory.shared}));
    }
    Ok(json!({ "cases": rows }).into())
}
