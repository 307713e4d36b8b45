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
/// The ratio of two worlds may be so many times as large in the better half of the rounds as in the worse one.
const NOISE: f64 = 1.3;

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

/// The ratio of two worlds, round by round: what the machine does meanwhile it does to both.
fn ratios(by_world: &BTreeMap<&'static str, Samples>, one: &str, other: &str) -> Samples {
    by_world[one].over(&by_world[other])
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
    print!("\n{:<28}", "RATIO (MIDDLE HALF)");
    for (one, other) in COMPARISONS {
        print!("{:>34}", format!("{one}/{other}"));
    }
    println!();
    for (name, by_world) in figures {
        print!("{name:<28}");
        for (one, other) in COMPARISONS {
            let ratios = ratios(by_world, one, other);
            let (low, middle, high) = (ratios.at(0.25), ratios.median(), ratios.at(0.75));
            print!("{:>34}", format!("{middle:.2} ({low:.2} to {high:.2})"));
        }
        println!();
    }
}

/// The comparisons that a noisy machine has spoilt. The slowest of a thousand answers is what it is.
fn spoilt(figures: &Figures) -> Vec<String> {
    let mut spoilt = Vec::new();
    for (name, by_world) in figures.iter().filter(|(name, _)| !name.contains("p99")) {
        for (one, other) in COMPARISONS {
            let ratios = ratios(by_world, one, other);
            let noise = ratios.at(0.75) / ratios.at(0.25);
            if noise > NOISE {
                spoilt.push(format!("{name} of {one}/{other} ({noise:.2} times between rounds)"));
            }
        }
    }
    spoilt
}

fn main() -> anyhow::Result<()> {
    let Some(arguments) = Arguments::read()? else {
        return Ok(());
    };
    let figures = measure(&Worlds::new()?)?;
    let spoilt = spoilt(&figures);
    ensure!(
        spoilt.is_empty(),
        "the machine was too noisy to compare {}; again, please",
        spoilt.join(", ")
    );
    print(&figures);
    let mut measures = serde_json::Map::new();
    for (name, by_world) in &figures {
        let worlds = by_world
            .iter()
            .map(|(world, samples)| ((*world).to_owned(), samples.json()));
        let ratios = COMPARISONS.map(|(one, other)| (format!("{one}/{other}"), ratios(by_world, one, other).json()));
        let all: serde_json::Map<String, Value> = worlds.chain(ratios).collect();
        measures.insert((*name).to_owned(), all.into());
    }
    arguments.write(&json!({"rounds": ROUNDS, "measures": measures}))
}
