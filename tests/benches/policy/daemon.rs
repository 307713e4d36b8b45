//! In a real hostd: its memory, and a load.

use super::ROUNDS;
use serde_json::{Value, json};
use std::time::Instant;
use wasmgate_tests::{
    crowd::{self, Memory},
    report::Samples,
};

/// A real hostd with so many pods in its store, each with an identity of its own, of which `local` are here.
pub fn in_hostd(identities: usize, local: usize) -> anyhow::Result<Value> {
    let cluster = crowd::cluster(identities, local)?;
    let node = &cluster.nodes[0];
    let mut loads = Samples::default();
    for _ in 0..ROUNDS {
        let began = Instant::now();
        crowd::load(node, "web-app")?;
        loads.push(began.elapsed().as_secs_f64() * 1e3);
    }
    let Memory { resident, shared, maps } = Memory::of(node)?;
    println!("\n{identities} identities in a real hostd, {local} of them here: {ROUNDS} loads");
    println!(
        "  load-policy, until it returns    {:>12.3} ms   ({:.3} to {:.3})",
        loads.median(),
        loads.least(),
        loads.most()
    );
    println!("  resident memory                  {resident:>12.1} MiB  (of it files and maps: {shared:.1})");
    println!("  memory of the maps               {maps:>12.1} MiB");
    Ok(json!({
        "identities": identities, "local": local, "load_ms": loads.json(),
        "resident_mib": resident, "shared_mib": shared, "maps_mib": maps,
    }))
}
