//! The demo: the main job, shown. It checks what it shows, and fails where that is not as it should be.

mod show;
mod stage;

use anyhow::{Context, bail, ensure};
use harness::{Capture, Cluster, Duplex, Listener, TcpOutcome, Traffic, reachable, tcp_exchange};
use stage::{ACROSS, BACKENDS, FAR, NEAR, SENDER, STRANGER};
use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// A denied connection attempt is given up after this time.
const WAIT: Duration = Duration::from_millis(500);

const PORT: u16 = 8080;
const DUPLEX_PORT: u16 = 9000;
const SERVICE: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 1);

/// Set by Ctrl-C.
#[derive(Clone)]
struct Interrupted(Arc<AtomicBool>);

impl Interrupted {
    fn watch() -> anyhow::Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&flag);
        ctrlc::set_handler(move || told.store(true, Ordering::Relaxed))?;
        Ok(Self(flag))
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.0.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }
}

/// Runs the demo; with `keep`, leaves it up until Ctrl-C. Everything is removed at the end, also after a failure.
pub fn run(keep: bool) -> anyhow::Result<()> {
    if let Err(unsupported) = harness::check_support() {
        bail!("the demo can't run here: {unsupported}");
    }
    harness::use_release();
    let interrupted = Interrupted::watch()?;
    // The store waits for the disk, and would wait for what a build has left to write.
    crate::run(&mut Command::new("sync"))?;
    let began = Instant::now();
    let result = play(&interrupted, keep);
    if interrupted.0.load(Ordering::Relaxed) {
        println!("\ninterrupted; everything was removed");
        return if keep && result.is_ok() {
            Ok(())
        } else {
            bail!("interrupted")
        };
    }
    result.context("the demo failed; everything was removed")?;
    println!("\ndone in {} s; everything was removed", began.elapsed().as_secs());
    Ok(())
}

fn play(interrupted: &Interrupted, keep: bool) -> anyhow::Result<()> {
    show::step("two nodes, two tenants and shared services");
    let cluster = stage::build(interrupted)?;
    let result = show_all(&cluster, interrupted, keep);
    if result.is_err() {
        show::logs(&cluster);
    }
    result
}

