//! `ClusterNetworkPolicy` of the network-policy-api (`policy.networking.k8s.io/v1alpha2`): the objects as users have them
//! are the configuration, as YAML or JSON, one or many.
//!
//! It is loaded twice, once in each tier that such policies have, with the same file: in the tier `admin` it takes the
//! objects of tier Admin, in the tier `baseline` those of tier Baseline. Between the two stands `network-policy` in the
//! tier `tenant`, with `unselected: Pass`. What nobody decides is allowed in the baseline, as Kubernetes has it.
//!
//! ```console
//! # hostd load-policy cluster-network-policy.wasm --name cnp-admin --tier admin --config objects.yaml
//! # hostd load-policy network-policy.wasm --name np --tier tenant --config policies.yaml
//! # hostd load-policy cluster-network-policy.wasm --name cnp-baseline --tier baseline --config objects.yaml
//! ```

mod object;
#[cfg(test)]
mod tests;

use object::{NamespacedPod, Object, Pods, ProtocolSpec};
use policy_sdk::{
    Action, Bits, Decision, Identity, Labels, Network, Peer, Placement, Pod, Policy, PortRange, Protocol, Reserved,
    Side, Tier, Who, any,
};
use std::collections::BTreeMap;

/// See the crate.
pub struct ClusterNetworkPolicy {
    /// By rising priority, then by name.
    policies: Vec<Compiled>,
    /// The different sets of pods and networks that anything names, each with a number.
    terms: Vec<Term>,
    /// The different named ports.
    names: Vec<String>,
    /// What no rule decides.
    otherwise: Action,
}

struct Compiled {
    subject: usize,
    ingress: Vec<Rule>,
    egress: Vec<Rule>,
}

struct Rule {
    text: String,
    action: Action,
    peers: Vec<usize>,
    /// None for every port.
    ports: Option<Vec<Ports>>,
}

enum Ports {
    Range(PortRange),
    /// Number among the names.
    Named(usize),
}

#[derive(Clone, Debug, PartialEq)]
enum Term {
    Pods(NamespacedPod),
    Network(String),
}

struct View {
    terms: Bits,
    ports: BTreeMap<usize, Vec<(Protocol, u16)>>,
}

impl Policy for ClusterNetworkPolicy {
    type Config = serde_json::Value;

    fn new(config: serde_json::Value) -> Result<Self, String> {
        Self::of(config, object::Tier::Admin)
    }

    fn placed(config: serde_json::Value, placement: &Placement) -> Result<Self, String> {
        match placement.tier {
            Tier::Admin => Self::of(config, object::Tier::Admin),
            Tier::Baseline => Self::of(config, object::Tier::Baseline),
            Tier::Tenant => Err("load it in the tier `admin` or `baseline` (--tier)".to_owned()),
        }
    }

    fn networks(&self) -> Vec<Network> {
        let networks = self.terms.iter().filter_map(|term| match term {
            Term::Network(cidr) => Some(Network::new(cidr).with(cidr.parse().ok()?, [])),
            Term::Pods(_) => None,
        });
        networks.collect()
    }

    fn identify(&self, pod: &Pod) -> Result<Identity, String> {
        let mut terms = Bits::default();
        for (number, term) in self.terms.iter().enumerate() {
            let holds = match term {
                Term::Pods(pods) => {
                    pods.namespace_selector.matches(&pod.namespace_labels) && pods.pod_selector.matches(&pod.labels)
                }
                Term::Network(name) => pod.networks.contains(name),
            };
            if holds {
                terms.insert(number);
            }
        }
        let mut identity = terms.write(Identity::unclaimed(), "set");
        for (number, name) in self.names.iter().enumerate() {
            for (kind, protocol) in [('t', Protocol::Tcp), ('u', Protocol::Udp), ('s', Protocol::Sctp)] {
                if let Some(port) = pod.port(name, protocol) {
                    identity = identity.with_label(format!("port{number}{kind}"), port.to_string());
                }
            }
        }
        Ok(identity)
    }

    fn decide_side(&self, side: Side, subject: &Peer, peer: &Peer) -> Decision {
        if peer.is(Reserved::Host) {
            return Decision::allow().because("a pod and its node always reach each other");
        }
        let own = subject.derived(|who| self.view(who));
        let other = peer.derived(|who| self.view(who));
        let mut decision = Decision::all(self.otherwise);
        decision.reason = match self.otherwise {
            Action::Allow => "no ClusterNetworkPolicy says otherwise".into(),
            _ => "no ClusterNetworkPolicy of the tier says anything".into(),
        };
        for policy in self.policies.iter().filter(|policy| own.terms.contains(policy.subject)) {
            let (rules, receiver) = match side {
                Side::Ingress => (&policy.ingress, own),
                Side::Egress => (&policy.egress, other),
            };
            for rule in rules {
                // Which addresses other nodes have is not known here: what denies networks denies them, too.
                let maybe = rule.action == Action::Deny
                    && peer.is(Reserved::RemoteNode)
                    && rule
                        .peers
                        .iter()
                        .any(|term| matches!(self.terms[*term], Term::Network(_)));
                if maybe || rule.peers.iter().any(|term| other.terms.contains(*term)) {
                    decision = rule.add_to(decision, receiver);
                }
            }
        }
        decision
    }
}

