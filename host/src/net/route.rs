//! Routes of the node to pod CIDRs: its own, and those of other nodes.

use super::{
    NetError, VXLAN_DEVICE,
    netlink::{get, netlink_here},
};
use abi::Identity;
use futures::{FutureExt, StreamExt, TryStreamExt};
use ipnet::IpNet;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::route::{
        RouteAddress, RouteAttribute, RouteIp6Tunnel, RouteIp6TunnelFlags, RouteIpTunnel, RouteMessage, RouteScope,
        RouteType,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Metric of the route to a pod CIDR as a whole: any other route is better.
const LAST_RESORT: u32 = u32::MAX;

fn unreachable_route(cidr: IpNet) -> RouteMessage {
    macro_rules! route {
        ($family:ty, $cidr:expr) => {
            RouteMessageBuilder::<$family>::new()
                .destination_prefix($cidr.network(), $cidr.prefix_len())
                .kind(RouteType::Unreachable)
                .priority(LAST_RESORT)
                .build()
        };
    }
    match cidr {
        IpNet::V4(cidr) => route!(Ipv4Addr, cidr),
        IpNet::V6(cidr) => route!(Ipv6Addr, cidr),
    }
}

/// Makes the node refuse what is for an address of a pod CIDR that no pod has, where it has no better route.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn make_unreachable(cidr: IpNet) -> Result<(), NetError> {
    netlink_here(move |handle| {
        async move {
            let added = handle.route().add(unreachable_route(cidr)).replace().execute().await;
            added.map_err(NetError::kernel(format!("setting the node's route to {cidr}")))
        }
        .boxed()
    })
}

/// Takes that back; that it is not there is no error.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn make_reachable(cidr: IpNet) -> Result<(), NetError> {
    netlink_here(move |handle| {
        async move {
            match handle.route().del(unreachable_route(cidr)).execute().await {
                Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -NO_SUCH_PROCESS => Ok(()),
                result => result.map_err(NetError::kernel(format!("removing the node's route to {cidr}"))),
            }
        }
        .boxed()
    })
}

/// `ESRCH`: what the kernel answers where there is no such route.
const NO_SUCH_PROCESS: i32 = 3;

/// Hop limit of what the node itself sends into the tunnel.
const TUNNEL_TTL: u8 = 64;

/// A way through the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The underlay address of the node that it leads to.
    pub node: IpAddr,
    /// What this node sends from, of the family of what is reached.
    pub source: IpAddr,
}

/// Makes the node reach the pods of other nodes through the tunnel, as the remote node that it is to them: by CIDR. Other routes into
/// the tunnel go; those that are there as they are `known` to have been set stay.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn set_tunnel_routes(
    wanted: &BTreeMap<IpNet, Tunnel>,
    known: &BTreeMap<IpNet, Tunnel>,
    own: IpAddr,
) -> Result<(), NetError> {
    let (wanted, known) = (wanted.clone(), known.clone());
    netlink_here(move |handle| {
        async move {
            let device = get(&handle, VXLAN_DEVICE).await?.header.index;
            let mut there = BTreeSet::new();
            for (cidr, route) in tunnel_routes(&handle, device).await? {
                there.insert(cidr);
                if !wanted.contains_key(&cidr) {
                    let deleted = handle.route().del(route).execute().await;
                    deleted.map_err(NetError::kernel(format!("removing the node's route to {cidr}")))?;
                }
            }
            let is_set = |cidr: &IpNet, way: &Tunnel| there.contains(cidr) && known.get(cidr) == Some(way);
            for (cidr, way) in wanted.into_iter().filter(|(cidr, way)| !is_set(cidr, way)) {
                let what = format!("setting the node's route to {cidr}");
                let route = RouteMessageBuilder::<IpAddr>::new()
                    .destination_prefix(cidr.network(), cidr.prefix_len())
                    .and_then(|route| route.pref_source(way.source))
                    .map_err(NetError::kernel(what.as_str()))?;
                let route = into_tunnel(route, own, way.node, device).build();
                let added = handle.route().add(route).replace().execute().await;
                added.map_err(NetError::kernel(what.as_str()))?;
            }
            Ok(())
        }
        .boxed()
    })
}

/// Whether the node has a way to all of these CIDRs through the tunnel.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn has_tunnel_routes(wanted: &BTreeMap<IpNet, Tunnel>) -> Result<bool, NetError> {
    let wanted: BTreeSet<IpNet> = wanted.keys().copied().collect();
    netlink_here(move |handle| {
        async move {
            let device = get(&handle, VXLAN_DEVICE).await?.header.index;
            let there = tunnel_routes(&handle, device).await?;
            Ok(wanted.is_subset(&there.iter().map(|(cidr, _)| *cidr).collect()))
        }
        .boxed()
    })
}

fn into_tunnel(
    route: RouteMessageBuilder<IpAddr>,
    own: IpAddr,
    node: IpAddr,
    device: u32,
) -> RouteMessageBuilder<IpAddr> {
    let id = u64::from(Identity::REMOTE_NODE.0);
    let route = route.output_interface(device).scope(RouteScope::Link);
    match (own, node) {
        (IpAddr::V4(own), IpAddr::V4(node)) => route.encap_ip(vec![
            RouteIpTunnel::Id(id),
            RouteIpTunnel::Source(own),
            RouteIpTunnel::Destination(node),
            RouteIpTunnel::Ttl(TUNNEL_TTL),
        ]),
        (IpAddr::V6(own), IpAddr::V6(node)) => route.encap_ip6(vec![
            RouteIp6Tunnel::Id(id),
            RouteIp6Tunnel::Source(own),
            RouteIp6Tunnel::Destination(node),
            RouteIp6Tunnel::Hoplimit(TUNNEL_TTL),
            // A receiver drops what has none (RFC 6935).
            RouteIp6Tunnel::Flags(RouteIp6TunnelFlags::Checksum),
        ]),
        // Nodes of a cluster have underlay addresses of one family.
        _ => route,
    }
}

/// The routes into the tunnel that are there.
async fn tunnel_routes(handle: &Handle, device: u32) -> Result<Vec<(IpNet, RouteMessage)>, NetError> {
    let of_v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let of_v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    let mut listed = handle
        .route()
        .get(of_v4)
        .execute()
        .chain(handle.route().get(of_v6).execute());
    let mut routes = Vec::new();
    while let Some(route) = listed.try_next().await.map_err(NetError::kernel("listing routes"))? {
        let ours = route.header.kind == RouteType::Unicast && route.attributes.contains(&RouteAttribute::Oif(device));
        let destination = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
            _ => None,
        });
        let cidr = destination.and_then(|address| IpNet::new(address, route.header.destination_prefix_length).ok());
        // What the kernel keeps for a link by itself stays.
        if let Some(cidr) = cidr.filter(|cidr| ours && !is_the_links(cidr)) {
            routes.push((cidr, route));
        }
    }
    Ok(routes)
}

fn is_the_links(cidr: &IpNet) -> bool {
    match cidr {
        IpNet::V4(_) => false,
        IpNet::V6(v6) => v6.network().is_unicast_link_local() || v6.network().is_multicast(),
    }
}
