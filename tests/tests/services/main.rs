//! Services, with real clients and real servers.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

mod control;
mod node_ports;
mod traffic;

use harness::{Cluster, Options, in_netns};
use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

const WAIT: Duration = Duration::from_millis(500);
const LONG: Duration = Duration::from_secs(90);
const VIPS: [&str; 2] = ["172.16.0.1", "fd00:96::1"];

/// The service's addresses, as options.
const AT_VIPS: &str = "--address 172.16.0.1 --address fd00:96::1";

fn vips() -> [IpAddr; 2] {
    VIPS.map(|vip| vip.parse().unwrap())
}

/// A client and a backend on each of two nodes, and a client of another tenant.
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

/// The backends of the only service's first port, as a node shows them.
fn backends(cluster: &Cluster, node: usize) -> Vec<String> {
    let list = cluster.nodes[node].json(&["service", "list"]).unwrap();
    let backends = list[0]["ports"][0]["backends"].as_array().unwrap();
    let names = backends.iter().map(|backend| backend["name"].as_str().unwrap());
    names.map(str::to_owned).collect()
}
