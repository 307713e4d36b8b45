//! `cargo xtask bench net`: real traffic between two pods, on one node and across, beside what a node would have otherwise.
//!
//! On one node: a bare pair of veth interfaces, which nothing beats that pods could have, and a Linux bridge with an nftables
//! policy of the same meaning. Across: bridges joined by the kernel's vxlan, without any policy. All have the pods' MTU, and
//! everything is measured by the same programs in rounds that have each once.

mod load;
mod worlds;

use anyhow::ensure;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use wasmgate_tests::report::{Arguments, Samples};
use worlds::Worlds;

/// Times that everything is measured; the median is shown.
const ROUNDS: usize = 5;
/// The better half of a measure's rounds between the bare pair's ends may be so many times the worse one.
const NOISE: f64 = 1.5;

/// What is compared: the worlds, and which way is better.
const COMPARISONS: [(&str, &str); 3] = [
    ("wasmgate", "bare"),
    ("wasmgate", "bridge_nftables"),
    ("wasmgate_across", "bridge_vxlan"),
];

/// By measure, then by world.
type Figures = BTreeMap<&'static str, BTreeMap<&'static str, Samples>>;

fn measure(worlds: &Worlds) -> anyhow::Result<Figures> {
    let mut figures = Figures::new();
    let worlds = worlds.all();
    let _servers = worlds.iter().map(load::serve).collect::<anyhow::Result<Vec<_>>>()?;
    for round in 0..ROUNDS {
        eprintln!("round {} of {ROUNDS}", round + 1);
        for load in load::ALL {
            for world in &worlds {
                for (name, value) in load(world)? {
                    figures
                        .entry(name)
                        .or_default()
                        .entry(world.name)
                        .or_default()
                        .push(value);
                }
            }
        }
    }
    Ok(figures)
}

fn print(figures: &Figures) {
    println!("\nmedian of {ROUNDS} rounds");
    print!("{:<28}", "MEASURE");
    for world in worlds::NAMES {
        print!("{world:>18}");
    }
    println!();
    for (name, by_world) in figures {
        print!("{name:<28}");
        for world in worlds::NAMES {
            print!("{:>18.2}", by_world[world].median());
        }
        println!();
    }
    print!("\n{:<28}", "RATIO");
    for (one, other) in COMPARISONS {
        print!("{:>34}", format!("{one}/{other}"));
    }
    println!();
    for (name, by_world) in figures {
        print!("{name:<28}");
        for (one, other) in COMPARISONS {
            print!("{:>34.2}", by_world[one].median() / by_world[other].median());
        }
        println!();
    }
}

fn main() -> anyhow::Result<()> {
    let Some(arguments) = Arguments::read()? else {
        return Ok(());
    };
    let figures = measure(&Worlds::new()?)?;
    print(&figures);
    for (name, by_world) in &figures {
        let bare = &by_world["bare"];
        let noise = bare.at(0.75) / bare.at(0.25);
        // The slowest of a thousand is what it is: whatever else the machine did.
        ensure!(
            noise <= NOISE || name.contains("p99"),
            "the machine was too noisy to compare anything: {name} of the bare pair differs {noise:.2} times between rounds; \
             again, please"
        );
    }
    let all: BTreeMap<&str, BTreeMap<&str, Value>> = figures
        .iter()
        .map(|(name, by_world)| {
            (
                *name,
                by_world
                    .iter()
                    .map(|(world, samples)| (*world, samples.json()))
                    .collect(),
            )
        })
        .collect();
    arguments.write(&json!({"rounds": ROUNDS, "measures": all}))
}
