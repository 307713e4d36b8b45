//! Interfaces, addresses and routes, by netlink; and work in other network namespaces.

mod netlink;
mod netns;
mod route;
mod veth;
mod vxlan;

pub use netlink::{bring_up, delete_link};
pub use netns::{Netns, in_netns};
pub use route::{make_reachable, make_unreachable};
pub use veth::{Veth, find_pod_link, make_pod_link, pod_links, prepare_node};
pub use vxlan::{ensure_vxlan, underlay_mtu};

use std::{net::IpAddr, path::PathBuf};

/// The vxlan device.
pub const VXLAN_DEVICE: &str = "wasmgate_vxlan";

/// What VXLAN over IPv4 adds to a packet, in bytes: ethernet 14, VXLAN 8, UDP 8, IPv4 20 (RFC 7348, section 5).
pub const VXLAN_OVERHEAD: u32 = 50;

/// The interface inside a pod.
pub const POD_INTERFACE: &str = "eth0";

/// Why the network could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// There is no such namespace, or it is none.
    #[error("network namespace {path}: {problem}")]
    Netns {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The pod has an interface already.
    #[error("network namespace {0} has an interface `{POD_INTERFACE}` already: is it another pod's?")]
    Occupied(PathBuf),
    /// No interface has the underlay address.
    #[error("no interface of this node has the address {0} (`underlay` in the configuration)")]
    NoUnderlay(IpAddr),
    /// The underlay's packets are too small.
    #[error("the underlay's MTU of {0} leaves no room for a tunnel")]
    SmallMtu(u32),
    /// The kernel refused.
    #[error("{what}: {problem}")]
    Kernel {
        /// What was being done.
        what: String,
        /// Why it failed.
        problem: String,
    },
}

/// Lets this node route between its pods and addresses that are no pods' (`ip_forward` in
/// `Documentation/networking/ip-sysctl.rst`). It stays on: others may rely on it by then.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn enable_forwarding() -> Result<(), NetError> {
    const SETTING: &str = "/proc/sys/net/ipv4/ip_forward";
    let failed = NetError::kernel("turning on IPv4 forwarding");
    let set = || {
        if std::fs::read_to_string(SETTING)?.trim() == "0" {
            tracing::info!("turning on IPv4 forwarding (net.ipv4.ip_forward), for what pods send to the outside");
            std::fs::write(SETTING, "1")?;
        }
        Ok::<(), std::io::Error>(())
    };
    set().map_err(failed)
}

impl NetError {
    fn kernel<E: std::fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |error| Self::Kernel {
            what,
            problem: error.to_string(),
        }
    }
}
