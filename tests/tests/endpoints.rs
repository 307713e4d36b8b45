//! Pods: connected, relabelled, disconnected; bad requests refused with nothing left; and what a hostile pod tries.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{
    Cluster, Listener, Namespace, Node, Options, TcpOutcome, in_netns, kernel_test, tcp_exchange, tcp_open, wait_until,
};
use std::{net::UdpSocket, time::Duration};

const WAIT: Duration = Duration::from_millis(400);

/// All that a pod leaves on its node: links, routes, pins, map entries, records.
fn traces(cluster: &Cluster, node: &Node) -> Vec<String> {
    let find = |folder: &str| harness::run("find", &[folder]).unwrap();
    // Names alone: the rest has states that change by themselves.
    let first_words = |text: String, words: usize| -> String {
        let lines = text
            .lines()
            .map(|line| line.split_whitespace().take(words).collect::<Vec<_>>().join(" "));
        lines.collect::<Vec<_>>().join("\n")
    };
    vec![
        first_words(node.netns.ip(&["-o", "link", "show"]).unwrap(), 2),
        first_words(node.netns.ip(&["route", "show", "table", "all"]).unwrap(), 3),
        node.netns.ip(&["neigh", "show", "nud", "permanent"]).unwrap(),
        find(&node.bpffs().display().to_string()),
        find(&cluster.folder().join("store/pods").display().to_string()),
        node.json(&["ipcache", "list"]).unwrap().to_string(),
        node.json(&["endpoint", "list"]).unwrap().to_string(),
    ]
}

#[test]
fn a_pod_that_is_disconnected_leaves_nothing() {
    kernel_test!();
    let mut cluster = Cluster::one_node().unwrap();
    cluster.load("allow-all").unwrap();
    let before = traces(&cluster, &cluster.nodes[0]);
    cluster.add_pod(0, "red/a", &[("app", "web")]).unwrap();
    assert_ne!(traces(&cluster, &cluster.nodes[0]), before);
    let delete = ["endpoint", "delete", "--namespace", "red", "--name", "a"];
    assert_eq!(cluster.nodes[0].json(&delete).unwrap()["deleted"], true);
    assert_eq!(traces(&cluster, &cluster.nodes[0]), before);
    assert_eq!(
        cluster.nodes[0].json(&delete).unwrap()["deleted"],
        false,
        "deleting again is no error"
    );
    let inside = cluster.pod("red/a").netns.ip(&["-o", "link", "show"]).unwrap();
    assert!(!inside.contains("eth0"), "{inside}");
}

