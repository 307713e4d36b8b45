//! `cargo xtask bench swap`: what a policy change every 100 ms costs the traffic of a node that has as much as it can carry.
//!
//! Eight TCP streams between two pods, and an echo every millisecond between two others, for a minute: in one second with
//! policy changes, in the next without. Two modules take turns, which both allow what is sent.

use anyhow::{Context, ensure};
use harness::{Cluster, Counts, Listener, Options, Program, Traffic, ask};
use serde_json::{Value, json};
use std::{
    fs, thread,
    time::{Duration, Instant},
};
use wasmgate_tests::report::{Arguments, Samples};

/// Seconds with changes, and as many without, after one that does not count.
const SECONDS: u64 = 30;
const SECOND: Duration = Duration::from_secs(1);
const EVERY: Duration = Duration::from_millis(100);
/// How many times the better half of the seconds without changes may carry what the worse half does.
const NOISE: f64 = 1.3;
const IPERF: u16 = 5201;
const ECHO: u16 = 7000;
const MODULES: [&str; 2] = ["allow-all", "tenant-isolation"];
/// Clock ticks a second in `/proc/PID/stat` (`USER_HZ`, proc(5)).
const TICKS: f64 = 100.0;

/// What was seen in the seconds of one kind.
#[derive(Default)]
struct Seen {
    gbit_s: Samples,
    stall_ms: Samples,
    loads: u64,
    /// Processor seconds of hostd.
    processor: f64,
    lost: u64,
    sent_again: u64,
    /// Packets that the kernel has dropped for want of room in a processor's queue, on their way from one end of a pair to the
    /// other.
    overrun: u64,
}

impl Seen {
    fn json(&self) -> Value {
        json!({"gbit_s": self.gbit_s.json(), "mean_gbit_s": self.gbit_s.mean(), "stall_ms": self.stall_ms.json(),
               "loads": self.loads, "hostd_cpu_s": self.processor, "echoes_lost": self.lost,
               "segments_sent_again": self.sent_again, "overrun": self.overrun})
    }

    fn print(&self, name: &str) {
        println!(
            "{name:<8} {:>8.2} {:>17} {:>11.1} {:>9} {:>12.2} {:>12} {:>15} {:>8}",
            self.gbit_s.mean(),
            format!("{:.2} to {:.2}", self.gbit_s.at(0.25), self.gbit_s.at(0.75)),
            self.stall_ms.most(),
            self.loads,
            self.processor,
            self.lost,
            self.sent_again,
            self.overrun
        );
    }

    fn add(&mut self, loads: u64, processor: f64, echoes: Counts) {
        self.loads += loads;
        self.processor += processor;
        self.lost += echoes.lost;
        self.stall_ms.push(echoes.slowest.as_secs_f64() * 1e3);
    }
}

/// Loads one module after the other until then; the answer is how many.
fn change(cluster: &Cluster, until: Instant) -> anyhow::Result<u64> {
    let mut loads = 0;
    let mut next = Instant::now();
    while next < until {
        cluster.load(MODULES[usize::from(loads % 2 == 0)])?;
        loads += 1;
        next += EVERY;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(loads)
}

/// Processor seconds of a process and of the children that it has waited for.
fn processor(pid: u32) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the program's name, which may have spaces.
    let (_, rest) = stat.rsplit_once(')').context("no name")?;
    let ticks = rest.split_whitespace().skip(11).take(4).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / TICKS)
}

/// What the processors' queues had no room for, in hexadecimal (`softnet_seq_show`, `net/core/net-procfs.c`).
fn overrun() -> anyhow::Result<u64> {
    let processors = fs::read_to_string("/proc/net/softnet_stat")?;
    let dropped = processors.lines().filter_map(|line| line.split_whitespace().nth(1));
    Ok(dropped
        .map(|count| u64::from_str_radix(count, 16))
        .sum::<Result<u64, _>>()?)
}

/// Packets that the programs have dropped, for whatever reason.
fn drops(cluster: &Cluster) -> anyhow::Result<u64> {
    let status = cluster.nodes[0].json(&["status"])?;
    let drops = status["drops"].as_array().context("no counters")?;
    Ok(drops.iter().filter_map(|counter| counter["packets"].as_u64()).sum())
}

