//! Ports that a container runtime publishes on a node.

use super::{WAIT, cluster, guest};
use harness::{Listener, TcpOutcome, in_netns, kernel_test, tcp_exchange, udp_exchange};
use std::net::UdpSocket;

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
    // Only answers: the container does not ask pods in the node's name, here or elsewhere.
    for pod in ["red/a", "blue/d"] {
        let pod = cluster.pod(pod);
        let _listener = Listener::new(pod.netns.name(), 81).unwrap();
        assert_ne!(
            tcp_exchange(guest.name(), pod.address, 81, WAIT).unwrap(),
            TcpOutcome::Open
        );
    }
}
