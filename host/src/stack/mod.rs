//! The modules that are loaded, in the order in which they are asked: what they make of a pod, put together into its
//! identity key; what they say of a pair, put together into a ruling.
//!
//! Whatever the modules answer, this holds:
//!
//! - Admin before tenant before baseline, in a tier by priority, then by name. What one passes on the next one decides.
//!   Last of all a node may reach its own pods; everything else is denied.
//! - A tenant's module is asked only about that tenant's pods as subjects, so it decides only over their own ends of
//!   connections. It tells only its tenant's pods apart: of others it sees the tenant, and the labels that matter to the
//!   modules that speak for all. So it has no say in anybody else's identity. What it may take of the kernel's room is
//!   bounded. Where it fails, its tenant's pods are closed; nobody else notices.
//! - A module that is only audited changes nothing: neither a pod's tenant, nor whether it can be identified.

mod identify;
mod judge;

pub use judge::Step;

use crate::{
    api::ModuleView,
    identity::IdentityKey,
    plan::{Action, Decision, Line, Network, Oracle, Partition, Ruling},
    store::records::ModuleRecord,
    wasm::{Compiled, Limits, Matrix, Runtime, WasmError, Who},
};
use abi::{Direction, Identity};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

/// Why the modules could not be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("module {module}: {source}")]
pub struct StackError {
    /// Its name.
    pub module: String,
    /// What it did.
    pub source: WasmError,
}

/// Which modules to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Include<'a> {
    /// Those that are enforced.
    Enforced,
    /// Those, and this one that is only audited.
    Audited(&'a str),
}

/// One module, running.
struct Module {
    record: ModuleRecord,
    /// None where it is a tenant's and could not even be started.
    runtime: Option<Runtime>,
    /// Its own networks, as it named them and cut into pieces.
    blocks: Vec<Network>,
    networks: Partition,
    /// Number of each identity there.
    numbers: HashMap<Identity, u32>,
    /// Interned line of each of its decisions.
    lines: HashMap<Decision, u32>,
    /// It must not fail: it is being loaded.
    strict: bool,
    /// Why its tenant's pods do without it, where they do.
    failure: Option<WasmError>,
    /// Breakpoints of its lines.
    breakpoints: usize,
    /// Until when it is not asked again, since it has used up what it may.
    rest: Option<Instant>,
}

/// A tenant's module that uses up its fuel or its time is not asked again for so long: it would hold up everybody.
const REST: Duration = Duration::from_secs(10);

impl Module {
    fn error(&self, source: WasmError) -> StackError {
        StackError {
            module: self.record.name().to_owned(),
            source,
        }
    }

    /// It has used up what it may: where it is a tenant's, it is left alone for a while.
    fn suspend(&mut self, error: &WasmError) {
        if !self.strict && self.tenant().is_some() {
            self.failure = Some(error.clone());
            self.rest = Some(Instant::now() + REST);
        }
    }

    /// Why it is not asked, while it is not.
    fn suspended(&self) -> Option<WasmError> {
        let resting = self.rest.is_some_and(|until| Instant::now() < until);
        self.failure.clone().filter(|_| resting)
    }

    /// Whose it is.
    fn tenant(&self) -> Option<&str> {
        self.record.placement.tenant.as_deref()
    }
}

/// Lines that are kept at the most, and breakpoints of them.
const MAX_VALUES: usize = 65_536;
const MAX_BREAKPOINTS: usize = 1 << 21;

/// Lines that have numbers, which keep their meaning.
struct Interner<T> {
    numbers: HashMap<Line<T>, u32>,
    values: Vec<Line<T>>,
    /// Breakpoints of all of them.
    breakpoints: usize,
}

impl<T: Copy + Eq + std::hash::Hash> Interner<T> {
    fn new() -> Self {
        Self {
            numbers: HashMap::new(),
            values: Vec::new(),
            breakpoints: 0,
        }
    }

