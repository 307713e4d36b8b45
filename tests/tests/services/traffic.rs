//! What clients in pods get from services.

use super::{AT_VIPS, LONG, WAIT, backends, cluster, name_server, vips, who_answers};
use harness::{
    Listener, Options, TcpOutcome, in_netns, kernel_test, tcp_exchange, tcp_open, udp_exchange, udp_exchange_of,
    wait_until,
};
use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

/// Port 80 of the service is its backends' 8080.
fn web() -> String {
    format!("{AT_VIPS} --port tcp/80=8080 --selector app=web")
}

#[test]
fn connections_go_to_all_backends_and_as_policy_lets_them() {
    kernel_test!();
    for ipv6_underlay in [false, true] {
        let cluster = cluster(&Options {
            ipv6_underlay,
            ..Options::dual_stack()
        });
        cluster.add_service("red/web", &web()).unwrap();
        let _servers = [("red/here", "here"), ("red/there", "there")]
            .map(|(pod, name)| name_server(cluster.pod(pod).netns.name(), 8080, name));
        for vip in vips() {
            let mut answers = BTreeMap::new();
            for _ in 0..40 {
                let name = who_answers(cluster.pod("red/client").netns.name(), vip).unwrap();
                *answers.entry(name).or_insert(0) += 1;
            }
            assert_eq!(answers.keys().collect::<Vec<_>>(), ["here", "there"], "{answers:?}");
            assert!(answers.values().all(|count| *count >= 8), "{answers:?}");
            // A backend reaches its own service, and itself through it.
            let mut answers = BTreeMap::new();
            for _ in 0..40 {
                let name = who_answers(cluster.pod("red/here").netns.name(), vip).unwrap();
                *answers.entry(name).or_insert(0) += 1;
            }
            assert_eq!(answers.keys().collect::<Vec<_>>(), ["here", "there"], "{answers:?}");
            // Another tenant's pod reaches no backend.
            let denied = who_answers(cluster.pod("blue/client").netns.name(), vip);
            assert_eq!(denied.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
        assert!(cluster.nodes[1].drops("egress_denied").unwrap() > 0);
    }
}

#[test]
fn what_is_large_passes_whole_both_ways() {
    kernel_test!();
    let cluster = cluster(&Options::dual_stack());
    let options = format!("{AT_VIPS} --port udp/53=5353 --port tcp/80=5353 --selector app=web");
    cluster.add_service("red/web", &options).unwrap();
    let _listeners = ["red/here", "red/there"].map(|pod| Listener::new(cluster.pod(pod).netns.name(), 5353).unwrap());
    let client = cluster.pod("red/client").netns.name();
    for vip in vips() {
        for attempt in 0..8 {
            assert!(udp_exchange(client, vip, 53, WAIT).unwrap(), "{vip}, {attempt}");
            // In fragments over the underlay, and whole as GSO packets.
            assert!(
                udp_exchange_of(client, vip, 53, 40_000, WAIT).unwrap(),
                "{vip}, {attempt}"
            );
        }
    }
    // Megabytes through a service: the checksums that the devices leave to each other are right.
    for vip in vips() {
        let sink = ["red/here", "red/there"].map(|pod| {
            let netns = cluster.pod(pod).netns.name();
            in_netns(netns, || TcpListener::bind(("::", 8080))).unwrap().unwrap()
        });
        cluster.add_service("red/web", &web()).unwrap();
        let threads = sink.map(|listener| {
            thread::spawn(move || -> io::Result<Vec<u8>> {
                listener.set_nonblocking(true)?;
                let mut seen = Vec::new();
                for _ in 0..200 {
                    if let Ok((mut stream, _)) = listener.accept() {
                        stream.set_nonblocking(false)?;
                        stream.set_read_timeout(Some(LONG))?;
                        stream.read_to_end(&mut seen)?;
                    }
                    thread::sleep(Duration::from_millis(10));
                }
                Ok(seen)
            })
        });
        let bytes: Vec<u8> = (0..4_000_000_u32).map(|index| index.to_le_bytes()[1]).collect();
        let mut stream = in_netns(client, || TcpStream::connect_timeout(&SocketAddr::new(vip, 80), WAIT))
            .unwrap()
            .unwrap();
        stream.write_all(&bytes).unwrap();
        drop(stream);
        let seen: Vec<Vec<u8>> = threads
            .into_iter()
            .map(|thread| thread.join().unwrap().unwrap())
            .collect();
        assert!(
            seen.concat() == bytes,
            "{vip}: {} bytes of {}",
            seen.concat().len(),
            bytes.len()
        );
    }
}

#[test]
fn who_asks_in_vain_hears_so_at_once() {
    kernel_test!();
    let cluster = cluster(&Options::dual_stack());
    let options = format!("{AT_VIPS} --port tcp/80 --port udp/53 --selector app=none");
    cluster.add_service("red/web", &options).unwrap();
    let client = cluster.pod("red/client").netns.name();
    for vip in vips() {
        for port in [80, 81] {
            let refused = in_netns(client, || TcpStream::connect_timeout(&SocketAddr::new(vip, port), LONG)).unwrap();
            assert_eq!(
                refused.unwrap_err().kind(),
                io::ErrorKind::ConnectionRefused,
                "{vip} {port}"
            );
        }
        for port in [53, 54] {
            let answer = in_netns(client, || -> io::Result<usize> {
                let any: IpAddr = if vip.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap();
                let socket = UdpSocket::bind((any, 0))?;
                socket.connect((vip, port))?;
                socket.set_read_timeout(Some(LONG))?;
                socket.send(b"hello")?;
                socket.recv(&mut [0; 8])
            });
            assert_eq!(
                answer.unwrap().unwrap_err().kind(),
                io::ErrorKind::ConnectionRefused,
                "{vip} {port}"
            );
        }
    }
    assert!(cluster.nodes[0].drops("no_backends").unwrap() >= 4);
    assert!(cluster.nodes[0].drops("no_service").unwrap() >= 4);
    // A backend that refuses is the service that refuses.
    let options = format!("{AT_VIPS} --port tcp/80 --port udp/53 --selector app=web");
    cluster.add_service("red/web", &options).unwrap();
    for vip in vips() {
        let refused = tcp_exchange(client, vip, 80, WAIT).unwrap();
        assert_eq!(refused, TcpOutcome::Refused);
        let refused = in_netns(client, || -> io::Result<usize> {
            let any: IpAddr = if vip.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap();
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect((vip, 53))?;
            socket.set_read_timeout(Some(LONG))?;
            socket.send(b"hello")?;
            socket.recv(&mut [0; 8])
        });
        assert_eq!(refused.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}

#[test]
fn backends_come_and_go_with_their_pods_and_open_connections_stay() {
    kernel_test!();
    let mut cluster = cluster(&Options::dual_stack());
    cluster.add_service("red/web", &web()).unwrap();
    let _listeners = ["red/here", "red/there"].map(|pod| Listener::new(cluster.pod(pod).netns.name(), 8080).unwrap());
    let client = cluster.pod("red/client").netns.name().to_owned();
    let vip = vips()[0];
    let mut streams: Vec<_> = (0..16).map(|_| tcp_open(&client, vip, 80, WAIT).unwrap()).collect();
    // One more, and one that is relabelled: none of the connections notices.
    cluster.add_pod(0, "red/new", &[("app", "web")]).unwrap();
    cluster.nodes[1].label("red/there", "app=other").unwrap();
    for node in 0..2 {
        let follows = wait_until(LONG, || {
            backends(&cluster, node) == ["red/here", "red/new", "red/here", "red/new"]
        });
        assert!(follows, "node {node}: {:?}", backends(&cluster, node));
    }
    for stream in &mut streams {
        assert!(stream.exchange(WAIT).unwrap());
    }
    // hostd starts anew: nor do they of that.
    cluster.nodes[0].stop(false).unwrap();
    cluster.nodes[0].start().unwrap();
    for stream in &mut streams {
        assert!(stream.exchange(WAIT).unwrap());
    }
    assert_eq!(
        cluster.nodes[0].json(&["service", "list"]).unwrap(),
        cluster.nodes[1].json(&["service", "list"]).unwrap()
    );
    // One that goes is none on any node.
    cluster.remove_pod("red/new").unwrap();
    for node in 0..2 {
        let follows = wait_until(LONG, || backends(&cluster, node) == ["red/here", "red/here"]);
        assert!(follows, "node {node}: {:?}", backends(&cluster, node));
    }
    // A service that is removed is one nobody knows.
    assert!(cluster.delete_service("red/web").unwrap());
    assert!(!cluster.delete_service("red/web").unwrap());
    let gone = wait_until(LONG, || {
        tcp_exchange(&client, vip, 80, WAIT).unwrap() != TcpOutcome::Open
    });
    assert!(gone);
    for node in &cluster.nodes {
        let listed = node.json(&["ipcache", "list"]).unwrap().to_string();
        assert!(!listed.contains("172.16.0.1"), "{listed}");
    }
}

#[test]
fn a_restart_changes_no_clients_backend() {
    kernel_test!();
    let mut cluster = cluster(&Options::default());
    for index in 0..4 {
        cluster
            .add_pod(index % 2, &format!("red/web{index}"), &[("app", "web")])
            .unwrap();
    }
    cluster.remove_pod("red/here").unwrap();
    let options = "--address 172.16.0.1 --port tcp/80=8080 --selector app=web --affinity 600";
    cluster.add_service("red/web", options).unwrap();
    let servers = ["red/there", "red/web0", "red/web1", "red/web2", "red/web3"];
    let names = ["there", "web0", "web1", "web2", "web3"];
    let _servers: Vec<TcpListener> = servers
        .iter()
        .zip(names)
        .map(|(pod, name)| name_server(cluster.pod(pod).netns.name(), 8080, name))
        .collect();
    let client = cluster.pod("red/client").netns.name().to_owned();
    let first = who_answers(&client, vips()[0]).unwrap();
    cluster.nodes[0].stop(false).unwrap();
    cluster.nodes[0].start().unwrap();
    for _ in 0..8 {
        assert_eq!(who_answers(&client, vips()[0]).unwrap(), first);
    }
}
