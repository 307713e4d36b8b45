//! Finding pods in the kernel alone, where what was kept of them on disk is lost.

use super::{
    NetError, Netns, in_netns,
    netlink::{mac, netlink, netlink_here},
    veth::{links, name_of, peer_index},
};
use crate::endpoint::is_interface_name;
use futures::{FutureExt, TryStreamExt};
use rtnetlink::{
    Handle,
    packet_route::{
        link::{LinkAttribute, LinkMessage},
        neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    path::PathBuf,
};

/// A pod's veth pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What the alias of the node's end says.
    pub alias: String,
    /// The namespace that has the other end.
    pub netns: PathBuf,
}

/// The veth pairs whose node's end has a name as hostd gives them, with both ends in place, by that name. That two interfaces
/// belong together is told by their indexes, which may be the same elsewhere, and by the MAC address that the node has entered
/// for the pod.
///
/// # Errors
///
/// Where netlink fails.
pub fn find_pods() -> Result<BTreeMap<String, Found>, NetError> {
    // By the indexes of both ends.
    let mut wanted: BTreeMap<(u32, u32), (String, String)> = BTreeMap::new();
    for link in netlink_here(|handle| links(handle).boxed())? {
        if let Some(name) = name_of(&link).filter(|name| is_interface_name(name))
            && let Some(peer) = peer_index(&link)
        {
            wanted.insert((link.header.index, peer), (name.to_owned(), alias_of(&link)));
        }
    }
    let macs = netlink_here(|handle| neighbours(handle).boxed())?;
    let mut found = BTreeMap::new();
    for path in namespaces() {
        let Ok(netns) = Netns::open_path(&path) else { continue };
        let its = in_netns(&netns, || netlink(|handle| links(handle).boxed()))??;
        for link in its {
            let node = peer_index(&link).filter(|node| macs.contains(&(*node, mac(&link))));
            let pair = node.map(|node| (node, link.header.index));
            if let Some((name, alias)) = pair.and_then(|pair| wanted.remove(&pair)) {
                let netns = path.clone();
                found.insert(name, Found { alias, netns });
            }
        }
    }
    Ok(found)
}

/// MAC addresses that the node has entered, by interface.
async fn neighbours(handle: Handle) -> Result<BTreeSet<(u32, [u8; 6])>, NetError> {
    let listed = handle.neighbours().get().execute();
    let all: Vec<NeighbourMessage> = listed
        .try_collect()
        .await
        .map_err(NetError::kernel("listing neighbours"))?;
    let entered = all.iter().filter(|one| one.header.state == NeighbourState::Permanent);
    let address = |one: &NeighbourMessage| {
        one.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                Some((one.header.ifindex, bytes.as_slice().try_into().ok()?))
            }
            _ => None,
        })
    };
    Ok(entered.filter_map(address).collect())
}

fn alias_of(link: &LinkMessage) -> String {
    let alias = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfAlias(alias) => Some(alias.clone()),
        _ => None,
    });
    alias.unwrap_or_default()
}

/// Paths of all network namespaces but this one: those that have a name, then those that a process is in. Each once.
fn namespaces() -> Vec<PathBuf> {
    let inside = |folder: &str| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let processes = inside("/proc").into_iter().map(|process| process.join("ns/net"));
    let paths = inside("/run/netns").into_iter().chain(processes);
    let number = |path: &PathBuf| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let mut seen: BTreeSet<_> = number(&"/proc/self/ns/net".into()).into_iter().collect();
    paths
        .filter(|path| number(path).is_some_and(|number| seen.insert(number)))
        .collect()
}
