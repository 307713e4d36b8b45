//! Who is believed for what: one attack for each row of the table in `docs/security.md` that real nodes are needed for. The others
//! are among the packets.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use abi::{Identity, node::TUNNEL_PORT};
use harness::{
    Cluster, Listener, Namespace, Options, TcpOutcome, in_netns, kernel_test, tcp_exchange, udp_exchange, wait_until,
};
use rustix::{process::Uid, thread::set_thread_res_uid};
use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};
use wasmgate_tests::frame::Frame;

const WAIT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(90);
/// Where the victim listens, and who is claimed to ask there.
const PORT: u16 = 7777;
const FORGED: [u8; 4] = [203, 0, 113, 77];
/// A user without any rights.
const NOBODY: u32 = 65534;

/// A pod on either node, and a host outside; everything may talk to everything.
fn cluster() -> Cluster {
    let mut cluster = Cluster::with(&Options {
        externals: ["203.0.113.1", "2001:db8:99::1"]
            .map(|address| address.parse().unwrap())
            .into(),
        ..Options::dual_stack()
    })
    .unwrap();
    cluster.add_pod(0, "red/a", &[("app", "web")]).unwrap();
    cluster.add_pod(1, "blue/d", &[]).unwrap();
    cluster.settle().unwrap();
    cluster.load("allow-all").unwrap();
    cluster
}

/// The datagram that a tunnel packet to the victim consists of: as if a client outside had asked at the sender's node (RFC 7348,
/// section 5).
fn tunnel_packet(victim: IpAddr) -> Vec<u8> {
    let IpAddr::V4(victim) = victim else { panic!("IPv4") };
    let vni = Identity::WORLD.0.to_be_bytes();
    let header = [0x08, 0, 0, 0, vni[1], vni[2], vni[3], 0];
    let inner = Frame::udp(FORGED, 1234, victim.octets(), PORT).summed();
    [&header[..], &inner.0].concat()
}

/// What the victim gets.
struct Victim {
    socket: UdpSocket,
}

impl Victim {
    fn new(cluster: &Cluster) -> Self {
        let netns = cluster.pod("blue/d").netns.name();
        let socket = in_netns(netns, || UdpSocket::bind(("0.0.0.0", PORT))).unwrap().unwrap();
        Self { socket }
    }

    fn has_got_anything(&self, within: Duration) -> bool {
        self.socket.set_read_timeout(Some(within)).unwrap();
        let mut datagram = [0; 64];
        self.socket.recv_from(&mut datagram).is_ok_and(|(_, from)| {
            assert_eq!(from.ip(), IpAddr::from(FORGED));
            true
        })
    }
}

/// Sends a datagram as a user, from a namespace.
fn send_as(netns: &Namespace, user: u32, to: SocketAddr, datagram: &[u8]) -> io::Result<usize> {
    in_netns(netns.name(), || {
        // The thread ends with this, and so do its rights.
        set_thread_res_uid(Uid::from_raw(user), Uid::from_raw(user), Uid::from_raw(user))?;
        UdpSocket::bind(("0.0.0.0", 0))?.send_to(datagram, to)
    })
    .unwrap()
}

/// A container behind a bridge of a node's, as container runtimes make them: what it sends leaves with the node's address.
fn guest(node: &Namespace) -> Namespace {
    let guest = Namespace::new("guest").unwrap();
    for arguments in [
        &["link", "add", "br0", "type", "bridge"][..],
        &["addr", "add", "172.17.0.1/16", "dev", "br0"],
        &["link", "set", "br0", "up"],
        &[
            "link",
            "add",
            "port0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            guest.name(),
        ],
        &["link", "set", "port0", "master", "br0", "up"],
    ] {
        node.ip(arguments).unwrap();
    }
    for arguments in [
        &["addr", "add", "172.17.0.2/16", "dev", "eth0"][..],
        &["link", "set", "eth0", "up"],
        &["link", "set", "lo", "up"],
        &["route", "add", "default", "via", "172.17.0.1"],
    ] {
        guest.ip(arguments).unwrap();
    }
    let table = "table ip runtime {\n\
        chain published { type nat hook prerouting priority dstnat; fib daddr type local meta l4proto { tcp, udp } th dport 8081 dnat to 172.17.0.2:80; }\n\
        chain leaving { type nat hook postrouting priority srcnat; ip saddr 172.17.0.0/16 oifname != \"br0\" masquerade; }\n}";
    let loaded = node.command("nft").arg(table).status().unwrap();
    assert!(loaded.success());
    guest
}

