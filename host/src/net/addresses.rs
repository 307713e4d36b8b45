//! The node's own addresses: by which of them others reach it, and which only its own pods know.

use super::{
    NetError,
    netlink::{is_gone, mtu, netlink_here},
    veth::GROUP,
};
use abi::node::GATEWAY_V4;
use futures::{FutureExt, TryStreamExt};
use rtnetlink::{
    Handle, LinkGetRequest,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
        link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// What `kube-proxy` puts the addresses of services on: they are no node's.
const SERVICES: &str = "kube-ipvs0";

/// Addresses of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// All of them, those that only the node itself and its pods know included.
    pub own: BTreeSet<IpAddr>,
    /// Those by which other nodes know it: of global scope, and on no interface that is left out.
    pub published: BTreeSet<IpAddr>,
    /// What it sends from in the family that is not the underlay's, of those that others know: beside the underlay address, where
    /// there is one.
    pub second: Option<IpAddr>,
    /// MTU of the interface that has the underlay address, in bytes; none where no interface has it.
    pub underlay_mtu: Option<u32>,
}

/// An interface, as far as its addresses are concerned.
#[derive(Debug)]
struct Interface {
    name: String,
    mtu: u32,
    is_pods: bool,
    is_bridge: bool,
    /// It connects containers or virtual machines: the end of a veth pair, or a tap.
    is_guests: bool,
    /// The bridge that it is a port of.
    master: Option<u32>,
}

impl Interface {
    fn of(link: &LinkMessage) -> Self {
        let mut found = Self {
            name: String::new(),
            mtu: mtu(link),
            is_pods: false,
            is_bridge: false,
            is_guests: false,
            master: None,
        };
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(name) => found.name.clone_from(name),
                LinkAttribute::Group(group) => found.is_pods = *group == GROUP,
                LinkAttribute::Controller(index) => found.master = Some(*index),
                LinkAttribute::LinkInfo(infos) => {
                    found.is_bridge |= infos.contains(&LinkInfo::Kind(InfoKind::Bridge));
                    found.is_guests |= infos.contains(&LinkInfo::Kind(InfoKind::Veth))
                        || infos.contains(&LinkInfo::Kind(InfoKind::Tun));
                }
                _ => {}
            }
        }
        found
    }
}

/// Whether all nodes may have the addresses of this interface: a container bridge's, to which only containers are connected.
fn is_containers(index: u32, interfaces: &BTreeMap<u32, Interface>) -> bool {
    interfaces.get(&index).is_some_and(|bridge| bridge.is_bridge)
        && interfaces
            .values()
            .filter(|port| port.master == Some(index))
            .all(|port| port.is_guests)
}

/// The address that a message is about: of a peer-to-peer link the node's own end (`IFA_LOCAL`, `rtnetlink(7)`).
fn address(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

/// Whether the node can send from an address, and will for as long as it has it: not yet checked for duplicates, about to go, or
/// another one of privacy's are none (RFC 4862, RFC 8981).
fn is_lasting(message: &AddressMessage) -> bool {
    let passing = AddressHeaderFlags::Tentative
        | AddressHeaderFlags::Dadfailed
        | AddressHeaderFlags::Deprecated
        | AddressHeaderFlags::Secondary;
    !message.header.flags.intersects(passing)
}

/// Whether a pod could send anything to it: not to the link that each pod has of its own.
fn can_be_reached(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_unspecified() && v4.octets() != GATEWAY_V4,
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unspecified() && !v6.is_unicast_link_local(),
    }
}

