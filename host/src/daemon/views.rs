//! What the daemon shows of itself, read from the same tables as what the kernel enforces.

use super::{Daemon, DaemonError};
use crate::{
    api::{
        CounterView, EndpointView, IdentityView, IpcacheView, ModuleView, ModulesView, NamespaceView, NodeView,
        PairView, PodName, PolicyView, RevisionView, Status, Usage,
    },
    identity::Labels,
    plan::protocol_name,
    survey::{Survey, is_end},
};
use abi::{AddressKey, Identity, event::Counter, ipcache::IPCACHE_SERVICE};
use std::collections::BTreeSet;
use tokio::task::block_in_place;

/// Identities whose pairs `policy show` lists, at the most.
const MAX_SHOWN: usize = 512;

fn usage(setting: &str, used: usize, capacity: u32) -> Usage {
    Usage {
        setting: setting.to_owned(),
        used: used as u64,
        capacity: u64::from(capacity),
    }
}

fn counter(name: &str, text: &str, counter: Counter) -> CounterView {
    CounterView {
        name: name.to_owned(),
        text: text.to_owned(),
        packets: counter.packets,
        bytes: counter.bytes,
    }
}

pub(super) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl Daemon {
    pub(super) fn status(&self) -> Result<Status, DaemonError> {
        let counters = self.datapath.counters()?;
        let (identities, local) = self.active.generation.counts();
        let (port_sets, breakpoints) = self.active.generation.port_set_counts();
        let maps = &self.config.maps;
        Ok(Status {
            node: self.config.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            attach: self.datapath.attach_mode().to_owned(),
            repairs: self.watch.repairs,
            problems: self.watch.problems(),
            pod_mtu: self.pod_mtu,
            generation: self.datapath.generation(),
            modules: self.active.revision.modules.clone(),
            failures: self
                .active
                .stack
                .failures()
                .map(|(module, error)| format!("{module}: {error}"))
                .collect(),
            store: self.config.store.clone(),
            store_problem: self.store.problem(),
            out_of_step: self.out_of_step.clone(),
            service_problems: self.service_problems(),
            endpoints: self.locals.len(),
            maps: vec![
                usage("maps.endpoints", self.locals.len(), maps.endpoints),
                usage("maps.addresses", self.datapath.placed().count(), maps.addresses),
                usage("maps.identities", identities, maps.identities),
                usage("maps.local_identities", local, maps.local_identities),
                usage("maps.port_sets", port_sets, maps.port_sets),
                usage("maps.breakpoints", breakpoints, maps.breakpoints),
                usage(
                    "maps.conntrack",
                    usize::try_from(self.datapath.tracked()?).unwrap_or(usize::MAX),
                    maps.conntrack,
                ),
                usage("maps.services", self.datapath.placed_services().len(), maps.services),
                usage("maps.networks", self.datapath.placed_networks().len(), maps.networks),
            ],
            nodes: self.node_list(),
            forwarded: counters
                .forwarded
                .iter()
                .map(|(path, count)| counter(path.name(), "", *count))
                .collect(),
            drops: counters
                .drops
                .iter()
                .filter(|(_, count)| count.packets > 0)
                .map(|(reason, count)| counter(reason.name(), reason.text(), *count))
                .collect(),
        })
    }

    fn node_list(&self) -> Vec<NodeView> {
        let view = |(name, node): (&String, &super::Node)| NodeView {
            name: name.clone(),
            underlay: node.record.underlay,
            pod_cidrs: node.record.pod_cidrs.iter().map(ToString::to_string).collect(),
            pods: self.pods.values().filter(|pod| pod.record.is_on(name)).count(),
            state: if node.stale_since.is_some() { "stale" } else { "alive" }.to_owned(),
            stale_seconds: node.stale_since.map_or(0, |since| since.elapsed().as_secs()),
        };
        self.nodes.iter().map(view).collect()
    }

    fn identity_of(&self, address: &AddressKey) -> Identity {
        let place = self.active.generation.place(address);
        place.map_or(Identity::NONE, |place| place.identity)
    }

    pub(super) fn endpoint_view(&self, pod: &PodName) -> Result<EndpointView, DaemonError> {
        let local = self
            .locals
            .get(pod)
            .ok_or_else(|| DaemonError::Request(format!("there is no pod {pod} on this node")))?;
        let record = &local.endpoint.pod;
        let identity = self.identity_of(&record.address.into());
        Ok(EndpointView {
            pod: pod.clone(),
            addresses: record.addresses().collect(),
            labels: Labels::clone(&record.labels),
            service_account: record.service_account.to_string(),
            ports: record
                .ports
                .iter()
                .map(|(name, protocol, port)| format!("{name}={}/{port}", protocol_name(*protocol)))
                .collect(),
            identity: identity.0,
            identity_name: self.registry.name(identity),
            netns: local.endpoint.netns.display().to_string(),
            interface: local.endpoint.interface.clone(),
            ifindex: local.veth.ifindex,
            mac: mac_text(local.veth.pod_mac),
        })
    }

    pub(super) fn endpoint_list(&self) -> Vec<EndpointView> {
        self.locals
            .keys()
            .filter_map(|pod| self.endpoint_view(pod).ok())
            .collect()
    }

    pub(super) fn identity_list(&self) -> Vec<IdentityView> {
        let reserved = Identity::RESERVED
            .iter()
            .map(|(identity, name)| (*identity, (*name).to_owned()));
        let pods = self.registry.iter().map(|(identity, key)| (identity, key.to_string()));
        reserved
            .chain(pods)
            .map(|(identity, name)| IdentityView {
                identity: identity.0,
                tenant: self.registry.layout().tenant(identity),
                name,
                addresses: self.active.generation.users(identity),
            })
            .collect()
    }

    pub(super) fn ipcache_list(&self) -> Vec<IpcacheView> {
        let parity = self.datapath.parity();
        let names = self.names.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.datapath
            .placed()
            .map(|(address, desired)| {
                let entry = &desired.ipcache;
                let (now, other) = (entry.identity[parity], entry.identity[1 - parity]);
                IpcacheView {
                    address: address.ip(),
                    identity: now.0,
                    identity_name: if entry.flags & IPCACHE_SERVICE == 0 {
                        self.registry.name(now)
                    } else {
                        "-".to_owned()
                    },
                    other_identity: (other != now).then_some(other.0),
                    tunnel_endpoint: (entry.tunnel_family != 0)
                        .then(|| abi::address::ip(entry.tunnel_family, entry.tunnel_endpoint)),
                    name: names.address(address),
                }
            })
            .collect()
    }

    pub(super) fn policy_show(&mut self) -> Result<PolicyView, DaemonError> {
        let (count, local) = self.active.generation.counts();
        let mut ends: BTreeSet<Identity> = self
            .pods
            .keys()
            .map(|address| self.identity_of(address))
            .filter(|identity| *identity != Identity::NONE)
            .collect();
        ends.extend([Identity::HOST, Identity::REMOTE_NODE, Identity::WORLD]);
        ends.extend(self.active.networks.iter().copied());
        let mut pairs = Vec::new();
        if ends.len() <= MAX_SHOWN {
            let identities: Vec<Identity> = ends.into_iter().collect();
            self.active.stack.begin();
            let survey = block_in_place(|| Survey::new(&mut self.active.stack, &identities))?;
            for from in &identities {
                for to in &identities {
                    // Between two that are no pods nothing passes through the datapath.
                    let stack = &self.active.stack;
                    let verdict = survey.ruling(*from, *to).to_string();
                    if verdict != "deny" && (is_end(stack, *from) || is_end(stack, *to)) {
                        pairs.push(PairView {
                            from: self.registry.name(*from),
                            to: self.registry.name(*to),
                            verdict,
                        });
                    }
                }
            }
        }
        let (port_sets, _) = self.active.generation.port_set_counts();
        Ok(PolicyView {
            modules: self.active.revision.modules.clone(),
            generation: self.datapath.generation(),
            identities: count,
            local_identities: local,
            cells: self.active.generation.cell_count(),
            port_sets,
            pairs,
        })
    }

    pub(super) fn policy_list(&self) -> ModulesView {
        let record = self.policy.as_ref().map(|(record, _)| record);
        let active = self.active.revision.serial;
        let earlier = record
            .into_iter()
            .flat_map(|record| std::iter::once(&record.previous).chain(&record.history))
            .filter(|revision| revision.serial != active && revision.serial != 0)
            .map(|revision| RevisionView {
                serial: revision.serial,
                what: revision.what.clone(),
                time_ms: revision.time_ms,
                modules: revision.modules.iter().map(|module| module.name().to_owned()).collect(),
            })
            .collect();
        ModulesView {
            modules: self.active.revision.modules.clone(),
            serial: active,
            earlier,
        }
    }

    pub(super) fn policy_inspect(&self, name: &str) -> Result<ModuleView, DaemonError> {
        self.active.stack.inspect(name).ok_or_else(|| {
            DaemonError::Request(format!(
                "no module is named {name:?}: `hostd policy list` shows those that are loaded"
            ))
        })
    }

    pub(super) fn namespace_list(&self) -> Vec<NamespaceView> {
        let mut names: BTreeSet<&str> = self.namespaces.keys().map(String::as_str).collect();
        names.extend(self.pods.values().map(|pod| pod.record.namespace.as_str()));
        names
            .into_iter()
            .map(|name| NamespaceView {
                namespace: name.to_owned(),
                labels: self.namespaces.get(name).cloned().unwrap_or_default(),
                pods: self.pods.values().filter(|pod| pod.record.namespace == name).count(),
            })
            .collect()
    }
}