#[test]
fn an_unprivileged_process_of_a_node_writes_no_tunnel_packet() {
    kernel_test!();
    let cluster = cluster();
    let victim = Victim::new(&cluster);
    let to = SocketAddr::new(cluster.nodes[1].underlay, TUNNEL_PORT);
    let forged = tunnel_packet(cluster.pod("blue/d").address);
    let here = &cluster.nodes[0].netns;
    // Root may, which shows that the packet is a good one.
    send_as(here, 0, to, &forged).unwrap();
    assert!(victim.has_got_anything(LONG));
    let denied = send_as(here, NOBODY, to, &forged).unwrap_err();
    assert_eq!(denied.kind(), io::ErrorKind::PermissionDenied, "{denied}");
    assert!(!victim.has_got_anything(WAIT));
    // To other ports it sends what it likes, and so does a pod's process, whose source is its own.
    let elsewhere = SocketAddr::new(to.ip(), 9);
    send_as(here, NOBODY, elsewhere, b"hello").unwrap();
    let (a, d) = (cluster.pod("red/a"), cluster.pod("blue/d"));
    let _listener = Listener::new(d.netns.name(), TUNNEL_PORT).unwrap();
    assert!(udp_exchange(a.netns.name(), d.address, TUNNEL_PORT, WAIT).unwrap());
}

#[test]
fn the_guard_stays_without_hostd_and_comes_back() {
    kernel_test!();
    let mut cluster = cluster();
    let victim = Victim::new(&cluster);
    let to = SocketAddr::new(cluster.nodes[1].underlay, TUNNEL_PORT);
    let forged = tunnel_packet(cluster.pod("blue/d").address);
    let pin = cluster.nodes[0].bpffs().join("guard/link");
    cluster.nodes[0].stop(true).unwrap();
    assert!(send_as(&cluster.nodes[0].netns, NOBODY, to, &forged).is_err());
    cluster.nodes[0].start().unwrap();
    assert!(send_as(&cluster.nodes[0].netns, NOBODY, to, &forged).is_err());
    std::fs::remove_file(&pin).unwrap();
    assert!(wait_until(LONG, || pin.exists()), "it is put right");
    assert!(send_as(&cluster.nodes[0].netns, NOBODY, to, &forged).is_err());
    assert!(!victim.has_got_anything(WAIT));
}

#[test]
fn a_container_behind_the_nodes_address_writes_no_tunnel_packet() {
    kernel_test!();
    let cluster = cluster();
    let victim = Victim::new(&cluster);
    let guest = guest(&cluster.nodes[0].netns);
    let other = cluster.nodes[1].underlay;
    let _listener = Listener::new(cluster.nodes[1].netns.name(), 80).unwrap();
    assert!(udp_exchange(guest.name(), other, 80, WAIT).unwrap(), "it gets out");
    let forged = tunnel_packet(cluster.pod("blue/d").address);
    send_as(&guest, 0, SocketAddr::new(other, TUNNEL_PORT), &forged).unwrap();
    assert!(!victim.has_got_anything(WAIT));
}

#[test]
fn the_tunnel_believes_what_was_sent_to_the_underlay_address_alone() {
    kernel_test!();
    let cluster = cluster();
    let victim = Victim::new(&cluster);
    let second = ["addr", "add", "192.0.2.22/24", "dev", "underlay"];
    cluster.nodes[1].netns.ip(&second).unwrap();
    let forged = tunnel_packet(cluster.pod("blue/d").address);
    let to = SocketAddr::new("192.0.2.22".parse().unwrap(), TUNNEL_PORT);
    send_as(&cluster.nodes[0].netns, 0, to, &forged).unwrap();
    let dropped = || cluster.nodes[1].drops("foreign_tunnel").unwrap() > 0;
    assert!(wait_until(LONG, dropped));
    assert!(!victim.has_got_anything(WAIT));
}

#[test]
fn a_stranger_on_another_interface_is_no_node() {
    kernel_test!();
    let cluster = cluster();
    let victim = Victim::new(&cluster);
    let forged = tunnel_packet(cluster.pod("blue/d").address);
    let stranger = Namespace::new("stranger").unwrap();
    let node = &cluster.nodes[1];
    let pair = [
        "link",
        "add",
        "other",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        stranger.name(),
    ];
    node.netns.ip(&pair).unwrap();
    for (netns, device, address) in [
        (&node.netns, "other", "198.51.100.1/24"),
        (&stranger, "eth0", "198.51.100.2/24"),
        // The address of the other node.
        (&stranger, "eth0", "192.0.2.1/32"),
    ] {
        netns.ip(&["addr", "add", address, "dev", device]).unwrap();
        netns.ip(&["link", "set", device, "up"]).unwrap();
    }
    let route = ["route", "add", "192.0.2.2", "via", "198.51.100.1", "src", "192.0.2.1"];
    stranger.ip(&route).unwrap();
    let send = |to: IpAddr, port: u16| send_as(&stranger, 0, SocketAddr::new(to, port), &forged).unwrap();
    send(node.underlay, TUNNEL_PORT);
    assert!(!victim.has_got_anything(WAIT));
    // By the underlay the same packet arrives.
    let to = SocketAddr::new(node.underlay, TUNNEL_PORT);
    send_as(&cluster.nodes[0].netns, 0, to, &forged).unwrap();
    assert!(victim.has_got_anything(LONG));
}

