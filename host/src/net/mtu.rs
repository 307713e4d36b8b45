//! How large packets are: the tunnel's, and those of pods.

use super::{
    NetError, Netns, in_netns,
    netlink::{get, netlink},
    vxlan_overhead,
};
use futures::FutureExt;
use rtnetlink::LinkUnspec;
use std::{net::IpAddr, path::Path};

/// MTU of the pods on a node with this underlay address and MTU: what fits into the tunnel.
///
/// # Errors
///
/// Where the underlay's packets are too small: IPv4 demands 68 bytes of a link (RFC 791), IPv6 1280 (RFC 8200, section 5).
pub fn pod_mtu(underlay: IpAddr, mtu: u32, ipv6: bool) -> Result<u32, NetError> {
    let least = if ipv6 { 1280 } else { 68 };
    mtu.checked_sub(vxlan_overhead(underlay))
        .filter(|mtu| *mtu >= least)
        .ok_or(NetError::SmallMtu { underlay: mtu, least })
}

/// Whether a tunnel whose packets are so large carries IPv6: at least 1280 bytes (RFC 8200, section 5), on a kernel that has it.
#[must_use]
pub fn tunnel_has_ipv6(mtu: u32) -> bool {
    mtu >= 1280 && Path::new("/proc/sys/net/ipv6/conf").exists()
}

/// Sets the MTU of a pod's end.
///
/// # Errors
///
/// Where the namespace or its interface is gone, or the kernel refuses.
pub fn set_pod_mtu(netns: &Netns, interface: &str, mtu: u32) -> Result<(), NetError> {
    let interface = interface.to_owned();
    in_netns(netns, || {
        netlink(move |handle| {
            async move {
                let index = get(&handle, &interface).await?.header.index;
                let link = LinkUnspec::new_with_index(index).mtu(mtu).build();
                let set = handle.link().set(link).execute().await;
                set.map_err(NetError::kernel(format!(
                    "setting the MTU of the pod's {interface} to {mtu}"
                )))
            }
            .boxed()
        })
    })?
}
