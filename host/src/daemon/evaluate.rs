//! What a set of modules would make of the cluster, without touching anything: validation and dry runs.

use super::{Daemon, DaemonError, policy::Side};
use crate::{
    api::LoadReport,
    identity::IdentityKey,
    plan::{Change, Generation},
    stack::{Stack, StackError, Start},
    store::records::{ModuleRecord, Revision},
    wasm::{Compiled, Limits},
};
use abi::{AddressKey, Identity};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Instant,
};
use tokio::task::block_in_place;

/// Identities for whose every pair a policy is asked, at the most.
const MAX_SURVEY: usize = 1024;

/// A set of modules that may be put in force.
#[derive(Clone)]
pub struct Candidate {
    pub revision: Revision,
    /// Modules by SHA-256, as far as the store may not have them.
    pub modules: BTreeMap<String, Arc<Vec<u8>>>,
    /// The cluster has it in force: a tenant's module that fails is no reason to do without all others.
    pub committed: bool,
    /// Report what of the flows that are tracked now would change.
    pub against_flows: bool,
}

/// Modules that have identified every pod, compiled for this node.
pub struct Compilation {
    pub stack: Stack,
    pub networks: Vec<Identity>,
    pub generation: Generation,
    pub change: Change,
}

/// Pods that modules are asked about at once.
const PODS_AT_ONCE: usize = 1024;

/// What a policy has made of each address; `None` for `init`.
pub type Keys = Vec<(AddressKey, Option<Arc<IdentityKey>>)>;

/// The same for one address, or why there is no answer.
pub type EachKey = (AddressKey, Result<Option<Arc<IdentityKey>>, StackError>);

