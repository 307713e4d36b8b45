//! The underlay, and the vxlan device on it.

use super::{
    NetError, VXLAN_DEVICE, VXLAN_OVERHEAD,
    netlink::{disable_ipv6, find, get, mtu, netlink_here},
};
use futures::{FutureExt, TryStreamExt};
use rtnetlink::{
    LinkUnspec, LinkVxlan,
    packet_route::{
        address::AddressAttribute,
        link::{InfoData, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage},
    },
};
use std::net::{IpAddr, Ipv4Addr};

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
pub(super) fn pod_mtu(underlay: u32) -> Result<u32, NetError> {
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
