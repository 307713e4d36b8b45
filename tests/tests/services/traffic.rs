//! Services, with real clients and real servers.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{
    Cluster, Listener, Options, TcpOutcome, in_netns, kernel_test, tcp_exchange, tcp_open, udp_exchange,
    udp_exchange_of, wait_until,
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

const WAIT: Duration = Duration::from_millis(500);
const LONG: Duration = Duration::from_secs(20);
const VIPS: [&str; 2] = ["172.16.0.1", "fd00:96::1"];

fn vips() -> [IpAddr; 2] {
    VIPS.map(|vip| vip.parse().unwrap())
}

/// A client and two backends on each of two nodes, and one service of the backends: port 80 is their 8080.
fn cluster(options: &Options) -> Cluster {
    let mut cluster = Cluster::with(options).unwrap();
    for (node, name, app) in [
        (0, "red/client", "client"),
        (0, "red/here", "web"),
        (1, "red/there", "web"),
        (1, "blue/client", "client"),
    ] {
        cluster.add_pod(node, name, &[("app", app)]).unwrap();
    }
    cluster.settle().unwrap();
    cluster.load("tenant-isolation").unwrap();
    cluster
}

fn add(cluster: &Cluster, more: &[&str]) -> anyhow::Result<Value> {
    let [v4, v6] = VIPS;
    add_at(cluster, &["--address", v4, "--address", v6], more)
}

fn add_at(cluster: &Cluster, addresses: &[&str], more: &[&str]) -> anyhow::Result<Value> {
    let service = ["service", "add", "--namespace", "red", "--name", "web"];
    let answer = cluster.nodes[0].json(&[&service[..], addresses, more].concat())?;
    let expected = cluster.nodes[0].json(&["service", "list"])?;
    let known = wait_until(LONG, || {
        cluster
            .nodes
            .iter()
            .all(|node| node.json(&["service", "list"]).unwrap() == expected)
    });
    anyhow::ensure!(known, "not all nodes know the service");
    Ok(answer)
}

const WEB: [&str; 4] = ["--port", "tcp/80=8080", "--selector", "app=web"];

/// Answers every connection with its own name.
fn name_server(namespace: &str, port: u16, name: &'static str) -> TcpListener {
    let listener = in_netns(namespace, || TcpListener::bind(("::", port)))
        .unwrap()
        .unwrap();
    let socket = listener.try_clone().unwrap();
    thread::spawn(move || {
        for stream in socket.incoming() {
            let Ok(mut stream) = stream else { return };
            if stream.write_all(name.as_bytes()).is_err() {
                return;
            }
        }
    });
    listener
}

fn who_answers(from: &str, to: IpAddr) -> io::Result<String> {
    let stream = in_netns(from, || TcpStream::connect_timeout(&SocketAddr::new(to, 80), WAIT)).unwrap();
    let mut stream = stream?;
    stream.set_read_timeout(Some(WAIT))?;
    let mut name = [0; 16];
    let length = stream.read(&mut name)?;
    Ok(String::from_utf8_lossy(&name[..length]).into_owned())
}

