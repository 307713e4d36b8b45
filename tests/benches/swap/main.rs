//! `cargo xtask bench swap`: what a policy change every 100 ms costs the traffic of a node that has as much as it can carry.
//!
//! Eight TCP streams between two pods, and an echo every millisecond between two others, in windows with policy changes and
//! without in turn. Two modules take turns, which both allow what is sent.

use anyhow::{Context, ensure};
use harness::{Cluster, Listener, Options, Program, Traffic, ask, tcp_retransmits, wait_until};
use serde_json::{Value, json};
use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};
use wasmgate_tests::report::{Arguments, Samples};

/// Windows of each kind.
const WINDOWS: usize = 8;
/// Seconds that each takes.
const SECONDS: &str = "3";
const EVERY: Duration = Duration::from_millis(100);
/// How many times the better half of the windows without changes may carry what the worse half does.
const NOISE: f64 = 1.1;
const IPERF: u16 = 5201;
const ECHO: u16 = 7000;
const MODULES: [&str; 2] = ["allow-all", "tenant-isolation"];
/// Clock ticks a second in `/proc/PID/stat` (`USER_HZ`, proc(5)).
const TICKS: f64 = 100.0;

/// What was seen in the windows of one kind.
#[derive(Default)]
struct Seen {
    gbit_s: Samples,
    stall_ms: Samples,
    loads: Samples,
    hostd_cpu: Samples,
    lost: u64,
    sent_again: u64,
}

impl Seen {
    fn json(&self) -> Value {
        json!({"gbit_s": self.gbit_s.json(), "stall_ms": self.stall_ms.json(), "loads": self.loads.json(),
               "hostd_cpu_s": self.hostd_cpu.json(), "echoes_lost": self.lost, "segments_sent_again": self.sent_again})
    }

    fn print(&self, name: &str) {
        println!(
            "{name:<10} {:>9.2} ({:.2} to {:.2}) {:>12.1} {:>12.1} {:>12.2} {:>8} {:>8}",
            self.gbit_s.median(),
            self.gbit_s.least(),
            self.gbit_s.most(),
            self.stall_ms.most(),
            self.loads.median(),
            self.hostd_cpu.median(),
            self.lost,
            self.sent_again
        );
    }
}

/// Loads one module after the other until it is told to stop; the answer is how many.
fn change(cluster: &Cluster, stop: &AtomicBool) -> anyhow::Result<u32> {
    let mut loads = 0;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        cluster.load(MODULES[loads as usize % 2])?;
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

fn window(cluster: &Cluster, changes: bool, seen: &mut Seen) -> anyhow::Result<()> {
    let (client, server) = (cluster.pod("red/client"), cluster.pod("red/server"));
    let hostd = cluster.nodes[0].pid().context("hostd does not run")?;
    let echoes = Traffic::paced(
        cluster.pod("red/asks").netns.name(),
        cluster.pod("red/answers").address,
        ECHO,
        Duration::from_secs(1),
        Duration::from_millis(1),
    );
    let before = (tcp_retransmits(client.netns.name())?, processor(hostd)?);
    let stop = AtomicBool::new(false);
    let to = server.address.to_string();
    let (report, loads) = thread::scope(|scope| {
        let changing = changes.then(|| scope.spawn(|| change(cluster, &stop)));
        let report = iperf(client, &to);
        stop.store(true, Ordering::Relaxed);
        let loads = changing.map_or(Ok(0), |thread| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        (report, loads)
    });
    let report: Value = serde_json::from_str(&report?)?;
    let bits = report
        .pointer("/end/sum_received/bits_per_second")
        .and_then(Value::as_f64);
    seen.gbit_s.push(bits.context("iperf3 says nothing")? / 1e9);
    seen.loads.push(f64::from(loads?));
    seen.hostd_cpu.push(processor(hostd)? - before.1);
    seen.sent_again += tcp_retransmits(client.netns.name())? - before.0;
    let counts = echoes.stop()?;
    seen.lost += counts.lost;
    seen.stall_ms.push(counts.slowest.as_secs_f64() * 1e3);
    Ok(())
}

fn iperf(client: &harness::Pod, to: &str) -> anyhow::Result<String> {
    let mut outcome = Err(anyhow::anyhow!("not asked"));
    // The server keeps one client at a time: it may still be tidying up.
    wait_until(Duration::from_secs(5), || {
        outcome = ask(&client.netns, "iperf3", &["-c", to, "-t", SECONDS, "-P", "8", "-J"]);
        outcome.is_ok()
    });
    outcome
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
    cluster.load(MODULES[0])?;
    let server = &cluster.pod("red/server").netns;
    let _iperf = Program::listening(server, "iperf3", &["-s"], IPERF)?;
    let _echo = Listener::new(cluster.pod("red/answers").netns.name(), ECHO)?;
    let (mut without, mut with) = (Seen::default(), Seen::default());
    for number in 0..WINDOWS {
        eprintln!("window {} of {WINDOWS}", number + 1);
        window(&cluster, false, &mut without)?;
        window(&cluster, true, &mut with)?;
    }
    println!("\n{WINDOWS} windows of {SECONDS} s each, with a policy change every {EVERY:?} and without");
    println!("             GBIT/S                 LONGEST ECHO MS      CHANGES   HOSTD CPU S     LOST    AGAIN");
    without.print("without");
    with.print("with");
    let lost = 1.0 - with.gbit_s.median() / without.gbit_s.median();
    println!("throughput lost: {:.2} %", lost * 100.0);
    let noise = without.gbit_s.at(0.75) / without.gbit_s.at(0.25);
    ensure!(
        noise <= NOISE,
        "the machine was too noisy to compare anything: without changes it carried {noise:.2} times as much at times; again, \
         please"
    );
    arguments.write(&json!({"without": without.json(), "with": with.json(), "throughput_lost": lost}))
}
