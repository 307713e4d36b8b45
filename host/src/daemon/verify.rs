//! Invariants: checked for a policy before it is loaded, and for the one in force.

use super::{Daemon, DaemonError, policy::Side};
use crate::{
    api::Verification,
    identity::{IdentityKey, Labels},
    invariant::{End, Invariants, Violation},
    survey::Survey,
};
use abi::{AddressKey, Identity};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};
use tokio::task::block_in_place;

impl Daemon {
    /// The invariants of the configuration hold for a policy, or it is refused.
    pub(super) fn check_invariants(
        &self,
        side: &mut Side,
        identities: &BTreeMap<AddressKey, Identity>,
    ) -> Result<(), DaemonError> {
        let Some(path) = &self.config.invariants else {
            return Ok(());
        };
        let unreadable =
            |error: &dyn std::fmt::Display| DaemonError::Request(format!("invariants {}: {error}", path.display()));
        let text = fs::read_to_string(path).map_err(|error| unreadable(&error))?;
        let invariants = Invariants::parse(&text).map_err(|error| unreadable(&error))?;
        let broken = self.verify(&invariants, side, identities)?;
        for one in invariants.about_nobody(&self.ends(side, identities)) {
            tracing::warn!(
                "invariants {}: `{one}` is about nobody: it can't be broken",
                path.display()
            );
        }
        match broken.first() {
            None => Ok(()),
            Some(first) => Err(DaemonError::Request(format!(
                "the policy breaks {} of the invariants in {}: {first}",
                broken.len(),
                path.display()
            ))),
        }
    }

    /// All counterexamples to invariants under one side's policy.
    pub(super) fn verify(
        &self,
        invariants: &Invariants,
        side: &mut Side,
        identities: &BTreeMap<AddressKey, Identity>,
    ) -> Result<Vec<Violation>, DaemonError> {
        let ends = self.ends(side, identities);
        side.stack.begin();
        block_in_place(|| {
            invariants.check(&ends, |from, to| {
                let survey = Survey::between(&mut side.stack, from, to)?;
                Ok(from
                    .iter()
                    .flat_map(|from| to.iter().map(|to| survey.ruling(*from, *to)).collect::<Vec<_>>())
                    .collect())
            })
        })
    }

    /// All ends that an invariant may be about.
    pub(super) fn ends(&self, side: &Side, identities: &BTreeMap<AddressKey, Identity>) -> Vec<End> {
        let mut ends: Vec<End> = Identity::RESERVED
            .iter()
            .filter(|(identity, _)| *identity != Identity::INIT)
            .map(|(identity, name)| End {
                name: (*name).to_owned(),
                identity: *identity,
                pod: None,
                labels: BTreeMap::new(),
                networks: BTreeSet::new(),
            })
            .collect();
        for (identity, names) in side.networks.iter().zip(side.stack.networks().memberships()) {
            if *identity != Identity::WORLD {
                ends.push(End {
                    name: IdentityKey::Networks(names.clone()).to_string(),
                    identity: *identity,
                    pod: None,
                    labels: BTreeMap::new(),
                    networks: names.clone(),
                });
            }
        }
        for (address, pod) in self.pods.iter() {
            let Some(identity) = identities.get(address) else {
                continue;
            };
            let tenant = side.stack.key(*identity).and_then(IdentityKey::tenant);
            let tenant = tenant.unwrap_or(&pod.record.namespace).to_owned();
            ends.push(End {
                name: pod.record.full_name(),
                identity: *identity,
                pod: Some((tenant, pod.record.namespace.clone())),
                labels: Labels::clone(&pod.record.labels),
                networks: pod
                    .record
                    .addresses()
                    .flat_map(|address| side.stack.networks().holding(address).clone())
                    .collect(),
            });
        }
        ends
    }

    /// Checks invariants against the policy in force.
    pub(super) fn policy_verify(&mut self, text: &str) -> Result<Verification, DaemonError> {
        let invariants = Invariants::parse(text).map_err(|error| DaemonError::Request(error.to_string()))?;
        let identities: BTreeMap<AddressKey, Identity> = self
            .pods
            .keys()
            .map(|address| (*address, self.active_identity(address)))
            .collect();
        // Out of `self`, which is asked for the pods meanwhile.
        let mut side = std::mem::replace(&mut self.active, Side::empty(self.datapath.shape()));
        let broken = self.verify(&invariants, &mut side, &identities);
        let vain = invariants.about_nobody(&self.ends(&side, &identities));
        self.active = side;
        let broken = broken?;
        Ok(Verification {
            invariants: invariants.0.len(),
            identities: identities.values().collect::<BTreeSet<_>>().len(),
            broken: broken.iter().map(ToString::to_string).collect(),
            about_nobody: vain,
        })
    }
}
