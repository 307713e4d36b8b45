//! Nodes and pods as network namespaces, with a real hostd on each node: for the kernel tests and the demo.
//!
//! Everything is made under names of its own and removed when the [`Cluster`] is dropped, also after a failure; a process that
//! outlives a run removes what is left where the run was killed.

mod amount;
mod artifacts;
mod capture;
mod cluster;
mod cni;
mod etcd;
mod netns;
mod node;
mod patience;
mod probe;
mod program;
mod reach;
mod server;
mod short;
mod support;
mod traffic;
mod warden;

pub use amount::{Stop, amount};
pub use artifacts::{hostd, plugin, policy, test_policy, use_release};
pub use capture::{Capture, VxlanPacket};
pub use cluster::{Cluster, Options, Pod};
pub use cni::Cni;
pub use etcd::{Etcd, EtcdOptions};
pub use netns::{Namespace, in_netns, run};
pub use node::Node;
pub use probe::{
    Listener, Stream, TcpOutcome, sent_bytes, tcp_duplicates, tcp_exchange, tcp_lost, tcp_open, tcp_retransmits,
    udp_exchange, udp_exchange_of, wait_until,
};
pub use program::{Program, ask, iperf3};
pub use reach::{Duplex, Reach, reachable};
pub use server::Server;
pub use short::{Short, answer_each, short_connections};
pub use support::{Unsupported, check as check_support};
pub use traffic::{Counts, Traffic};
pub use warden::folder;

/// Begins a kernel test: on a machine that can't run it the test is skipped, but never in CI.
#[macro_export]
macro_rules! kernel_test {
    () => {
        if let Err(unsupported) = $crate::check_support() {
            assert!(
                std::env::var_os("CI").is_none() && std::env::var_os("WASMGATE_REQUIRE_KERNEL").is_none(),
                "this machine can't run kernel tests: {unsupported}"
            );
            eprintln!("skipped: {unsupported}");
            return;
        }
    };
}