pub fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Daemon {
    /// Compiles a module, unless that was done before.
    async fn compile(
        &mut self,
        record: &ModuleRecord,
        given: &BTreeMap<String, Arc<Vec<u8>>>,
    ) -> Result<Compiled, DaemonError> {
        if let Some(compiled) = self.compiled.get(&record.sha256) {
            return Ok(compiled.clone());
        }
        let module = match given.get(&record.sha256) {
            Some(module) => Arc::clone(module),
            None => Arc::new(self.fetch(record).await?),
        };
        let compiled = self.compiler.compile(&module).await?;
        self.compiled.insert(record.sha256.clone(), compiled.clone());
        Ok(compiled)
    }

    /// Starts a set of modules. Those that are `new` here must not fail, whoever's they are, unless the cluster has
    /// committed to them already.
    pub(super) async fn start_stack(&mut self, candidate: &Candidate) -> Result<Stack, DaemonError> {
        let mut compiled = Vec::new();
        for record in &candidate.revision.modules {
            compiled.push(match self.compile(record, &candidate.modules).await {
                Ok(compiled) => Ok(compiled),
                Err(DaemonError::Wasm(error)) => Err(error),
                Err(error) => return Err(error),
            });
        }
        let in_force = &self.active.revision.modules;
        let starts: Vec<Start<'_>> = candidate
            .revision
            .modules
            .iter()
            .zip(&compiled)
            .map(|(record, compiled)| Start {
                record,
                compiled,
                limits: Limits::from(self.config.wasm).with(record.overrides),
                strict: !candidate.committed && !in_force.contains(record),
            })
            .collect();
        Ok(block_in_place(|| Stack::start(&starts))?)
    }

    /// Has a set of modules identify every pod.
    pub(super) fn identify_all(&self, stack: &mut Stack) -> Result<Keys, DaemonError> {
        let each = self.identify_each(stack).into_iter();
        each.map(|(address, key)| Ok((address, key?))).collect()
    }

    /// The same, whatever becomes of one of them. Pods are many and their keys are few: each key is kept once, and only some
    /// pods at a time are put into words for the modules.
    pub(super) fn identify_each(&self, stack: &mut Stack) -> Vec<EachKey> {
        let mut known: HashSet<Arc<IdentityKey>> = HashSet::new();
        let mut shared = |key: IdentityKey| {
            if let Some(key) = known.get(&key) {
                return Arc::clone(key);
            }
            let key = Arc::new(key);
            known.insert(Arc::clone(&key));
            key
        };
        let addresses: Vec<AddressKey> = self.pods.keys().copied().collect();
        let mut each = Vec::with_capacity(addresses.len());
        stack.begin();
        for some in addresses.chunks(PODS_AT_ONCE) {
            let pods = some.iter().filter_map(|address| self.pods.get(address));
            let facts: Vec<_> = pods.map(|pod| self.facts(&pod.record)).collect();
            let keys = block_in_place(|| stack.identify(&facts));
            let keys = keys.into_iter().map(|key| key.map(|key| key.map(&mut shared)));
            each.extend(some.iter().copied().zip(keys));
        }
        each
    }

    /// Compiles the matrix of identified pods and networks.
    pub(super) fn compile_matrix(
        &self,
        mut stack: Stack,
        identified: Vec<(AddressKey, Identity, Option<Arc<IdentityKey>>)>,
        networks: Vec<(Identity, Option<Arc<IdentityKey>>)>,
    ) -> Result<Compilation, DaemonError> {
        block_in_place(|| {
            // Numbering the identities has taken time that is not the modules'.
            stack.begin();
            let mut members = Vec::with_capacity(identified.len());
            for (address, identity, key) in identified {
                stack.learn(identity, key);
                let pod = self.pods.get(&address);
                members.push((
                    address,
                    identity,
                    pod.is_some_and(|pod| pod.record.is_on(&self.config.node)),
                ));
            }
            let mut numbers = Vec::with_capacity(networks.len());
            for (identity, key) in networks {
                stack.learn(identity, key);
                numbers.push(identity);
            }
            let fixed: Vec<Identity> = numbers
                .iter()
                .copied()
                .filter(|identity| identity.is_allocated())
                .collect();
            let shape = self.datapath.shape();
            let (generation, change) = Generation::compile_all(shape, members, fixed, &mut stack)?;
            let networks = numbers;
            let prefixes = stack.networks().prefixes().count() + self.unrouted().len();
            self.datapath.check_networks(prefixes)?;
            Ok(Compilation {
                stack,
                networks,
                generation,
                change,
            })
        })
    }

    /// What each set of networks stands for; `None` for the world.
    pub(super) fn network_keys(stack: &Stack) -> Vec<Option<IdentityKey>> {
        let memberships = stack.networks().memberships().iter();
        memberships
            .map(|names| (!names.is_empty()).then(|| IdentityKey::Networks(names.clone())))
            .collect()
    }

    /// What a set of modules would make of the cluster. The report is a dry run's: no node has been asked.
    pub(super) async fn evaluate(&mut self, candidate: &Candidate) -> Result<LoadReport, DaemonError> {
        let began = Instant::now();
        let mut stack = self.start_stack(candidate).await?;
        let mut steps = vec![("compile".to_owned(), micros(began))];

        let began = Instant::now();
        let keys = self.identify_all(&mut stack)?;
        self.check_tenants(&candidate.revision, &keys)?;
        // Numbers that only this evaluation knows: nothing is entered in the store.
        let mut registry = self.registry.clone();
        let mut number = |key: Option<&IdentityKey>, other: Identity| -> Result<_, DaemonError> {
            let Some(key) = key else { return Ok((other, None)) };
            let identity = registry.assign(key)?;
            Ok((identity, registry.shared(identity)))
        };
        let mut identified = Vec::with_capacity(keys.len());
        for (address, key) in keys {
            let (identity, key) = number(key.as_deref(), Identity::INIT)?;
            identified.push((address, identity, key));
        }
        let networks = Self::network_keys(&stack)
            .into_iter()
            .map(|key| number(key.as_ref(), Identity::WORLD))
            .collect::<Result<Vec<_>, _>>()?;
        steps.push(("identify".to_owned(), micros(began)));

        let began = Instant::now();
        let next: BTreeMap<AddressKey, Identity> = identified
            .iter()
            .map(|(address, identity, _)| (*address, *identity))
            .collect();
        let compilation = self.compile_matrix(stack, identified, networks)?;
        steps.push(("evaluate".to_owned(), micros(began)));
        let mut side = Side {
            revision: candidate.revision.clone(),
            stack: compilation.stack,
            generation: compilation.generation,
            networks: compilation.networks,
        };
        let calls = side.stack.calls();

        let began = Instant::now();
        self.check_invariants(&mut side, &next)?;
        let identities: BTreeSet<Identity> = next.values().copied().collect();
        let ends = identities.len() + side.networks.len() + Identity::RESERVED.len();
        let before = self.active.generation.counts().0;
        let changed = if ends.max(before) <= MAX_SURVEY {
            let name = |identity| registry.name(identity);
            // The report alone needs it: where a policy is too slow to be asked for every pair, it is left out.
            self.changed_pairs(&next, &mut side, &name)
                .inspect_err(|error| tracing::warn!("comparing the policies: {error}"))
                .ok()
        } else {
            None
        };
        steps.push(("compare".to_owned(), micros(began)));
        let flows = candidate
            .against_flows
            .then(|| self.changed_flows(&next, &mut side))
            .transpose()?;
        Ok(LoadReport {
            what: candidate.revision.what.clone(),
            modules: candidate.revision.modules.clone(),
            dry_run: true,
            pods: next.len(),
            identities: identities.len(),
            pairs: identities.len() * identities.len(),
            cells: side.generation.cell_count(),
            calls,
            changed,
            flows,
            steps,
            nodes: Vec::new(),
        })
    }

    /// A module of a tenant that nobody belongs to is a mistake.
    fn check_tenants(&self, revision: &Revision, keys: &Keys) -> Result<(), DaemonError> {
        let mut known: BTreeSet<&str> = self.registry.tenants().collect();
        known.extend(keys.iter().filter_map(|(_, key)| key.as_ref()?.tenant()));
        for record in &revision.modules {
            let Some(tenant) = record.placement.tenant.as_deref() else {
                continue;
            };
            if !known.contains(tenant) && !self.active.revision.modules.contains(record) {
                let known: Vec<&str> = known.into_iter().collect();
                return Err(DaemonError::Request(format!(
                    "no pod belongs to the tenant {tenant:?} of module {}; there are: {}",
                    record.name(),
                    if known.is_empty() {
                        "none".to_owned()
                    } else {
                        known.join(", ")
                    }
                )));
            }
        }
        Ok(())
    }

    /// Identity of a pod's address in the policy in force.
    pub(super) fn active_identity(&self, address: &AddressKey) -> Identity {
        let place = self.active.generation.place(address);
        place.map_or(Identity::INIT, |place| place.identity)
    }
}