fn show_all(cluster: &Cluster, interrupted: &Interrupted, keep: bool) -> anyhow::Result<()> {
    show::pods(cluster)?;
    let listeners = cluster
        .pods
        .iter()
        .map(|pod| Ok((pod.name.as_str(), Listener::new(pod.netns.name(), PORT)?)))
        .collect::<anyhow::Result<BTreeMap<_, _>>>()?;

    show::step("no policy yet: who reaches whom, by TCP and UDP?");
    expect(cluster, interrupted, |_, _| false)?;

    show::step("hostd load-policy tenant-isolation.wasm");
    show::hostd(cluster, &["load-policy", &stage::policy("tenant-isolation")?])?;

    show::step("who reaches whom now, and what is on the wire between the nodes?");
    let capture = Capture::start(&cluster.nodes[0].netns, "underlay")?;
    expect(cluster, interrupted, stage::isolated)?;
    vnis(cluster, capture)?;

    show::step("why? hostd policy explain red/backend blue/db --protocol tcp --port 8080");
    show::hostd(
        cluster,
        &[
            "policy",
            "explain",
            "red/backend",
            "blue/db",
            "--protocol",
            "tcp",
            "--port",
            "8080",
        ],
    )?;

    service(cluster, &listeners, interrupted)?;

    show::step("throughput: iperf3, 3 s each, with a bare veth pair for comparison");
    throughput(cluster, interrupted)?;

    show::step("a policy change under traffic: allow-all, then tenant-isolation again");
    change_under_traffic(cluster, interrupted)?;

    if keep {
        show::commands(cluster)?;
        while interrupted.check().is_ok() {
            thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(())
}

/// Tries every pair, shows the outcome, and compares it with what it should be.
fn expect(cluster: &Cluster, interrupted: &Interrupted, allowed: impl Fn(&str, &str) -> bool) -> anyhow::Result<()> {
    interrupted.check()?;
    let reach = reachable(cluster, PORT, WAIT)?;
    show::matrix(cluster, &reach);
    for ((from, to), reach) in &reach {
        let expected = allowed(from, to);
        ensure!(
            reach.tcp == expected && reach.udp == expected,
            "{from} -> {to}: TCP {}, UDP {}, but the policy says {expected}",
            reach.tcp,
            reach.udp
        );
    }
    Ok(())
}

/// Every VNI on the wire must be the identity of the packet's sender.
fn vnis(cluster: &Cluster, capture: Capture) -> anyhow::Result<()> {
    let mut seen: BTreeMap<_, (u32, usize)> = BTreeMap::new();
    let mut wrong = 0;
    let packets = capture.stop()?;
    let identities = stage::identities(cluster)?;
    for packet in &packets {
        let (name, identity) = identities.get(&packet.source).context("a packet from nobody")?;
        wrong += usize::from(packet.vni != *identity);
        seen.entry(name.clone()).or_insert((packet.vni, 0)).1 += 1;
    }
    show::vnis(&seen, &identities);
    ensure!(!packets.is_empty(), "no VXLAN packet was captured");
    ensure!(
        wrong == 0,
        "{wrong} packets have another VNI than their sender's identity"
    );
    println!(
        "{} VXLAN packets captured, each with its sender's identity as VNI",
        packets.len()
    );
    Ok(())
}

/// Connections to a service go to all its backends, and policy judges them by those.
fn service(cluster: &Cluster, listeners: &BTreeMap<&str, Listener>, interrupted: &Interrupted) -> anyhow::Result<()> {
    let add = format!(
        "service add --namespace red --name shop --address {SERVICE} --port tcp/80={PORT} --selector tier=back"
    );
    show::step(&format!("one address for two pods: hostd {add}"));
    show::hostd(cluster, &add.split(' ').collect::<Vec<_>>())?;
    let accepted = || BACKENDS.map(|name| listeners[name].accepted());
    let mut shown = Vec::new();
    for (client, attempts, allowed) in [(SENDER, 200, true), (STRANGER, 4, false)] {
        let before = accepted();
        let mut opened = 0;
        for _ in 0..attempts {
            interrupted.check()?;
            let outcome = tcp_exchange(cluster.pod(client).netns.name(), SERVICE.into(), 80, WAIT)?;
            opened += usize::from(outcome == TcpOutcome::Open);
        }
        let after = accepted();
        let at: Vec<usize> = before
            .iter()
            .zip(&after)
            .map(|(before, after)| after - before)
            .collect();
        let expected = if allowed { attempts } else { 0 };
        ensure!(
            opened == expected && at.iter().sum::<usize>() == expected,
            "{opened} of {attempts} connections of {client} to the service opened, {at:?} at its backends"
        );
        ensure!(
            !allowed || at.iter().all(|count| *count > 0),
            "a backend gets no connection"
        );
        shown.push((client, attempts, at));
    }
    show::service(&BACKENDS, &shown);
    Ok(())
}

fn throughput(cluster: &Cluster, interrupted: &Interrupted) -> anyhow::Result<()> {
    let mut results = Vec::new();
    for (what, to) in [("same node", NEAR), ("across nodes", FAR)] {
        interrupted.check()?;
        let result = stage::iperf3(cluster.pod(SENDER).into(), cluster.pod(to).into(), 3)?.finish()?;
        results.push((what, to, result));
    }
    // What the machine itself makes of it, with nothing in between.
    results.push(("bare veth pair", "-", stage::bare_pair(3)?));
    show::throughput(&results);
    Ok(())
}

fn change_under_traffic(cluster: &Cluster, interrupted: &Interrupted) -> anyhow::Result<()> {
    cluster.load("allow-all")?;
    let sender = cluster.pod(SENDER).netns.name();
    let mut revoked = Vec::new();
    for name in [STRANGER, ACROSS] {
        let to = cluster.pod(name);
        revoked.push((
            name,
            Duplex::open(sender, to.netns.name(), to.address, DUPLEX_PORT, WAIT)?,
        ));
    }
    let streams = [NEAR, FAR]
        .map(|name| stage::iperf3(cluster.pod(SENDER).into(), cluster.pod(name).into(), 5).map(|run| (name, run)))
        .into_iter()
        .collect::<anyhow::Result<Vec<_>>>()?;
    let echoes: Vec<_> = [NEAR, FAR]
        .map(|name| {
            (
                name,
                Traffic::start(sender, cluster.pod(name).address, PORT, Duration::from_secs(1)),
            )
        })
        .into_iter()
        .collect();
    thread::sleep(Duration::from_secs(2));
    interrupted.check()?;

    let before: Vec<[u64; 2]> = revoked.iter().map(|(_, stream)| stream.received()).collect();
    cluster.load("tenant-isolation")?;
    // What was in a socket's buffer before is read within this time.
    thread::sleep(Duration::from_millis(200));
    let after: Vec<[u64; 2]> = revoked.iter().map(|(_, stream)| stream.received()).collect();
    thread::sleep(Duration::from_secs(1));
    let later: Vec<[u64; 2]> = revoked.iter().map(|(_, stream)| stream.received()).collect();
    interrupted.check()?;

    let streams = streams
        .into_iter()
        .map(|(name, run)| Ok((name, run.finish()?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let echoes = echoes
        .into_iter()
        .map(|(name, echo)| Ok((name, echo.stop()?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    show::stays(&streams, &echoes);
    show::revoked(
        &revoked.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
        &before,
        &after,
        &later,
    );
    ensure!(
        before.iter().flatten().all(|bytes| *bytes > 0),
        "a stream that was allowed did not flow"
    );
    ensure!(after == later, "a revoked stream goes on");
    let lost: u64 = echoes.iter().map(|(_, counts)| counts.lost).sum();
    ensure!(lost == 0, "{lost} packets of what stays allowed were lost");
    Ok(())
}