    fn number(&mut self, value: Line<T>) -> u32 {
        if let Some(number) = self.numbers.get(&value) {
            return *number;
        }
        let number = u32::try_from(self.values.len()).unwrap_or(u32::MAX);
        self.breakpoints += value.iter().len();
        self.values.push(value.clone());
        self.numbers.insert(value, number);
        number
    }

    fn get(&self, number: u32) -> &Line<T> {
        &self.values[number as usize]
    }

    /// Whether there are so many that most of them are of no use any more: a module could make up new ones for ever.
    fn is_bulky(&self) -> bool {
        self.values.len() > MAX_VALUES || self.breakpoints > MAX_BREAKPOINTS
    }

    fn clear(&mut self) {
        *self = Self::new();
    }
}

/// What identities stand for.
type Keys = HashMap<Identity, Arc<IdentityKey>>;

/// The modules that are loaded.
pub struct Stack {
    modules: Vec<Module>,
    networks: Partition,
    /// What each identity stands for, as far as a decision can be about it.
    keys: Keys,
    /// Names of the modules that speak for all, and are enforced.
    common: BTreeSet<String>,
    lines: Interner<Action>,
    rulings: Interner<bool>,
}

/// A module that is to be started.
pub struct Start<'a> {
    /// Its record.
    pub record: &'a ModuleRecord,
    /// The module.
    pub compiled: &'a Result<Compiled, WasmError>,
    /// What it may use, overrides included.
    pub limits: Limits,
    /// It must not fail, whoever's it is.
    pub strict: bool,
}

