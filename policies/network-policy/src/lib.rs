//! Kubernetes `NetworkPolicy`: the objects as users have them are the configuration, as YAML or JSON, one or many.
//!
//! Pods that no policy selects may do everything, as in Kubernetes. To have other modules decide about them, add a
//! document:
//!
//! ```yaml
//! apiVersion: wasmgate.dev/v1
//! kind: Defaults
//! unselected: Pass
//! ```
//!
//! Of a pod, only what the policies make of it matters: which of them select it, which peers of rules it is, and which
//! numbers its named ports have. As sets of numbers in labels, so that pods that differ in nothing else share an
//! identity.
//!
//! A pod and its own node always reach each other. Addresses of other nodes are in no `ipBlock`.

mod object;
#[cfg(test)]
mod tests;

use object::{IpBlock, NumberOrName, Objects, PeerSpec, PolicyType, PortSpec, Transport, Unselected};
use policy_sdk::{
    Action, Bits, Decision, Identity, Labels, Network, Peer, Pod, Policy, PortRange, Protocol, Reserved, Selector,
    Side, Who, any,
};
use std::collections::BTreeMap;

/// See the crate.
pub struct NetworkPolicy {
    policies: Vec<Compiled>,
    /// The different peers that rules name, each with a number.
    terms: Vec<Term>,
    /// The different named ports that rules name.
    names: Vec<(String, Transport)>,
    unselected: Unselected,
}

struct Compiled {
    /// `NAMESPACE/NAME`.
    full_name: String,
    namespace: String,
    selector: Selector,
    ingress: Option<Vec<Rule>>,
    egress: Option<Vec<Rule>>,
}

struct Rule {
    /// For people.
    text: String,
    /// Numbers of peers; none for everybody.
    peers: Option<Vec<usize>>,
    /// None for every port.
    ports: Option<Vec<Ports>>,
}

enum Ports {
    Range(PortRange),
    /// Number among the names, with the protocol.
    Named(usize, Protocol),
}

#[derive(Clone, Debug, PartialEq)]
enum Term {
    /// Pods of one namespace.
    In(String, Selector),
    /// Pods of namespaces with these labels.
    Across(Selector, Selector),
    /// A network, by its name.
    Block(String, IpBlock),
}

/// Policies that a reason names at the most.
const NAMED: usize = 3;

/// What matters of a peer.
struct View {
    ingress: Bits,
    egress: Bits,
    terms: Bits,
    ports: BTreeMap<usize, u16>,
}

impl Policy for NetworkPolicy {
    type Config = serde_json::Value;

    fn new(config: serde_json::Value) -> Result<Self, String> {
        if config.is_null() {
            return Err("give the policies with --config FILE; without any, everything would be allowed".to_owned());
        }
        let objects = Objects::read(config)?;
        let mut policy = Self {
            policies: Vec::new(),
            terms: Vec::new(),
            names: Vec::new(),
            unselected: objects.unselected,
        };
        for object in objects.policies {
            let full_name = format!("{}/{}", object.namespace, object.name);
            let spec = object.spec;
            let isolates = |direction| spec.isolates(direction);
            let ingress = isolates(PolicyType::Ingress).then(|| {
                let rules = spec.ingress.iter().flatten().enumerate();
                let rules = rules.map(|(index, rule)| {
                    let text = format!("NetworkPolicy {full_name}, ingress[{index}]");
                    policy.rule(text, &object.namespace, rule.from.as_deref(), rule.ports.as_deref())
                });
                rules.collect()
            });
            let egress = isolates(PolicyType::Egress).then(|| {
                let rules = spec.egress.iter().flatten().enumerate();
                let rules = rules.map(|(index, rule)| {
                    let text = format!("NetworkPolicy {full_name}, egress[{index}]");
                    policy.rule(text, &object.namespace, rule.to.as_deref(), rule.ports.as_deref())
                });
                rules.collect()
            });
            policy.policies.push(Compiled {
                full_name,
                namespace: object.namespace,
                selector: spec.pod_selector.unwrap_or_default(),
                ingress,
                egress,
            });
        }
        Ok(policy)
    }