/// Seconds of both kinds in turn, for as long as the streams run: those with changes come first.
fn seconds(cluster: &Cluster, began: Instant) -> anyhow::Result<[Seen; 2]> {
    let mut seen = [Seen::default(), Seen::default()];
    let hostd = cluster.nodes[0].pid().context("hostd does not run")?;
    thread::sleep(SECOND);
    for number in 1..=2 * SECONDS {
        let until = began + SECOND * u32::try_from(number + 1)?;
        let (asks, answers) = (cluster.pod("red/asks"), cluster.pod("red/answers"));
        let echoes = Traffic::paced(
            asks.netns.name(),
            answers.address,
            ECHO,
            Duration::from_secs(1),
            Duration::from_millis(1),
        );
        let before = (processor(hostd)?, overrun()?);
        let changes = number % 2 == 1;
        let loads = if changes { change(cluster, until)? } else { 0 };
        thread::sleep(until.saturating_duration_since(Instant::now()));
        let seen = &mut seen[usize::from(!changes)];
        seen.add(loads, processor(hostd)? - before.0, echoes.stop()?);
        seen.overrun += overrun()? - before.1;
    }
    Ok(seen)
}

fn number(value: &Value, pointer: &str) -> anyhow::Result<f64> {
    let number = value.pointer(pointer).and_then(Value::as_f64);
    number.with_context(|| format!("iperf3 says nothing of {pointer}"))
}

fn main() -> anyhow::Result<()> {
    let Some(arguments) = Arguments::read()? else {
        return Ok(());
    };
    let mut cluster = Cluster::with(&Options {
        nodes: 1,
        ..Options::default()
    })?;
    for name in ["red/client", "red/server", "red/asks", "red/answers"] {
        cluster.add_pod(0, name, &[])?;
    }
    cluster.settle()?;
    for module in MODULES {
        cluster.load(module)?;
    }
    let (client, server) = (cluster.pod("red/client"), cluster.pod("red/server"));
    let _iperf = Program::listening(&server.netns, "iperf3", &["-s"], IPERF)?;
    let _echo = Listener::new(cluster.pod("red/answers").netns.name(), ECHO)?;
    let dropped = drops(&cluster)?;
    let (report, seen) = thread::scope(|scope| {
        let began = Instant::now();
        let streams = scope.spawn(|| {
            let (to, time) = (server.address.to_string(), (2 * SECONDS + 1).to_string());
            ask(
                &client.netns,
                "iperf3",
                &["-c", &to, "-t", &time, "-i", "1", "-P", "8", "-J"],
            )
        });
        let seen = seconds(&cluster, began);
        let report = streams.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (report, seen)
    });
    let report: Value = serde_json::from_str(&report?)?;
    let [mut with, mut without] = seen?;
    for second in 1..=2 * SECONDS {
        let seen = if second % 2 == 1 { &mut with } else { &mut without };
        let sum = format!("/intervals/{second}/sum");
        seen.gbit_s
            .push(number(&report, &format!("{sum}/bits_per_second"))? / 1e9);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
        let again = number(&report, &format!("{sum}/retransmits"))? as u64;
        seen.sent_again += again;
    }
    let dropped = drops(&cluster)? - dropped;
    println!("\n{SECONDS} seconds with a policy change every {EVERY:?}, and {SECONDS} without, in turn");
    println!(
        "           GBIT/S     MIDDLE HALF  LONGEST MS   CHANGES  HOSTD CPU S  ECHOES LOST  SEGMENTS AGAIN  OVERRUN"
    );
    with.print("with");
    without.print("without");
    let lost = 1.0 - with.gbit_s.mean() / without.gbit_s.mean();
    println!(
        "throughput lost: {:.2} %; packets dropped by the programs: {dropped}",
        lost * 100.0
    );
    let noise = without.gbit_s.at(0.75) / without.gbit_s.at(0.25);
    ensure!(
        noise <= NOISE,
        "the machine was too noisy to compare anything: without changes it carried {noise:.2} times as much at times; again, \
         please"
    );
    arguments
        .write(&json!({"without": without.json(), "with": with.json(), "throughput_lost": lost, "dropped": dropped}))
}
