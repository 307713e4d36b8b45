//! The veth pair of a pod.

use super::{
    NetError, Netns, POD_INTERFACE, in_netns,
    netlink::{delete_link, disable_ipv6, find, get, mac, netlink, netlink_here},
    vxlan::pod_mtu,
};
use futures::{FutureExt, TryStreamExt};
use rtnetlink::{
    Handle, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{link::LinkAttribute, neighbour::NeighbourState, route::RouteScope},
};
use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd,
};

/// A pod's veth pair, as the datapath has to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Veth {
    /// Index of the host's end.
    pub ifindex: u32,
    /// MAC address of the pod's end.
    pub pod_mac: [u8; 6],
    /// MAC address of the host's end.
    pub host_mac: [u8; 6],
}

/// Names of the host's ends of pods' veth pairs.
///
/// # Errors
///
/// Where netlink fails.
pub fn pod_links() -> Result<Vec<String>, NetError> {
    netlink_here(|handle| {
        async move {
            let mut links = handle.link().get().execute();
            let mut names = Vec::new();
            while let Some(link) = links.try_next().await.map_err(NetError::kernel("listing interfaces"))? {
                names.extend(link.attributes.into_iter().filter_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) if crate::endpoint::is_interface_name(&name) => Some(name),
                    _ => None,
                }));
            }
            Ok(names)
        }
        .boxed()
    })
}

/// Makes a pod's veth pair and moves one end into its namespace, as `eth0`, with its address and routes. Everything
/// is down until [`prepare_node`] says otherwise. On an error nothing is left.
///
/// # Errors
///
/// Where the namespace has an `eth0`, or the kernel refuses.
pub fn make_pod_link(name: &str, netns: &Netns, address: Ipv4Addr, underlay_mtu: u32) -> Result<Veth, NetError> {
    let mtu = pod_mtu(underlay_mtu)?;
    if in_netns(netns, || {
        netlink(|handle| async move { find(&handle, POD_INTERFACE).await }.boxed())
    })??
    .is_some()
    {
        return Err(NetError::Occupied(netns.path().to_owned()));
    }
    let made = make_pair(name, netns, mtu).and_then(|veth| {
        let peer = peer_name(name);
        in_netns(netns, || {
            netlink(move |handle| configure_pod(handle, peer, address).boxed())
        })??;
        Ok(veth)
    });
    if made.is_err()
        && let Err(error) = delete_link(name)
    {
        tracing::error!("undoing: {error}");
    }
    made
}

/// Name of the pod's end while it is still in the node's namespace.
fn peer_name(name: &str) -> String {
    name.replacen("wg-", "wp-", 1)
}

fn make_pair(name: &str, netns: &Netns, mtu: u32) -> Result<Veth, NetError> {
    let (name, peer, netns) = (name.to_owned(), peer_name(name), netns.file().as_raw_fd());
    netlink_here(move |handle| {
        async move {
            handle
                .link()
                .add(LinkVeth::new(&name, &peer).build())
                .execute()
                .await
                .map_err(NetError::kernel(format!("making the veth pair {name}")))?;
            let (host, pod) = (get(&handle, &name).await?, get(&handle, &peer).await?);
            // Set, if only to what the kernel chose: an address that nobody has set udev may change at any time, and
            // the programs know pods by theirs.
            for link in [&host, &pod] {
                let message = LinkUnspec::new_with_index(link.header.index)
                    .address(mac(link).to_vec())
                    .build();
                handle
                    .link()
                    .set(message)
                    .execute()
                    .await
                    .map_err(NetError::kernel(format!("setting the MAC addresses of {name}")))?;
            }
            let (host, pod) = (get(&handle, &name).await?, get(&handle, &peer).await?);
            let veth = Veth {
                ifindex: host.header.index,
                pod_mac: mac(&pod),
                host_mac: mac(&host),
            };
            disable_ipv6(&name)?;
            for index in [host.header.index, pod.header.index] {
                handle
                    .link()
                    .set(LinkUnspec::new_with_index(index).mtu(mtu).build())
                    .execute()
                    .await
                    .map_err(NetError::kernel(format!("setting the MTU of {name} to {mtu}")))?;
            }
            handle
                .link()
                .set(LinkUnspec::new_with_index(pod.header.index).setns_by_fd(netns).build())
                .execute()
                .await
                .map_err(NetError::kernel(format!("moving {peer} into the pod's namespace")))?;
            Ok(veth)
        }
        .boxed()
    })
}

