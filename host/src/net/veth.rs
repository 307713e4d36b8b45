//! The veth pair of a pod.

use super::{
    NetError, Netns, in_netns,
    netlink::{NODE_SIDE, delete_link, disable_ipv6, find, get, mac, netlink, netlink_here, set_ipv6},
};
use crate::random;
use futures::{FutureExt, TryStreamExt};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkMessage},
        neighbour::NeighbourState,
        route::{RouteAttribute, RouteMetric, RouteScope},
    },
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
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
    let links = netlink_here(|handle| links(handle).boxed())?;
    let names = links.iter().filter_map(|link| name_of(link).map(str::to_owned));
    Ok(names.filter(|name| crate::endpoint::is_interface_name(name)).collect())
}

/// All interfaces.
pub(super) async fn links(handle: Handle) -> Result<Vec<LinkMessage>, NetError> {
    let links = handle.link().get().execute();
    links
        .try_collect()
        .await
        .map_err(NetError::kernel("listing interfaces"))
}

pub(super) fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

/// What a pod's veth pair is called.
#[derive(Clone, Copy, Debug)]
pub struct PairNames<'a> {
    /// The node's end.
    pub node: &'a str,
    /// What its alias says.
    pub alias: &'a str,
    /// The pod's end.
    pub pod: &'a str,
}

/// Makes a pod's veth pair, one end of it in the pod's namespace, with its addresses and routes. The node's end is down
/// until [`prepare_node`] says otherwise. On an error nothing is left.
///
/// # Errors
///
/// Where the namespace has such an interface, or the kernel refuses.
pub fn make_pod_link(called: PairNames<'_>, netns: &Netns, addresses: &[IpAddr], mtu: u32) -> Result<Veth, NetError> {
    let (name, interface) = (called.node, called.pod.to_owned());
    let ipv6 = addresses.iter().any(IpAddr::is_ipv6);
    let made = make_pair(called, netns, mtu, ipv6).and_then(|veth| {
        let (interface, addresses) = (interface.clone(), addresses.to_vec());
        in_netns(netns, || {
            netlink(move |handle| configure_pod(handle, interface, addresses, veth.host_mac).boxed())
        })??;
        Ok(veth)
    });
    match made {
        Ok(veth) => Ok(veth),
        Err(Failed::Exists(_)) if is_occupied(netns, &interface)? => Err(NetError::Occupied {
            netns: netns.path().to_owned(),
            interface,
        }),
        Err(Failed::Exists(error) | Failed::Other(error)) => {
            if let Err(error) = delete_link(name) {
                tracing::error!("undoing: {error}");
            }
            Err(error)
        }
    }
}

/// Why there is no pair.
enum Failed {
    /// One of the names is taken.
    Exists(NetError),
    Other(NetError),
}

impl From<NetError> for Failed {
    fn from(error: NetError) -> Self {
        Self::Other(error)
    }
}

fn is_occupied(netns: &Netns, interface: &str) -> Result<bool, NetError> {
    let wanted = interface.to_owned();
    let found = in_netns(netns, || {
        netlink(|handle| async move { find(&handle, &wanted).await }.boxed())
    })??;
    Ok(found.is_some())
}

/// A MAC address of nobody's: locally administered, unicast (IEEE 802-2014, section 8.2), as `eth_random_addr` in
/// `include/linux/etherdevice.h` has it.
fn random_mac() -> Result<[u8; 6], NetError> {
    let mut mac: [u8; 6] = random::bytes().map_err(NetError::kernel("choosing a MAC address"))?;
    mac[0] = (mac[0] & !1) | 2;
    Ok(mac)
}