impl Stack {
    /// No modules: every pod is `init`, and everything is passed on to the last word.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            modules: Vec::new(),
            networks: Partition::default(),
            keys: HashMap::new(),
            common: BTreeSet::new(),
            lines: Interner::new(),
            rulings: Interner::new(),
        }
    }

    /// Starts modules, in any order.
    ///
    /// # Errors
    ///
    /// Which module can't be started, and why.
    pub fn start(starts: &[Start<'_>]) -> Result<Self, StackError> {
        let mut stack = Self::empty();
        let mut all: Vec<Network> = Vec::new();
        for start in starts {
            let failed = |source| StackError {
                module: start.record.name().to_owned(),
                source,
            };
            let (runtime, networks, failure) = match start_one(start) {
                Ok((runtime, networks)) => (Some(runtime), networks, None),
                // What is in force already must not keep a node down, or others from changing their policy.
                Err(error) if !start.strict && start.record.placement.tenant.is_some() => {
                    tracing::error!("module {}: {error}; its tenant's pods are closed", start.record.name());
                    (None, Vec::new(), Some(error))
                }
                Err(error) => return Err(failed(error)),
            };
            stack.modules.push(Module {
                record: start.record.clone(),
                runtime,
                networks: Partition::new(&networks).map_err(|problem| {
                    let call = "networks".to_owned();
                    failed(WasmError::Answer { call, problem })
                })?,
                blocks: networks.clone(),
                numbers: HashMap::new(),
                lines: HashMap::new(),
                strict: start.strict,
                failure,
                breakpoints: 0,
                rest: None,
            });
            all.extend(networks);
        }
        stack
            .modules
            .sort_by(|one, other| order(&one.record).cmp(&order(&other.record)));
        let speaks_for_all = |module: &&Module| module.tenant().is_none() && !module.record.audit;
        let common = stack.modules.iter().filter(speaks_for_all);
        stack.common = common.map(|module| module.record.name().to_owned()).collect();
        stack.networks = Partition::new(&all).map_err(|problem| StackError {
            module: all.last().map_or_else(String::new, |network| network.module.clone()),
            source: WasmError::Answer {
                call: "networks".to_owned(),
                problem,
            },
        })?;
        Ok(stack)
    }

    /// Begins a load or a change, with a time limit of its own for each module.
    pub fn begin(&mut self) {
        for runtime in self.modules.iter_mut().filter_map(|module| module.runtime.as_mut()) {
            runtime.begin();
        }
    }

    /// Lets tenants' modules that have failed, and have rested, be asked again; the answer is whose they are. What they
    /// had nothing to say of has to be asked then: if they fail again, they are noted again.
    pub fn begin_again(&mut self) -> Vec<String> {
        let now = Instant::now();
        let mut tenants = Vec::new();
        for module in &mut self.modules {
            let rested = module.rest.is_none_or(|until| until <= now);
            if module.failure.is_some() && rested && module.runtime.is_some() {
                module.failure = None;
                module.rest = None;
                tenants.extend(module.record.placement.tenant.clone());
            }
        }
        tenants
    }

    /// From now on a tenant's module that fails harms only its tenant.
    pub fn settle(&mut self) {
        for module in &mut self.modules {
            module.strict = false;
        }
    }

    /// The address space, cut into pieces by all modules' networks.
    #[must_use]
    pub const fn networks(&self) -> &Partition {
        &self.networks
    }

    /// Takes note of what an identity stands for; nothing for the reserved ones.
    pub fn learn(&mut self, identity: Identity, key: Option<Arc<IdentityKey>>) {
        let Some(key) = key else { return };
        let known = self.keys.get(&identity);
        if known.is_some_and(|known| Arc::ptr_eq(known, &key) || *known == key) {
            return;
        }
        // A number that was collected may mean something else by now.
        self.keys.insert(identity, key);
        for module in &mut self.modules {
            module.numbers.remove(&identity);
        }
    }

    /// Whether an identity stands for pods.
    #[must_use]
    pub fn is_pod(&self, identity: Identity) -> bool {
        self.keys.get(&identity).is_some_and(|key| key.tenant().is_some())
    }

    /// What an identity stands for, where it is known and no reserved one.
    #[must_use]
    pub fn key(&self, identity: Identity) -> Option<&IdentityKey> {
        self.keys.get(&identity).map(|key| &**key)
    }

    /// Forgets identities that are gone, once there are many of them.
    pub fn forget_except(&mut self, live: usize, is_live: impl Fn(Identity) -> bool) {
        const SLACK: usize = 1024;
        if self.keys.len() > 2 * live + SLACK {
            self.keys.retain(|identity, _| is_live(*identity));
        }
        for module in &mut self.modules {
            if let Some(runtime) = &mut module.runtime
                && runtime.learned() > 2 * live + SLACK
            {
                runtime.forget();
                module.numbers.clear();
            }
        }
    }

    /// Forgets rulings once there are many, most of which nobody can need any more; true where it did. Whoever keeps
    /// their numbers has to forget them, too.
    pub fn forget_rulings(&mut self) -> bool {
        let many = self.rulings.is_bulky();
        if many {
            self.rulings.clear();
        }
        many
    }

    /// Calls of modules so far.
    #[must_use]
    pub fn calls(&self) -> u64 {
        let runtimes = self.modules.iter().filter_map(|module| module.runtime.as_ref());
        runtimes.map(Runtime::calls).sum()
    }

    /// One module, for people.
    #[must_use]
    pub fn inspect(&self, name: &str) -> Option<ModuleView> {
        let module = self.modules.iter().find(|module| module.record.name() == name)?;
        let runtime = module.runtime.as_ref();
        let limits = runtime.map(Runtime::limits);
        let networks = module.blocks.iter().map(|network| {
            let blocks = network.blocks.iter().map(|(cidr, except)| {
                let except: Vec<String> = except.iter().map(|one| format!(" but {one}")).collect();
                format!("{cidr}{}", except.concat())
            });
            (network.name.clone(), blocks.collect())
        });
        Some(ModuleView {
            module: module.record.clone(),
            networks: networks.collect(),
            peers: runtime.map_or(0, Runtime::learned),
            calls: runtime.map_or(0, Runtime::calls),
            limits: limits.map_or((0, 0, 0), |limits| {
                let time = u64::try_from(limits.evaluate.as_millis()).unwrap_or(u64::MAX);
                (limits.fuel, time, limits.memory as u64)
            }),
            failure: module.failure.as_ref().map(ToString::to_string),
        })
    }

    /// Tenants' modules that have failed, with what they did.
    pub fn failures(&self) -> impl Iterator<Item = (&str, &WasmError)> {
        self.modules
            .iter()
            .filter_map(|module| Some((module.record.name(), module.failure.as_ref()?)))
    }

    /// Names of the modules that are only audited.
    #[must_use]
    pub fn audited(&self) -> Vec<String> {
        let audited = self.modules.iter().filter(|module| module.record.audit);
        audited.map(|module| module.record.name().to_owned()).collect()
    }
}

