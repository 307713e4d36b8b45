//! Who can make a tunnel packet, and which are believed.

use super::{LONG, NOBODY, Victim, WAIT, aim, cluster, guest, send_as, tunnel_packet};
use abi::node::TUNNEL_PORT;
use harness::{Listener, Namespace, TcpOutcome, in_netns, kernel_test, tcp_exchange, udp_exchange, wait_until};
use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
};

#[test]
fn an_unprivileged_process_of_a_node_writes_no_tunnel_packet() {
    kernel_test!();
    let cluster = cluster();
    let victim = Victim::new(&cluster);
    let (to, forged) = aim(&cluster);
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
    let (to, forged) = aim(&cluster);
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
    node.netns.connect("other", &stranger, "eth0").unwrap();
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
