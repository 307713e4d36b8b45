//! `cargo xtask bench net`: real traffic between two pods, on one node and across, beside what a node would have otherwise.
//!
//! On one node: a bare pair of veth interfaces, which nothing beats that pods could have, and a Linux bridge with an nftables
//! policy of the same meaning. Across: bridges joined by the kernel's vxlan, without any policy. All have the pods' MTU, and
//! everything is measured by the same programs in rounds that have each once.

mod load;
mod worlds;

use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, process::ExitCode};
use wasmgate_tests::report::{self, Measured, Samples};
use worlds::{World, Worlds};

/// Rounds that have everything once; the median is shown.
const ROUNDS: usize = 5;
/// What they disagree on gets more, so many in all: a fixed number, for who stops when it looks well fools himself.
const MOST_ROUNDS: usize = 15;
/// Rounds disagree where the upper bound of a ratio is so many times the lower one.
const NOISE: f64 = 1.3;

/// What is compared: the worlds, and which way is better.
const COMPARISONS: [(&str, &str); 3] = [
    ("wasmgate", "bare"),
    ("wasmgate", "bridge_nftables"),
    ("wasmgate_across", "bridge_vxlan"),
];

/// One measure, by world.
type ByWorld = BTreeMap<&'static str, Samples>;
/// By measure.
type Figures = BTreeMap<&'static str, ByWorld>;

/// The ratio of two worlds, round by round: what the machine does meanwhile it does to both.
fn ratios(by_world: &ByWorld, (one, other): (&str, &str)) -> Samples {
    by_world[one].over(&by_world[other])
}

/// How many times its lower bound the upper one of a ratio is, where that is too much. Latencies of the slowest packets always vary
/// so much, and are not marked.
fn disagreement(name: &str, by_world: &ByWorld, comparison: (&str, &str)) -> Option<f64> {
    let (low, high) = ratios(by_world, comparison).confidence();
    let noise = high / low;
    (noise > NOISE && !name.contains("p99")).then_some(noise)
}

fn disagrees(name: &str, by_world: &ByWorld) -> bool {
    let noisy = |comparison| disagreement(name, by_world, comparison).is_some();
    COMPARISONS.into_iter().any(noisy)
}

/// Measures in all worlds, one after the other.
fn round(
    worlds: &[World<'_>],
    (names, load): (&[&'static str], load::Load),
    figures: &mut Figures,
) -> anyhow::Result<()> {
    for world in worlds {
        for (name, value) in names.iter().zip(load(world)?) {
            figures
                .entry(name)
                .or_default()
                .entry(world.name)
                .or_default()
                .push(value);
        }
    }
    Ok(())
}

fn measure(worlds: &Worlds) -> anyhow::Result<Figures> {
    let mut figures = Figures::new();
    let worlds = worlds.all();
    let _servers = worlds.iter().map(load::serve).collect::<anyhow::Result<Vec<_>>>()?;
    for number in 1..=ROUNDS {
        eprintln!("round {number} of {ROUNDS}");
        for load in load::ALL {
            round(&worlds, load, &mut figures)?;
        }
    }
    let all = load::ALL.into_iter();
    let noisy: Vec<_> = all
        .filter(|(names, _)| names.iter().any(|name| disagrees(name, &figures[name])))
        .collect();
    if !noisy.is_empty() {
        let names: Vec<&str> = noisy.iter().map(|(names, _)| names[0]).collect();
        for number in ROUNDS + 1..=MOST_ROUNDS {
            eprintln!("round {number} of {MOST_ROUNDS} for {}", names.join(", "));
            for load in &noisy {
                round(&worlds, *load, &mut figures)?;
            }
        }
    }
    Ok(figures)
}

fn print(figures: &Figures) {
    println!("\nmedian of {ROUNDS} rounds; of {MOST_ROUNDS} where those disagree");
    print!("{:<28}", "MEASURE");
    for world in worlds::NAMES {
        print!("{world:>18}");
    }
    println!("{:>8}", "ROUNDS");
    for (name, by_world) in figures {
        print!("{name:<28}");
        for world in worlds::NAMES {
            print!("{:>18.2}", by_world[world].median());
        }
        println!("{:>8}", by_world[worlds::NAMES[0]].count());
    }
    print!("\n{:<28}", "RATIO (90 % CONFIDENCE)");
    for (one, other) in COMPARISONS {
        print!("{:>36}", format!("{one}/{other}  "));
    }
    println!();
    for (name, by_world) in figures {
        print!("{name:<28}");
        for comparison in COMPARISONS {
            let ratios = ratios(by_world, comparison);
            let (low, high) = ratios.confidence();
            let mark = disagreement(name, by_world, comparison).map_or(' ', |_| '*');
            print!(
                "{:>36}",
                format!("{:.2} ({low:.2} to {high:.2}) {mark}", ratios.median())
            );
        }
        println!();
    }
}

/// Rows that are marked in the table, and why.
fn not_comparable(figures: &Figures) -> Vec<String> {
    let mut rows = Vec::new();
    for (name, by_world) in figures {
        for (one, other) in COMPARISONS {
            if let Some(noise) = disagreement(name, by_world, (one, other)) {
                rows.push(format!(
                    "{name} of {one}/{other}: uncertain by a factor of {noise:.2} ({NOISE} may be)"
                ));
            }
        }
    }
    rows
}

fn json_of(by_world: &ByWorld) -> Value {
    let of = |samples: &Samples| {
        let (low, high) = samples.confidence();
        let mut figures = samples.json();
        figures["rounds"] = json!(samples.count());
        figures["confidence"] = json!([low, high]);
        figures
    };
    let worlds = by_world
        .iter()
        .map(|(world, samples)| ((*world).to_owned(), of(samples)));
    let ratios = COMPARISONS.map(|(one, other)| (format!("{one}/{other}"), of(&ratios(by_world, (one, other)))));
    worlds.chain(ratios).collect::<Map<String, Value>>().into()
}

fn main() -> ExitCode {
    report::run(bench)
}

fn bench() -> anyhow::Result<Measured> {
    let figures = measure(&Worlds::new()?)?;
    print(&figures);
    let measures = figures
        .iter()
        .map(|(name, by_world)| ((*name).to_owned(), json_of(by_world)));
    Ok(Measured {
        figures: json!({"rounds": ROUNDS, "measures": measures.collect::<Map<String, Value>>()}),
        not_comparable: not_comparable(&figures),
    })
}