/// Blocks of networks that a tenant's module may name at the most: each of them takes room that all share.
const MAX_TENANT_BLOCKS: usize = 64;

fn start_one(start: &Start<'_>) -> Result<(Runtime, Vec<Network>), WasmError> {
    let placement = &start.record.placement;
    let compiled = start.compiled.as_ref().map_err(Clone::clone)?;
    let mut runtime = Runtime::start(compiled, &start.record.config, placement, start.limits)?;
    let networks = runtime.networks()?;
    let blocks: usize = networks.iter().map(Network::prefixes).sum();
    if placement.tenant.is_some() && blocks > MAX_TENANT_BLOCKS {
        return Err(WasmError::Answer {
            call: "networks".to_owned(),
            problem: format!(
                "{blocks} CIDRs and exceptions; a tenant's module may name {MAX_TENANT_BLOCKS} of them at the most"
            ),
        });
    }
    Ok((runtime, networks))
}

/// Where a module stands among the others.
#[must_use]
pub fn order(record: &ModuleRecord) -> impl Ord + use<'_> {
    let placement = &record.placement;
    (placement.tier, placement.priority, &placement.name)
}

impl Oracle for Stack {
    type Error = StackError;

    fn decide(&mut self, side: Direction, subjects: &[Identity], peers: &[Identity]) -> Result<Vec<u32>, StackError> {
        self.judge(Include::Enforced, side, subjects, peers)
    }

    fn ruling(&self, number: u32) -> &Ruling {
        self.rulings.get(number)
    }
}

/// Who an identity is to one module. A tenant's module sees of other tenants' pods what the `common` ones make of them.
fn who(module: &ModuleRecord, common: &BTreeSet<String>, identity: Identity, key: Option<&IdentityKey>) -> Who {
    let name = module.name();
    match key {
        None => Who::Reserved(identity),
        Some(IdentityKey::Pod(pod)) => {
            let foreign = module
                .placement
                .tenant
                .as_ref()
                .is_some_and(|tenant| *tenant != pod.tenant);
            if foreign {
                let classes = pod.classes.iter().filter(|(owner, _)| common.contains(*owner));
                let labels = classes.filter_map(|(_, labels)| labels.as_ref()).flatten();
                let labels = labels.map(|(key, value)| (key.clone(), value.clone()));
                return Who::Pod(pod.tenant.clone(), labels.collect());
            }
            match pod.classes.get(name) {
                None => Who::Pod(pod.tenant.clone(), BTreeMap::new()),
                Some(Some(labels)) => Who::Pod(pod.tenant.clone(), labels.clone()),
                Some(None) => Who::Unknown(pod.tenant.clone()),
            }
        }
        Some(IdentityKey::Networks(membership)) => {
            let own = membership.iter().filter(|(owner, _)| owner == name);
            let names: Vec<String> = own.map(|(_, network)| network.clone()).collect();
            if names.is_empty() {
                Who::Reserved(Identity::WORLD)
            } else {
                Who::Networks(names)
            }
        }
    }
}
