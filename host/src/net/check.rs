//! Whether a pod's interface is still as hostd has made it.

use super::{
    NetError, Netns, Veth, in_netns,
    netlink::{find, mac, netlink, netlink_here},
    veth::gateway,
};
use futures::{FutureExt, TryStreamExt};
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::AddressAttribute,
        link::{LinkFlags, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
        route::{RouteAddress, RouteAttribute},
    },
};
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// A pod's veth pair as it was made.
#[derive(Clone, Copy, Debug)]
pub struct Made<'a> {
    /// Name of the node's end.
    pub node: &'a str,
    /// Name of the pod's end.
    pub pod: &'a str,
    /// Both ends.
    pub veth: &'a Veth,
    /// The pod's addresses.
    pub addresses: &'a [IpAddr],
    /// Gateways of the routes to everything that should still be there.
    pub routes: &'a [IpAddr],
}

/// What is not as it should be of a pod's veth pair: interfaces, MAC addresses, addresses, routes, neighbours.
///
/// # Errors
///
/// Where netlink fails.
pub fn check_pod_link(made: Made<'_>, netns: &Netns) -> Result<Vec<String>, NetError> {
    let (host, pod, veth) = (made.node.to_owned(), made.pod.to_owned(), *made.veth);
    let addresses = made.addresses.to_vec();
    let gateways: BTreeSet<IpAddr> = addresses.iter().copied().map(gateway).collect();
    let routes = gateways.into_iter().filter(|by| made.routes.contains(by)).collect();
    let mut problems = netlink_here(move |handle| check_host(handle, host, veth).boxed())?;
    problems.extend(in_netns(netns, || {
        netlink(move |handle| check_pod(handle, pod, veth, addresses, routes).boxed())
    })??);
    Ok(problems)
}

fn is_up(link: &LinkMessage) -> bool {
    link.header.flags.contains(LinkFlags::Up)
}

async fn check_host(handle: Handle, name: String, veth: Veth) -> Result<Vec<String>, NetError> {
    let mut problems = Vec::new();
    match find(&handle, &name).await? {
        None => problems.push(format!("the node's interface {name} is gone")),
        Some(link) if link.header.index != veth.ifindex => problems.push(format!("{name} is another interface now")),
        Some(link) => {
            if !is_up(&link) {
                problems.push(format!("the node's interface {name} is down"));
            }
            if mac(&link) != veth.host_mac {
                problems.push(format!("the node's interface {name} has another MAC address"));
            }
        }
    }
    Ok(problems)
}

async fn check_pod(
    handle: Handle,
    interface: String,
    veth: Veth,
    addresses: Vec<IpAddr>,
    routes: Vec<IpAddr>,
) -> Result<Vec<String>, NetError> {
    let Some(link) = find(&handle, &interface).await? else {
        return Ok(vec![format!("the container has no interface {interface}")]);
    };
    let mut problems = Vec::new();
    if !is_up(&link) {
        problems.push(format!("the container's {interface} is down"));
    }
    if mac(&link) != veth.pod_mac {
        problems.push(format!("the container's {interface} has another MAC address"));
    }
    let index = link.header.index;
    let mut listed = handle.address().get().set_link_index_filter(index).execute();
    let mut there = Vec::new();
    while let Some(address) = listed.try_next().await.map_err(NetError::kernel("listing addresses"))? {
        there.extend(address.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        }));
    }
    for address in addresses {
        if !there.contains(&address) {
            problems.push(format!(
                "the container's {interface} no longer has the address {address}"
            ));
        }
    }
    for by in routes {
        if !has_default_route(&handle, index, by).await? {
            problems.push(format!("the container no longer has its route to everything by {by}"));
        }
        if by.is_ipv6() && !knows(&handle, index, by).await? {
            problems.push(format!("the container no longer knows {by} as its neighbour"));
        }
    }
    Ok(problems)
}

/// Whether an address is a neighbour that stays (`NUD_PERMANENT`).
async fn knows(handle: &Handle, index: u32, address: IpAddr) -> Result<bool, NetError> {
    let mut listed = handle
        .neighbours()
        .get()
        .set_address_family(AddressFamily::Inet6)
        .execute();
    let mut found = false;
    while let Some(one) = listed
        .try_next()
        .await
        .map_err(NetError::kernel("listing neighbours"))?
    {
        let is_its = |attribute: &NeighbourAttribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(known)) => IpAddr::V6(*known) == address,
            _ => false,
        };
        found |= one.header.ifindex == index
            && one.header.state == NeighbourState::Permanent
            && one.attributes.iter().any(is_its);
    }
    Ok(found)
}

async fn has_default_route(handle: &Handle, index: u32, by: IpAddr) -> Result<bool, NetError> {
    let (query, by) = match by {
        IpAddr::V4(by) => (RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteAddress::Inet(by)),
        IpAddr::V6(by) => (RouteMessageBuilder::<Ipv6Addr>::new().build(), RouteAddress::Inet6(by)),
    };
    let mut listed = handle.route().get(query).execute();
    let mut found = false;
    while let Some(route) = listed.try_next().await.map_err(NetError::kernel("listing routes"))? {
        found |= route.header.destination_prefix_length == 0
            && route.attributes.contains(&RouteAttribute::Oif(index))
            && route.attributes.contains(&RouteAttribute::Gateway(by.clone()));
    }
    Ok(found)
}