    fn networks(&self) -> Vec<Network> {
        let blocks = self.terms.iter().filter_map(|term| match term {
            Term::Block(name, block) => {
                let except = block.except.iter().flatten().copied();
                Some(Network::new(name).with(block.cidr, except))
            }
            Term::In(..) | Term::Across(..) => None,
        });
        blocks.collect()
    }

    fn identify(&self, pod: &Pod) -> Result<Identity, String> {
        let (mut ingress, mut egress, mut terms) = (Bits::default(), Bits::default(), Bits::default());
        for (number, policy) in self.policies.iter().enumerate() {
            if policy.namespace == pod.namespace && policy.selector.matches(&pod.labels) {
                if policy.ingress.is_some() {
                    ingress.insert(number);
                }
                if policy.egress.is_some() {
                    egress.insert(number);
                }
            }
        }
        for (number, term) in self.terms.iter().enumerate() {
            if term.holds(pod) {
                terms.insert(number);
            }
        }
        let identity = ingress.write(Identity::unclaimed(), "ingress");
        let identity = egress.write(identity, "egress");
        let mut identity = terms.write(identity, "peer");
        for (number, (name, transport)) in self.names.iter().enumerate() {
            if let Some(port) = pod.port(name, (*transport).into()) {
                identity = identity.with_label(format!("port{number}"), port.to_string());
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
        let selecting = match side {
            Side::Ingress => &own.ingress,
            Side::Egress => &own.egress,
        };
        let mut decision = Decision::deny();
        let mut isolating = Vec::new();
        for number in selecting.iter() {
            let Some(policy) = self.policies.get(number) else {
                continue;
            };
            isolating.push(policy.full_name.as_str());
            let (rules, receiver) = match side {
                Side::Ingress => (&policy.ingress, own),
                Side::Egress => (&policy.egress, other),
            };
            for rule in rules.iter().flatten() {
                decision = rule.add_to(decision, other, receiver);
            }
        }
        if isolating.is_empty() {
            return match self.unselected {
                Unselected::Allow => Decision::allow().because("no NetworkPolicy selects the pod"),
                Unselected::Pass => Decision::pass().because("no NetworkPolicy selects the pod"),
            };
        }
        let others = isolating.len().saturating_sub(NAMED);
        isolating.truncate(NAMED);
        let names = isolating.join(", ");
        let more = if others > 0 {
            format!(" and {others} more")
        } else {
            String::new()
        };
        decision.reason = format!("no rule of NetworkPolicy {names}{more} allows it").into();
        decision
    }
}

impl NetworkPolicy {
    fn rule(&mut self, text: String, namespace: &str, peers: Option<&[PeerSpec]>, ports: Option<&[PortSpec]>) -> Rule {
        let peers = peers.filter(|peers| !peers.is_empty());
        let ports = ports.filter(|ports| !ports.is_empty());
        Rule {
            text,
            peers: peers.map(|peers| peers.iter().map(|peer| self.term(namespace, peer)).collect()),
            ports: ports.map(|ports| ports.iter().map(|port| self.ports(port)).collect()),
        }
    }

    /// Number of a peer.
    fn term(&mut self, namespace: &str, peer: &PeerSpec) -> usize {
        let term = match (&peer.ip_block, &peer.namespace_selector) {
            (Some(block), _) => Term::Block(block_name(block), block.clone()),
            (None, Some(namespaces)) => Term::Across(namespaces.clone(), peer.pod_selector.clone().unwrap_or_default()),
            (None, None) => Term::In(namespace.to_owned(), peer.pod_selector.clone().unwrap_or_default()),
        };
        let known = self.terms.iter().position(|known| known.is(&term));
        known.unwrap_or_else(|| {
            self.terms.push(term);
            self.terms.len() - 1
        })
    }

    fn ports(&mut self, port: &PortSpec) -> Ports {
        let transport = port.protocol.unwrap_or_default();
        let range = |first, last| Ports::Range(PortRange::new(transport.into(), first, last));
        match &port.port {
            None => range(0, u16::MAX),
            Some(NumberOrName::Number(number)) => range(*number, port.end_port.unwrap_or(*number)),
            Some(NumberOrName::Name(name)) => {
                let named = (name.clone(), transport);
                let known = self.names.iter().position(|known| *known == named);
                let number = known.unwrap_or_else(|| {
                    self.names.push(named);
                    self.names.len() - 1
                });
                Ports::Named(number, transport.into())
            }
        }
    }

    fn view(&self, who: &Who) -> View {
        let mut view = View {
            ingress: Bits::default(),
            egress: Bits::default(),
            terms: Bits::default(),
            ports: BTreeMap::new(),
        };
        match who {
            Who::Pod(identity) => {
                view.ingress = Bits::read(identity, "ingress");
                view.egress = Bits::read(identity, "egress");
                view.terms = Bits::read(identity, "peer");
                view.ports = named_ports(&identity.labels);
            }
            Who::Networks(names) => {
                for (number, term) in self.terms.iter().enumerate() {
                    if matches!(term, Term::Block(name, _) if names.contains(name)) {
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
    /// Adds what it allows with this peer. `receiver` is whose names for ports count.
    fn add_to(&self, decision: Decision, peer: &View, receiver: &View) -> Decision {
        let meant = |terms: &Vec<usize>| terms.iter().any(|term| peer.terms.contains(*term));
        if !self.peers.as_ref().is_none_or(meant) {
            return decision;
        }
        let Some(ports) = &self.ports else {
            return decision.rule(any(), Action::Allow, self.text.clone());
        };
        ports.iter().fold(decision, |decision, ports| match ports {
            Ports::Range(range) => decision.rule(*range, Action::Allow, self.text.clone()),
            Ports::Named(number, protocol) => match receiver.ports.get(number) {
                Some(port) => {
                    let range = PortRange::new(*protocol, *port, *port);
                    decision.rule(range, Action::Allow, self.text.clone())
                }
                None => decision,
            },
        })
    }
}

fn named_ports(labels: &Labels) -> BTreeMap<usize, u16> {
    let named = labels.iter().filter_map(|(key, value)| {
        let number = key.strip_prefix("port")?.parse().ok()?;
        Some((number, value.parse().ok()?))
    });
    named.collect()
}

impl Term {
    /// Whether both mean the same. Blocks do whose names are equal, in whatever order and form they were written.
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Block(one, _), Self::Block(other, _)) => one == other,
            _ => self == other,
        }
    }

    fn holds(&self, pod: &Pod) -> bool {
        match self {
            Self::In(namespace, selector) => *namespace == pod.namespace && selector.matches(&pod.labels),
            Self::Across(namespaces, selector) => {
                namespaces.matches(&pod.namespace_labels) && selector.matches(&pod.labels)
            }
            Self::Block(name, _) => pod.networks.contains(name),
        }
    }
}

/// One name for blocks that are the same.
fn block_name(block: &IpBlock) -> String {
    let mut except: Vec<String> = block
        .except
        .iter()
        .flatten()
        .map(|one| one.trunc().to_string())
        .collect();
    except.sort();
    except.dedup();
    let mut name = block.cidr.trunc().to_string();
    for one in &except {
        name.push('!');
        name.push_str(one);
    }
    if name.len() <= 255 {
        return name;
    }
    // Too long for a name: the first ones, and a hash of all (FNV-1a).
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let end = name.floor_char_boundary(200);
    format!("{}…{hash:016x}", &name[..end])
}

policy_sdk::export!(NetworkPolicy);
