//! Pods with addresses of both families, over underlays of either.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{
    Cluster, Listener, Options, TcpOutcome, in_netns, kernel_test, run, tcp_exchange, udp_exchange, udp_exchange_of,
    wait_until,
};
use std::{net::IpAddr, process::Command, thread, time::Duration};

const WAIT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(90);

/// Three red pods and a blue one on two nodes, all listening on port 80, under tenant isolation.
fn tenants(options: &Options) -> (Cluster, Vec<Listener>) {
    let mut cluster = Cluster::with(options).unwrap();
    for (node, name) in [(0, "red/a"), (0, "red/b"), (1, "red/c"), (1, "blue/a")] {
        cluster.add_pod(node, name, &[]).unwrap();
    }
    cluster.settle().unwrap();
    cluster.load("tenant-isolation").unwrap();
    let listeners = cluster
        .pods
        .iter()
        .map(|pod| Listener::new(pod.netns.name(), 80).unwrap())
        .collect();
    (cluster, listeners)
}

fn ping(namespace: &str, to: IpAddr, more: &[&str]) -> (bool, String) {
    let to = to.to_string();
    let arguments = [
        &["netns", "exec", namespace, "ping", "-n", "-c", "1", "-W", "1"],
        more,
        &[&to],
    ]
    .concat();
    let output = Command::new("ip").args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

/// Whether a pod reaches others' addresses by TCP, UDP and ICMP, which it should or should not.
fn talk(netns: &str, addresses: &[IpAddr], should: bool, what: &str) {
    for address in addresses {
        let tcp = tcp_exchange(netns, *address, 80, WAIT).unwrap();
        assert_eq!(tcp == TcpOutcome::Open, should, "TCP {what} at {address}");
        assert_eq!(
            udp_exchange(netns, *address, 80, WAIT).unwrap(),
            should,
            "UDP {what} at {address}"
        );
        assert_eq!(ping(netns, *address, &[]).0, should, "ping {what} at {address}");
    }
}

#[test]
fn one_policy_holds_for_both_families_over_either_underlay() {
    kernel_test!();
    for ipv6_underlay in [false, true] {
        let (cluster, _listeners) = tenants(&Options {
            ipv6_underlay,
            ..Options::dual_stack()
        });
        // What is denied takes its time to be silent: all at once.
        thread::scope(|scope| {
            for from in &cluster.pods {
                for to in cluster.pods.iter().filter(|to| to.name != from.name) {
                    assert_eq!(to.addresses.len(), 2, "{}", to.name);
                    let underlay = if ipv6_underlay { "over IPv6" } else { "over IPv4" };
                    let what = format!("{} -> {} {underlay}", from.name, to.name);
                    let same = from.name.split('/').next() == to.name.split('/').next();
                    scope.spawn(move || talk(from.netns.name(), &to.addresses, same, &what));
                }
            }
        });
        // By either address the same pod is meant, and the kernel has the same of it.
        let node = &cluster.nodes[0];
        let [v4, v6] = cluster.pod("red/a").addresses[..] else {
            panic!()
        };
        let to = cluster.pod("blue/a").addresses[1].to_string();
        for from in [v4, v6] {
            let why = node.json(&["policy", "explain", &from.to_string(), &to]).unwrap();
            assert_eq!((&why["allowed"], &why["agrees"]), (&"deny".into(), &true.into()));
        }
        // Nothing odd was seen on the way: what was dropped policy dropped, or it was multicast control.
        for node in &cluster.nodes {
            let status = node.json(&["status"]).unwrap();
            for drop in status["drops"].as_array().unwrap() {
                let name = drop["name"].as_str().unwrap();
                assert!(
                    ["egress_denied", "ingress_denied", "link_control"].contains(&name),
                    "{}: {name}",
                    node.name
                );
            }
        }
    }
}

#[test]
fn a_datagram_of_64_kilobytes_arrives_whole_both_ways() {
    kernel_test!();
    for ipv6_underlay in [false, true] {
        let (cluster, _listeners) = tenants(&Options {
            ipv6_underlay,
            ..Options::dual_stack()
        });
        let from = cluster.pod("red/a").netns.name();
        for to in ["red/b", "red/c"] {
            for address in &cluster.pod(to).addresses {
                for size in [1400, 1500, 9000, 65_000] {
                    // On a busy machine the kernel may drop pieces of its own accord.
                    let arrived = wait_until(LONG, || udp_exchange_of(from, *address, 80, size, WAIT).unwrap());
                    assert!(
                        arrived,
                        "{size} bytes to {to} at {address}, IPv6 underlay {ipv6_underlay}"
                    );
                }
            }
        }
        for address in &cluster.pod("blue/a").addresses {
            assert!(!udp_exchange_of(from, *address, 80, 9000, WAIT).unwrap(), "{address}");
        }
    }
}

#[test]
fn a_packet_that_is_too_big_or_lives_too_short_is_answered() {
    kernel_test!();
    let (cluster, _listeners) = tenants(&Options::dual_stack());
    let from = &cluster.pod("red/a").netns;
    // Somebody has raised the MTU inside the pod: what fits into the tunnel is learned from the gateway.
    from.ip(&["link", "set", "eth0", "mtu", "9000"]).unwrap();
    for (address, payload) in cluster.pod("red/c").addresses.iter().zip([1422, 1402]) {
        let largest = ping(from.name(), *address, &["-M", "do", "-s", &payload.to_string()]);
        assert!(largest.0, "{}", largest.1);
        let too_big = ping(from.name(), *address, &["-M", "do", "-s", "3000"]);
        assert!(!too_big.0 && too_big.1.contains("1450"), "{}", too_big.1);
        // Once learned, it holds for TCP, too.
        assert_eq!(tcp_exchange(from.name(), *address, 80, LONG).unwrap(), TcpOutcome::Open);
    }
    for (address, said) in cluster
        .pod("red/c")
        .addresses
        .iter()
        .zip(["Time to live exceeded", "Hop limit"])
    {
        let short = ping(from.name(), *address, &["-t", "1"]);
        assert!(!short.0 && short.1.contains(said), "{}", short.1);
        assert!(ping(from.name(), *address, &["-t", "2"]).0, "one hop");
    }
}

#[test]
fn the_node_and_hosts_outside_are_reached_by_ipv6() {
    kernel_test!();
    let outside: IpAddr = "2001:db8:99::1".parse().unwrap();
    let mut cluster = Cluster::with(&Options {
        externals: vec![outside],
        ..Options::dual_stack()
    })
    .unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.load("allow-all").unwrap();
    let pod = cluster.pod("red/a");
    let (pod_netns, address) = (pod.netns.name(), pod.addresses[1]);
    let (node, external) = (&cluster.nodes[0], cluster.external.as_ref().unwrap());
    let _listeners = [pod_netns, node.netns.name(), external.name()].map(|netns| Listener::new(netns, 80).unwrap());
    let own: IpAddr = "2001:db8:0:2::1".parse().unwrap();
    for (from, to) in [
        (pod_netns, own),
        (node.netns.name(), address),
        (pod_netns, outside),
        (external.name(), address),
    ] {
        assert_eq!(
            tcp_exchange(from, to, 80, WAIT).unwrap(),
            TcpOutcome::Open,
            "{from} -> {to}"
        );
        assert!(ping(from, to, &[]).0, "{from} -> {to}");
    }
    // A router's errors about a flow reach the pod: here the node's own, which has no route there.
    let nowhere = ping(pod_netns, "2001:db8:98::1".parse().unwrap(), &[]);
    assert!(
        !nowhere.0 && nowhere.1.contains("Destination unreachable"),
        "{}",
        nowhere.1
    );
}

#[test]
fn a_restarted_hostd_and_a_deleted_pod_leave_both_families_right() {
    kernel_test!();
    let (mut cluster, _listeners) = tenants(&Options::dual_stack());
    cluster.nodes[0].stop(true).unwrap();
    cluster.nodes[0].start().unwrap();
    let from = cluster.pod("red/a").netns.name().to_owned();
    for address in cluster.pod("red/c").addresses.clone() {
        assert_eq!(
            tcp_exchange(&from, address, 80, WAIT).unwrap(),
            TcpOutcome::Open,
            "{address}"
        );
    }
    let gone = cluster.pod("red/b").addresses.clone();
    cluster.remove_pod("red/b").unwrap();
    let listed = cluster.nodes[0].json(&["ipcache", "list"]).unwrap().to_string();
    for address in gone {
        assert!(!listed.contains(&format!("\"{address}\"")), "{address}: {listed}");
        let route = run(
            "ip",
            &[
                "netns",
                "exec",
                cluster.nodes[0].netns.name(),
                "ip",
                "route",
                "get",
                &address.to_string(),
            ],
        );
        assert!(route.is_err(), "{address}: {route:?}");
    }
}

#[test]
fn a_pod_gets_the_addresses_that_were_asked_for() {
    kernel_test!();
    let mut cluster = Cluster::with(&Options::dual_stack()).unwrap();
    let more = ["--address", "fd00:10:1::77", "--address", "10.1.0.77"].map(str::to_owned);
    cluster.add_pod_with(0, "red/a", &more).unwrap();
    let expected: [IpAddr; 2] = ["10.1.0.77".parse().unwrap(), "fd00:10:1::77".parse().unwrap()];
    assert_eq!(cluster.pod("red/a").addresses, expected);
    let shown = in_netns(cluster.pod("red/a").netns.name(), || {
        run("ip", &["addr", "show", "eth0"])
    })
    .unwrap()
    .unwrap();
    for address in expected {
        assert!(shown.contains(&address.to_string()), "{shown}");
    }
    let netns = cluster.nodes[0].netns.name().to_owned();
    let refused = |address: &str| {
        let arguments = [
            "endpoint",
            "add",
            "--netns",
            &netns,
            "--namespace",
            "red",
            "--name",
            "b",
            "--address",
            address,
        ];
        cluster.nodes[0].refusal(&arguments).unwrap()
    };
    assert!(refused("fd00:10:1::77").contains("belongs to red/a already"));
    assert!(refused("fd00:10:2::1").contains("in none of this node's pod CIDRs"));
}

#[test]
fn the_underlays_mtu_is_followed() {
    kernel_test!();
    let mut cluster = Cluster::with(&Options::dual_stack()).unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(1, "red/b", &[]).unwrap();
    cluster.settle().unwrap();
    cluster.load("allow-all").unwrap();
    let (a, b) = (cluster.pod("red/a"), cluster.pod("red/b"));
    let _listener = Listener::new(b.netns.name(), 80).unwrap();
    for (underlay, pods) in [(1400, 1350), (1600, 1550)] {
        for node in &cluster.nodes {
            let mtu = underlay.to_string();
            node.netns.ip(&["link", "set", "underlay", "mtu", &mtu]).unwrap();
        }
        let followed = |node: usize| {
            let status = cluster.nodes[node].json(&["status"]).unwrap();
            status["pod_mtu"] == pods
        };
        assert!(wait_until(LONG, || (0..2).all(followed)), "{underlay}");
        let link = a.netns.ip(&["-o", "link", "show", "eth0"]).unwrap();
        assert!(link.contains(&format!("mtu {pods} ")), "{link}");
        // As large as fits, in one piece, by either family.
        for (to, headers) in b.addresses.iter().zip([28, 48]) {
            let size = pods - headers;
            assert!(
                udp_exchange_of(a.netns.name(), *to, 80, size, WAIT).unwrap(),
                "{underlay} {to}"
            );
        }
    }
    // One that leaves pods no room is said, and changes nothing.
    cluster.nodes[0]
        .netns
        .ip(&["link", "set", "underlay", "mtu", "1300"])
        .unwrap();
    let said = || {
        let status = cluster.nodes[0].json(&["status"]).unwrap();
        status.to_string().contains("leaves no room") && status["pod_mtu"] == 1550
    };
    assert!(
        wait_until(LONG, said),
        "{}",
        cluster.nodes[0].json(&["status"]).unwrap()
    );
}