#[test]
fn connections_go_to_all_backends_and_as_policy_lets_them() {
    kernel_test!();
    for ipv6_underlay in [false, true] {
        let cluster = cluster(&Options {
            ipv6_underlay,
            ..Options::dual_stack()
        });
        add(&cluster, &WEB).unwrap();
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
    add(
        &cluster,
        &[
            "--port",
            "udp/53=5353",
            "--port",
            "tcp/80=5353",
            "--selector",
            "app=web",
        ],
    )
    .unwrap();
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
        add(&cluster, &WEB).unwrap();
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
    add(
        &cluster,
        &["--port", "tcp/80", "--port", "udp/53", "--selector", "app=none"],
    )
    .unwrap();
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
    add(
        &cluster,
        &["--port", "tcp/80", "--port", "udp/53", "--selector", "app=web"],
    )
    .unwrap();
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
    add(&cluster, &WEB).unwrap();
    let _listeners = ["red/here", "red/there"].map(|pod| Listener::new(cluster.pod(pod).netns.name(), 8080).unwrap());
    let client = cluster.pod("red/client").netns.name().to_owned();
    let vip = vips()[0];
    let mut streams: Vec<_> = (0..16).map(|_| tcp_open(&client, vip, 80, WAIT).unwrap()).collect();
    // One more, and one that is relabelled: none of the connections notices.
    cluster.add_pod(0, "red/new", &[("app", "web")]).unwrap();
    let label = [
        "endpoint",
        "label",
        "--namespace",
        "red",
        "--name",
        "there",
        "app=other",
    ];
    cluster.nodes[1].json(&label).unwrap();
    let backends = |node: usize| -> Vec<String> {
        let list = cluster.nodes[node].json(&["service", "list"]).unwrap();
        let backends = list[0]["ports"][0]["backends"].as_array().unwrap();
        let names = backends
            .iter()
            .map(|backend| backend["name"].as_str().unwrap().to_owned());
        names.collect()
    };
    for node in 0..2 {
        let follows = wait_until(LONG, || {
            backends(node) == ["red/here", "red/new", "red/here", "red/new"]
        });
        assert!(follows, "node {node}: {:?}", backends(node));
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
    // A service that is removed is one nobody knows.
    let delete = ["service", "delete", "--namespace", "red", "--name", "web"];
    assert_eq!(cluster.nodes[1].json(&delete).unwrap()["deleted"], true);
    assert_eq!(cluster.nodes[1].json(&delete).unwrap()["deleted"], false);
    let gone = wait_until(LONG, || {
        tcp_exchange(&client, vip, 80, WAIT).unwrap() != TcpOutcome::Open
    });
    assert!(gone);
    cluster.remove_pod("red/new").unwrap();
}

#[test]
fn what_can_be_no_service_is_refused_with_a_reason() {
    kernel_test!();
    let cluster = cluster(&Options::dual_stack());
    add(&cluster, &["--port", "tcp/80=8080@30080", "--selector", "app=web"]).unwrap();
    let before = cluster.nodes[0].json(&["service", "list"]).unwrap();
    let service = |name, more: &[&str]| {
        let arguments = ["service", "add", "--namespace", "red", "--name", name];
        let refused = cluster.nodes[0].json(&[&arguments[..], more].concat()).unwrap_err();
        format!("{refused:#}")
    };
    for (name, arguments, expected) in [
        (
            "Web",
            &["--port", "tcp/80", "--address", "172.16.0.9"][..],
            "lower-case",
        ),
        ("a", &["--port", "tcp/80"], "an address or a node port"),
        (
            "a",
            &["--port", "tcp/80", "--address", "10.1.0.77"],
            "in pod CIDR 10.1.0.0/24 of node node1",
        ),
        (
            "a",
            &["--port", "tcp/80", "--address", "192.0.2.2"],
            "the address of node node2",
        ),
        (
            "a",
            &["--port", "tcp/80", "--address", "172.16.0.1"],
            "172.16.0.1 tcp/80 is service red/web's",
        ),
        ("a", &["--port", "tcp/81@30080"], "node port 30080 is service red/web's"),
        (
            "a",
            &["--port", "tcp/80", "--address", "127.0.0.1"],
            "can be no service's",
        ),
        (
            "a",
            &["--port", "tcp/80", "--address", "172.16.0.9", "--address", "172.16.0.8"],
            "one address of each family",
        ),
        (
            "a",
            &["--port", "tcp/80", "--port", "tcp/80=81", "--address", "172.16.0.9"],
            "given twice",
        ),
        (
            "a",
            &["--port", "udp/80@8472", "--address", "172.16.0.9"],
            "not between 30000 and 32767",
        ),
        (
            "a",
            &["--port", "tcp/80", "--address", "172.16.0.9", "--backend", "172.16.0.1"],
            "can be no backend",
        ),
        (
            "a",
            &["--port", "sctp/80", "--address", "172.16.0.9"],
            "no port of a service",
        ),
        (
            "a",
            &["--port", "tcp/80=", "--address", "172.16.0.9"],
            "no port of a service",
        ),
        ("a", &["--port", "tcp/0", "--address", "172.16.0.9"], "0 is no port"),
    ] {
        let problem = service(name, arguments);
        assert!(problem.contains(expected), "{arguments:?}: {problem}");
    }
    assert_eq!(cluster.nodes[0].json(&["service", "list"]).unwrap(), before);
    // The same again changes nothing, and other ports are a change.
    add(&cluster, &["--port", "tcp/80=8080@30080", "--selector", "app=web"]).unwrap();
    assert_eq!(cluster.nodes[0].json(&["service", "list"]).unwrap(), before);
    let changed = add(&cluster, &["--port", "tcp/81=http"]).unwrap();
    assert_eq!(changed["ports"][0]["port"], "tcp/81");
}

/// Whom a server sees that answers a client at `to`, and whether what it says comes back.
fn seen_by(cluster: &Cluster, pods: &[&str], client: &str, to: SocketAddr) -> Option<IpAddr> {
    let listeners: Vec<TcpListener> = pods
        .iter()
        .map(|pod| {
            let netns = cluster.pod(pod).netns.name();
            let listener = in_netns(netns, || TcpListener::bind(("::", 8080))).unwrap().unwrap();
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
        add(
            &cluster,
            &[
                "--port",
                "tcp/80=8080@30080",
                "--port",
                "udp/53=5353@30053",
                "--selector",
                "app=web",
            ],
        )
        .unwrap();
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
                let app = format!("app={app}");
                let label = ["endpoint", "label", "--namespace", "red", "--name", name, &app];
                cluster.nodes[node].json(&label).unwrap();
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
        let delete = ["service", "delete", "--namespace", "red", "--name", "web"];
        cluster.nodes[1].json(&delete).unwrap();
        let refused = wait_until(LONG, || {
            tcp_exchange(external, node.ip(), node.port(), WAIT).unwrap() == TcpOutcome::Refused
        });
        assert!(refused);
    }
}

#[test]
fn what_one_node_has_no_room_for_keeps_nothing_else_from_being_done() {
    kernel_test!();
    let mut cluster = cluster(&Options::default());
    let config = cluster.nodes[1].config();
    let small = std::fs::read_to_string(&config).unwrap() + "\n[maps]\nservices = 16\n";
    std::fs::write(&config, small).unwrap();
    let restart = |cluster: &mut Cluster| {
        cluster.nodes[1].stop(false).unwrap();
        cluster.nodes[1].start().unwrap();
    };
    restart(&mut cluster);
    let many: Vec<String> = (1..=20).map(|port| format!("tcp/{port}=8080")).collect();
    let many: Vec<&str> = many.iter().flat_map(|port| ["--port", port]).collect();
    let service = [
        "service",
        "add",
        "--namespace",
        "red",
        "--name",
        "many",
        "--selector",
        "app=web",
        "--address",
        "172.16.0.5",
    ];
    cluster.nodes[0].json(&[&service[..], &many].concat()).unwrap();
    let problems = |node: usize| -> usize {
        let status = cluster.nodes[node].json(&["status"]).unwrap();
        status["service_problems"].as_array().unwrap().len()
    };
    assert_eq!(problems(0), 0);
    assert!(wait_until(LONG, || problems(1) > 0));
    // Pods come and go there all the same, and hostd starts.
    cluster.add_pod(1, "red/more", &[("app", "web")]).unwrap();
    cluster.remove_pod("red/more").unwrap();
    restart(&mut cluster);
    let _listener = Listener::new(cluster.pod("red/there").netns.name(), 8080).unwrap();
    let here = cluster.pod("red/client").netns.name();
    assert_eq!(
        tcp_exchange(here, cluster.pod("red/there").address, 8080, WAIT).unwrap(),
        TcpOutcome::Open
    );
    // What there is room for again is there, without anybody's doing.
    let delete = ["service", "delete", "--namespace", "red", "--name", "many"];
    cluster.nodes[0].json(&delete).unwrap();
    let status = |node: usize| cluster.nodes[node].json(&["status"]).unwrap();
    assert!(wait_until(LONG, || status(1)["service_problems"]
        .as_array()
        .unwrap()
        .is_empty()));
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
    add_at(
        &cluster,
        &["--address", VIPS[0]],
        &["--port", "tcp/80=8080", "--selector", "app=web", "--affinity", "600"],
    )
    .unwrap();
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