/// The kernel makes the pod's end where it belongs (`veth_newlink` in `drivers/net/veth.c`, Linux 6.1): to move it there
/// would take it several grace periods. MAC addresses are given, for one that nobody has set udev may change at any time,
/// and the programs know pods by theirs.
fn make_pair(called: PairNames<'_>, netns: &Netns, mtu: u32, ipv6: bool) -> Result<Veth, Failed> {
    let (name, alias) = (called.node.to_owned(), called.alias.to_owned());
    let (pod_mac, host_mac) = (random_mac()?, random_mac()?);
    let pod = LinkMessageBuilder::<LinkUnspec>::new()
        .name(called.pod)
        .address(pod_mac.to_vec())
        .mtu(mtu)
        .setns_by_fd(netns.file().as_raw_fd())
        .build();
    let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(name.clone())
        .address(host_mac.to_vec())
        .set_info_data(InfoData::Veth(InfoVeth::Peer(pod)))
        .build();
    let made = netlink_here(move |handle| {
        async move {
            let what = NetError::kernel(format!("making the veth pair {name}"));
            match handle.link().add(pair).execute().await {
                Err(rtnetlink::Error::NetlinkError(error)) if error.to_io().kind() == io::ErrorKind::AlreadyExists => {
                    return Ok(Err(what(rtnetlink::Error::NetlinkError(error))));
                }
                made => made.map_err(what)?,
            }
            let named = LinkUnspec::new_with_name(&name).append_extra_attribute(LinkAttribute::IfAlias(alias));
            let named = handle.link().set(named.build()).execute().await;
            named.map_err(NetError::kernel(format!("setting the alias of {name}")))?;
            let ifindex = get(&handle, &name).await?.header.index;
            if ipv6 {
                set_ipv6(&name, &NODE_SIDE)?;
            } else {
                disable_ipv6(&name)?;
            }
            Ok(Ok(Veth {
                ifindex,
                pod_mac,
                host_mac,
            }))
        }
        .boxed()
    });
    made?.map_err(Failed::Exists)
}

/// The pod's end: hostd has chosen its address, which nobody else has, and its routes.
const POD_SIDE: [(&str, &str); 4] = [
    ("disable_ipv6", "0"),
    ("accept_ra", "0"),
    ("accept_dad", "0"),
    ("router_solicitations", "0"),
];

/// By whom a pod reaches everything.
#[must_use]
pub fn gateway(of: IpAddr) -> IpAddr {
    match of {
        IpAddr::V4(_) => abi::node::GATEWAY_V4.into(),
        IpAddr::V6(_) => abi::node::GATEWAY_V6.0.into(),
    }
}