#[test]
fn bad_requests_are_refused_and_leave_nothing() {
    kernel_test!();
    let options = Options {
        nodes: 1,
        pod_cidr: "10.{n}.0.0/31".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.load("allow-all").unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    let free = Namespace::new("free").unwrap();
    let occupied = Namespace::new("occupied").unwrap();
    occupied
        .ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"])
        .unwrap();
    let file = cluster.folder().join("file");
    std::fs::write(&file, "no namespace").unwrap();
    let (free, occupied, file) = (free.name(), occupied.name(), file.display().to_string());
    let node = &cluster.nodes[0];
    cluster.wait_for_links().unwrap();
    let before = traces(&cluster, node);
    let (long, wide) = ("x".repeat(64), format!("k={}", "v".repeat(64)));
    let add = |netns: &str, namespace: &str, name: &str, more: &[&str]| {
        let arguments = [
            "endpoint",
            "add",
            "--netns",
            netns,
            "--namespace",
            namespace,
            "--name",
            name,
        ];
        node.refusal(&[&arguments[..], more].concat()).unwrap()
    };
    for (refusal, expected) in [
        (
            add("no-such-namespace", "red", "b", &[]),
            "/run/netns/no-such-namespace",
        ),
        (add(&file, "red", "b", &[]), "not a network namespace"),
        (add(occupied, "red", "b", &[]), "has an interface `eth0` already"),
        (add(free, "red", "a", &[]), "pod red/a exists already"),
        (add(free, "Red", "b", &[]), "lower-case"),
        (add(free, "red", &long, &[]), "64 bytes"),
        (add(free, "red", "b", &["--label", "novalue"]), "KEY=VALUE"),
        (
            add(free, "red", "b", &["--label", &wide]),
            "a value has at most 63 bytes",
        ),
        (
            add(free, "red", "b", &["--address", "10.1.0.0"]),
            "10.1.0.0 belongs to red/a already",
        ),
        (
            add(free, "red", "b", &["--address", "10.9.0.1"]),
            "in none of this node's pod CIDRs (10.1.0.0/31)",
        ),
        (
            add(free, "red", "b", &["--address", "fd00::1"]),
            "in none of this node's pod CIDRs",
        ),
        (add(free, "red", "b", &["--address", "banana"]), "invalid"),
        (
            node.refusal(&["endpoint", "label", "--namespace", "red", "--name", "b", "x=y"])
                .unwrap(),
            "there is no pod red/b",
        ),
        (
            node.refusal(&["endpoint", "label", "--namespace", "red", "--name", "a", "x-"])
                .unwrap(),
            "has no label x",
        ),
    ] {
        assert!(refusal.contains(expected), "{expected}: {refusal}");
        assert_eq!(traces(&cluster, node), before, "{expected}");
    }
    cluster.add_pod(0, "red/b", &[]).unwrap();
    let error = cluster.add_pod(0, "red/c", &[]).unwrap_err().to_string();
    assert!(
        error.contains("every address of this node's pod CIDRs (10.1.0.0/31) is taken"),
        "{error}"
    );
}

#[test]
fn new_labels_take_effect_on_live_connections() {
    kernel_test!();
    let mut cluster = Cluster::new().unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(0, "red/b", &[]).unwrap();
    cluster.add_pod(1, "red/c", &[]).unwrap();
    cluster.load("tenant-isolation").unwrap();
    cluster.settle().unwrap();
    let _listeners: Vec<_> = ["red/b", "red/c"]
        .iter()
        .map(|name| Listener::new(cluster.pod(name).netns.name(), 80).unwrap())
        .collect();
    let a = cluster.pod("red/a").netns.name();
    let mut streams: Vec<_> = ["red/b", "red/c"]
        .iter()
        .map(|name| tcp_open(a, cluster.pod(name).address, 80, WAIT).unwrap())
        .collect();
    assert!(streams.iter_mut().all(|stream| stream.exchange(WAIT).unwrap()));
    let label = |change: &str| cluster.nodes[0].label("red/a", change).unwrap();
    assert_eq!(label("tenant=blue")["identity_name"], "blue");
    for stream in &mut streams {
        assert!(!stream.exchange(WAIT).unwrap(), "a is blue's now");
    }
    assert_eq!(label("tenant-")["identity_name"], "red");
    for name in ["red/b", "red/c"] {
        let to = cluster.pod(name).address;
        let open = || tcp_exchange(a, to, 80, WAIT).unwrap() == TcpOutcome::Open;
        assert!(wait_until(Duration::from_secs(5), open), "a is red's again: {name}");
    }
}

#[test]
fn a_pod_sends_only_as_itself_and_never_to_a_tunnel() {
    kernel_test!();
    let mut cluster = Cluster::new().unwrap();
    cluster.load("allow-all").unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(0, "red/b", &[]).unwrap();
    cluster.add_pod(1, "red/c", &[]).unwrap();
    cluster.settle().unwrap();
    let node = &cluster.nodes[0];
    let (a, b) = (cluster.pod("red/a"), cluster.pod("red/b"));
    let rises = |reason: &str, deed: &dyn Fn()| {
        let before = node.drops(reason).unwrap();
        deed();
        assert!(
            node.drops(reason).unwrap() > before,
            "{reason}: {}",
            node.json(&["status"]).unwrap()["drops"]
        );
    };
    let send = |from: &str, to: &str| {
        in_netns(a.netns.name(), || {
            let socket = UdpSocket::bind(from).unwrap();
            // Whether the pod's own stack minds is not the point.
            let _ = socket.send_to(b"x", to);
        })
        .unwrap();
    };
    for tunnel in ["192.0.2.1:8472", "192.0.2.2:8472"] {
        rises("tunnel_port", &|| send("0.0.0.0:0", tunnel));
    }
    a.netns.ip(&["addr", "add", "10.1.0.200/32", "dev", "eth0"]).unwrap();
    rises("spoofed_address", &|| send("10.1.0.200:0", &format!("{}:9", b.address)));
    // Without a fixed neighbour entry the pod would ask for its gateway first, as somebody else.
    let neighbour = a.netns.ip(&["neigh", "show", "169.254.1.1", "dev", "eth0"]).unwrap();
    let gateway = neighbour
        .split_whitespace()
        .skip_while(|word| *word != "lladdr")
        .nth(1)
        .unwrap();
    a.netns
        .ip(&["link", "set", "eth0", "address", "02:00:00:00:00:99"])
        .unwrap();
    rises("spoofed_arp", &|| send("0.0.0.0:0", &format!("{}:9", b.address)));
    a.netns
        .ip(&["neigh", "replace", "169.254.1.1", "lladdr", gateway, "dev", "eth0"])
        .unwrap();
    rises("spoofed_mac", &|| send("0.0.0.0:0", &format!("{}:9", b.address)));
}

#[test]
fn vxlan_from_a_stranger_is_not_believed() {
    kernel_test!();
    let options = Options {
        nodes: 3,
        ..Options::default()
    };
    // The third is on the underlay, but no node.
    let mut cluster = Cluster::without_hostd(&options).unwrap();
    for index in 0..2 {
        cluster.nodes[index].start().unwrap();
    }
    cluster.load("allow-all").unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(1, "red/b", &[]).unwrap();
    let node = &cluster.nodes[0];
    let known = wait_until(Duration::from_secs(10), || node.others_addresses().unwrap().len() == 2);
    assert!(known);
    let identity = node.json(&["endpoint", "list"]).unwrap()[0]["identity"]
        .as_u64()
        .unwrap();
    let vni = u32::try_from(identity).unwrap().to_be_bytes();
    let mut packet = vec![8, 0, 0, 0, vni[1], vni[2], vni[3], 0];
    packet.extend([2; 12]); // any MAC addresses
    packet.extend([8, 0, 0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 17, 0, 0]);
    packet.extend([10, 2, 0, 0, 10, 1, 0, 0]); // as if from red/b to red/a
    packet.extend([0, 9, 0, 9, 0, 8, 0, 0]);
    let before = node.drops("unknown_node").unwrap();
    in_netns(cluster.nodes[2].netns.name(), || {
        let socket = UdpSocket::bind("192.0.2.3:0").unwrap();
        socket.send_to(&packet, "192.0.2.1:8472").unwrap();
    })
    .unwrap();
    let counted = wait_until(Duration::from_secs(5), || node.drops("unknown_node").unwrap() > before);
    assert!(counted, "{}", node.json(&["status"]).unwrap()["drops"]);
}

#[test]
fn the_monitor_shows_drops_and_flows_by_name() {
    kernel_test!();
    let mut cluster = Cluster::one_node().unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(0, "red/b", &[]).unwrap();
    cluster.add_pod(0, "blue/c", &[]).unwrap();
    cluster.load("tenant-isolation").unwrap();
    let _listener = Listener::new(cluster.pod("red/b").netns.name(), 80).unwrap();
    let watch = |kind: &str| {
        let node = &cluster.nodes[0];
        std::process::Command::new(harness::hostd().unwrap())
            .arg("--socket")
            .arg(node.socket())
            .args(["monitor", kind, "--count", "1"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    };
    for (kind, to, expected) in [
        (
            "--drops",
            "blue/c",
            "drop  egress_denied at from_pod tcp red/a (10.1.0.0:",
        ),
        ("--flows", "red/b", "allow local at from_pod tcp red/a (10.1.0.0:"),
    ] {
        let monitor = watch(kind);
        // Until the programs report, every attempt goes unseen; each one is denied or opens a flow of its own.
        let ended = std::sync::atomic::AtomicBool::new(false);
        let output = std::thread::scope(|scope| {
            scope.spawn(|| {
                let from = cluster.pod("red/a").netns.name();
                while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                    tcp_exchange(from, cluster.pod(to).address, 80, Duration::from_millis(100)).unwrap();
                }
            });
            let output = monitor.wait_with_output().unwrap();
            ended.store(true, std::sync::atomic::Ordering::Relaxed);
            output
        });
        let line = String::from_utf8(output.stdout).unwrap();
        assert!(line.contains(expected) && line.contains("[red -> "), "{line}");
        assert_eq!(line.lines().count(), 1);
    }
}
