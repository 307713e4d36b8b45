//! Who is believed for what: one attack for each row of the table in `docs/security.md` that real nodes are needed for. The others
//! are among the packets.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

mod addresses;
mod published;
mod tunnel;

use abi::{Identity, node::TUNNEL_PORT};
use harness::{Cluster, Namespace, Options, in_netns};
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

/// Where the other node believes tunnel packets, and one to the victim there.
fn aim(cluster: &Cluster) -> (SocketAddr, Vec<u8>) {
    let to = SocketAddr::new(cluster.nodes[1].underlay, TUNNEL_PORT);
    (to, tunnel_packet(cluster.pod("blue/d").address))
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
    node.connect("port0", &guest, "eth0").unwrap();
    for arguments in [
        &["link", "add", "br0", "type", "bridge"][..],
        &["addr", "add", "172.17.0.1/16", "dev", "br0"],
        &["link", "set", "br0", "up"],
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
