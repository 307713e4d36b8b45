//! Addresses of nodes: this node's own, and those that others have besides their underlay address.

use super::{Daemon, DaemonError};
use crate::{
    net,
    plan::{self, Announced, Facts, Stance},
    store::{
        Collection, Expect, Key,
        records::{self, AddressesRecord},
    },
};
use abi::{AddressKey, Identity};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};
use tokio::task::block_in_place;

/// Addresses that a node tells others of at the most: more are a mistake, for which there is a key.
const MOST: usize = 256;

/// What is known of the nodes' addresses.
#[derive(Debug, Default)]
pub struct NodeAddresses {
    /// This node's.
    own: net::Addresses,
    /// What the cluster was told of them.
    told: Option<BTreeSet<IpAddr>>,
    /// Those of other nodes, by the nodes' names.
    others: BTreeMap<String, BTreeSet<IpAddr>>,
}

impl NodeAddresses {
    /// Whether this node has an address.
    pub fn is_own(&self, address: IpAddr) -> bool {
        self.own.own.contains(&address)
    }
}

impl Daemon {
    /// Looks which addresses this node has, and makes its own programs know them. The answer is whether anything has changed.
    pub(super) fn look_at_own_addresses(&mut self) -> Result<bool, DaemonError> {
        let (underlay, ignored) = (self.config.underlay, &self.config.ignore_interfaces);
        let mut found = block_in_place(|| net::addresses(underlay, ignored))?;
        // It stays this node's, also while its interface is away.
        found.own.insert(underlay);
        let gone: Vec<IpAddr> = self.addresses.own.own.difference(&found.own).copied().collect();
        for address in gone {
            let key = AddressKey::from(address);
            if self.datapath.is_host(&key) {
                self.datapath.remove(&key)?;
                self.names_mut().remove_address(&key);
            }
        }
        // Also what has not changed: a pod that had such an address for a while has taken it away.
        self.place_own_addresses(&found.own)?;
        let is_new = found != self.addresses.own;
        self.addresses.own = found;
        Ok(is_new)
    }

    /// The node's own addresses are in the ipcache, whatever the policy; but for one that a pod has, against all precautions, and one
    /// besides the underlay's that stands for a service.
    fn place_own_addresses(&mut self, own: &BTreeSet<IpAddr>) -> Result<(), DaemonError> {
        let facts = Facts {
            owner: 0,
            epoch: Identity::HOST.0,
            stance: Stance::Host,
        };
        let parity = self.datapath.parity();
        for address in own.iter().copied() {
            let key = AddressKey::from(address);
            let is_a_services = address != self.config.underlay && self.is_a_services(address);
            if self.pods.find(&key).is_some() || is_a_services {
                continue;
            }
            self.names_mut().set_address(key, "host".to_owned());
            if let Some(desired) = plan::entry(&key, &key, &facts, parity, &self.active.generation, None) {
                self.datapath.place(key, desired)?;
            }
        }
        Ok(())
    }

    /// Says which addresses pods could have, and the node has.
    fn note_shared_addresses(&mut self) {
        for address in &self.addresses.own.own {
            if let Some((_, pod)) = self.pods.find(&AddressKey::from(*address)) {
                let pod = pod.record.full_name();
                self.watch.complain(format!(
                    "{address} is this node's own address, and pod {pod}'s: take it from one of them"
                ));
            } else if let Some(cidr) = self.config.pod_cidrs.iter().find(|cidr| cidr.contains(address)) {
                self.watch.complain(format!(
                    "no pod gets {address} of pod CIDR {cidr}: an interface of this node has it"
                ));
            }
        }
    }

    /// Follows this node's addresses: its programs first, then the cluster.
    pub(super) async fn follow_own_addresses(&mut self) -> Result<(), DaemonError> {
        if self.look_at_own_addresses()? {
            self.place_nodes()?;
            self.route_to_nodes()?;
        }
        self.note_shared_addresses();
        self.follow_mtu()?;
        let mut published = self.addresses.own.published.clone();
        published.remove(&self.config.underlay);
        if published.len() > MOST {
            self.watch.complain(format!(
                "this node has {} addresses, of which other nodes are told {MOST}: leave interfaces out by `ignore_interfaces`",
                published.len()
            ));
            published = published.into_iter().take(MOST).collect();
        }
        if self.addresses.told.as_ref() == Some(&published) {
            return Ok(());
        }
        let key = Key::new(Collection::Addresses, &self.config.node);
        let record = AddressesRecord {
            addresses: published.iter().copied().collect(),
        };
        records::put(&*self.store, &key, &record, Expect::Any).await?;
        self.addresses.told = Some(published);
        Ok(())
    }