#[test]
fn who_asks_at_a_published_port_is_no_pod_behind_the_tunnel() {
    kernel_test!();
    let cluster = cluster();
    let guest = guest(&cluster.nodes[0].netns);
    let _listener = Listener::new(guest.name(), 80).unwrap();
    let (node, external) = (cluster.nodes[0].underlay, cluster.external.as_ref().unwrap());
    assert!(
        udp_exchange(external.name(), node, 8081, WAIT).unwrap(),
        "it is published"
    );
    // What the container answers would reach the pod in the node's name.
    let pod = cluster.pod("blue/d");
    let victim = in_netns(pod.netns.name(), || UdpSocket::bind(("0.0.0.0", 5555)))
        .unwrap()
        .unwrap();
    victim.set_read_timeout(Some(WAIT)).unwrap();
    let address = format!("{}/32", pod.address);
    external.ip(&["addr", "add", &address, "dev", "lo"]).unwrap();
    in_netns(external.name(), || {
        UdpSocket::bind((pod.address, 5555))?.send_to(b"?", (node, 8081))
    })
    .unwrap()
    .unwrap();
    assert!(victim.recv_from(&mut [0; 8]).is_err());
}

#[test]
fn no_pod_answers_a_client_with_a_tunnel_packet() {
    kernel_test!();
    let cluster = cluster();
    let victim = Victim::new(&cluster);
    // A second address of the other node's, which somebody outside claims to have.
    let second: IpAddr = "192.0.2.22".parse().unwrap();
    let address = ["addr", "add", "192.0.2.22/24", "dev", "underlay"];
    cluster.nodes[1].netns.ip(&address).unwrap();
    cluster
        .add_service("red/web", "--port udp/53=5353@30053 --selector app=web")
        .unwrap();
    let external = cluster.external.as_ref().unwrap();
    external.ip(&["addr", "add", "192.0.2.22/32", "dev", "lo"]).unwrap();
    let pod = cluster.pod("red/a");
    let attacker = in_netns(pod.netns.name(), || UdpSocket::bind(("0.0.0.0", 5353)))
        .unwrap()
        .unwrap();
    attacker.set_read_timeout(Some(WAIT)).unwrap();
    // A node's address is the stack's to answer, which has nobody at that port.
    let node_takes_it = || {
        let known = cluster.nodes[0].json(&["explain", "red/a", "192.0.2.22"]).unwrap();
        known.to_string().contains("remote-node")
    };
    let spoof = |port: u16| {
        in_netns(external.name(), || {
            // It is the other node that answers for the address.
            std::fs::write("/proc/sys/net/ipv4/conf/all/arp_ignore", "1")?;
            std::fs::write("/proc/sys/net/ipv4/conf/all/arp_announce", "2")?;
            let socket = UdpSocket::bind((second, port))?;
            socket.send_to(b"?", (cluster.nodes[0].underlay, 30053))
        })
        .unwrap()
        .unwrap();
    };
    let forged = tunnel_packet(cluster.pod("blue/d").address);
    // Dropped for its port, or for its address, where that is known to be a node's already.
    let refused = || {
        let drops = |reason| cluster.nodes[0].drops(reason).unwrap();
        drops("tunnel_port") + drops("unknown_source") > 0
    };
    let mut question = [0; 8];
    let came = wait_until(LONG, || {
        spoof(TUNNEL_PORT);
        if let Ok((_, client)) = attacker.recv_from(&mut question) {
            attacker.send_to(&forged, client).unwrap();
            return true;
        }
        refused() || node_takes_it()
    });
    assert!(came, "nothing has come at all");
    assert!(!victim.has_got_anything(WAIT));
}

