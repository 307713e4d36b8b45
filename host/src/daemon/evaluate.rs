//! What a policy would make of the cluster, without touching anything: validation and dry runs.

use super::{Daemon, DaemonError, policy::Asked};
use crate::{
    api::ChangedPair,
    identity::IdentityKey,
    plan::{Change, Generation, Verdict, survey},
    store::records::ModuleRecord,
    wasm::Compiled,
};
use abi::{AddressKey, Identity};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};
use tokio::task::block_in_place;

/// Identities for whose every pair a policy is asked, at the most.
const MAX_SURVEY: usize = 512;

/// A module that may be loaded.
#[derive(Clone)]
pub struct Candidate {
    pub record: ModuleRecord,
    pub module: Arc<Vec<u8>>,
}

/// What it would make of the cluster.
#[derive(Debug)]
pub struct Evaluation {
    pub pods: usize,
    pub identities: usize,
    pub pairs: usize,
    pub cells: u64,
    pub changed: Option<Vec<ChangedPair>>,
    /// What each step took, in microseconds.
    pub steps: Vec<(String, u64)>,
}

/// A policy that has identified every pod, compiled for this node.
pub struct Compilation {
    pub asked: Asked,
    pub generation: Generation,
    pub change: Change,
}

/// What a policy has made of each address; `None` for `init`.
pub type Keys = Vec<(AddressKey, Option<IdentityKey>)>;

pub fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Daemon {
    /// Compiles a module, unless it is the one that was compiled last.
    pub(super) async fn compile(&mut self, candidate: &Candidate) -> Result<Compiled, DaemonError> {
        if let Some(compiled) = &self.compiled
            && compiled.sha256 == candidate.record.sha256
        {
            return Ok(compiled.clone());
        }
        let compiled = self.compiler.compile(&candidate.module).await?;
        self.compiled = Some(compiled.clone());
        Ok(compiled)
    }

    /// Starts a module and has it identify every pod.
    pub(super) fn identify_all(
        &self,
        compiled: &Compiled,
        record: &ModuleRecord,
    ) -> Result<(Asked, Keys), DaemonError> {
        block_in_place(|| {
            let mut asked = Asked::start(compiled, record)?;
            let keys = self
                .pods
                .iter()
                .map(|(address, pod)| Ok((*address, asked.identify(&pod.record)?)))
                .collect::<Result<Vec<_>, DaemonError>>()?;
            Ok((asked, keys))
        })
    }

    /// Compiles the matrix of identified pods.
    pub(super) fn compile_matrix(
        &self,
        mut asked: Asked,
        identified: Vec<(AddressKey, Identity, Option<IdentityKey>)>,
    ) -> Result<Compilation, DaemonError> {
        block_in_place(|| {
            // Numbering the identities has taken time that is not the module's.
            asked.begin();
            asked.learn_reserved()?;
            asked.learn(identified.iter().map(|(_, identity, key)| (*identity, key.clone())))?;
            let members = identified.into_iter().map(|(address, identity, _)| {
                let local = self
                    .pods
                    .get(&address)
                    .is_some_and(|pod| pod.record.node == self.config.node);
                (address, identity, local)
            });
            let (generation, change) = Generation::compile_all(self.datapath.shape(), members, &mut asked)?;
            Ok(Compilation {
                asked,
                generation,
                change,
            })
        })
    }

    pub(super) async fn evaluate(&mut self, candidate: &Candidate) -> Result<Evaluation, DaemonError> {
        let began = Instant::now();
        let compiled = self.compile(candidate).await?;
        let mut steps = vec![("compile".to_owned(), micros(began))];

        let began = Instant::now();
        let (asked, keys) = self.identify_all(&compiled, &candidate.record)?;
        // Numbers that only this evaluation knows: nothing is entered in the store.
        let mut registry = self.registry.clone();
        let identified = keys
            .into_iter()
            .map(|(address, key)| {
                let identity = match &key {
                    Some(key) => registry.assign(key)?,
                    None => Identity::INIT,
                };
                Ok((address, identity, key))
            })
            .collect::<Result<Vec<_>, DaemonError>>()?;
        steps.push(("identify".to_owned(), micros(began)));

        let began = Instant::now();
        let next: BTreeMap<AddressKey, Identity> = identified
            .iter()
            .map(|(address, identity, _)| (*address, *identity))
            .collect();
        let mut compilation = self.compile_matrix(asked, identified)?;
        steps.push(("evaluate".to_owned(), micros(began)));

        let began = Instant::now();
        let identities: BTreeSet<Identity> = next.values().copied().collect();
        let changed = if identities.len() <= MAX_SURVEY {
            let name = |identity| registry.name(identity);
            // The report alone needs it: where a policy is too slow to be asked for every pair, it is left out.
            self.changed_pairs(&next, &mut compilation.asked, &name)
                .inspect_err(|error| tracing::warn!("comparing the policies: {error}"))
                .ok()
        } else {
            None
        };
        steps.push(("compare".to_owned(), micros(began)));
        let ends = identities.len() + 1;
        Ok(Evaluation {
            pods: next.len(),
            identities: identities.len(),
            pairs: ends * ends,
            cells: compilation.generation.cell_count(),
            changed,
            steps,
        })
    }

    /// Pairs whose verdict changes. Pods are compared by what they were and will be: pods that share both are one.
    fn changed_pairs(
        &mut self,
        next: &BTreeMap<AddressKey, Identity>,
        asked: &mut Asked,
        name: &impl Fn(Identity) -> String,
    ) -> Result<Vec<ChangedPair>, DaemonError> {
        let now = |address: &AddressKey| {
            let place = self.active.generation.place(address);
            place.map_or(Identity::INIT, |place| place.identity)
        };
        let mut classes: BTreeSet<(Identity, Identity)> = next
            .iter()
            .map(|(address, identity)| (now(address), *identity))
            .collect();
        classes.insert((Identity::HOST, Identity::HOST));
        let olds: BTreeSet<Identity> = classes.iter().map(|(old, _)| *old).collect();
        let news: BTreeSet<Identity> = classes.iter().map(|(_, new)| *new).collect();
        self.active.asked.begin();
        let before = block_in_place(|| survey(&olds.into_iter().collect::<Vec<_>>(), &mut self.active.asked))?;
        asked.begin();
        let after = block_in_place(|| survey(&news.into_iter().collect::<Vec<_>>(), asked))?;
        let mut changed = Vec::new();
        for from in &classes {
            for to in &classes {
                // A node does not reach itself through the datapath.
                if from.1 == Identity::HOST && to.1 == Identity::HOST {
                    continue;
                }
                let (before, after) = (before.get(&(from.0, to.0)), after.get(&(from.1, to.1)));
                if before != after {
                    changed.push(ChangedPair {
                        from: name(from.1),
                        to: name(to.1),
                        before: before.cloned().unwrap_or(Verdict::Deny),
                        after: after.cloned().unwrap_or(Verdict::Deny),
                    });
                }
            }
        }
        changed.sort_by(|one, other| (&one.from, &one.to).cmp(&(&other.from, &other.to)));
        changed.dedup();
        Ok(changed)
    }
}