const fn whole(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Inside the pod: its addresses, and everything by way of the link-local gateway.
async fn configure_pod(
    handle: Handle,
    interface: String,
    addresses: Vec<IpAddr>,
    gateway_mac: [u8; 6],
) -> Result<(), NetError> {
    let index = get(&handle, &interface).await?.header.index;
    if addresses.iter().any(IpAddr::is_ipv6) {
        set_ipv6(&interface, &POD_SIDE)?;
    } else {
        disable_ipv6(&interface)?;
    }
    let link = LinkUnspec::new_with_index(index).up().build();
    handle
        .link()
        .set(link)
        .execute()
        .await
        .map_err(NetError::kernel(format!("bringing the pod's {interface} up")))?;
    let lo = get(&handle, "lo").await?.header.index;
    handle
        .link()
        .set(LinkUnspec::new_with_index(lo).up().build())
        .execute()
        .await
        .map_err(NetError::kernel("bringing the pod's loopback up"))?;
    for address in addresses {
        handle
            .address()
            .add(index, address, whole(address))
            .execute()
            .await
            .map_err(NetError::kernel(format!("giving the pod the address {address}")))?;
        add_gateway(&handle, index, gateway(address), gateway_mac).await?;
    }
    Ok(())
}

/// Makes everything go by way of the gateway. Its IPv6 neighbour entry stays: to see whether a neighbour is still there
/// the kernel would ask from a link-local address, which is no pod's own.
async fn add_gateway(handle: &Handle, index: u32, gateway: IpAddr, mac: [u8; 6]) -> Result<(), NetError> {
    const ROUTES: &str = "setting the pod's routes";
    let to_gateway = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(gateway, whole(gateway))
        .map_err(NetError::kernel(ROUTES))?
        .output_interface(index)
        .scope(RouteScope::Link)
        .build();
    handle
        .route()
        .add(to_gateway)
        .execute()
        .await
        .map_err(NetError::kernel(ROUTES))?;
    let everything: IpAddr = match gateway {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let to_all = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(everything, 0)
        .map_err(NetError::kernel(ROUTES))?
        .gateway(gateway)
        .map_err(NetError::kernel(ROUTES))?
        .output_interface(index)
        .build();
    handle
        .route()
        .add(to_all)
        .execute()
        .await
        .map_err(NetError::kernel(ROUTES))?;
    if gateway.is_ipv6() {
        handle
            .neighbours()
            .add(index, gateway)
            .link_layer_address(&mac)
            .state(NeighbourState::Permanent)
            .replace()
            .execute()
            .await
            .map_err(NetError::kernel("entering the gateway as the pod's neighbour"))?;
    }
    Ok(())
}

/// MTU of the node's end, the most that a veth takes: whatever a pod sends reaches the programs, which tell it of what
/// is too big. What goes to the pod is bounded by its route.
pub const NODE_MTU: u32 = 65535;

/// The device group of the node's ends (`IFLA_GROUP`), by which the table of nftables knows them: others' interfaces may have names
/// much like theirs.
pub(super) const GROUP: u32 = 0x5747;

/// The node's side: the interface up, and the node's own routes and neighbour entries for the pod, whose MTU this is.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn prepare_node(name: &str, veth: &Veth, addresses: &[IpAddr], underlay: IpAddr, mtu: u32) -> Result<(), NetError> {
    let (name, veth, addresses) = (name.to_owned(), *veth, addresses.to_vec());
    netlink_here(move |handle| {
        async move {
            let link = LinkUnspec::new_with_index(veth.ifindex)
                .append_extra_attribute(LinkAttribute::Group(GROUP))
                .mtu(NODE_MTU)
                .up();
            handle
                .link()
                .set(link.build())
                .execute()
                .await
                .map_err(NetError::kernel(format!("bringing {name} up")))?;
            for address in addresses {
                route_to_pod(&handle, &veth, address, underlay, mtu).await?;
            }
            Ok(())
        }
        .boxed()
    })
}

async fn route_to_pod(
    handle: &Handle,
    veth: &Veth,
    address: IpAddr,
    underlay: IpAddr,
    mtu: u32,
) -> Result<(), NetError> {
    handle
        .neighbours()
        .add(veth.ifindex, address)
        .link_layer_address(&veth.pod_mac)
        .state(NeighbourState::Permanent)
        .replace()
        .execute()
        .await
        .map_err(NetError::kernel(format!("entering {address} as a neighbour")))?;
    let what = format!("setting the node's route to {address}");
    let mut route = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(address, whole(address))
        .map_err(NetError::kernel(what.as_str()))?
        .output_interface(veth.ifindex)
        .scope(RouteScope::Link);
    // The node speaks to its pods from the address that they know it by, where that is of their family.
    if underlay.is_ipv4() == address.is_ipv4() {
        route = route.pref_source(underlay).map_err(NetError::kernel(what.as_str()))?;
    }
    let metrics = RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]);
    route.get_mut().attributes.push(metrics);
    let added = handle.route().add(route.build()).replace().execute().await;
    added.map_err(NetError::kernel(what.as_str()))
}

/// The veth pair of a pod that an earlier hostd made, if it is there: a namespace that is another one by now, under the
/// same path, has an interface of that name perhaps, but not this pair's other end.
///
/// # Errors
///
/// Where netlink fails.
pub fn find_pod_link(name: &str, netns: &Netns, interface: &str) -> Result<Option<Veth>, NetError> {
    let (owned, interface) = (name.to_owned(), interface.to_owned());
    let host = netlink_here(move |handle| async move { find(&handle, &owned).await }.boxed())?;
    let pod = in_netns(netns, || {
        netlink(|handle| async move { find(&handle, &interface).await }.boxed())
    })??;
    let pair = host
        .zip(pod)
        .filter(|(host, pod)| peer_index(host) == Some(pod.header.index) && peer_index(pod) == Some(host.header.index));
    Ok(pair.map(|(host, pod)| Veth {
        ifindex: host.header.index,
        pod_mac: mac(&pod),
        host_mac: mac(&host),
    }))
}

/// Index of a veth's other end, in the namespace that that is in (`IFLA_LINK`; `veth_get_iflink` in `drivers/net/veth.c`,
/// Linux 6.12).
pub(super) fn peer_index(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    })
}
