//! Why something passes or not: what each module says, and what the kernel has.

use super::{Daemon, DaemonError};
use crate::{
    api::{EndView, Explain, Explanation, KernelView, SideView, StepView},
    identity::IdentityKey,
    plan::{Action, Ruling, protocol_name},
    stack::Include,
    wasm,
};
use abi::{
    AddressKey, Direction, Identity,
    network::UNROUTED,
    policy::{CELL_ALLOW, CELL_DENY, CELL_PORT_SET, ICMP, ICMPV6, port_key},
};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc};
use tokio::task::block_in_place;

/// One end of a question.
struct Asked {
    view: EndView,
    identity: Identity,
    /// Policy is enforced at this end.
    is_pod: bool,
}

fn wrong<T>(problem: String) -> Result<T, DaemonError> {
    Err(DaemonError::Request(problem))
}

impl Daemon {
    /// Answers who may reach whom, and why.
    pub(super) fn explain(&mut self, what: &Explain) -> Result<Explanation, DaemonError> {
        let from = self.resolve(&what.from, None)?;
        let to = self.resolve(&what.to, what.protocol.zip(what.port))?;
        let key = position(what)?;
        if !from.is_pod && !to.is_pod {
            return wrong(format!(
                "neither {} nor {} is a pod: nothing between them passes through the datapath",
                from.view.name, to.view.name
            ));
        }
        self.active.stack.begin();
        let mut sides = Vec::new();
        if from.is_pod {
            sides.push(self.side(Direction::Egress, &from, &to, key)?);
        }
        if to.is_pod {
            sides.push(self.side(Direction::Ingress, &to, &from, key)?);
        }
        let both = sides.iter().fold(Ruling::all(true), |sum, (_, ruling)| {
            sum.merge(ruling, |one, other| one && other)
        });
        Ok(Explanation {
            from: from.view,
            to: to.view,
            protocol: what.protocol.map(protocol_name),
            port: what.port,
            generation: self.datapath.generation(),
            verdict: key.map(|key| both.at(key)),
            allowed: both.to_string(),
            agrees: sides
                .iter()
                .all(|(side, _)| side.kernel.as_ref().is_none_or(|kernel| kernel.ruling == side.ruling)),
            sides: sides.into_iter().map(|(side, _)| side).collect(),
        })
    }

    /// One end, with what is enforced there: what the kernel holds, or, where another node enforces it, what the modules
    /// say.
    fn side(
        &mut self,
        direction: Direction,
        subject: &Asked,
        peer: &Asked,
        key: Option<u32>,
    ) -> Result<(SideView, Ruling), DaemonError> {
        let stack = &mut self.active.stack;
        let (ruling, steps) = block_in_place(|| {
            let ruling = stack.ruling_of(Include::Enforced, direction, subject.identity, peer.identity)?;
            let steps = match key {
                Some(key) => stack.steps(direction, subject.identity, peer.identity, key)?,
                None => Vec::new(),
            };
            Ok::<_, DaemonError>((ruling, steps))
        })?;
        let mut open = true;
        let steps = steps
            .into_iter()
            .map(|step| {
                let decides = open && !step.audit && step.action != Action::Pass;
                open &= !decides;
                StepView {
                    module: step.module,
                    tier: step.tier.name().to_owned(),
                    tenant: step.tenant,
                    audit: step.audit,
                    subject: step.classes.0,
                    peer: step.classes.1,
                    action: step.action.to_string(),
                    reason: step.reason,
                    decides,
                }
            })
            .collect();
        let kernel = self.kernel(direction, subject.identity, peer.identity)?;
        let (kernel, enforced) = match kernel {
            Some((view, enforced)) => (Some(view), enforced),
            None => (None, ruling.clone()),
        };
        let view = SideView {
            side: match direction {
                Direction::Egress => "egress",
                Direction::Ingress => "ingress",
            }
            .to_owned(),
            subject: subject.view.name.clone(),
            node: subject.view.node.clone(),
            here: self.active.generation.row(subject.identity).is_some(),
            ruling: ruling.to_string(),
            verdict: key.map(|key| enforced.at(key)),
            last_word: open,
            steps,
            kernel,
        };
        Ok((view, enforced))
    }

    /// What the kernel has for a pair at one end, where this node enforces it.
    fn kernel(
        &self,
        direction: Direction,
        subject: Identity,
        peer: Identity,
    ) -> Result<Option<(KernelView, Ruling)>, DaemonError> {
        let generation = &self.active.generation;
        let Some((row, column)) = generation.row(subject).zip(generation.column(peer)) else {
            return Ok(None);
        };
        let parity = self.datapath.parity();
        let index = self.datapath.shape().index(direction, row, column);
        let cell = self.datapath.cell(parity, index);
        let ruling = self.datapath.ruling(parity, cell)?;
        let view = KernelView {
            map: abi::map::POLICY[parity].to_owned(),
            row,
            column,
            index,
            cell: match cell {
                CELL_DENY => "deny".to_owned(),
                CELL_ALLOW => "allow".to_owned(),
                set => format!("port set {}", set - CELL_PORT_SET),
            },
            ruling: ruling.to_string(),
        };
        Ok(Some((view, ruling)))
    }

