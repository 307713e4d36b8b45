//! Services: from records and pods to what each frontend's entry holds.

use super::{Desired, maglev};
use crate::store::records::{PodRecord, ServicePort, ServiceRecord, TargetPort};
use abi::{
    AddressKey, Family, Identity, IpcacheEntry, Service, ServiceKey,
    address::{Address, SHARED_SCOPE},
    ipcache::IPCACHE_SERVICE,
    policy::UNPLACED,
    service::{Backend, MAX_BACKENDS, SLOTS_PER_WORD},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// What stands behind a frontend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frontend {
    /// Seconds for which a client keeps its backend; zero for none.
    pub affinity: u32,
    /// Its backends.
    pub backends: BTreeSet<Backend>,
}

/// A service's backends at one of its ports, in one family. At a node port they are pods: only their answers to clients
/// outside come by the node that was asked.
fn backends(
    service: &ServiceRecord,
    port: &ServicePort,
    key: ServiceKey,
    selected: &[&PodRecord],
    is_pod: &dyn Fn(IpAddr) -> bool,
) -> BTreeSet<Backend> {
    let family = key.family;
    let at_node = key.address == Address::NONE;
    let backend = |address: IpAddr, port: u16| {
        let key = AddressKey::from(address);
        (key.family == family).then_some(Backend {
            address: key.address,
            port: port.to_be(),
            zero: 0,
        })
    };
    let target = |pod: Option<&PodRecord>| match &port.target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => pod?
            .ports
            .iter()
            .find(|(known, protocol, _)| known == name && *protocol == port.protocol)
            .map(|(_, _, number)| *number),
    };
    let selected = selected
        .iter()
        .filter_map(|pod| Some((pod, target(Some(pod))?)))
        .flat_map(|(pod, number)| pod.addresses().filter_map(move |address| backend(address, number)));
    let given = service
        .backends
        .iter()
        .filter(|address| !at_node || is_pod(**address))
        .filter_map(|address| backend(*address, target(None)?));
    selected.chain(given).collect()
}

fn key(address: Address, family: u8, protocol: u8, port: u16) -> ServiceKey {
    ServiceKey {
        address,
        port: port.to_be(),
        scope: SHARED_SCOPE,
        family,
        protocol,
        zero: 0,
    }
}

/// Keys of a service's frontends, each with its port.
pub fn keys(service: &ServiceRecord) -> impl Iterator<Item = (ServiceKey, &ServicePort)> {
    service.ports.iter().flat_map(|port| {
        let at = service.addresses.iter().map(move |address| {
            let address = AddressKey::from(*address);
            (key(address.address, address.family, port.protocol, port.port), port)
        });
        let nodes = port.node_port.into_iter().flat_map(move |node_port| {
            let families = [Family::V4, Family::V6];
            families.map(|family| (key(Address::NONE, family as u8, port.protocol, node_port), port))
        });
        at.chain(nodes)
    })
}

/// A service's frontends, with what stands behind them: the pods that it selects, and the addresses that it names.
pub fn frontends(
    service: &ServiceRecord,
    selected: &[&PodRecord],
    is_pod: &dyn Fn(IpAddr) -> bool,
) -> BTreeMap<ServiceKey, Frontend> {
    keys(service)
        .map(|(key, port)| {
            let frontend = Frontend {
                affinity: service.affinity,
                backends: backends(service, port, key, selected, is_pod),
            };
            (key, frontend)
        })
        .collect()
}

/// The ipcache's entry of a service's address, but for its stamps.
#[must_use]
pub fn service_address(address: &AddressKey) -> Desired {
    Desired {
        ipcache: IpcacheEntry {
            first_stamp: 0,
            address: address.address,
            identity: [Identity::NONE; 2],
            column: [UNPLACED; 2],
            owner: 0,
            epoch: 0,
            tunnel_endpoint: Address::NONE,
            tunnel_family: 0,
            flags: IPCACHE_SERVICE,
            zero: [0; 2],
            slot: 0,
            last_stamp: 0,
        },
        endpoint: None,
    }
}

/// Numbers of a frontend's backends: each keeps its own for as long as it is one.
#[derive(Clone, Debug, Default)]
pub struct Numbers(BTreeMap<Backend, u16>);

impl Numbers {
    /// Those that an entry has.
    #[must_use]
    pub fn of(service: &Service) -> Self {
        let numbered = (0..).zip(&service.backend);
        let known = numbered.filter(|(_, backend)| backend.port != 0);
        Self(known.map(|(number, backend)| (*backend, number)).collect())
    }

    /// Follows a change of the backends. Those that find no number are left out, and counted.
    pub fn follow(&mut self, backends: &BTreeSet<Backend>) -> usize {
        self.0.retain(|backend, _| backends.contains(backend));
        let taken: BTreeSet<u16> = self.0.values().copied().collect();
        let limit = u16::try_from(MAX_BACKENDS).unwrap_or(u16::MAX);
        let mut free = (0..limit).filter(|number| !taken.contains(number));
        let mut left_out = 0;
        for backend in backends {
            if self.0.contains_key(backend) {
                continue;
            }
            match free.next() {
                Some(number) => {
                    self.0.insert(*backend, number);
                }
                None => left_out += 1,
            }
        }
        left_out
    }

