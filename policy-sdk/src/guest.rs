//! Glue between [`Policy`](crate::Policy) and the WIT world, for [`export!`](crate::export).

#[cfg(target_arch = "wasm32")]
#[expect(missing_docs, reason = "generated from the WIT, where it is documented")]
#[allow(clippy::pedantic, reason = "generated code")]
pub mod bindings {
    wit_bindgen::generate!({
        world: "module",
        path: "wit",
        pub_export_macro: true,
    });
}

#[cfg(target_arch = "wasm32")]
pub use wasm::State;

#[cfg(target_arch = "wasm32")]
mod wasm {
    use super::bindings::exports::wasmgate::policy::policy as wit;
    use crate::{
        Action, Decision, Identity, Labels, NamedPort, Peer, Placement, Pod, Policy, PortRange, Protocol, Reserved,
        Side, Tier, Who, config::read_config,
    };
    use std::{
        cell::{OnceCell, RefCell},
        collections::HashMap,
    };

    /// A module's state: the policy, and the peers that it has learned.
    pub struct State<P> {
        policy: OnceCell<P>,
        peers: RefCell<Vec<Peer>>,
    }

    impl<P> Default for State<P> {
        fn default() -> Self {
            Self {
                policy: OnceCell::new(),
                peers: RefCell::default(),
            }
        }
    }

    /// Rows have few distinct decisions, and neighbours are often equal: a search through so many beats a hash.
    const SEARCHED: usize = 8;

    impl<P: Policy> State<P> {
        /// `configure` of the WIT.
        pub fn configure(&self, config: &str, placement: wit::Placement) -> Result<(), String> {
            std::panic::set_hook(Box::new(|panic| crate::error!("{panic}")));
            let placement = Placement {
                name: placement.name,
                tier: match placement.tier {
                    wit::Tier::Admin => Tier::Admin,
                    wit::Tier::Tenant => Tier::Tenant,
                    wit::Tier::Baseline => Tier::Baseline,
                },
                tenant: placement.tenant,
            };
            let policy = P::placed(read_config(config)?, &placement)?;
            self.policy
                .set(policy)
                .map_err(|_| "configure was called twice".to_owned())
        }

        fn policy(&self) -> &P {
            self.policy.get().expect("configure is called first")
        }

        /// `networks` of the WIT.
        pub fn networks(&self) -> Vec<wit::Network> {
            let block = |block: &crate::AddressBlock| wit::AddressBlock {
                cidr: block.cidr.to_string(),
                except: block.except.iter().map(ToString::to_string).collect(),
            };
            let networks = self.policy().networks();
            networks
                .into_iter()
                .map(|network| wit::Network {
                    blocks: network.blocks.iter().map(block).collect(),
                    name: network.name,
                })
                .collect()
        }

        /// `identify` of the WIT.
        pub fn identify(&self, pods: Vec<wit::Pod>) -> Vec<Result<wit::Class, String>> {
            pods.into_iter()
                .map(|one| {
                    let identity = self.policy().identify(&pod(one))?;
                    Ok(wit::Class {
                        tenant: Some(identity.tenant).filter(|tenant| !tenant.is_empty()),
                        labels: identity
                            .labels
                            .into_iter()
                            .map(|(key, value)| wit::Label { key, value })
                            .collect(),
                    })
                })
                .collect()
        }

        /// `learn` of the WIT.
        pub fn learn(&self, peers: Vec<wit::Peer>) {
            self.peers.borrow_mut().extend(peers.into_iter().map(peer));
        }

