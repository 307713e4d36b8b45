//! hostd is killed at any moment, and what it keeps on disk is damaged: nothing of that reaches the packets, and nothing is
//! left of it.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{
    Cluster, Cni, Listener, Namespace, Node, Options, Program, Stop, TcpOutcome, Traffic, amount, in_netns,
    kernel_test, sent_bytes, tcp_exchange, tcp_lost, wait_until,
};
use serde_json::{Value, json};
use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

/// An answer that has not come by then was lost. One that is late, where the processors have all else to do too, was not.
const WAIT: Duration = Duration::from_secs(5);
const LONG: Duration = Duration::from_mins(1);

/// How often hostd is killed: some 80 times a minute.
fn kills() -> u64 {
    amount("WASMGATE_KILLS", 25, 200)
}

/// A node's pods as it shows them.
fn endpoints(node: &Node) -> Value {
    node.json(&["endpoint", "list"]).unwrap()
}

#[test]
fn a_file_of_endpoints_that_is_damaged_or_another_versions_is_made_anew() {
    kernel_test!();
    let options = Options {
        nodes: 1,
        ..Options::dual_stack()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.load("tenant-isolation").unwrap();
    cluster.add_pod(0, "red/a", &[("app", "web")]).unwrap();
    cluster.add_pod(0, "red/b", &[]).unwrap();
    let container = Namespace::new("container").unwrap();
    let path = container.path().display().to_string();
    let cni = Cni::new(&cluster.nodes[0], "c1", Some(&path)).with("namespace", json!("red"));
    let added = cni.run("ADD").unwrap().unwrap();
    let _listener = Listener::new(cluster.pod("red/b").netns.name(), 80).unwrap();
    let (a, b) = (cluster.pod("red/a"), cluster.pod("red/b"));
    let traffic = [a.netns.name(), container.name()].map(|from| Traffic::start(from, b.address, 80, WAIT));

    let before = endpoints(&cluster.nodes[0]);
    let file = cluster.folder().join("node1/state/endpoints");
    let whole = fs::read(&file).unwrap();
    let mut newer = whole.clone();
    newer[4] = 99;
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [&whole[..whole.len() / 2], &[], &flipped, &newer] {
        cluster.nodes[0].stop(true).unwrap();
        fs::write(&file, damaged).unwrap();
        cluster.nodes[0].start().unwrap();
        assert_eq!(endpoints(&cluster.nodes[0]), before);
        let log = cluster.nodes[0].log();
        let said = log.lines().filter(|line| line.contains("3 pods found"));
        assert!(said.count() > 0 && log.contains("state/endpoints: "), "{log}");
        assert_eq!(fs::read(file.with_extension("damaged")).unwrap(), damaged);
    }
    cluster.nodes[0].stop(true).unwrap();
    fs::remove_file(&file).unwrap();
    cluster.nodes[0].start().unwrap();
    assert_eq!(endpoints(&cluster.nodes[0]), before, "the file was gone");
    // Also what its runtime calls the container.
    let check = cni.clone().with("prevResult", added);
    assert_eq!(check.run("CHECK").unwrap(), Ok(Value::Null));
    traffic.into_iter().for_each(Traffic::lost_nothing);
    assert_eq!(cni.run("DEL").unwrap(), Ok(Value::Null));
    assert_eq!(endpoints(&cluster.nodes[0]).as_array().unwrap().len(), 2);
}

/// New flows of one asker: a thousand a second, as the processors allow. As fast as it goes they would keep the kernel's own
/// threads from running, and the sockets that are closed meanwhile from being freed, until no socket gets its answer any
/// more (`udp_mem`).
const BETWEEN_FLOWS: Duration = Duration::from_millis(1);

/// Sends datagrams, each a flow of its own, and counts those that are answered.
fn ask(from: &str, to: SocketAddr, end: &AtomicBool, wait: Duration, asked: &AtomicU64) -> u64 {
    in_netns(from, || {
        let mut answered = 0;
        while !end.load(Ordering::Relaxed) {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(wait)).unwrap();
            socket.send_to(b"new", to).unwrap();
            asked.fetch_add(1, Ordering::Relaxed);
            answered += u64::from(socket.recv(&mut [0; 8]).is_ok());
            thread::sleep(BETWEEN_FLOWS);
        }
        answered
    })
    .unwrap()
}

