//! The vxlan device, and the veth pair of a pod.

use super::{NetError, Netns, POD_INTERFACE, VXLAN_DEVICE, VXLAN_OVERHEAD, in_netns};
use futures::{FutureExt, TryStreamExt, future::BoxFuture};
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle, LinkUnspec, LinkVeth, LinkVxlan, RouteMessageBuilder, new_connection,
    packet_route::{
        address::AddressAttribute,
        link::{InfoData, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage},
        neighbour::NeighbourState,
        route::{RouteMessage, RouteScope, RouteType},
    },
};
use std::{
    fs, io,
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

/// Runs netlink requests on a connection of the calling thread's network namespace.
fn netlink<T>(run: impl FnOnce(Handle) -> BoxFuture<'static, Result<T, NetError>>) -> Result<T, NetError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(NetError::kernel("starting a netlink connection"))?;
    runtime.block_on(async {
        let (connection, handle, _) = new_connection().map_err(NetError::kernel("opening a netlink socket"))?;
        let connection = tokio::spawn(connection);
        let answer = run(handle).await;
        connection.abort();
        answer
    })
}

/// The same for a caller that is inside an async runtime: on a thread of its own, in the process's namespace.
fn netlink_here<T: Send>(
    run: impl FnOnce(Handle) -> BoxFuture<'static, Result<T, NetError>> + Send,
) -> Result<T, NetError> {
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| netlink(run));
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

async fn find(handle: &Handle, name: &str) -> Result<Option<LinkMessage>, NetError> {
    match handle
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_next()
        .await
    {
        Ok(link) => Ok(link),
        Err(rtnetlink::Error::NetlinkError(error)) if error.to_io().kind() == io::ErrorKind::NotFound => Ok(None),
        // ENODEV has no kind of its own in the standard library.
        Err(rtnetlink::Error::NetlinkError(error)) if error.to_io().raw_os_error() == Some(19) => Ok(None),
        Err(error) => Err(NetError::kernel(format!("looking for {name}"))(error)),
    }
}

async fn get(handle: &Handle, name: &str) -> Result<LinkMessage, NetError> {
    find(handle, name)
        .await?
        .ok_or_else(|| NetError::kernel(format!("looking for {name}"))("it is gone"))
}

fn mac(link: &LinkMessage) -> [u8; 6] {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok(),
            _ => None,
        })
        .unwrap_or_default()
}

fn mtu(link: &LinkMessage) -> u32 {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        })
        .unwrap_or_default()
}

/// MTU of the interface that has the underlay address.
///
/// # Errors
///
/// Where no interface has it.
pub fn underlay_mtu(underlay: Ipv4Addr) -> Result<u32, NetError> {
    let wanted = IpAddr::V4(underlay);
    netlink_here(move |handle| {
        async move {
            let mut addresses = handle.address().get().execute();
            while let Some(message) = addresses
                .try_next()
                .await
                .map_err(NetError::kernel("listing addresses"))?
            {
                let has_it = message
                    .attributes
                    .iter()
                    .any(|attribute| matches!(attribute, AddressAttribute::Local(address) if *address == wanted));
                if has_it {
                    let link = handle
                        .link()
                        .get()
                        .match_index(message.header.index)
                        .execute()
                        .try_next()
                        .await
                        .map_err(NetError::kernel("looking at the underlay's interface"))?;
                    return link.as_ref().map(mtu).ok_or(NetError::NoUnderlay(wanted));
                }
            }
            Err(NetError::NoUnderlay(wanted))
        }
        .boxed()
    })
}

/// MTU of the pods over an underlay of this MTU.
fn pod_mtu(underlay: u32) -> Result<u32, NetError> {
    // The least that IPv4 demands of a link (RFC 791).
    const LEAST: u32 = 68;
    underlay
        .checked_sub(VXLAN_OVERHEAD)
        .filter(|mtu| *mtu >= LEAST)
        .ok_or(NetError::SmallMtu(underlay))
}

