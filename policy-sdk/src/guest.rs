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

/// Reads a policy's configuration: JSON text, empty where none was given.
pub(crate) fn read_config<C: serde::de::DeserializeOwned>(text: &str) -> Result<C, String> {
    if text.is_empty() {
        // Nothing to set, or a structure all of whose fields have defaults.
        return serde_json::from_str("null")
            .or_else(|_| serde_json::from_str("{}"))
            .map_err(|error| format!("this policy needs a configuration: {error}"));
    }
    serde_json::from_str(text).map_err(|error| format!("configuration: {error}"))
}

#[cfg(target_arch = "wasm32")]
pub use wasm::State;

#[cfg(target_arch = "wasm32")]
mod wasm {
    use super::{bindings::exports::wasmgate::policy::policy as wit, read_config};
    use crate::{Decision, Identity, Labels, Peer, Pod, Policy, Protocol, Reserved};
    use std::cell::{OnceCell, RefCell};

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

    impl<P: Policy> State<P> {
        /// `configure` of the WIT.
        pub fn configure(&self, config: &str) -> Result<(), String> {
            let policy = P::new(read_config(config)?)?;
            self.policy
                .set(policy)
                .map_err(|_| "configure was called twice".to_owned())
        }

        fn policy(&self) -> &P {
            self.policy.get().expect("configure is called first")
        }

        /// `identify` of the WIT.
        pub fn identify(&self, pod: wit::Pod) -> Result<wit::Identity, String> {
            let identity = self.policy().identify(&Pod {
                namespace: pod.namespace,
                name: pod.name,
                labels: labels(pod.labels),
            })?;
            Ok(wit::Identity {
                tenant: identity.tenant,
                labels: identity
                    .labels
                    .into_iter()
                    .map(|(key, value)| wit::Label { key, value })
                    .collect(),
            })
        }

        /// `learn` of the WIT.
        pub fn learn(&self, peers: Vec<wit::Peer>) {
            self.peers.borrow_mut().extend(peers.into_iter().map(peer));
        }

        /// `decide` of the WIT.
        pub fn decide(&self, from: u32, to: &[u32]) -> wit::Row {
            let peers = self.peers.borrow();
            let mut decisions: Vec<Decision> = Vec::new();
            let cells = to
                .iter()
                .map(|to| {
                    let decision = self.policy().decide(&peers[from as usize], &peers[*to as usize]);
                    // Rows have few distinct decisions, so a search through them beats a hash.
                    let known = decisions.iter().position(|known| *known == decision);
                    let index = known.unwrap_or_else(|| {
                        decisions.push(decision);
                        decisions.len() - 1
                    });
                    u16::try_from(index).expect("fewer than 65,536 different decisions in a row")
                })
                .collect();
            wit::Row {
                decisions: decisions.into_iter().map(decision).collect(),
                cells,
            }
        }
    }

    fn labels(labels: Vec<wit::Label>) -> Labels {
        labels.into_iter().map(|label| (label.key, label.value)).collect()
    }

    fn peer(peer: wit::Peer) -> Peer {
        match peer {
            wit::Peer::Pod(identity) => Peer::Pod(Identity {
                tenant: identity.tenant,
                labels: labels(identity.labels),
            }),
            wit::Peer::Reserved(reserved) => Peer::Reserved(match reserved {
                wit::Reserved::Host => Reserved::Host,
                wit::Reserved::World => Reserved::World,
                wit::Reserved::Health => Reserved::Health,
                wit::Reserved::Init => Reserved::Init,
                wit::Reserved::RemoteNode => Reserved::RemoteNode,
            }),
        }
    }

    fn decision(decision: Decision) -> wit::Decision {
        match decision {
            Decision::Allow => wit::Decision::Allow,
            Decision::Deny => wit::Decision::Deny,
            Decision::Pass => wit::Decision::Pass,
            Decision::Ports(ranges) => wit::Decision::Ports(
                ranges
                    .into_iter()
                    .map(|range| wit::PortRange {
                        protocol: match range.protocol {
                            Protocol::Any => wit::Protocol::Any,
                            Protocol::Icmp => wit::Protocol::Icmp,
                            Protocol::Tcp => wit::Protocol::Tcp,
                            Protocol::Udp => wit::Protocol::Udp,
                            Protocol::Sctp => wit::Protocol::Sctp,
                        },
                        first: range.first,
                        last: range.last,
                    })
                    .collect(),
            ),
        }
    }
}
