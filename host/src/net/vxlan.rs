//! The underlay, and the vxlan device on it.

use super::{
    NetError, VXLAN_DEVICE,
    mtu::tunnel_has_ipv6,
    netlink::{NODE_SIDE, disable_ipv6, find, get, mtu, netlink_here, set_ipv6},
};
use futures::{FutureExt, TryStreamExt};
use rtnetlink::{
    LinkUnspec, LinkVxlan,
    packet_route::{
        address::AddressAttribute,
        link::{InfoData, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage},
    },
};
use std::net::IpAddr;

/// The interface that has the underlay address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// Its name.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
    /// Its MTU, in bytes.
    pub mtu: u32,
}

/// Finds the interface that has the underlay address.
///
/// # Errors
///
/// Where no interface has it.
pub fn underlay(wanted: IpAddr) -> Result<Underlay, NetError> {
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
                    .any(|attribute| matches!(attribute, AddressAttribute::Local(address) | AddressAttribute::Address(address) if *address == wanted));
                if has_it {
                    let link = handle
                        .link()
                        .get()
                        .match_index(message.header.index)
                        .execute()
                        .try_next()
                        .await
                        .map_err(NetError::kernel("looking at the underlay's interface"))?;
                    return link
                        .and_then(|link| {
                            let name = link.attributes.iter().find_map(|attribute| match attribute {
                                LinkAttribute::IfName(name) => Some(name.clone()),
                                _ => None,
                            })?;
                            Some(Underlay {
                                name,
                                ifindex: link.header.index,
                                mtu: mtu(&link),
                            })
                        })
                        .ok_or(NetError::NoUnderlay(wanted));
                }
            }
            Err(NetError::NoUnderlay(wanted))
        }
        .boxed()
    })
}

/// Makes the one vxlan device, whose tunnel keys come from the programs; it is down until [`super::bring_up`]. One with the wrong
/// settings is replaced. The answer is its index.
///
/// # Errors
///
/// Where it can't be made.
pub fn ensure_vxlan(port: u16, mtu: u32) -> Result<u32, NetError> {
    let ipv6 = tunnel_has_ipv6(mtu);
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
            // Whoever is behind the tunnel has no neighbours: the outer address says where a packet goes.
            handle
                .link()
                .set(LinkUnspec::new_with_index(index).mtu(mtu).arp(false).build())
                .execute()
                .await
                .map_err(NetError::kernel(format!("setting the MTU of {VXLAN_DEVICE} to {mtu}")))?;
            // For what the node itself and pods of other nodes send each other, whatever the tunnel's own family is.
            if ipv6 {
                set_ipv6(VXLAN_DEVICE, &NODE_SIDE)?;
            } else {
                disable_ipv6(VXLAN_DEVICE)?;
            }
            Ok(index)
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