        /// `decide` of the WIT.
        pub fn decide(&self, side: wit::Side, subjects: &[u32], peers: &[u32]) -> wit::Matrix {
            let known = self.peers.borrow();
            let side = match side {
                wit::Side::Egress => Side::Egress,
                wit::Side::Ingress => Side::Ingress,
            };
            let mut decisions: Vec<Decision> = Vec::new();
            let mut numbers: HashMap<Decision, usize> = HashMap::new();
            let mut last = 0;
            let mut cells = Vec::with_capacity(subjects.len() * peers.len());
            for subject in subjects {
                let subject = &known[*subject as usize];
                for peer in peers {
                    let decision = self.policy().decide_side(side, subject, &known[*peer as usize]);
                    if !decisions.get(last).is_some_and(|known| known.is(&decision)) {
                        let head = &decisions[..decisions.len().min(SEARCHED)];
                        let number = head.iter().position(|one| one.is(&decision));
                        last = number
                            .or_else(|| numbers.get(&decision).copied())
                            .unwrap_or(decisions.len());
                    }
                    if last == decisions.len() {
                        if last >= SEARCHED {
                            numbers.insert(decision.clone(), last);
                        }
                        decisions.push(decision);
                    }
                    cells.push(u16::try_from(last).expect("fewer than 65,536 different decisions at once"));
                }
            }
            wit::Matrix {
                decisions: decisions.into_iter().map(to_decision).collect(),
                cells,
            }
        }
    }

    fn labels(labels: Vec<wit::Label>) -> Labels {
        labels.into_iter().map(|label| (label.key, label.value)).collect()
    }

    fn pod(pod: wit::Pod) -> Pod {
        Pod {
            namespace: pod.namespace,
            name: pod.name,
            labels: labels(pod.labels),
            namespace_labels: labels(pod.namespace_labels),
            service_account: pod.service_account,
            addresses: pod
                .addresses
                .iter()
                .filter_map(|address| address.parse().ok())
                .collect(),
            ports: pod
                .ports
                .into_iter()
                .map(|port| NamedPort {
                    name: port.name,
                    port: PortRange::new(protocol(port.protocol), port.port, port.port),
                })
                .collect(),
            networks: pod.networks,
        }
    }

    const fn protocol(protocol: wit::Protocol) -> Protocol {
        match protocol {
            wit::Protocol::Any => Protocol::Any,
            wit::Protocol::Icmp => Protocol::Icmp,
            wit::Protocol::Tcp => Protocol::Tcp,
            wit::Protocol::Udp => Protocol::Udp,
            wit::Protocol::Sctp => Protocol::Sctp,
            wit::Protocol::Icmpv6 => Protocol::Icmpv6,
        }
    }

    const fn to_protocol(protocol: Protocol) -> wit::Protocol {
        match protocol {
            Protocol::Any => wit::Protocol::Any,
            Protocol::Icmp => wit::Protocol::Icmp,
            Protocol::Tcp => wit::Protocol::Tcp,
            Protocol::Udp => wit::Protocol::Udp,
            Protocol::Sctp => wit::Protocol::Sctp,
            Protocol::Icmpv6 => wit::Protocol::Icmpv6,
        }
    }

    fn peer(peer: wit::Peer) -> Peer {
        Peer::from(match peer {
            wit::Peer::Pod(identity) => Who::Pod(Identity {
                tenant: identity.tenant,
                labels: labels(identity.labels),
            }),
            wit::Peer::Networks(names) => Who::Networks(names),
            wit::Peer::Unknown(tenant) => Who::Unknown(tenant),
            wit::Peer::Reserved(reserved) => Who::Reserved(match reserved {
                wit::Reserved::Host => Reserved::Host,
                wit::Reserved::World => Reserved::World,
                wit::Reserved::Health => Reserved::Health,
                wit::Reserved::Init => Reserved::Init,
                wit::Reserved::RemoteNode => Reserved::RemoteNode,
            }),
        })
    }

    const fn action(action: Action) -> wit::Action {
        match action {
            Action::Allow => wit::Action::Allow,
            Action::Deny => wit::Action::Deny,
            Action::Pass => wit::Action::Pass,
        }
    }

    fn to_decision(decision: Decision) -> wit::Decision {
        let rule = |rule: crate::Rule| wit::Rule {
            ports: wit::PortRange {
                protocol: to_protocol(rule.ports.protocol),
                first: rule.ports.first,
                last: rule.ports.last,
            },
            action: action(rule.action),
            reason: rule.reason.into_owned(),
        };
        wit::Decision {
            rules: decision.rules.into_iter().map(rule).collect(),
            otherwise: action(decision.otherwise),
            reason: decision.reason.into_owned(),
        }
    }
}