/// Inside the pod: its name, its address, and everything by way of the link-local gateway.
async fn configure_pod(handle: Handle, peer: String, address: Ipv4Addr) -> Result<(), NetError> {
    let gateway = Ipv4Addr::from(abi::node::GATEWAY_V4);
    let index = get(&handle, &peer).await?.header.index;
    disable_ipv6(&peer)?;
    let link = LinkUnspec::new_with_index(index).name(POD_INTERFACE).up().build();
    handle
        .link()
        .set(link)
        .execute()
        .await
        .map_err(NetError::kernel(format!("bringing the pod's {POD_INTERFACE} up")))?;
    let lo = get(&handle, "lo").await?.header.index;
    handle
        .link()
        .set(LinkUnspec::new_with_index(lo).up().build())
        .execute()
        .await
        .map_err(NetError::kernel("bringing the pod's loopback up"))?;
    handle
        .address()
        .add(index, IpAddr::V4(address), 32)
        .execute()
        .await
        .map_err(NetError::kernel(format!("giving the pod the address {address}")))?;
    let to_gateway = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(gateway, 32)
        .output_interface(index)
        .scope(RouteScope::Link)
        .build();
    let to_all = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(gateway)
        .output_interface(index)
        .build();
    for route in [to_gateway, to_all] {
        handle
            .route()
            .add(route)
            .execute()
            .await
            .map_err(NetError::kernel("setting the pod's routes"))?;
    }
    Ok(())
}

/// The node's side: the interface up, and the node's own route and neighbour entry for the pod.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn prepare_node(name: &str, veth: &Veth, address: Ipv4Addr, underlay: Ipv4Addr) -> Result<(), NetError> {
    let (name, veth) = (name.to_owned(), *veth);
    netlink_here(move |handle| {
        async move {
            handle
                .link()
                .set(LinkUnspec::new_with_index(veth.ifindex).up().build())
                .execute()
                .await
                .map_err(NetError::kernel(format!("bringing {name} up")))?;
            handle
                .neighbours()
                .add(veth.ifindex, IpAddr::V4(address))
                .link_layer_address(&veth.pod_mac)
                .state(NeighbourState::Permanent)
                .replace()
                .execute()
                .await
                .map_err(NetError::kernel(format!("entering {address} as a neighbour")))?;
            let route = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(address, 32)
                .output_interface(veth.ifindex)
                .scope(RouteScope::Link)
                .pref_source(underlay)
                .build();
            handle
                .route()
                .add(route)
                .replace()
                .execute()
                .await
                .map_err(NetError::kernel(format!("setting the node's route to {address}")))
        }
        .boxed()
    })
}

/// The veth pair of a pod that an earlier hostd made, if it is there.
///
/// # Errors
///
/// Where netlink fails.
pub fn find_pod_link(name: &str, netns: &Netns) -> Result<Option<Veth>, NetError> {
    let owned = name.to_owned();
    let host = netlink_here(move |handle| async move { find(&handle, &owned).await }.boxed())?;
    let pod = in_netns(netns, || {
        netlink(|handle| async move { find(&handle, POD_INTERFACE).await }.boxed())
    })??;
    Ok(host.zip(pod).map(|(host, pod)| Veth {
        ifindex: host.header.index,
        pod_mac: mac(&pod),
        host_mac: mac(&host),
    }))
}
