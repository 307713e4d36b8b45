//! Services of the cluster: from records in the store to frontends in the maps.

use super::{Daemon, DaemonError};
use crate::{
    api::{BackendView, ServicePortView, ServiceView},
    datapath::DatapathError,
    endpoint, net,
    plan::{self, Frontend, protocol_name},
    store::{
        Expect,
        records::{self, PodRecord, ServiceRecord, TargetPort},
    },
};
use abi::{AddressKey, ServiceKey, address::Address, ipcache::IPCACHE_SERVICE};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};
use tokio::task::block_in_place;

/// The services of the cluster, by full name.
#[derive(Default)]
pub struct Services {
    by_name: BTreeMap<String, Service>,
    /// Pods of this node that are no backends for now: they are being connected, or disconnected.
    pub withheld: BTreeSet<String>,
    /// What of them this node could not take in: it is tried again, and keeps nothing else from being done.
    pub problems: Vec<String>,
    /// What was said to be dangerous.
    hazard: Option<String>,
}

impl Services {
    /// The cluster's services.
    pub fn records(&self) -> impl Iterator<Item = &ServiceRecord> {
        self.by_name.values().map(|service| &service.record)
    }
}

/// A service with what stands behind each of its frontends now.
struct Service {
    record: ServiceRecord,
    frontends: BTreeMap<ServiceKey, Frontend>,
}

fn refuse(problem: impl Into<String>) -> DaemonError {
    DaemonError::Request(problem.into())
}

