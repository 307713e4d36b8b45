//! Loading a policy on all nodes, in two phases over the store.
//!
//! 1. *Prepare*: every node compiles the policy into the side that is not in force, and gives every address its new
//!    identity there. From then on it accepts both identities of an address from the tunnel. It answers.
//! 2. *Commit*: when all have answered, every node flips its generation word, waits for a grace period, and answers.
//! 3. *Retired*: when all have flipped, nodes forget the old side.
//!
//! This is what each node does; `coordinate.rs` has the node that runs the load.
//!
//! A node that refuses or does not answer makes the coordinator write *Aborted* instead of the commit, and nothing has
//! changed anywhere.

use super::{
    Daemon, DaemonError,
    evaluate::{Candidate, micros},
    policy::Side,
};
use crate::{
    identity::IdentityKey,
    stack::Stack,
    store::{
        Collection, Expect, Key, StoreError,
        records::{self, AnswerRecord, POLICY, Phase, PolicyRecord, Prepared, Revision},
    },
};
use abi::{AddressKey, Identity};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// A load that has been in one phase for so much longer than both may take has no coordinator any more.
const ABANDONED: Duration = Duration::from_secs(5);
/// How often what could not be done is tried again.
const MAKE_UP: Duration = Duration::from_secs(5);

/// Key of the one policy record.
pub fn policy_key() -> Key {
    Key::new(Collection::Policy, POLICY)
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

impl Daemon {
    /// Follows the policy record.
    pub(super) async fn policy_seen(&mut self, record: PolicyRecord, revision: u64) -> Result<(), DaemonError> {
        if record.in_force().is_before(&self.active.revision) {
            // What was revoked since a backup must not be allowed again by it.
            tracing::error!(
                "the store has a policy of before the one in force: {}",
                record.in_force().what
            );
            return self.enter_policy().await;
        }
        let at = |record: &PolicyRecord| (record.serial(), record.phase);
        if self.policy.as_ref().is_none_or(|(known, _)| at(known) != at(&record)) {
            self.policy_since = Instant::now();
        }
        self.policy = Some((record.clone(), revision));
        if matches!(record.phase, Phase::Prepare | Phase::Aborted) {
            // A node that can't do even that may still be able to do what comes now.
            if let Err(error) = self.catch_up(&record).await {
                tracing::error!("{error}");
            }
        }
        match record.phase {
            Phase::Prepare => {
                let result = self.prepare(&record.next, false).await;
                self.answer(&record, result).await?;
            }
            Phase::Commit => {
                let result = self.commit(&record.next).await;
                self.answer(&record, result).await?;
            }
            Phase::Retired => {
                if self.active.revision != record.next || self.recompile {
                    // This node was skipped, or came back late.
                    let result = self.commit(&record.next).await;
                    self.answer(&record, result).await?;
                }
                self.drop_aside()?;
            }
            Phase::Aborted => self.drop_aside()?,
        }
        Ok(())
    }

    /// A watch may skip all but the last state of the record: a node that was busy enforces what came before this
    /// change first.
    async fn catch_up(&mut self, record: &PolicyRecord) -> Result<(), DaemonError> {
        if self.active.revision.modules == record.previous.modules && !self.recompile {
            return Ok(());
        }
        self.commit(&record.previous).await?;
        self.drop_aside()
    }

    async fn answer(&self, record: &PolicyRecord, result: Result<Prepared, DaemonError>) -> Result<(), DaemonError> {
        let node = self.config.node.clone();
        let answer = AnswerRecord {
            node: node.clone(),
            serial: record.serial(),
            phase: record.phase,
            result: result.map_err(|error| error.to_string()),
        };
        let key = AnswerRecord::key(record.serial(), record.phase, &node);
        records::put(&*self.store, &key, &answer, Expect::Any).await?;
        Ok(())
    }

    /// Compiles a set of modules into the side that is not in force. On an error that side is as if nothing had been
    /// asked.
    async fn prepare(&mut self, revision: &Revision, committed: bool) -> Result<Prepared, DaemonError> {
        let began = Instant::now();
        self.drop_aside()?;
        let (mut side, change) = self.build(revision, committed).await?;
        let identities: BTreeMap<AddressKey, Identity> = self
            .pods
            .keys()
            .filter_map(|address| Some((*address, side.generation.place(address)?.identity)))
            .collect();
        if !committed {
            self.check_invariants(&mut side, &identities)?;
        }
        side.stack.settle();
        let parity = 1 - self.datapath.parity();
        self.datapath.clear(parity);
        self.datapath.write(parity, &change)?;
        let (identities, local) = side.generation.counts();
        let prepared = Prepared {
            identities: u32::try_from(identities).unwrap_or(u32::MAX),
            local_identities: u32::try_from(local).unwrap_or(u32::MAX),
            cells: side.generation.cell_count(),
            micros: 0,
        };
        self.aside = Some(side);
        if let Err(error) = self.place_all().and_then(|()| self.place_networks()) {
            self.drop_aside()?;
            return Err(error);
        }
        Ok(Prepared {
            micros: micros(began),
            ..prepared
        })
    }

    /// Starts a set of modules, and compiles what they make of the cluster. Nothing is written yet.
    async fn build(
        &mut self,
        revision: &Revision,
        committed: bool,
    ) -> Result<(Side, crate::plan::Change), DaemonError> {
        let candidate = Candidate {
            revision: revision.clone(),
            modules: BTreeMap::new(),
            committed,
            against_flows: false,
        };
        let mut stack = self.start_stack(&candidate).await?;
        let keys = self.identify_all(&mut stack)?;
        let mut identified = Vec::with_capacity(keys.len());
        for (address, key) in keys {
            let identity = self.number(key.as_deref()).await?;
            identified.push((address, identity, self.registry.shared(identity)));
        }
        self.finish_build(revision, stack, identified).await
    }

    /// Numbers the networks, and compiles the matrix.
    async fn finish_build(
        &mut self,
        revision: &Revision,
        stack: Stack,
        identified: Vec<(AddressKey, Identity, Option<Arc<IdentityKey>>)>,
    ) -> Result<(Side, crate::plan::Change), DaemonError> {
        let mut networks = Vec::new();
        for key in Self::network_keys(&stack) {
            let identity = match &key {
                Some(_) => self.number(key.as_ref()).await?,
                None => Identity::WORLD,
            };
            networks.push((identity, self.registry.shared(identity)));
        }
        let compilation = self.compile_matrix(stack, identified, networks)?;
        let side = Side {
            revision: revision.clone(),
            stack: compilation.stack,
            generation: compilation.generation,
            networks: compilation.networks,
        };
        Ok((side, compilation.change))
    }

    /// Puts the prepared side in force. What was in force stays aside until all nodes have switched.
    pub(super) async fn commit(&mut self, revision: &Revision) -> Result<Prepared, DaemonError> {
        let began = Instant::now();
        // Not by serial alone: a store that was made anew gives them out again.
        if self.active.revision == *revision && !self.recompile {
            return Ok(Prepared::default());
        }
        let prepared = !self.recompile && self.aside.as_ref().is_some_and(|aside| aside.revision == *revision);
        if !prepared && let Err(error) = self.prepare(revision, true).await {
            self.out_of_step = Some(format!(
                "change {} ({}) can't be enforced here: {error}",
                revision.serial, revision.what
            ));
            return Err(error);
        }
        if let Some(next) = self.aside.take() {
            let last = std::mem::replace(&mut self.active, next);
            self.aside = Some(last);
            self.datapath.flip()?;
        }
        self.out_of_step = None;
        self.recompile = false;
        let needed = &self.active.revision.modules;
        self.compiled
            .retain(|sha256, _| needed.iter().any(|module| module.sha256 == *sha256));
        self.keep_modules().await;
        self.audit_anew();
        self.note_unplaced();
        tracing::info!(
            "generation {} is in force: {}",
            self.datapath.generation(),
            revision.what
        );
        Ok(Prepared {
            micros: micros(began),
            ..Prepared::default()
        })
    }

    fn drop_aside(&mut self) -> Result<(), DaemonError> {
        if self.aside.take().is_some() {
            self.place_all()?;
            self.place_networks()?;
        }
        Ok(())
    }

    /// Fills the maps for the first time, with the policy that the cluster has in force. Nothing is attached yet.
    pub(super) async fn enforce_from_start(&mut self) -> Result<(), DaemonError> {
        let revision = self
            .policy
            .as_ref()
            .map_or_else(Revision::none, |(record, _)| record.in_force().clone());
        let candidate = Candidate {
            revision: revision.clone(),
            modules: BTreeMap::new(),
            committed: true,
            against_flows: false,
        };
        let mut stack = self.start_stack(&candidate).await?;
        stack.settle();
        let mut identified = Vec::with_capacity(self.pods.keys().len());
        for (address, key) in self.identify_each(&mut stack) {
            match key {
                Ok(key) => {
                    let identity = self.number(key.as_deref()).await?;
                    identified.push((address, identity, self.registry.shared(identity)));
                }
                // One pod must not keep the node down: nothing reaches it.
                Err(error) => {
                    let name = self.pods.get(&address).map(|pod| pod.record.full_name());
                    tracing::error!("{}: {error}", name.unwrap_or_default());
                }
            }
        }
        let (side, change) = self.finish_build(&revision, stack, identified).await?;
        self.active = side;
        let parity = self.datapath.parity();
        self.datapath.write(parity, &change)?;
        self.place_all()?;
        self.place_networks()?;
        self.audit_anew();
        self.note_unplaced();
        Ok(())
    }

    /// Pods that have no place in the policy in force: nothing reaches them until they have.
    fn note_unplaced(&mut self) {
        let unplaced = self
            .pods
            .keys()
            .filter(|address| self.active.generation.place(address).is_none());
        self.unplaced = unplaced.copied().collect();
    }

    /// What could not be done when it should have been is tried again from time to time: pods without a place, a policy
    /// that this node does not enforce, and a tenant's module that has failed.
    pub(super) async fn make_up(&mut self) {
        if self.made_up.elapsed() < MAKE_UP {
            return;
        }
        self.made_up = Instant::now();
        if self.out_of_step.is_some()
            && let Some((record, revision)) = self.policy.clone()
        {
            let caught_up = match record.phase {
                Phase::Commit | Phase::Retired => self.policy_seen(record, revision).await,
                Phase::Aborted => self.catch_up(&record).await,
                // Until that is over what is prepared has the other side.
                Phase::Prepare => Ok(()),
            };
            if let Err(error) = caught_up {
                error.complain("catching up with the cluster's policy");
            }
        }
        for address in std::mem::take(&mut self.unplaced) {
            let Some(pod) = self.pods.get(&address) else { continue };
            let record = pod.record.clone();
            if let Err(error) = self.upsert_pod(record.clone()).await {
                error.complain(&format!("{} has no place in the policy", record.full_name()));
                self.unplaced.insert(address);
            }
        }
        self.retry_services();
        if let Err(error) = self.reopen().await {
            error.complain("asking tenants' modules again");
        }
    }

    /// Asks tenants' modules that have failed again, about all that they may have said nothing of.
    async fn reopen(&mut self) -> Result<(), DaemonError> {
        let tenants = self.active.stack.begin_again();
        if tenants.is_empty() {
            return Ok(());
        }
        let is_its = |key: Option<&IdentityKey>| {
            key.and_then(IdentityKey::tenant)
                .is_some_and(|tenant| tenants.iter().any(|one| one == tenant))
        };
        let its: Vec<_> = self
            .pods
            .iter()
            .filter(|(address, _)| is_its(self.active.stack.key(self.active_identity(address))))
            .map(|(_, pod)| pod.record.clone())
            .collect();
        for record in its {
            self.upsert_pod(record).await?;
        }
        let rows: Vec<Identity> = self
            .active
            .generation
            .local()
            .filter(|identity| is_its(self.active.stack.key(*identity)))
            .collect();
        let Side { stack, generation, .. } = &mut self.active;
        stack.begin();
        let change = tokio::task::block_in_place(|| generation.recompile(&rows, stack))?;
        let parity = self.datapath.parity();
        Ok(self.datapath.write(parity, &change)?)
    }

    /// A coordinator that died leaves a load that nobody finishes: before its commit it is aborted, after that it is
    /// retired, since every node that is alive has switched by then.
    pub(super) async fn finish_abandoned_load(&mut self) {
        let Some((record, revision)) = &self.policy else { return };
        // Coordinators give up in time; this is later, so that they do it themselves. Not by their deadline: clocks differ.
        let late = self.policy_since.elapsed() > 2 * self.config.lease.phase() + ABANDONED;
        let phase = match record.phase {
            Phase::Prepare if late => Phase::Aborted,
            Phase::Commit if late => Phase::Retired,
            _ => return,
        };
        let finished = PolicyRecord {
            phase,
            ..record.clone()
        };
        match records::put(&*self.store, &policy_key(), &finished, Expect::Revision(*revision)).await {
            Ok(_) => tracing::warn!("{} left a policy load unfinished: now {phase:?}", record.coordinator),
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => DaemonError::from(error).complain("finishing a load that was left unfinished"),
        }
    }
}