    /// Who is meant: a pod, an address, a number, a reserved name, or labels of a pod that need not exist. At some ports a
    /// node's address is a service's.
    fn resolve(&mut self, text: &str, port: Option<(u8, u16)>) -> Result<Asked, DaemonError> {
        if let Some(labels) = text.strip_suffix('}') {
            return self.resolve_labels(text, labels);
        }
        let named = text.split_once('/');
        let pod = named.and_then(|(namespace, name)| self.pods.named(namespace, name));
        let address = match (pod, text.parse::<IpAddr>()) {
            (Some((_, pod)), _) => Some(pod.record.address),
            (None, Ok(address)) => Some(address),
            (None, Err(_)) => None,
        };
        if let Some(address) = address {
            return self.resolve_address(address, port);
        }
        let reserved = Identity::RESERVED.iter().find(|(_, name)| *name == text);
        let number = text.parse::<u32>().ok().map(Identity);
        let identity = reserved.map(|(identity, _)| *identity).or(number);
        match identity {
            Some(identity) if identity.reserved_name().is_some() || self.active.stack.key(identity).is_some() => {
                Ok(self.asked(text.to_owned(), identity, None))
            }
            Some(identity) => wrong(format!("nobody has identity {} in the policy in force", identity.0)),
            None => wrong(format!(
                "{text:?} is no pod of this cluster (NAMESPACE/NAME), address, identity, reserved name (host, world, \
                 remote-node, health) and no labels (NAMESPACE{{KEY=VALUE,…}})"
            )),
        }
    }

    fn resolve_address(&self, address: IpAddr, port: Option<(u8, u16)>) -> Result<Asked, DaemonError> {
        let key = AddressKey::from(address);
        if let Some((first, pod)) = self.pods.find(&key) {
            let name = format!("{} ({address})", pod.record.full_name());
            return Ok(self.asked(name, self.active_identity(&first), Some(pod.record.node.to_string())));
        }
        if let Some((service, backends)) = self.service_at(address, port) {
            let backends: Vec<String> = backends.iter().map(ToString::to_string).collect();
            return wrong(format!(
                "{address} is where service {service} is asked, of which policy knows nothing: ask about its backends, at \
                 their ports ({})",
                if backends.is_empty() {
                    "none now".to_owned()
                } else {
                    backends.join(", ")
                }
            ));
        }
        // From what the kernel was given, as the programs would find it.
        let placed = self.datapath.placed().find(|(placed, _)| **placed == key);
        let identity = if placed.is_some() {
            Identity::HOST
        } else if self.is_another_nodes(address) {
            Identity::REMOTE_NODE
        } else {
            match self.datapath.network_of(address) {
                None => Identity::WORLD,
                Some((prefix, entry)) if entry.flags & UNROUTED != 0 => {
                    return wrong(format!(
                        "{address}: nothing is routed to or from addresses of {prefix} that are no pods'"
                    ));
                }
                Some((_, entry)) => entry.identity[self.datapath.parity()],
            }
        };
        Ok(self.asked(address.to_string(), identity, None))
    }

    fn resolve_labels(&mut self, text: &str, labels: &str) -> Result<Asked, DaemonError> {
        let Some((namespace, labels)) = labels.split_once('{') else {
            return wrong(format!("{text:?}: labels are NAMESPACE{{KEY=VALUE,…}}"));
        };
        let labels = labels
            .split(',')
            .filter(|label| !label.is_empty())
            .map(|label| match label.split_once('=') {
                Some((key, value)) => Ok((key.trim().to_owned(), value.trim().to_owned())),
                None => wrong(format!("{label:?}: a label is KEY=VALUE")),
            })
            .collect::<Result<BTreeMap<_, _>, _>>()?;
        let pod = wasm::Pod {
            namespace: namespace.to_owned(),
            name: "explained".to_owned(),
            labels,
            namespace_labels: self.namespace_labels(namespace),
            service_account: String::new(),
            addresses: Vec::new(),
            ports: Vec::new(),
        };
        let key = self.active.identify(pod)?;
        let identity = match &key {
            None => Identity::INIT,
            // A number that only this answer knows, where nobody has it.
            Some(key) => self.registry.clone().assign(key)?,
        };
        self.active.stack.learn(identity, key.map(Arc::new));
        Ok(self.asked(text.to_owned(), identity, None))
    }

    fn asked(&self, name: String, identity: Identity, node: Option<String>) -> Asked {
        let key = self.active.stack.key(identity);
        Asked {
            is_pod: identity == Identity::INIT || key.is_some_and(|key| key.tenant().is_some()),
            view: EndView {
                name,
                identity: identity.0,
                identity_name: key.map_or_else(|| self.registry.name(identity), IdentityKey::to_string),
                node,
            },
            identity,
        }
    }
}

/// Where on the line of ports the question is.
fn position(what: &Explain) -> Result<Option<u32>, DaemonError> {
    match (what.protocol, what.port) {
        (None, None) => Ok(None),
        (None, Some(_)) => wrong("a port needs a protocol".to_owned()),
        (Some(ICMP), None) => Ok(Some(port_key(ICMP, 8))),
        (Some(ICMPV6), None) => Ok(Some(port_key(ICMPV6, 128))),
        (Some(protocol), None) => wrong(format!("{} needs a port", protocol_name(protocol))),
        (Some(protocol @ (ICMP | ICMPV6)), Some(256..)) => wrong(format!(
            "{} has types up to 255 in place of ports",
            protocol_name(protocol)
        )),
        (Some(protocol), Some(port)) => Ok(Some(port_key(protocol, port))),
    }
}
