//! What a policy would change: pairs of identities, and flows that are tracked now.

use super::{Daemon, DaemonError, policy::Side};
use crate::{
    api::{ChangedPair, FlowView},
    plan::{Ruling, protocol_name},
    survey::{Survey, is_end},
};
use abi::{AddressKey, Identity, policy::port_key};
use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};
use tokio::task::block_in_place;

/// Pairs that a report lists at the most.
const MAX_CHANGED: usize = 10_000;
/// Flows that it lists at the most.
const MAX_FLOWS: usize = 1000;

impl Daemon {
    /// Pairs whose verdict changes. Pods are compared by what they were and will be: pods that share both are one.
    pub(super) fn changed_pairs(
        &mut self,
        next: &BTreeMap<AddressKey, Identity>,
        side: &mut Side,
        name: &impl Fn(Identity) -> String,
    ) -> Result<Vec<ChangedPair>, DaemonError> {
        let mut classes: BTreeSet<(Identity, Identity)> = next
            .iter()
            .map(|(address, identity)| (self.active_identity(address), *identity))
            .collect();
        for reserved in [Identity::HOST, Identity::REMOTE_NODE, Identity::WORLD, Identity::HEALTH] {
            classes.insert((reserved, reserved));
        }
        for (index, new) in side.networks.iter().enumerate() {
            // What an address of these networks was before, by any of their prefixes.
            let partition = side.stack.networks();
            let before = partition
                .prefixes()
                .find(|prefix| partition.find(*prefix) == index)
                .and_then(|prefix| {
                    let old = self.active.stack.networks().find(prefix);
                    self.active.networks.get(old).copied()
                });
            classes.insert((before.unwrap_or(Identity::WORLD), *new));
        }
        let olds: Vec<Identity> = classes
            .iter()
            .map(|(old, _)| *old)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let news: Vec<Identity> = classes
            .iter()
            .map(|(_, new)| *new)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        self.active.stack.begin();
        let before = block_in_place(|| Survey::new(&mut self.active.stack, &olds))?;
        side.stack.begin();
        let after = block_in_place(|| Survey::new(&mut side.stack, &news))?;
        let mut changed = Vec::new();
        for from in &classes {
            for to in &classes {
                // Between two that are no pods nothing passes through the datapath.
                if !is_end(&side.stack, from.1) && !is_end(&side.stack, to.1) {
                    continue;
                }
                let (was, will) = (before.ruling(from.0, to.0), after.ruling(from.1, to.1));
                if changed.len() < MAX_CHANGED && was != will && was.to_string() != will.to_string() {
                    changed.push(ChangedPair {
                        from: name(from.1),
                        to: name(to.1),
                        before: was.to_string(),
                        after: will.to_string(),
                    });
                }
            }
        }
        changed.sort_by(|one, other| (&one.from, &one.to).cmp(&(&other.from, &other.to)));
        changed.dedup();
        Ok(changed)
    }

    /// What a new policy would no longer let pass of the flows that are tracked on this node.
    pub(super) fn changed_flows(
        &mut self,
        next: &BTreeMap<AddressKey, Identity>,
        side: &mut Side,
    ) -> Result<Vec<FlowView>, DaemonError> {
        let flows = self.datapath.flows()?;
        side.stack.begin();
        let mut changed = BTreeMap::new();
        let mut rulings: BTreeMap<(Identity, Identity), Ruling> = BTreeMap::new();
        for flow in flows {
            let identity = |address: &AddressKey| {
                let pod = self.pods.find(address);
                match pod.and_then(|(first, _)| next.get(&first)) {
                    Some(identity) => *identity,
                    None => self.outside_identity(side, address),
                }
            };
            let (from, to) = (identity(&flow.from), identity(&flow.to));
            let ruling = match rulings.entry((from, to)) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => {
                    let survey = block_in_place(|| Survey::between(&mut side.stack, &[from], &[to]))?;
                    place.insert(survey.ruling(from, to))
                }
            };
            if ruling.at(port_key(flow.protocol, flow.port)) {
                continue;
            }
            let name = |address: &AddressKey| match self.pods.find(address) {
                Some((_, pod)) => format!("{} ({})", pod.record.full_name(), address.ip()),
                None => address.ip().to_string(),
            };
            let view = FlowView {
                from: name(&flow.from),
                to: name(&flow.to),
                protocol: protocol_name(flow.protocol),
                port: flow.port,
                flows: 0,
            };
            if changed.len() < MAX_FLOWS {
                let key = (view.from.clone(), view.to.clone(), flow.protocol, flow.port);
                changed.entry(key).or_insert(view).flows += 1;
            }
        }
        Ok(changed.into_values().collect())
    }

    /// What one side makes of an address that is no pod's.
    fn outside_identity(&self, side: &Side, address: &AddressKey) -> Identity {
        let ip = address.ip();
        if self.addresses.is_own(ip) {
            Identity::HOST
        } else if self.is_another_nodes(ip) {
            Identity::REMOTE_NODE
        } else {
            let index = side.stack.networks().find(ip.into());
            side.networks.get(index).copied().unwrap_or(Identity::WORLD)
        }
    }
}