impl ClusterNetworkPolicy {
    fn of(config: serde_json::Value, tier: object::Tier) -> Result<Self, String> {
        let mut objects = object::read(config)?;
        objects.retain(|object| object.spec.tier == tier);
        objects.sort_by(|one, other| (one.spec.priority, &one.name).cmp(&(other.spec.priority, &other.name)));
        let mut policy = Self {
            policies: Vec::new(),
            terms: Vec::new(),
            names: Vec::new(),
            otherwise: match tier {
                object::Tier::Admin => Action::Pass,
                object::Tier::Baseline => Action::Allow,
            },
        };
        for object in objects {
            policy.add(object);
        }
        Ok(policy)
    }

    fn add(&mut self, object: Object) {
        let Object { name, spec } = object;
        let text = |rule: &str, field: &str, index: usize| {
            let name = format!("ClusterNetworkPolicy {name}, {field}[{index}]");
            if rule.is_empty() {
                name
            } else {
                format!("{name} ({rule})")
            }
        };
        let subject = self.pods(&spec.subject);
        let mut ingress = Vec::new();
        for (index, rule) in spec.ingress.into_iter().flatten().enumerate() {
            ingress.push(Rule {
                text: text(&rule.name, "ingress", index),
                action: rule.action.into(),
                peers: rule.from.iter().map(|peer| self.pods(peer)).collect(),
                ports: self.ports(rule.protocols),
            });
        }
        let mut egress = Vec::new();
        for (index, rule) in spec.egress.into_iter().flatten().enumerate() {
            let mut peers = Vec::new();
            for peer in &rule.to {
                peers.extend(peer.pods().map(|pods| self.pods(&pods)));
                for cidr in peer.networks.iter().flatten() {
                    peers.push(self.term(Term::Network(cidr.trunc().to_string())));
                }
            }
            egress.push(Rule {
                text: text(&rule.name, "egress", index),
                action: rule.action.into(),
                peers,
                ports: self.ports(rule.protocols),
            });
        }
        self.policies.push(Compiled {
            subject,
            ingress,
            egress,
        });
    }

    fn term(&mut self, term: Term) -> usize {
        let known = self.terms.iter().position(|known| *known == term);
        known.unwrap_or_else(|| {
            self.terms.push(term);
            self.terms.len() - 1
        })
    }

    fn pods(&mut self, pods: &Pods) -> usize {
        let term = match (&pods.namespaces, &pods.pods) {
            (Some(namespaces), _) => NamespacedPod {
                namespace_selector: namespaces.clone(),
                pod_selector: policy_sdk::Selector::default(),
            },
            (None, Some(pods)) => pods.clone(),
            // Refused when it was read.
            (None, None) => NamespacedPod {
                namespace_selector: policy_sdk::Selector::label("", ""),
                pod_selector: policy_sdk::Selector::default(),
            },
        };
        self.term(Term::Pods(term))
    }

    fn ports(&mut self, protocols: Option<Vec<ProtocolSpec>>) -> Option<Vec<Ports>> {
        let protocols = protocols?;
        let ports = protocols
            .iter()
            .map(|one| match (one.range(), &one.destination_named_port) {
                (Some((protocol, first, last)), _) => Ports::Range(PortRange::new(protocol, first, last)),
                (None, name) => {
                    let name = name.clone().unwrap_or_default();
                    let known = self.names.iter().position(|known| *known == name);
                    Ports::Named(known.unwrap_or_else(|| {
                        self.names.push(name);
                        self.names.len() - 1
                    }))
                }
            });
        Some(ports.collect())
    }

    fn view(&self, who: &Who) -> View {
        let mut view = View {
            terms: Bits::default(),
            ports: BTreeMap::new(),
        };
        match who {
            Who::Pod(identity) => {
                view.terms = Bits::read(identity, "set");
                view.ports = named_ports(&identity.labels);
            }
            Who::Networks(names) => {
                for (number, term) in self.terms.iter().enumerate() {
                    if matches!(term, Term::Network(name) if names.contains(name)) {
                        view.terms.insert(number);
                    }
                }
            }
            Who::Reserved(_) | Who::Unknown(_) => {}
        }
        view
    }
}

impl Rule {
    fn add_to(&self, decision: Decision, receiver: &View) -> Decision {
        let Some(ports) = &self.ports else {
            return decision.rule(any(), self.action, self.text.clone());
        };
        ports.iter().fold(decision, |decision, ports| match ports {
            Ports::Range(range) => decision.rule(*range, self.action, self.text.clone()),
            Ports::Named(number) => {
                let numbers = receiver.ports.get(number).into_iter().flatten();
                numbers.fold(decision, |decision, (protocol, port)| {
                    decision.rule(PortRange::new(*protocol, *port, *port), self.action, self.text.clone())
                })
            }
        })
    }
}

fn named_ports(labels: &Labels) -> BTreeMap<usize, Vec<(Protocol, u16)>> {
    let mut named: BTreeMap<usize, Vec<(Protocol, u16)>> = BTreeMap::new();
    for (key, value) in labels {
        let Some(key) = key.strip_prefix("port") else { continue };
        let Some((number, kind)) = key.split_at_checked(key.len().saturating_sub(1)) else {
            continue;
        };
        let protocol = match kind {
            "t" => Protocol::Tcp,
            "u" => Protocol::Udp,
            _ => Protocol::Sctp,
        };
        if let (Ok(number), Ok(port)) = (number.parse(), value.parse()) {
            named.entry(number).or_default().push((protocol, port));
        }
    }
    named
}

policy_sdk::export!(ClusterNetworkPolicy);
