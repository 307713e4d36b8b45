//! Soaking: tests that do little in every run do much here, again and again.

use crate::cargo::cargo;
use clap::ValueEnum;
use std::time::{Duration, Instant};

/// What to do, and for how long.
#[derive(clap::Args)]
pub struct Arguments {
    /// Go round these again until so many minutes are over; what has begun is finished. Once without.
    #[arg(long, value_name = "N", default_value_t = 0)]
    minutes: u64,
    /// Only these; all of them without.
    names: Vec<Soak>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Soak {
    /// hostd is killed 200 times, under new flows, old ones and streams.
    Kills,
    /// Two million packets and changes of tables through the programs and the model of them.
    Model,
    /// A hundred million packets on established flows, while an address goes from pod to pod.
    Packets,
    /// Policies, labels and pods change at once for two minutes, under traffic.
    Changes,
    /// A hundred thousand connections, each with a request and its answer.
    Connections,
    /// One stream, through a hundred changes of everything else.
    Stream,
    /// Bursts of 100 containers by podman and by containerd.
    Containers,
}

impl Soak {
    /// Its tests, in nextest's language (its pages, "Filterset reference").
    fn tests(self) -> &'static str {
        match self {
            Self::Kills => "binary(crashes) & test(killed_at_any_moment)",
            Self::Model => "binary(packets) & test(the_programs_do_what_the_model_does)",
            Self::Packets => "binary(packets) & test(no_packet_goes_to_a_wrong_pod)",
            Self::Changes => "binary(races)",
            Self::Connections => "binary(traffic) & test(short_connections)",
            Self::Stream => "binary(traffic) & test(one_stream)",
            Self::Containers => "binary(runtimes)",
        }
    }
}

/// Runs them one after the other, until one fails.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let all = Soak::value_variants();
    let soaks = if arguments.names.is_empty() {
        all
    } else {
        &arguments.names
    };
    let (began, time) = (Instant::now(), Duration::from_secs(60 * arguments.minutes));
    let mut done = 0_u32;
    loop {
        for soak in soaks {
            println!("== round {}, {soak:?}, after {} s", done + 1, began.elapsed().as_secs());
            let mut command = cargo();
            command
                .args([
                    "nextest",
                    "run",
                    "--release",
                    "--profile",
                    "soak",
                    "--package",
                    "wasmgate-tests",
                ])
                .args(["--filterset", soak.tests()])
                .env("WASMGATE_REQUIRE_KERNEL", "1")
                .env("WASMGATE_SOAK", "1");
            crate::run(&mut command)?;
        }
        done += 1;
        if began.elapsed() >= time {
            break;
        }
    }
    println!("soaked: {done} rounds of {soaks:?} in {} s", began.elapsed().as_secs());
    Ok(())
}