/// Makes the one vxlan device, whose tunnel keys come from the programs; it is down until [`bring_up`]. One with the wrong
/// settings is replaced. The answer is its index.
///
/// # Errors
///
/// Where it can't be made.
pub fn ensure_vxlan(port: u16, underlay_mtu: u32) -> Result<u32, NetError> {
    let mtu = pod_mtu(underlay_mtu)?;
    netlink_here(move |handle| {
        async move {
            if let Some(link) = find(&handle, VXLAN_DEVICE).await?
                && !is_ours(&link, port)
            {
                handle
                    .link()
                    .del(link.header.index)
                    .execute()
                    .await
                    .map_err(NetError::kernel(format!("replacing {VXLAN_DEVICE}")))?;
            }
            if find(&handle, VXLAN_DEVICE).await?.is_none() {
                let device = LinkVxlan::new(VXLAN_DEVICE, 0)
                    .collect_metadata(true)
                    .learning(false)
                    .port(port)
                    .build();
                handle
                    .link()
                    .add(device)
                    .execute()
                    .await
                    .map_err(NetError::kernel(format!(
                        "making {VXLAN_DEVICE} on UDP port {port} (is another tunnel on that port?)"
                    )))?;
            }
            let index = get(&handle, VXLAN_DEVICE).await?.header.index;
            disable_ipv6(VXLAN_DEVICE)?;
            handle
                .link()
                .set(LinkUnspec::new_with_index(index).mtu(mtu).build())
                .execute()
                .await
                .map_err(NetError::kernel(format!("setting the MTU of {VXLAN_DEVICE} to {mtu}")))?;
            Ok(index)
        }
        .boxed()
    })
}

/// Brings an interface up.
///
/// # Errors
///
/// Where it is not there.
pub fn bring_up(name: &str) -> Result<(), NetError> {
    let name = name.to_owned();
    netlink_here(move |handle| {
        async move {
            let index = get(&handle, &name).await?.header.index;
            handle
                .link()
                .set(LinkUnspec::new_with_index(index).up().build())
                .execute()
                .await
                .map_err(NetError::kernel(format!("bringing {name} up")))
        }
        .boxed()
    })
}

fn is_ours(link: &LinkMessage, port: u16) -> bool {
    let mut external = false;
    let mut same_port = false;
    for attribute in &link.attributes {
        let LinkAttribute::LinkInfo(infos) = attribute else {
            continue;
        };
        for info in infos {
            let LinkInfo::Data(InfoData::Vxlan(data)) = info else {
                continue;
            };
            external |= data.iter().any(|info| matches!(info, InfoVxlan::CollectMetadata(true)));
            same_port |= data
                .iter()
                .any(|info| matches!(info, InfoVxlan::Port(found) if *found == port));
        }
    }
    external && same_port
}

/// The datapath carries no IPv6 yet, and the kernel's own chatter on our interfaces would only be counted as drops.
fn disable_ipv6(interface: &str) -> Result<(), NetError> {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    match fs::write(&path, "1") {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(NetError::kernel(format!("writing {path}"))),
    }
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

/// Deletes an interface; that it is gone already is no error.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn delete_link(name: &str) -> Result<(), NetError> {
    let name = name.to_owned();
    netlink_here(move |handle| {
        async move {
            let Some(link) = find(&handle, &name).await? else {
                return Ok(());
            };
            match handle.link().del(link.header.index).execute().await {
                Err(rtnetlink::Error::NetlinkError(error)) if error.to_io().raw_os_error() == Some(19) => Ok(()),
                other => other.map_err(NetError::kernel(format!("deleting {name}"))),
            }
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

/// Metric of the route to a pod CIDR as a whole: any other route is better.
const LAST_RESORT: u32 = u32::MAX;

fn unreachable_route(cidr: Ipv4Net) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(cidr.network(), cidr.prefix_len())
        .kind(RouteType::Unreachable)
        .priority(LAST_RESORT)
        .build()
}

/// Makes the node refuse what is for an address of a pod CIDR that no pod has, where it has no better route.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn make_unreachable(cidr: Ipv4Net) -> Result<(), NetError> {
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
pub fn make_reachable(cidr: Ipv4Net) -> Result<(), NetError> {
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
