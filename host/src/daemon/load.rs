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
    policy::{Asked, Side},
};
use crate::store::{
    Collection, Expect, Key, StoreError,
    records::{self, AnswerRecord, ModuleRecord, POLICY, Phase, PolicyRecord, Prepared},
};
use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

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
        self.policy = Some((record.clone(), revision));
        if matches!(record.phase, Phase::Prepare | Phase::Aborted) {
            // A node that can't do even that may still be able to do what comes now.
            if let Err(error) = self.catch_up(&record).await {
                tracing::error!("{error}");
            }
        }
        match record.phase {
            Phase::Prepare => {
                let result = self.prepare(&record).await;
                self.answer(&record, result).await?;
            }
            Phase::Commit => {
                let result = self.commit(&record).await;
                self.answer(&record, result).await?;
            }
            Phase::Retired => {
                if self.active.serial != record.serial {
                    // This node was skipped, or came back late.
                    let result = self.commit(&record).await;
                    self.answer(&record, result).await?;
                }
                self.drop_aside()?;
            }
            Phase::Aborted => self.drop_aside()?,
        }
        Ok(())
    }

    /// A watch may skip all but the last state of the record: a node that was busy enforces what came before this
    /// load first.
    async fn catch_up(&mut self, record: &PolicyRecord) -> Result<(), DaemonError> {
        let Some(module) = record.previous.clone() else {
            return Ok(());
        };
        if self.active.module.as_ref() == Some(&module) {
            return Ok(());
        }
        let before = PolicyRecord {
            serial: record.serial - 1,
            phase: Phase::Commit,
            module,
            ..record.clone()
        };
        self.commit(&before).await?;
        self.drop_aside()
    }

    async fn answer(&self, record: &PolicyRecord, result: Result<Prepared, DaemonError>) -> Result<(), DaemonError> {
        let node = self.config.node.clone();
        let answer = AnswerRecord {
            node: node.clone(),
            serial: record.serial,
            phase: record.phase,
            result: result.map_err(|error| error.to_string()),
        };
        let key = AnswerRecord::key(record.serial, record.phase, &node);
        records::put(&*self.store, &key, &answer, Expect::Any).await?;
        Ok(())
    }

    async fn fetch(&self, record: &ModuleRecord) -> Result<Candidate, DaemonError> {
        let key = Key::new(Collection::Modules, &record.sha256);
        let found = self
            .store
            .get(&key)
            .await?
            .ok_or_else(|| DaemonError::Request(format!("the store has no module {}", record.sha256)))?;
        Ok(Candidate {
            record: record.clone(),
            module: Arc::new(found.value),
        })
    }

    /// Compiles a policy into the side that is not in force. On an error that side is as if nothing had been asked.
    async fn prepare(&mut self, record: &PolicyRecord) -> Result<Prepared, DaemonError> {
        let began = Instant::now();
        self.drop_aside()?;
        let candidate = self.fetch(&record.module).await?;
        let compiled = self.compile(&candidate).await?;
        let (asked, keys) = self.identify_all(&compiled, &candidate.record)?;
        let mut identified = Vec::with_capacity(keys.len());
        for (address, key) in keys {
            identified.push((address, self.number(key.as_ref()).await?, key));
        }
        let compilation = self.compile_matrix(asked, identified)?;
        let parity = 1 - self.datapath.parity();
        self.datapath.clear(parity);
        self.datapath.write(parity, &compilation.change)?;
        let (identities, local) = compilation.generation.counts();
        let prepared = Prepared {
            identities: u32::try_from(identities).unwrap_or(u32::MAX),
            local_identities: u32::try_from(local).unwrap_or(u32::MAX),
            cells: compilation.generation.cell_count(),
            micros: 0,
        };
        self.aside = Some(Side {
            module: Some(record.module.clone()),
            serial: record.serial,
            asked: compilation.asked,
            generation: compilation.generation,
        });
        if let Err(error) = self.place_all() {
            self.drop_aside()?;
            return Err(error);
        }
        Ok(Prepared {
            micros: micros(began),
            ..prepared
        })
    }

    /// Puts the prepared side in force. What was in force stays aside until all nodes have switched.
    pub(super) async fn commit(&mut self, record: &PolicyRecord) -> Result<Prepared, DaemonError> {
        let began = Instant::now();
        if self.active.serial == record.serial {
            return Ok(Prepared::default());
        }
        let prepared = self.aside.as_ref().is_some_and(|aside| aside.serial == record.serial);
        if !prepared && let Err(error) = self.prepare(record).await {
            self.out_of_step = Some(format!("policy {} can't be enforced here: {error}", record.module.name));
            return Err(error);
        }
        if let Some(next) = self.aside.take() {
            let last = std::mem::replace(&mut self.active, next);
            self.aside = Some(last);
            self.datapath.flip()?;
        }
        self.out_of_step = None;
        tracing::info!(
            "generation {} enforces {}",
            self.datapath.generation(),
            record.module.name
        );
        Ok(Prepared {
            micros: micros(began),
            ..Prepared::default()
        })
    }

    fn drop_aside(&mut self) -> Result<(), DaemonError> {
        if self.aside.take().is_some() {
            self.place_all()?;
        }
        Ok(())
    }

    /// Fills the maps for the first time, with the policy that the cluster has in force. Nothing is attached yet.
    pub(super) async fn enforce_from_start(&mut self) -> Result<(), DaemonError> {
        let record = self.policy.clone().map(|(record, _)| record);
        let serial = match &record {
            Some(record) if matches!(record.phase, Phase::Commit | Phase::Retired) => record.serial,
            _ => 0,
        };
        let parity = self.datapath.parity();
        if let Some(module) = record.as_ref().and_then(PolicyRecord::in_force).cloned() {
            let candidate = self.fetch(&module).await?;
            let compiled = self.compile(&candidate).await?;
            let asked = Asked::start(&compiled, &module)?;
            self.active = Side {
                module: Some(module),
                serial,
                asked,
                ..Side::empty(self.datapath.shape())
            };
        }
        let mut identified = Vec::new();
        let addresses: Vec<_> = self
            .pods
            .iter()
            .map(|(address, pod)| (*address, pod.record.clone()))
            .collect();
        for (address, record) in addresses {
            self.active.asked.begin();
            match self.active.asked.identify(&record) {
                Ok(key) => identified.push((address, self.number(key.as_ref()).await?, key)),
                // One pod must not keep the node down: nothing reaches it.
                Err(error) => tracing::error!("{}: {error}", record.full_name()),
            }
        }
        let asked = std::mem::replace(&mut self.active.asked, Asked::nobody());
        let compilation = self.compile_matrix(asked, identified)?;
        self.active.asked = compilation.asked;
        self.active.generation = compilation.generation;
        self.datapath.write(parity, &compilation.change)?;
        self.place_all()
    }

    /// A coordinator that died leaves a load that nobody finishes: before its commit it is aborted, after that it is
    /// retired, since every node that is alive has switched by then.
    pub(super) async fn finish_abandoned_load(&mut self) {
        let Some((record, revision)) = &self.policy else { return };
        // Coordinators give up at their deadline; this is later, so that they do it themselves.
        let abandoned = Duration::from_secs(5);
        let late = now_ms().saturating_sub(record.deadline_ms) > u64::try_from(abandoned.as_millis()).unwrap_or(0);
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
            Err(error) => tracing::error!("finishing a load that was left unfinished: {error}"),
        }
    }
}
