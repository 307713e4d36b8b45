//! Interfaces, addresses and routes, by netlink; and work in other network namespaces.

mod addresses;
mod check;
mod filter;
mod mtu;
mod netlink;
mod netns;
mod ports;
mod recover;
mod route;
mod table;
mod veth;
mod vxlan;

pub use addresses::{Addresses, addresses};
pub use check::{Made, check_pod_link};
pub use filter::filters;
pub use mtu::{pod_mtu, set_pod_mtu, tunnel_has_ipv6};
pub use netlink::{bring_up, delete_link};
pub use netns::{Netns, in_netns};
pub use ports::given_to_connections;
pub use recover::{Found, find_pods};
pub use route::{Tunnel, has_tunnel_routes, make_reachable, make_unreachable, set_tunnel_routes};
pub use table::{Routed, remove_table, set_table, table};
pub use veth::{NODE_MTU, PairNames, Veth, find_pod_link, gateway, make_pod_link, pod_links, prepare_node};
pub use vxlan::{Underlay, ensure_vxlan, underlay};

use rustix::net::{AddressFamily, SocketType};
use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

/// The vxlan device.
pub const VXLAN_DEVICE: &str = "wasmgate_vxlan";

/// What VXLAN adds to a packet, in bytes: ethernet 14, VXLAN 8, UDP 8, and IPv4 20 or IPv6 40 (RFC 7348, section 5).
#[must_use]
pub const fn vxlan_overhead(underlay: IpAddr) -> u32 {
    14 + 8 + 8 + if underlay.is_ipv4() { 20 } else { 40 }
}

/// The interface inside a pod, unless its runtime calls it something else.
pub const POD_INTERFACE: &str = "eth0";

/// Index of an interface of this thread's namespace.
///
/// # Errors
///
/// Where there is none of that name.
pub fn ifindex(name: &str) -> Result<u32, NetError> {
    let what = format!("looking {name} up");
    let failed = |error| NetError::kernel(what.as_str())(std::io::Error::from(error));
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).map_err(failed)?;
    rustix::net::netdevice::name_to_index(&socket, name).map_err(failed)
}

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
    #[error("network namespace {netns} has an interface `{interface}` already: is it another pod's?")]
    Occupied {
        /// The namespace.
        netns: PathBuf,
        /// The interface.
        interface: String,
    },
    /// No interface has the underlay address.
    #[error("no interface of this node has the address {0} (`underlay` in the configuration)")]
    NoUnderlay(IpAddr),
    /// The underlay's packets are too small.
    #[error("the underlay's MTU of {underlay} leaves no room for packets of {least} bytes in a tunnel")]
    SmallMtu {
        /// Its MTU.
        underlay: u32,
        /// What pods need.
        least: u32,
    },
    /// The kernel refused.
    #[error("{what}: {problem}")]
    Kernel {
        /// What was being done.
        what: String,
        /// Why it failed.
        problem: String,
    },
}

/// Lets this node route between its pods and addresses that are no pods' (`ip_forward` and `conf/all/forwarding` in
/// `Documentation/networking/ip-sysctl.rst`). It stays on: others may rely on it by then.
///
/// An interface that learns its routes from router advertisements goes on doing so: forwarding alone would end that.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn enable_forwarding(ipv6: bool) -> Result<(), NetError> {
    turn_on("net/ipv4/ip_forward").map_err(NetError::kernel("turning on IPv4 forwarding"))?;
    if ipv6 {
        keep_router_advertisements()
            .and_then(|()| turn_on("net/ipv6/conf/all/forwarding"))
            .map_err(NetError::kernel("turning on IPv6 forwarding"))?;
    }
    Ok(())
}

fn turn_on(setting: &str) -> std::io::Result<()> {
    let path = Path::new("/proc/sys").join(setting);
    if std::fs::read_to_string(&path)?.trim() == "0" {
        tracing::info!("turning on {setting}, for what pods send to the outside");
        std::fs::write(&path, "1")?;
    }
    Ok(())
}

/// `accept_ra` 2: also with forwarding.
fn keep_router_advertisements() -> std::io::Result<()> {
    if std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/forwarding")?.trim() != "0" {
        return Ok(());
    }
    for entry in std::fs::read_dir("/proc/sys/net/ipv6/conf")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let setting = entry.path().join("accept_ra");
        if matches!(name.as_str(), "all" | "default" | "lo" | VXLAN_DEVICE) || crate::endpoint::is_interface_name(&name)
        {
            continue;
        }
        if std::fs::read_to_string(&setting)?.trim() == "1" {
            tracing::info!("{name} goes on accepting router advertisements (accept_ra = 2)");
            std::fs::write(&setting, "2")?;
        }
    }
    Ok(())
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