/// Sends flows that nothing may come of, until it is told to end; how many.
fn send(from: &str, to: SocketAddr, end: &AtomicBool) -> u64 {
    in_netns(from, || {
        let mut sent = 0;
        while !end.load(Ordering::Relaxed) {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"new", to).unwrap();
            sent += 1;
            thread::sleep(BETWEEN_FLOWS);
        }
        sent
    })
    .unwrap()
}

/// The port where nothing may arrive.
const DENIED: u16 = 81;

/// Counts what arrives all the same, however late, until it is told to end.
fn arrived(at: &str, end: &AtomicBool) -> u64 {
    in_netns(at, || {
        let socket = UdpSocket::bind(("0.0.0.0", DENIED)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut count = 0;
        while !end.load(Ordering::Relaxed) {
            count += u64::from(socket.recv(&mut [0; 8]).is_ok());
        }
        count
    })
    .unwrap()
}

/// Puts a policy that says the same in force again and again, as far as it can, on two nodes of which one is killed meanwhile.
fn reload(node: &Node, end: &AtomicBool) -> u64 {
    let policy = harness::policy("tenant-isolation").unwrap();
    let mut loaded = 0;
    while !end.load(Ordering::Relaxed) {
        let done = node.hostd(&["load-policy", policy.to_str().unwrap()]).unwrap();
        loaded += u64::from(done.status.success());
    }
    loaded
}

/// TCP streams from one pod, to pods of both nodes, for as long as this lives.
struct Streams {
    from: String,
    /// Segments that seemed lost before anything was done: an opening that was answered late says nothing of duplicates.
    before: u64,
    _programs: Vec<Program>,
}

impl Streams {
    fn start(cluster: &Cluster, from: &str, to: &[&str]) -> Self {
        const PORT: u16 = 5201;
        let from = cluster.pod(from);
        let mut programs = Vec::new();
        for to in to.iter().map(|to| cluster.pod(to)) {
            programs.push(Program::listening(&to.netns, "iperf3", &["-s"], PORT).unwrap());
            let address = to.address.to_string();
            // The processors are also the other flows'.
            let arguments = ["-c", &address, "-t", "3600", "-b", "20M", "-l", "1K"];
            programs.push(Program::start(&from.netns, "iperf3", &arguments).unwrap());
        }
        let from = from.netns.name().to_owned();
        let flowing = || sent_bytes(&from).unwrap() > 1 << 20;
        assert!(wait_until(LONG, flowing), "they have not begun");
        Self {
            before: tcp_lost(&from).unwrap(),
            from,
            _programs: programs,
        }
    }

    /// What was sent again had all arrived before, and they still go on.
    fn lost_nothing(&self) {
        // That one has arrived twice is told a moment later.
        let lost = || tcp_lost(&self.from).unwrap().saturating_sub(self.before);
        assert!(wait_until(LONG, || lost() == 0), "{} segments were lost", lost());
        let sent = || sent_bytes(&self.from).unwrap();
        let before = sent();
        assert!(wait_until(LONG, || sent() > before + (1 << 20)), "they have stopped");
    }
}

/// Asks a hostd that may not be there, for pods that come and go and labels that change.
fn disturb(node: &Node, spare: &[Namespace; 2], end: &AtomicBool) {
    let mut number = 0_usize;
    while !end.load(Ordering::Relaxed) {
        number += 1;
        let netns = &spare[number % 2];
        let pod = ["--namespace", "red", "--name", &format!("spare{}", number % 2)];
        let add = [&["endpoint", "add", "--netns", netns.name()][..], &pod].concat();
        // Whether hostd is there when it is asked is what this is about.
        let _ = node.hostd(&add);
        let _ = node.hostd(&["namespace", "label", "red", &format!("round=r{number}")]);
        if let Ok(policy) = harness::policy("tenant-isolation") {
            let _ = node.hostd(&["load-policy", &policy.display().to_string()]);
        }
        let _ = node.hostd(&[&["endpoint", "delete"][..], &pod].concat());
    }
}

/// What is left in the kernel and on disk of a node and its cluster.
fn leftovers(cluster: &Cluster) -> Vec<String> {
    let node = &cluster.nodes[0];
    let count = |what: &str, folder: &Path| {
        let files = Command::new("find")
            .arg(folder)
            .args(["-mindepth", "1"])
            .output()
            .unwrap();
        format!("{what}: {}", String::from_utf8(files.stdout).unwrap().lines().count())
    };
    let links = node.netns.ip(&["-o", "link"]).unwrap();
    let routes = node.netns.ip(&["route"]).unwrap();
    vec![
        format!("links: {}", links.lines().count()),
        format!("routes: {}", routes.lines().count()),
        count("pins", &node.bpffs()),
        count("records of pods", &cluster.folder().join("store/pods")),
        count("state", &cluster.folder().join("node1/state")),
        endpoints(node).to_string(),
        node.json(&["ipcache", "list"]).unwrap().to_string(),
    ]
}

#[test]
fn hostd_killed_at_any_moment_loses_nothing_and_leaves_nothing() {
    kernel_test!();
    let mut cluster = Cluster::new().unwrap();
    for (node, name) in [(0, "red/a"), (0, "red/b"), (1, "red/c"), (0, "blue/d")] {
        cluster.add_pod(node, name, &[]).unwrap();
    }
    cluster.load("tenant-isolation").unwrap();
    cluster.nodes[0]
        .json(&["namespace", "label", "red", "round=last"])
        .unwrap();
    cluster.settle().unwrap();
    cluster.nodes[0].stop(true).unwrap();
    cluster.nodes[0].start().unwrap();
    cluster.wait_for_links().unwrap();
    let before = leftovers(&cluster);
    cluster.nodes[0].stop(true).unwrap();

    let spare = [Namespace::new("spare").unwrap(), Namespace::new("spare").unwrap()];
    let netns = |name: &str| cluster.pod(name).netns.name().to_owned();
    let _listeners = ["red/b", "red/c"].map(|name| Listener::new(&netns(name), 80).unwrap());
    let to = |name: &str| SocketAddr::new(cluster.pod(name).address, 80);
    let (near, far) = (to("red/b"), to("red/c"));
    let [a, b, c, d] = ["red/a", "red/b", "red/c", "blue/d"].map(netns);
    let old = [near, far].map(|to| Traffic::paced(&a, to.ip(), 80, WAIT, Duration::from_millis(1)));
    let streams = Streams::start(&cluster, "red/a", &["red/b", "red/c"]);
    let (end, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    let [killed, other] = &mut cluster.nodes[..] else {
        panic!()
    };
    let other = &*other;
    thread::scope(|scope| {
        let _stop = Stop(&end);
        let new = [near, far].map(|to| {
            scope.spawn({
                let (a, end, asked) = (&a, &end, &asked);
                move || ask(a, to, end, WAIT, asked)
            })
        });
        let never = [near, far].map(|to| {
            let (d, end, to) = (&d, &end, SocketAddr::new(to.ip(), DENIED));
            scope.spawn(move || send(d, to, end))
        });
        let leaks = [&b, &c].map(|at| scope.spawn(|| arrived(at, &end)));
        let loads = scope.spawn(|| reload(other, &end));
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..kills() {
            // A xorshift: how far hostd comes differs each time, from its first instructions to some time after its start.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            killed.launch().unwrap();
            let stop = AtomicBool::new(false);
            thread::scope(|inner| {
                let (node, stop) = (&*killed, &stop);
                let spare = &spare;
                inner.spawn(move || disturb(node, spare, stop));
                thread::sleep(Duration::from_millis(random % 1200));
                let pid = node.pid().unwrap().to_string();
                assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
                stop.store(true, Ordering::Relaxed);
            });
            killed.stop(true).unwrap();
        }
        assert!(wait_until(LONG, || asked.load(Ordering::Relaxed) > 1000));
        end.store(true, Ordering::Relaxed);
        let answered: u64 = new.map(|one| one.join().unwrap()).iter().sum();
        let leaked: u64 = leaks.map(|one| one.join().unwrap()).iter().sum();
        let denied: u64 = never.map(|one| one.join().unwrap()).iter().sum();
        let asked = asked.load(Ordering::Relaxed);
        let loaded = loads.join().unwrap();
        eprintln!("{answered} of {asked} new flows were answered, {loaded} policies were put in force meanwhile");
        assert_eq!(answered, asked, "new flows");
        assert!(denied > 1000 && leaked == 0, "{leaked} of {denied}");
    });
    streams.lost_nothing();
    drop(streams);
    old.into_iter().for_each(Traffic::lost_nothing);
    cluster.nodes[0].start().unwrap();
    for name in ["spare0", "spare1"] {
        cluster.nodes[0]
            .json(&["endpoint", "delete", "--namespace", "red", "--name", name])
            .unwrap();
    }
    cluster.nodes[0]
        .json(&["namespace", "label", "red", "round=last"])
        .unwrap();
    cluster.agree().unwrap();
    // Others finish a load whose coordinator was killed, after a while.
    let policy = harness::policy("tenant-isolation").unwrap();
    let load = || {
        let done = cluster.nodes[0].hostd(&["load-policy", policy.to_str().unwrap()]);
        done.unwrap().status.success()
    };
    assert!(wait_until(Duration::from_mins(1), load));
    cluster.wait_for_links().unwrap();
    assert_eq!(leftovers(&cluster), before);
    assert_eq!(tcp_exchange(&a, near.ip(), 80, WAIT).unwrap(), TcpOutcome::Open);
}

#[test]
fn another_build_keeps_the_maps_that_it_can_read_and_makes_the_others_anew() {
    kernel_test!();
    let mut cluster = Cluster::new().unwrap();
    for (node, name) in [(0, "red/a"), (0, "red/b"), (1, "red/c"), (0, "blue/d")] {
        cluster.add_pod(node, name, &[]).unwrap();
    }
    cluster.load("tenant-isolation").unwrap();
    cluster.settle().unwrap();
    let netns = |name: &str| cluster.pod(name).netns.name().to_owned();
    let _listeners = ["red/b", "red/c"].map(|name| Listener::new(&netns(name), 80).unwrap());
    let to = ["red/b", "red/c"].map(|name| SocketAddr::new(cluster.pod(name).address, 80));
    let [a, b, c, d] = ["red/a", "red/b", "red/c", "blue/d"].map(netns);
    let old = to.map(|to| Traffic::paced(&a, to.ip(), 80, WAIT, Duration::from_millis(1)));
    let streams = Streams::start(&cluster, "red/a", &["red/b", "red/c"]);
    let (end, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let _stop = Stop(&end);
        let (end, asked, a, b, c, d) = (&end, &asked, &a, &b, &c, &d);
        let new = to.map(|to| scope.spawn(move || ask(a, to, end, WAIT, asked)));
        let never = to.map(|to| scope.spawn(move || send(d, SocketAddr::new(to.ip(), DENIED), end)));
        let leaks = [b, c].map(|at| scope.spawn(move || arrived(at, end)));
        for (map, anew) in [
            ("SERVICES", &[][..]),
            ("AFFINITY", &["the map AFFINITY"]),
            ("CONNTRACK", &["the map CONNTRACK"]),
            ("GENERATION", &["the map CONNTRACK", "the map AFFINITY"]),
        ] {
            let node = &mut cluster.nodes[0];
            node.stop(true).unwrap();
            // As a build would leave it for which that map is something else.
            let maps = node.bpffs().join("maps");
            let layout = format!("layout-{map}");
            let mut marked = 0;
            for entry in fs::read_dir(&maps).unwrap() {
                let entry = entry.unwrap();
                if entry.file_name().to_str().unwrap().starts_with(&layout) {
                    fs::rename(entry.path(), maps.join(format!("other-{marked}"))).unwrap();
                    marked += 1;
                }
            }
            assert!(marked > 0, "{map}");
            let before = node.log().len();
            node.start().unwrap();
            let log = node.log().split_off(before);
            for what in ["the map CONNTRACK", "the map AFFINITY"] {
                assert_eq!(log.contains(what), anew.contains(&what), "{map}: {log}");
            }
        }
        assert!(wait_until(LONG, || asked.load(Ordering::Relaxed) > 1000));
        end.store(true, Ordering::Relaxed);
        let answered: u64 = new.map(|one| one.join().unwrap()).iter().sum();
        let leaked: u64 = leaks.map(|one| one.join().unwrap()).iter().sum();
        let denied: u64 = never.map(|one| one.join().unwrap()).iter().sum();
        let asked = asked.load(Ordering::Relaxed);
        assert_eq!(answered, asked, "new flows");
        assert!(denied > 1000 && leaked == 0, "{leaked} of {denied}");
    });
    streams.lost_nothing();
    old.into_iter().for_each(Traffic::lost_nothing);
}