    /// Follows the MTU of the underlay: the tunnel's, that of the routes to pods, and the pods' own.
    fn follow_mtu(&mut self) -> Result<(), DaemonError> {
        let (underlay, ipv6) = (self.config.underlay, self.config.has_ipv6());
        let Some(mtu) = self.addresses.own.underlay_mtu else {
            return Ok(());
        };
        let pod_mtu = match net::pod_mtu(underlay, mtu, ipv6) {
            Ok(pod_mtu) if pod_mtu == self.pod_mtu => return Ok(()),
            Ok(pod_mtu) => pod_mtu,
            Err(error) => {
                self.watch.complain(error.to_string());
                return Ok(());
            }
        };
        let vxlan = block_in_place(|| net::ensure_vxlan(abi::node::TUNNEL_PORT, pod_mtu))?;
        self.datapath.set_vxlan(vxlan, pod_mtu, underlay)?;
        tracing::info!(
            "the underlay's MTU is {mtu} now: that of pods is {pod_mtu}, and was {}",
            self.pod_mtu
        );
        self.pod_mtu = pod_mtu;
        self.route_to_nodes()?;
        for local in self.locals.values() {
            let endpoint = &local.endpoint;
            let addresses: Vec<IpAddr> = endpoint.pod.addresses().collect();
            let set = block_in_place(|| {
                net::prepare_node(&endpoint.interface, &local.veth, &addresses, underlay, pod_mtu)?;
                net::set_pod_mtu(
                    &net::Netns::open_path(&endpoint.netns)?,
                    endpoint.pod_interface(),
                    pod_mtu,
                )
            });
            if let Err(error) = set {
                self.watch.complain(format!("{}: {error}", endpoint.pod.full_name()));
            }
        }
        Ok(())
    }

    /// The store may have forgotten this node's addresses.
    pub(super) fn tell_addresses_again(&mut self) {
        self.addresses.told = None;
    }

    /// A node has said which addresses it has, or is gone.
    pub(super) fn addresses_seen(&mut self, node: &str, record: Option<AddressesRecord>) -> Result<(), DaemonError> {
        let said = record.as_ref().map(AddressesRecord::set);
        if node == self.config.node {
            // Where somebody has removed them, or a backup has others, they are told again with the next look.
            if self.addresses.told != said {
                self.addresses.told = None;
            }
            return Ok(());
        }
        if self.addresses.others.get(node) == said.as_ref() {
            return Ok(());
        }
        self.note_addresses(node, record);
        self.place_nodes()
    }

    /// What a node has said of its addresses.
    pub(super) fn addresses_of(&self, node: &str) -> Option<AddressesRecord> {
        let known = self.addresses.others.get(node)?;
        Some(AddressesRecord {
            addresses: known.iter().copied().collect(),
        })
    }

    /// The same without a look at the maps.
    pub(super) fn note_addresses(&mut self, node: &str, record: Option<AddressesRecord>) {
        match record {
            Some(record) => {
                self.addresses.others.insert(node.to_owned(), record.set());
            }
            None => {
                self.addresses.others.remove(node);
            }
        }
    }

    /// Makes the programs know all nodes' addresses.
    pub(super) fn place_nodes(&mut self) -> Result<(), DaemonError> {
        let none = BTreeSet::new();
        let announced = self.nodes.values().map(|node| {
            let is_own = node.record.name == self.config.node;
            let others = if is_own {
                &self.addresses.own.own
            } else {
                self.addresses.others.get(&node.record.name).unwrap_or(&none)
            };
            Announced {
                is_own,
                underlay: node.record.underlay,
                others,
            }
        });
        let desired = plan::node_addresses(announced);
        Ok(self.datapath.place_nodes(&desired)?)
    }

    /// Whether a node has an address, but for this one.
    pub(super) fn is_another_nodes(&self, address: IpAddr) -> bool {
        self.datapath.is_node(&AddressKey::from(address)) && !self.addresses.is_own(address)
    }

    /// What this node sends from into the tunnel, in the other family than the underlay's; none, where it has no such address, or the
    /// kernel no IPv6 on a device whose packets are too small for it.
    pub(super) fn second_source(&self) -> Option<IpAddr> {
        let carries = self.config.underlay.is_ipv6() || net::tunnel_has_ipv6(self.pod_mtu);
        self.addresses.own.second.filter(|_| carries)
    }
}