/// Lists the node's addresses. Others are not told of those on interfaces of pods, on bridges that only containers are connected to
/// and that do not have the underlay address, and on those that are to be ignored.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn addresses(underlay: IpAddr, ignored: &[String]) -> Result<Addresses, NetError> {
    let ignored = ignored.to_vec();
    netlink_here(move |handle| {
        async move {
            let listed = list(&handle).await?;
            let interfaces = interfaces(&handle, &listed).await?;
            let mut found = Addresses::default();
            let mut is_beside = false;
            for message in &listed {
                let Some(address) = address(message).filter(|address| can_be_reached(*address)) else {
                    continue;
                };
                let index = message.header.index;
                let is_nodes = |interface: &&Interface| !interface.is_pods && interface.name != SERVICES;
                let Some(interface) = interfaces.get(&index).filter(is_nodes) else {
                    continue;
                };
                found.own.insert(address);
                if address == underlay {
                    found.underlay_mtu = Some(interface.mtu);
                }
                let has_underlay =
                    |other: &AddressMessage| other.header.index == index && self::address(other) == Some(underlay);
                let is_left_out = ignored.contains(&interface.name)
                    || (is_containers(index, &interfaces) && !listed.iter().any(has_underlay));
                // What nodes serve to their own pods alone (NodeLocal DNSCache) is on each of them.
                let is_local = matches!(address, IpAddr::V4(v4) if v4.is_link_local());
                if message.header.scope != AddressScope::Universe || is_left_out || is_local {
                    continue;
                }
                found.published.insert(address);
                let with_underlay = listed.iter().any(has_underlay);
                let is_second = address.is_ipv4() != underlay.is_ipv4() && is_lasting(message);
                if is_second && (found.second.is_none() || (with_underlay && !is_beside)) {
                    (found.second, is_beside) = (Some(address), with_underlay);
                }
            }
            Ok(found)
        }
        .boxed()
    })
}

async fn list(handle: &Handle) -> Result<Vec<AddressMessage>, NetError> {
    let listed = handle.address().get().execute();
    listed
        .try_collect()
        .await
        .map_err(NetError::kernel("listing the node's addresses"))
}

/// The interfaces that have addresses, and what is connected to their bridges: most of a node's interfaces are pods', which have none.
async fn interfaces(handle: &Handle, listed: &[AddressMessage]) -> Result<BTreeMap<u32, Interface>, NetError> {
    let indexes: BTreeSet<u32> = listed.iter().map(|message| message.header.index).collect();
    let mut found = BTreeMap::new();
    for index in indexes {
        match links(handle.link().get().match_index(index)).await {
            Ok(links) => found.extend(links.iter().map(|link| (index, Interface::of(link)))),
            // Its addresses are gone, too.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(NetError::kernel("looking at the node's interfaces")(error)),
        }
    }
    let bridges = found.iter().filter(|(_, interface)| interface.is_bridge);
    for bridge in bridges.map(|(index, _)| *index).collect::<Vec<_>>() {
        let mut ports = handle.link().get();
        ports.message_mut().attributes.push(LinkAttribute::Controller(bridge));
        let ports = links(ports)
            .await
            .map_err(NetError::kernel("listing the ports of a bridge"))?;
        found.extend(ports.iter().map(|port| (port.header.index, Interface::of(port))));
    }
    Ok(found)
}

async fn links(asked: LinkGetRequest) -> Result<Vec<LinkMessage>, rtnetlink::Error> {
    asked.execute().try_collect().await
}

#[cfg(test)]
mod tests {
    use super::{Interface, can_be_reached, is_containers};
    use std::collections::BTreeMap;

    fn interface(is_bridge: bool, is_guests: bool, master: Option<u32>) -> Interface {
        Interface {
            name: String::new(),
            mtu: 1500,
            is_pods: false,
            is_bridge,
            is_guests,
            master,
        }
    }

    #[test]
    fn a_bridge_is_the_containers_where_nothing_else_is_connected_to_it() {
        let mut interfaces = BTreeMap::from([
            (1, interface(true, false, None)),
            (2, interface(false, true, Some(1))),
            (3, interface(false, false, None)),
        ]);
        assert!(is_containers(1, &interfaces));
        assert!(!is_containers(3, &interfaces), "no bridge");
        // The node's network card.
        interfaces.insert(4, interface(false, false, Some(1)));
        assert!(!is_containers(1, &interfaces));
    }

    #[test]
    fn what_no_pod_can_reach_is_left_out() {
        for (address, reached) in [
            ("192.0.2.1", true),
            ("169.254.20.10", true),
            ("169.254.1.1", false),
            ("127.0.0.1", false),
            ("2001:db8::1", true),
            ("fe80::1", false),
            ("::1", false),
        ] {
            assert_eq!(can_be_reached(address.parse().unwrap()), reached, "{address}");
        }
    }
}
