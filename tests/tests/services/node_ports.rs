//! Services at nodes' own addresses, for clients outside.

use super::{AT_VIPS, LONG, WAIT, cluster};
use harness::{
    Cluster, Listener, Options, TcpOutcome, Traffic, in_netns, kernel_test, tcp_exchange, tcp_open, udp_exchange,
    udp_exchange_of, wait_until,
};
use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
};

/// Whom a server sees that answers a client at `to`, and whether what it says comes back.
fn seen_by(cluster: &Cluster, pods: &[&str], client: &str, to: SocketAddr) -> Option<IpAddr> {
    let listeners: Vec<TcpListener> = pods
        .iter()
        .map(|pod| {
            let netns = cluster.pod(pod).netns.name();
            // What the last one had open may not be gone yet.
            let mut listener = None;
            wait_until(LONG, || {
                listener = in_netns(netns, || TcpListener::bind(("::", 8080))).unwrap().ok();
                listener.is_some()
            });
            let listener = listener.unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        })
        .collect();
    let stream = in_netns(client, || TcpStream::connect_timeout(&to, WAIT)).unwrap();
    let mut stream = stream.ok()?;
    let mut accepted = None;
    wait_until(WAIT, || {
        accepted = listeners.iter().find_map(|listener| listener.accept().ok());
        accepted.is_some()
    });
    let (mut server, from) = accepted?;
    server.write_all(b"hello").unwrap();
    stream.set_read_timeout(Some(WAIT)).unwrap();
    stream.read_exact(&mut [0; 5]).ok()?;
    Some(from.ip().to_canonical())
}

#[test]
fn a_restart_ends_no_connection_of_a_pod_through_a_node_port() {
    kernel_test!();
    let mut cluster = cluster(&Options::default());
    cluster.load("allow-all").unwrap();
    // Pods whose interfaces the new hostd has to prepare between its first program and its last step.
    for number in 0..12 {
        cluster.add_pod(0, &format!("red/other{number}"), &[]).unwrap();
    }
    cluster
        .add_service(
            "red/web",
            "--port udp/53=5353@30053 --port tcp/80=5353@30080 --selector app=web",
        )
        .unwrap();
    let _listeners = ["red/here", "red/there"].map(|pod| Listener::new(cluster.pod(pod).netns.name(), 5353).unwrap());
    let client = cluster.pod("red/client").netns.name().to_owned();
    let node = cluster.nodes[0].underlay;
    let mut open = tcp_open(&client, node, 30080, WAIT).unwrap();
    let traffic = Traffic::start(&client, node, 30053, WAIT);
    for _ in 0..3 {
        cluster.nodes[0].stop(false).unwrap();
        cluster.nodes[0].start().unwrap();
        assert!(open.exchange(WAIT).unwrap());
    }
    let counts = traffic.stop().unwrap();
    assert!(counts.answered > 100, "{counts:?}");
    assert_eq!(counts.lost, 0);
}

#[test]
fn clients_outside_reach_backends_of_all_nodes_at_any_node() {
    kernel_test!();
    let outside = ["203.0.113.1", "2001:db8:99::1"];
    for (ipv6_underlay, attach) in [(false, "auto"), (true, "auto"), (false, "clsact")] {
        let cluster = cluster(&Options {
            ipv6_underlay,
            keys: format!("attach = \"{attach}\""),
            externals: outside.map(|address| address.parse().unwrap()).into(),
            ..Options::dual_stack()
        });
        cluster.load("allow-all").unwrap();
        let external = cluster.external.as_ref().unwrap().name();
        let client: IpAddr = outside[usize::from(ipv6_underlay)].parse().unwrap();
        // From the address that pods and nodes know, not from the underlay's.
        let route = [
            "route",
            "replace",
            &cluster.nodes[0].underlay.to_string(),
            "dev",
            "underlay",
            "src",
            &client.to_string(),
        ]
        .map(str::to_owned);
        let route: Vec<&str> = route.iter().map(String::as_str).collect();
        cluster.external.as_ref().unwrap().ip(&route).unwrap();
        let node = SocketAddr::new(cluster.nodes[0].underlay, 30080);
        let options = format!("{AT_VIPS} --port tcp/80=8080@30080 --port udp/53=5353@30053 --selector app=web");
        cluster.add_service("red/web", &options).unwrap();
        for _ in 0..8 {
            assert_eq!(
                seen_by(&cluster, &["red/here", "red/there"], external, node),
                Some(client),
                "{attach}"
            );
        }
        // Each of them alone: here, and by way of the tunnel.
        for (pod, other) in [("here", "there"), ("there", "here")] {
            let label = |name: &str, app: &str| {
                let node = cluster.pod(&format!("red/{name}")).node;
                cluster.nodes[node]
                    .label(&format!("red/{name}"), &format!("app={app}"))
                    .unwrap();
            };
            label(pod, "web");
            label(other, "none");
            let name = format!("red/{pod}");
            let alone = wait_until(LONG, || {
                let list = cluster.nodes[0].json(&["service", "list"]).unwrap();
                let backends = list[0]["ports"][0]["backends"].as_array().unwrap();
                !backends.is_empty() && backends.iter().all(|backend| backend["name"] == *name)
            });
            assert!(alone, "{pod}");
            assert_eq!(seen_by(&cluster, &[&name], external, node), Some(client), "{pod}");
            let _listener = Listener::new(cluster.pod(&name).netns.name(), 5353).unwrap();
            let udp = SocketAddr::new(node.ip(), 30053);
            assert!(udp_exchange(external, udp.ip(), udp.port(), WAIT).unwrap(), "{pod}");
            // Of IPv6 the client has to be told first how large pieces may be.
            let in_pieces = || udp_exchange_of(external, udp.ip(), udp.port(), 8000, WAIT).unwrap_or(false);
            assert!(in_pieces() || (ipv6_underlay && in_pieces()), "{pod}");
            // Pods ask there, too.
            let asks = cluster.pod("red/client");
            let own = asks.addresses[usize::from(ipv6_underlay)];
            assert_eq!(seen_by(&cluster, &[&name], asks.netns.name(), node), Some(own), "{pod}");
        }
        // As the world that they are: this policy lets none of it in.
        cluster.load("tenant-isolation").unwrap();
        assert_eq!(seen_by(&cluster, &["red/there"], external, node), None);
        // Without node ports nothing is attached to the underlay any more.
        cluster.delete_service("red/web").unwrap();
        let refused = wait_until(LONG, || {
            tcp_exchange(external, node.ip(), node.port(), WAIT).unwrap() == TcpOutcome::Refused
        });
        assert!(refused);
    }
}