    /// The frontend's entry.
    #[must_use]
    pub fn entry(&self, key: ServiceKey, affinity: u32) -> Box<Service> {
        let mut service = Box::new(Service::none(key));
        service.affinity = affinity;
        service.backends = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        let backends: Vec<Backend> = self.0.keys().copied().collect();
        let numbers: Vec<u16> = self.0.values().copied().collect();
        for (backend, number) in &self.0 {
            service.backend[usize::from(*number)] = *backend;
        }
        let per_word = SLOTS_PER_WORD as usize;
        for (slot, backend) in maglev::table(&backends).into_iter().enumerate() {
            service.slots[slot / per_word] |= u64::from(numbers[backend]) << (slot % per_word * 16);
        }
        service
    }
}

#[cfg(test)]
mod tests {
    use super::{Numbers, frontends};
    use crate::store::records::{PodRecord, ServicePort, ServiceRecord, TargetPort};
    use abi::{
        address::Address,
        policy::{TCP, UDP},
        service::{Backend, MAX_BACKENDS},
    };
    use std::collections::{BTreeMap, BTreeSet};

    fn pod(name: &str, app: &str, addresses: [&str; 2], http: u16) -> PodRecord {
        PodRecord {
            namespace: "red".to_owned(),
            name: name.to_owned(),
            labels: BTreeMap::from([("app".to_owned(), app.to_owned())]).into(),
            address: addresses[0].parse().unwrap(),
            second: Some(addresses[1].parse().unwrap()),
            node: "a".into(),
            service_account: "".into(),
            ports: vec![("http".to_owned(), TCP, http)],
            incarnation: 1,
        }
    }

    fn service() -> ServiceRecord {
        let port = |protocol, port, target, node_port| ServicePort {
            protocol,
            port,
            target,
            node_port,
        };
        ServiceRecord {
            namespace: "red".to_owned(),
            name: "web".to_owned(),
            addresses: ["10.96.0.1", "fd00:96::1"].map(|text| text.parse().unwrap()).into(),
            ports: vec![
                port(TCP, 80, TargetPort::Name("http".to_owned()), Some(30080)),
                port(UDP, 53, TargetPort::Number(5353), Some(30053)),
            ],
            selector: [("app".to_owned(), "web".to_owned())].into(),
            backends: vec!["203.0.113.9".parse().unwrap()],
            affinity: 0,
        }
    }

    #[test]
    fn a_frontend_has_the_pods_that_are_selected_in_its_family() {
        let pods = [
            pod("one", "web", ["10.1.0.1", "fd00::1"], 8080),
            pod("two", "web", ["10.1.0.2", "fd00::2"], 8081),
            pod("three", "db", ["10.1.0.3", "fd00::3"], 8080),
            PodRecord {
                namespace: "blue".to_owned(),
                ..pod("four", "web", ["10.1.0.4", "fd00::4"], 8080)
            },
        ];
        let service = service();
        let selected: Vec<&PodRecord> = pods.iter().filter(|pod| service.selects(pod)).collect();
        let is_pod = |address| pods.iter().any(|pod| pod.addresses().any(|its| its == address));
        let frontends = frontends(&service, &selected, &is_pod);
        let of = |address: &str, protocol: u8, port: u16| -> Vec<(String, u16)> {
            let (key, frontend) = frontends
                .iter()
                .find(|(key, _)| {
                    abi::address::ip(key.family, key.address).to_string() == address
                        && key.protocol == protocol
                        && u16::from_be(key.port) == port
                })
                .unwrap();
            let text = |backend: &Backend| {
                let address = abi::address::ip(key.family, backend.address).to_string();
                (address, u16::from_be(backend.port))
            };
            frontend.backends.iter().map(text).collect()
        };
        let pair = |address: &str, port: u16| (address.to_owned(), port);
        let v4 = [pair("10.1.0.1", 8080), pair("10.1.0.2", 8081)];
        // What is no pod has no named ports.
        assert_eq!(of("10.96.0.1", TCP, 80), v4);
        assert_eq!(of("0.0.0.0", TCP, 30080), v4);
        assert_eq!(
            of("fd00:96::1", TCP, 80),
            [pair("fd00::1", 8080), pair("fd00::2", 8081)]
        );
        assert_eq!(
            of("10.96.0.1", UDP, 53),
            [
                pair("10.1.0.1", 5353),
                pair("10.1.0.2", 5353),
                pair("203.0.113.9", 5353)
            ]
        );
        // Nor do its answers to clients outside come by the node that was asked.
        assert_eq!(
            of("0.0.0.0", UDP, 30053),
            [pair("10.1.0.1", 5353), pair("10.1.0.2", 5353)]
        );
        assert_eq!(frontends.len(), 8);
    }

    #[test]
    fn a_backend_keeps_its_number_and_what_does_not_fit_is_counted() {
        let many: BTreeSet<Backend> = (1..=u16::try_from(MAX_BACKENDS).unwrap() + 3)
            .map(|port| Backend {
                address: Address::v4([10, 1, 0, 1]),
                port: port.to_be(),
                zero: 0,
            })
            .collect();
        let mut numbers = Numbers::default();
        assert_eq!(numbers.follow(&many), 3);
        let mut fewer = many.clone();
        let gone = fewer.pop_first().unwrap();
        let before = numbers.clone();
        assert_eq!(numbers.follow(&fewer), 2);
        let kept = before.0.iter().filter(|(backend, _)| **backend != gone);
        for (backend, number) in kept {
            assert_eq!(numbers.0.get(backend), Some(number));
        }
        let distinct: BTreeSet<u16> = numbers.0.values().copied().collect();
        assert_eq!(distinct.len(), numbers.0.len());
    }
}