/// What no service may be, whatever the others are.
fn check(record: &ServiceRecord, node_ports: [u16; 2]) -> Result<(), String> {
    endpoint::check_name(&record.namespace).map_err(|problem| format!("namespace {problem}"))?;
    endpoint::check_name(&record.name).map_err(|problem| format!("service {problem}"))?;
    endpoint::check_labels(&record.selector).map_err(|problem| format!("selector: {problem}"))?;
    if record.ports.is_empty() {
        return Err("a service has at least one port: give --port PROTOCOL/PORT".to_owned());
    }
    if record.addresses.is_empty() && record.ports.iter().all(|port| port.node_port.is_none()) {
        return Err(
            "a service has an address or a node port: give --address, or --port PROTOCOL/PORT@NODEPORT".to_owned(),
        );
    }
    let families: BTreeSet<bool> = record.addresses.iter().map(IpAddr::is_ipv4).collect();
    if families.len() != record.addresses.len() {
        return Err("a service has one address of each family at the most".to_owned());
    }
    for address in record.addresses.iter().chain(&record.backends) {
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_link_local(*address) {
            return Err(format!("{address} can be no service's and no backend's"));
        }
    }
    if let Some(address) = record
        .backends
        .iter()
        .find(|address| record.addresses.contains(address))
    {
        return Err(format!("{address} can't be the service and its own backend"));
    }
    let mut ports = BTreeSet::new();
    let mut used_node_ports = BTreeSet::new();
    for port in &record.ports {
        let name = format!("{}/{}", protocol_name(port.protocol), port.port);
        if port.port == 0 || port.target == TargetPort::Number(0) {
            return Err(format!("port {name}: 0 is no port"));
        }
        if !ports.insert((port.protocol, port.port)) {
            return Err(format!("port {name} is given twice"));
        }
        if let TargetPort::Name(target) = &port.target {
            endpoint::check_ports(&[(target.clone(), port.protocol, 1)])?;
            if !record.backends.is_empty() {
                return Err(format!(
                    "port {name}: {target} is a name, which only pods give to their ports"
                ));
            }
        }
        if let Some(node_port) = port.node_port {
            if !used_node_ports.insert((port.protocol, node_port)) {
                return Err(format!("node port {node_port} is given twice"));
            }
            let [first, last] = node_ports;
            if !(first..=last).contains(&node_port) {
                return Err(format!(
                    "node port {node_port} is not between {first} and {last} (`node_port_range` in the configuration)"
                ));
            }
        }
    }
    Ok(())
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

impl Daemon {
    /// Adds a service to the cluster, or changes the one of that name.
    pub(super) async fn service_add(&mut self, record: ServiceRecord) -> Result<ServiceView, DaemonError> {
        check(&record, self.config.node_port_range).map_err(DaemonError::Request)?;
        self.check_against_others(&record)?;
        let key = ServiceRecord::key(&record.namespace, &record.name);
        records::put(&*self.store, &key, &record, Expect::Any).await?;
        let name = record.full_name();
        self.service_seen(record);
        tracing::info!("service {name}");
        if !self.services.problems.is_empty() {
            return Err(refuse(format!(
                "service {name} is in the store, but this node has not all of it: {}; it tries again",
                self.services.problems.join("; ")
            )));
        }
        self.service_list()
            .into_iter()
            .find(|view| format!("{}/{}", view.namespace, view.name) == name)
            .ok_or_else(|| refuse(format!("service {name} is gone again")))
    }

    fn check_against_others(&self, record: &ServiceRecord) -> Result<(), DaemonError> {
        for address in &record.addresses {
            for node in self.nodes.values() {
                let node = &node.record;
                if node.underlay == *address {
                    return Err(refuse(format!("{address} is the address of node {}", node.name)));
                }
                if let Some(cidr) = node.pod_cidrs.iter().find(|cidr| cidr.contains(address)) {
                    return Err(refuse(format!(
                        "{address} is in pod CIDR {cidr} of node {}: a service's address is none of the pods'",
                        node.name
                    )));
                }
            }
        }
        let name = record.full_name();
        let others = self.services.by_name.iter().filter(|(other, _)| **other != name);
        let taken: BTreeMap<&ServiceKey, &String> = others
            .flat_map(|(other, service)| service.frontends.keys().map(move |key| (key, other)))
            .collect();
        for (key, port) in plan::frontend_keys(record) {
            if let Some(other) = taken.get(&key) {
                return Err(refuse(match port.node_port {
                    Some(node_port) if key.port == node_port.to_be() && key.address == Address::NONE => {
                        format!("node port {node_port} is service {other}'s")
                    }
                    _ => format!(
                        "{} {}/{} is service {other}'s",
                        abi::address::ip(key.family, key.address),
                        protocol_name(key.protocol),
                        port.port
                    ),
                }));
            }
        }
        for backend in &record.backends {
            let key = AddressKey::from(*backend);
            let is_service = |taken: &&ServiceKey| taken.address == key.address && taken.family == key.family;
            if let Some((_, other)) = taken.iter().find(|(taken, _)| is_service(taken)) {
                return Err(refuse(format!("{backend} is service {other}'s, and can be no backend")));
            }
        }
        for address in &record.addresses {
            let is_backend =
                |(other, service): &(&String, &Service)| **other != name && service.record.backends.contains(address);
            if let Some((other, _)) = self.services.by_name.iter().find(is_backend) {
                return Err(refuse(format!("{address} is a backend of service {other}'s")));
            }
        }
        let frontends = taken.len() + plan::frontend_keys(record).count();
        Ok(self.datapath.check_services(frontends)?)
    }

    /// Takes in a service that is new or has changed.
    pub(super) fn service_seen(&mut self, record: ServiceRecord) {
        self.note_service(record);
        self.place_services();
    }

    /// The same without a word to the maps yet.
    pub(super) fn note_service(&mut self, record: ServiceRecord) {
        let frontends = self.frontends_of(&record);
        let service = Service { record, frontends };
        self.services.by_name.insert(service.record.full_name(), service);
    }

    fn frontends_of(&self, record: &ServiceRecord) -> BTreeMap<ServiceKey, Frontend> {
        let pods = self.pods.values().map(|pod| &pod.record);
        let withheld = &self.services.withheld;
        let selected: Vec<&PodRecord> = pods
            .filter(|pod| record.selects(pod) && !withheld.contains(&pod.full_name()))
            .collect();
        let is_pod = |address: IpAddr| self.pods.find(&address.into()).is_some();
        plan::frontends(record, &selected, &is_pod)
    }

    /// The cluster has a service no longer.
    pub(super) fn service_gone(&mut self, name: &str) {
        self.services.by_name.remove(name);
        self.place_services();
    }

    /// Removes a service; false where there is none.
    pub(super) async fn service_delete(&mut self, namespace: &str, name: &str) -> Result<bool, DaemonError> {
        let full_name = format!("{namespace}/{name}");
        if !self.services.by_name.contains_key(&full_name) {
            return Ok(false);
        }
        let key = ServiceRecord::key(namespace, name);
        self.store.delete(&key, Expect::Any).await?;
        self.service_gone(&full_name);
        Ok(true)
    }

    /// Follows a change of a pod, or its end.
    pub(super) fn services_follow(&mut self, pod: &PodRecord) {
        let affected = |service: &&Service| {
            let Service { record, .. } = service;
            !record.backends.is_empty() || (record.namespace == pod.namespace && !record.selector.is_empty())
        };
        let affected: Vec<ServiceRecord> = self
            .services
            .by_name
            .values()
            .filter(affected)
            .map(|service| service.record.clone())
            .collect();
        let mut changed = pod.addresses().any(|address| self.is_a_services(address));
        for record in affected {
            let frontends = self.frontends_of(&record);
            if let Some(service) = self.services.by_name.get_mut(&record.full_name())
                && service.frontends != frontends
            {
                service.frontends = frontends;
                changed = true;
            }
        }
        if changed {
            self.place_services();
        }
    }

    /// Fills the maps at a start, before packets meet them.
    pub(super) fn services_from_start(&mut self) {
        let records: Vec<ServiceRecord> = self
            .services
            .by_name
            .values()
            .map(|service| service.record.clone())
            .collect();
        for record in records {
            self.note_service(record);
        }
        let mut problems = self.fill_services();
        problems.extend(self.datapath.announce_node_ports().err().map(|error| error.to_string()));
        self.note_problems(problems);
    }

    /// Tries again what could not be done.
    pub(super) fn retry_services(&mut self) {
        if !self.services.problems.is_empty() {
            self.place_services();
        }
    }

    /// Makes the maps hold all services, and their node ports be served.
    pub(super) fn place_services(&mut self) {
        let mut problems = self.fill_services();
        problems.extend(self.attach_node_ports().err().map(|error| error.to_string()));
        self.note_problems(problems);
        let hazard = self.hazard();
        if hazard != self.services.hazard
            && let Some(hazard) = &hazard
        {
            tracing::warn!("{hazard}");
        }
        self.services.hazard = hazard;
    }

    /// What this node could not take in of the services, and what may go wrong with them.
    pub(super) fn service_problems(&self) -> Vec<String> {
        self.services.problems.iter().cloned().chain(self.hazard()).collect()
    }

    /// Whether the node's own connections may begin where clients ask for services.
    fn hazard(&self) -> Option<String> {
        let [first, last] = self.config.node_port_range;
        let given = self
            .datapath
            .has_node_ports()
            .then(|| net::given_to_connections([first, last]))?;
        (given > 0).then(|| {
            format!(
                "the kernel may open connections of this node's own from {given} of the node ports: add {first}-{last} to the \
                 sysctl net.ipv4.ip_local_reserved_ports"
            )
        })
    }

    /// Says of each problem once that it is there.
    fn note_problems(&mut self, mut problems: Vec<String>) {
        problems.sort();
        problems.dedup();
        for problem in problems
            .iter()
            .filter(|problem| !self.services.problems.contains(problem))
        {
            tracing::error!("{problem}");
        }
        self.services.problems = problems;
    }

    /// Makes the maps hold all services. Where two claim the same, the one whose name comes first has it on every node. A
    /// frontend is there before its address leads to it, and the address leads nowhere before the frontend goes. The
    /// answer is what could not be done.
    fn fill_services(&mut self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut desired: BTreeMap<ServiceKey, &Frontend> = BTreeMap::new();
        for (name, service) in &self.services.by_name {
            for (key, frontend) in &service.frontends {
                if desired.contains_key(key) {
                    problems.push(format!(
                        "service {name} has {} port {} of another one's",
                        abi::address::ip(key.family, key.address),
                        u16::from_be(key.port)
                    ));
                } else {
                    desired.insert(*key, frontend);
                }
            }
        }
        let mut addresses: BTreeMap<AddressKey, String> = BTreeMap::new();
        for (name, service) in &self.services.by_name {
            let its = service
                .record
                .addresses
                .iter()
                .map(|address| AddressKey::from(*address));
            addresses.extend(its.map(|address| (address, format!("service {name}"))));
        }
        let placed = self.datapath.placed();
        let stale: Vec<AddressKey> = placed
            .filter(|(_, desired)| desired.ipcache.flags & IPCACHE_SERVICE != 0)
            .map(|(address, _)| *address)
            .filter(|address| !addresses.contains_key(address) || self.has_somebody(address))
            .collect();
        let mut failed: Vec<DatapathError> = Vec::new();
        for address in &stale {
            failed.extend(self.datapath.remove(address).err());
            self.names_mut().remove_address(address);
        }
        failed.extend(block_in_place(|| self.datapath.place_frontends(&desired)));
        for (address, name) in addresses {
            if self.has_somebody(&address) {
                problems.push(format!(
                    "{} is a service's address, but a pod or a node has it",
                    address.ip()
                ));
            } else {
                failed.extend(self.datapath.place(address, plan::service_address(&address)).err());
                self.names_mut().set_address(address, name);
            }
        }
        problems.extend(failed.into_iter().map(|error| error.to_string()));
        problems
    }

    /// Whether an address is a service's: a pod or a node may have it against all precautions, for nodes write to the store
    /// at once.
    pub(super) fn is_a_services(&self, address: IpAddr) -> bool {
        let mut services = self.services.by_name.values();
        services.any(|service| service.record.addresses.contains(&address))
    }

    /// Whether an address is a pod's, or the underlay address of a node. A service may stand for another one that nodes have, as for a
    /// virtual IP that moves between them.
    fn has_somebody(&self, address: &AddressKey) -> bool {
        let is_node = |node: &super::Node| AddressKey::from(node.record.underlay) == *address;
        self.pods.find(address).is_some() || self.nodes.values().any(is_node)
    }

    /// Attaches the program for node ports while there are any, and takes it away when there are none.
    fn attach_node_ports(&mut self) -> Result<(), DaemonError> {
        let underlay = block_in_place(|| net::underlay(self.config.underlay))?;
        self.datapath.set_underlay(underlay.ifindex)?;
        self.underlay = underlay.name;
        Ok(block_in_place(|| self.datapath.attach_node_ports(&self.underlay))?)
    }

    /// The service that answers at an address, with its backends; or the one whose node port a node's address has at the
    /// port that is asked for.
    pub(super) fn service_at(&self, address: IpAddr, port: Option<(u8, u16)>) -> Option<(&str, BTreeSet<IpAddr>)> {
        let place = AddressKey::from(address);
        let is_node = self.datapath.is_node(&place);
        let answers = |key: &ServiceKey| {
            let is_asked_for = port == Some((key.protocol, u16::from_be(key.port)));
            let at_node = key.address == Address::NONE;
            key.family == place.family
                && if at_node {
                    is_node && is_asked_for
                } else {
                    key.address == place.address
                }
        };
        self.services.by_name.iter().find_map(|(name, service)| {
            let mut asked = service.frontends.iter().filter(|(key, _)| answers(key)).peekable();
            asked.peek()?;
            let backends = asked.flat_map(|(_, frontend)| &frontend.backends);
            let ends = backends.map(|backend| abi::address::ip(place.family, backend.address));
            Some((name.as_str(), ends.collect()))
        })
    }

    pub(super) fn service_list(&self) -> Vec<ServiceView> {
        self.services
            .by_name
            .values()
            .map(|service| self.service_view(service))
            .collect()
    }

    fn service_view(&self, service: &Service) -> ServiceView {
        let record = &service.record;
        let ports = record.ports.iter().map(|port| {
            // A node port's backends are those of the port.
            let mut backends: BTreeMap<(IpAddr, u16), BackendView> = BTreeMap::new();
            let its = plan::frontend_keys(record).filter(|(_, its)| *its == port);
            let mut left_out = 0;
            for (key, _) in its {
                let placed = self.datapath.placed_services().get(&key);
                left_out = left_out.max(placed.map_or(0, |placed| placed.left_out));
                let frontend = service.frontends.get(&key);
                for backend in frontend.iter().flat_map(|frontend| &frontend.backends) {
                    let address = abi::address::ip(key.family, backend.address);
                    let port = u16::from_be(backend.port);
                    let name = self.names_mut().address(&address.into());
                    backends.insert((address, port), BackendView { address, port, name });
                }
            }
            ServicePortView {
                port: format!("{}/{}", protocol_name(port.protocol), port.port),
                target: match &port.target {
                    TargetPort::Number(number) => number.to_string(),
                    TargetPort::Name(name) => name.clone(),
                },
                node_port: port.node_port,
                left_out,
                backends: backends.into_values().collect(),
            }
        });
        ServiceView {
            namespace: record.namespace.clone(),
            name: record.name.clone(),
            addresses: record.addresses.clone(),
            selector: record.selector.clone(),
            affinity_seconds: record.affinity,
            ports: ports.collect(),
        }
    }
}