#[test]
fn the_tunnel_sends_from_the_underlay_address_whichever_the_kernel_prefers() {
    kernel_test!();
    let cluster = cluster();
    for (node, other) in [(0, 1), (1, 0)] {
        let netns = &cluster.nodes[node].netns;
        let preferred = format!("192.0.2.{}", 31 + node);
        let to = format!("{}/32", cluster.nodes[other].underlay);
        netns
            .ip(&["addr", "add", &format!("{preferred}/24"), "dev", "underlay"])
            .unwrap();
        netns
            .ip(&["route", "replace", &to, "dev", "underlay", "src", &preferred])
            .unwrap();
    }
    let (a, d) = (cluster.pod("red/a"), cluster.pod("blue/d"));
    let _listener = Listener::new(d.netns.name(), 80).unwrap();
    for from in [a.netns.name(), cluster.nodes[0].netns.name()] {
        for to in &d.addresses {
            assert_eq!(
                tcp_exchange(from, *to, 80, WAIT).unwrap(),
                TcpOutcome::Open,
                "{from} -> {to}"
            );
        }
    }
}

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
fn a_node_and_the_pods_of_another_reach_each_other_in_both_families() {
    kernel_test!();
    for ipv6_underlay in [false, true] {
        let mut cluster = Cluster::with(&Options {
            ipv6_underlay,
            ..Options::dual_stack()
        })
        .unwrap();
        cluster.add_pod(0, "red/a", &[]).unwrap();
        cluster.settle().unwrap();
        cluster.load("allow-all").unwrap();
        let (pod, other) = (cluster.pod("red/a"), cluster.nodes[1].netns.name());
        let _listeners = [pod.netns.name(), other].map(|netns| Listener::new(netns, 80).unwrap());
        let node: [IpAddr; 2] = ["192.0.2.2", "2001:db8:0:2::2"].map(|address| address.parse().unwrap());
        for (own, node) in pod.addresses.iter().zip(node) {
            for (from, to) in [(other, *own), (pod.netns.name(), node)] {
                let open = || tcp_exchange(from, to, 80, WAIT).unwrap() == TcpOutcome::Open;
                assert!(wait_until(LONG, open), "{from} -> {to}");
            }
        }
    }
}

#[test]
fn ports_that_a_runtime_publishes_are_reached_from_everywhere() {
    kernel_test!();
    let cluster = cluster();
    let guest = guest(&cluster.nodes[1].netns);
    let _listener = Listener::new(guest.name(), 80).unwrap();
    let to = cluster.nodes[1].underlay;
    for (who, from) in [
        ("outside", cluster.external.as_ref().unwrap().name()),
        ("another node", cluster.nodes[0].netns.name()),
        ("a pod here", cluster.pod("blue/d").netns.name()),
        ("a pod elsewhere", cluster.pod("red/a").netns.name()),
    ] {
        assert_eq!(tcp_exchange(from, to, 8081, WAIT).unwrap(), TcpOutcome::Open, "{who}");
    }
    // Only answers: the container does not ask pods in the node's name.
    let _listener = Listener::new(cluster.pod("red/a").netns.name(), 81).unwrap();
    let pod = cluster.pod("red/a").address;
    assert_ne!(tcp_exchange(guest.name(), pod, 81, WAIT).unwrap(), TcpOutcome::Open);
}

#[test]
fn where_a_program_is_missing_nothing_passes() {
    kernel_test!();
    let mut cluster = cluster();
    cluster.wait_for_links().unwrap();
    let external: IpAddr = "203.0.113.1".parse().unwrap();
    let listening = cluster.external.as_ref().unwrap().name().to_owned();
    let _listeners = [listening.as_str(), cluster.nodes[0].netns.name()].map(|netns| Listener::new(netns, 80).unwrap());
    let (pod, node) = (cluster.pod("red/a").netns.name().to_owned(), cluster.nodes[0].underlay);
    let asks = |to: IpAddr| tcp_exchange(&pod, to, 80, WAIT).unwrap() == TcpOutcome::Open;
    assert!(asks(external) && asks(node));
    // With hostd down nobody puts it back.
    cluster.nodes[0].stop(true).unwrap();
    assert!(asks(external) && asks(node));
    let links = cluster.nodes[0].bpffs().join("links");
    let pins = std::fs::read_dir(&links).unwrap().flatten().map(|pin| pin.path());
    for pin in pins.filter(|pin| pin.to_string_lossy().ends_with("-from_pod")) {
        std::fs::remove_file(pin).unwrap();
    }
    // The kernel takes a moment to detach them. From then on nothing passes, neither as itself nor as anybody else.
    assert!(wait_until(LONG, || !asks(external) && !asks(node)));
    assert!(!asks(external) && !asks(node));
    cluster.nodes[0].start().unwrap();
    assert!(wait_until(LONG, || asks(external) && asks(node)));
}
