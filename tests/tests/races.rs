//! Everything changes at once, under traffic: what may talk loses nothing, and what may not never gets through.

use harness::{Cluster, Listener, Namespace, Traffic, kernel_test, tcp_open, tcp_retransmits};
use std::{
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

const FOR: Duration = Duration::from_secs(8);

/// The same policies disagree on much, but under both of them red's frontend reaches red's backend at port 8080, and
/// blue reaches neither.
const POLICIES: [&str; 2] = ["tenant-isolation", "web-app"];

/// Sends datagrams as fast as it may, and counts what is answered: nothing ever should be.
fn knock(from: &str, to: SocketAddr, end: &AtomicBool, sent: &AtomicU64) -> u64 {
    harness::in_netns(from, || {
        let mut answered = 0;
        while !end.load(Ordering::Relaxed) {
            // A port of its own each time: a flow of its own each time.
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            socket.send_to(b"knock", to).unwrap();
            sent.fetch_add(1, Ordering::Relaxed);
            answered += u64::from(socket.recv(&mut [0; 8]).is_ok());
        }
        answered
    })
    .unwrap()
}

#[test]
fn changes_of_every_kind_under_traffic() {
    kernel_test!();
    let mut cluster = Cluster::new().unwrap();
    for (node, name, app) in [
        (0, "red/frontend", "frontend"),
        (0, "red/near", "backend"),
        (1, "red/far", "backend"),
        (0, "blue/near", "frontend"),
        (1, "blue/far", "frontend"),
    ] {
        cluster.add_pod(node, name, &[("app", app)]).unwrap();
    }
    cluster.load(POLICIES[0]).unwrap();
    cluster.settle().unwrap();
    let _listeners: Vec<_> = ["red/near", "red/far"]
        .iter()
        .map(|name| Listener::new(cluster.pod(name).netns.name(), 8080).unwrap())
        .collect();
    // Under both policies: a node and its pods by UDP, the frontend and the backends by TCP.
    let stays: Vec<Traffic> = cluster
        .pods
        .iter()
        .filter(|pod| pod.name.starts_with("red/n") || pod.name == "red/far")
        .map(|pod| {
            let node = &cluster.nodes[pod.node];
            Traffic::start(node.netns.name(), pod.address, 8080, Duration::from_secs(1))
        })
        .collect();
    let end = AtomicBool::new(false);
    let (knocks, loads, labels, churn) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let until_end = |work: &dyn Fn(u64), count: &AtomicU64| {
        while !end.load(Ordering::Relaxed) {
            work(count.fetch_add(1, Ordering::Relaxed));
        }
    };
    let spare = [Namespace::new("churn").unwrap(), Namespace::new("churn").unwrap()];
    thread::scope(|scope| {
        let streams: Vec<_> = ["red/near", "red/far"]
            .iter()
            .map(|to| {
                let from = cluster.pod("red/frontend").netns.name();
                let mut stream = tcp_open(from, cluster.pod(to).address, 8080, Duration::from_secs(5)).unwrap();
                let end = &end;
                scope.spawn(move || {
                    while !end.load(Ordering::Relaxed) {
                        assert!(stream.exchange(Duration::from_secs(5)).unwrap(), "a stream that may go on has stopped");
                    }
                })
            })
            .collect();
        let knocking: Vec<_> = ["blue/near", "blue/far"]
            .iter()
            .flat_map(|from| ["red/near", "red/far"].map(|to| (*from, to)))
            .map(|(from, to)| {
                let (from, to) = (cluster.pod(from).netns.name(), cluster.pod(to).address);
                let (end, knocks) = (&end, &knocks);
                scope.spawn(move || knock(from, SocketAddr::new(to, 8080), end, knocks))
            })
            .collect();
        scope.spawn(|| {
            until_end(
                &|n| {
                    cluster.load(POLICIES[usize::try_from(n + 1).unwrap() % 2]).unwrap();
                },
                &loads,
            );
        });
        scope.spawn(|| {
            until_end(
                &|n| {
                    // Whatever blue calls itself, it stays blue.
                    let label = format!("app={}", ["frontend", "backend", "db", "other"][usize::try_from(n).unwrap() % 4]);
                    let arguments = ["endpoint", "label", "--namespace", "blue", "--name", "near", &label];
                    cluster.nodes[0].json(&arguments).unwrap();
                },
                &labels,
            );
        });
        scope.spawn(|| {
            until_end(
                &|n| {
                    // The same address for a blue pod and a red one in turn.
                    let node = usize::try_from(n).unwrap() % 2;
                    let namespace = ["blue", "red"][usize::try_from(n / 2).unwrap() % 2];
                    let netns = spare[node].name();
                    let add = ["endpoint", "add", "--netns", netns, "--namespace", namespace, "--name", "churn"];
                    let address = format!("10.{}.0.99", node + 1);
                    cluster.nodes[node].json(&[&add[..], &["--address", &address]].concat()).unwrap();
                    let delete = ["endpoint", "delete", "--namespace", namespace, "--name", "churn"];
                    cluster.nodes[node].json(&delete).unwrap();
                },
                &churn,
            );
        });
        let began = Instant::now();
        while began.elapsed() < FOR {
            thread::sleep(Duration::from_millis(50));
        }
        end.store(true, Ordering::Relaxed);
        let answered: u64 = knocking.into_iter().map(|knocking| knocking.join().unwrap()).sum();
        streams.into_iter().for_each(|stream| stream.join().unwrap());
        for pod in ["red/frontend", "red/near", "red/far"] {
            assert_eq!(tcp_retransmits(cluster.pod(pod).netns.name()).unwrap(), 0, "{pod} has sent segments again");
        }
        assert_eq!(answered, 0, "of {} knocks", knocks.load(Ordering::Relaxed));
    });
    for traffic in stays {
        let counts = traffic.stop().unwrap();
        assert!(counts.answered > 100 && counts.lost == 0, "{counts:?}");
    }
    for (what, count, least) in [("loads", &loads, 3), ("labels", &labels, 10), ("pods", &churn, 4), ("knocks", &knocks, 1000)] {
        let count = count.load(Ordering::Relaxed);
        eprintln!("{what}: {count}");
        assert!(count >= least, "{what}: only {count}");
    }
}
