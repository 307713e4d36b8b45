//! The addresses of nodes: whose each is.

use super::{LONG, WAIT, cluster};
use harness::{Cluster, Listener, Namespace, Options, TcpOutcome, kernel_test, tcp_exchange, wait_until};

/// Lets pods of namespace `red` out to every network, and to nobody else.
const OUT_TO_NETWORKS: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: out, namespace: red }
spec:
  podSelector: {}
  policyTypes: [Egress]
  egress:
    - to:
        - ipBlock: { cidr: 0.0.0.0/0 }
        - ipBlock: { cidr: \"::/0\" }
";

#[test]
fn every_address_of_a_node_is_the_nodes_and_not_the_worlds() {
    kernel_test!();
    let cluster = cluster();
    let (node, pod) = (&cluster.nodes[1], cluster.pod("red/a"));
    let second = ["addr", "add", "192.0.2.22/24", "dev", "underlay"];
    node.netns.ip(&second).unwrap();
    let _listeners = [node.netns.name(), cluster.external.as_ref().unwrap().name()]
        .map(|netns| Listener::new(netns, 10250).unwrap());
    let asks = |to: &str| tcp_exchange(pod.netns.name(), to.parse().unwrap(), 10250, WAIT).unwrap();
    // While everything is allowed all of them are reached.
    for to in [
        "192.0.2.2",
        "192.0.2.22",
        "2001:db8:0:2::2",
        "203.0.113.1",
        "2001:db8:99::1",
    ] {
        assert_eq!(asks(to), TcpOutcome::Open, "{to}");
    }
    let policy = cluster.folder().join("out.yaml");
    std::fs::write(&policy, OUT_TO_NETWORKS).unwrap();
    let module = harness::policy("network-policy").unwrap();
    let (module, policy) = (module.display().to_string(), policy.display().to_string());
    cluster.nodes[0]
        .json(&["load-policy", &module, "--config", &policy])
        .unwrap();
    // The second one as soon as the others have heard of it.
    assert!(wait_until(LONG, || asks("192.0.2.22") == TcpOutcome::Silence));
    for (to, expected) in [
        ("192.0.2.2", TcpOutcome::Silence),
        ("192.0.2.22", TcpOutcome::Silence),
        ("2001:db8:0:2::2", TcpOutcome::Silence),
        ("203.0.113.1", TcpOutcome::Open),
        ("2001:db8:99::1", TcpOutcome::Open),
    ] {
        assert_eq!(asks(to), expected, "{to}");
    }
    // One that is gone is whose it is next.
    node.netns
        .ip(&["addr", "del", "192.0.2.22/24", "dev", "underlay"])
        .unwrap();
    let external = cluster.external.as_ref().unwrap();
    external.ip(&["addr", "add", "192.0.2.22/32", "dev", "lo"]).unwrap();
    for node in &cluster.nodes {
        node.netns.ip(&["neigh", "flush", "all"]).unwrap();
    }
    assert!(wait_until(LONG, || asks("192.0.2.22") == TcpOutcome::Open));
}

#[test]
fn no_pod_gets_an_address_that_the_node_has() {
    kernel_test!();
    let mut cluster = Cluster::one_node().unwrap();
    let node = &cluster.nodes[0];
    // As another network plugin leaves it.
    for arguments in [
        &["link", "add", "cni0", "type", "bridge"][..],
        &["addr", "add", "10.1.0.0/24", "dev", "cni0"],
        &["addr", "add", "10.1.0.2/24", "dev", "cni0"],
    ] {
        node.netns.ip(arguments).unwrap();
    }
    let named = |address: &str| {
        let status = node.json(&["status"]).unwrap();
        let problems = status["problems"].as_array().unwrap();
        problems
            .iter()
            .any(|problem| problem.as_str().unwrap().contains(&format!("no pod gets {address} ")))
    };
    assert!(wait_until(LONG, || named("10.1.0.0") && named("10.1.0.2")));
    for (name, address) in [("red/a", "10.1.0.1"), ("red/b", "10.1.0.3")] {
        cluster.add_pod(0, name, &[]).unwrap();
        assert_eq!(cluster.pod(name).address.to_string(), address);
    }
    let netns = Namespace::new("pod").unwrap();
    let asked = [
        "endpoint",
        "add",
        "--netns",
        netns.name(),
        "--namespace",
        "red",
        "--name",
        "c",
        "--address",
        "10.1.0.2",
    ];
    let refusal = cluster.nodes[0].refusal(&asked).unwrap();
    assert!(
        refusal.contains("10.1.0.2") && refusal.contains("this node"),
        "{refusal}"
    );
}

#[test]
fn a_node_with_ipv4_pods_alone_is_beside_one_with_both() {
    kernel_test!();
    let cidrs = [&["10.1.0.0/24"][..], &["10.2.0.0/24", "fd00:10:2::/64"]];
    let mut cluster = Cluster::with(&Options {
        pod_cidrs: cidrs
            .map(|cidrs| cidrs.iter().map(|cidr| (*cidr).to_owned()).collect())
            .into(),
        ..Options::default()
    })
    .unwrap();
    cluster.add_pod(1, "red/b", &[]).unwrap();
    cluster.settle().unwrap();
    cluster.load("allow-all").unwrap();
    let pod = cluster.pod("red/b");
    let _listener = Listener::new(pod.netns.name(), 80).unwrap();
    for address in &pod.addresses {
        let open = || tcp_exchange(cluster.nodes[0].netns.name(), *address, 80, WAIT).unwrap() == TcpOutcome::Open;
        assert!(wait_until(LONG, open), "{address}");
    }
    // Also after a start beside it.
    cluster.nodes[0].stop(false).unwrap();
    cluster.nodes[0].start().unwrap();
}

#[test]
fn a_service_keeps_its_address_where_a_node_has_it() {
    kernel_test!();
    let cluster = cluster();
    cluster
        .add_service("red/web", "--address 172.16.0.1 --port tcp/80=8080 --selector app=web")
        .unwrap();
    let backend = cluster.pod("red/a");
    let _listener = Listener::new(backend.netns.name(), 8080).unwrap();
    let asks = || {
        let address = "172.16.0.1".parse().unwrap();
        tcp_exchange(cluster.pod("blue/d").netns.name(), address, 80, WAIT).unwrap() == TcpOutcome::Open
    };
    assert!(asks());
    // A virtual IP that moves to the client's node, and away again.
    let node = &cluster.nodes[1];
    for (change, has) in [("add", true), ("del", false)] {
        for address in ["172.16.0.1/32", "203.0.113.55/32"] {
            node.netns.ip(&["addr", change, address, "dev", "lo"]).unwrap();
        }
        // Both are seen at once.
        let seen = || {
            let listed = node.json(&["ipcache", "list"]).unwrap().to_string();
            listed.contains("203.0.113.55") == has
        };
        assert!(wait_until(LONG, seen));
        assert!(asks(), "{change}");
    }
}

#[test]
fn what_keeps_processes_from_the_tunnel_is_named_where_it_is_missing() {
    kernel_test!();
    let cluster = Cluster::with(&Options {
        nodes: 1,
        keys: "cgroup = \"/nowhere\"".to_owned(),
        ..Options::default()
    })
    .unwrap();
    let problems = || cluster.nodes[0].json(&["status"]).unwrap()["problems"].to_string();
    assert!(
        wait_until(LONG, || problems().contains("`cgroup` in the configuration")),
        "{}",
        problems()
    );
    let shown = cluster.nodes[0].hostd(&["status"]).unwrap();
    assert!(String::from_utf8_lossy(&shown.stdout).contains("PROBLEM     the node's own processes"));
}
