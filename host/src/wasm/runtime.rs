//! Running a module: every call has fuel, a deadline and bounded memory, and every answer is checked.

use super::{
    Compiled, Limits, Placement, Tier, WasmError,
    check::{check_class, check_matrix, check_networks, to_peer, to_pod},
    clock::{Running, TICK},
    log::{Level, ModuleLog},
    wit,
};
use crate::plan::{Decision, Network};
use abi::{Direction, Identity};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};
use wasmtime::{
    Store, StoreLimits, StoreLimitsBuilder, Trap,
    component::{HasSelf, Linker},
};

/// Different decisions in one answer at the most.
const MAX_DECISIONS: usize = 16_384;
/// Cells that are asked for in one call, and pods: bounds what a call may cost.
const CELLS_PER_CALL: usize = 1 << 16;
const PODS_PER_CALL: usize = 256;

/// A pod, as modules are told of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Labels of its namespace.
    pub namespace_labels: BTreeMap<String, String>,
    /// Its service account, or nothing.
    pub service_account: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Names of its ports, with IP protocol number and port.
    pub ports: Vec<(String, u8, u16)>,
}

impl Pod {
    /// `NAMESPACE/NAME`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// What a module makes of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class {
    /// Whose it is, where the module says so.
    pub tenant: Option<String>,
    /// The labels that matter to the module.
    pub labels: BTreeMap<String, String>,
}

/// Who a module is asked about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Who {
    /// Pods of this tenant, of the class with these labels.
    Pod(String, BTreeMap<String, String>),
    /// A reserved identity.
    Reserved(Identity),
    /// Addresses in these of the module's own networks.
    Networks(Vec<String>),
    /// A pod of this tenant that the module could not identify.
    Unknown(String),
}

/// Decisions for some subjects with some peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// The different decisions.
    pub decisions: Vec<Decision>,
    /// An index for each, subject by subject.
    pub cells: Vec<u16>,
}

/// A module with its configuration, ready to be asked.
pub struct Runtime {
    compiled: Compiled,
    limits: Limits,
    config: String,
    placement: Placement,
    /// Peers that the module has learned, by their number there.
    learned: HashMap<Arc<Who>, u32>,
    order: Vec<Arc<Who>>,
    deadline: Instant,
    calls: u64,
    /// `None` after a trap: a component instance can't be entered again, so the next call starts another.
    instance: Option<Instance>,
    log: Option<ModuleLog>,
}

struct Instance {
    store: Store<State>,
    module: wit::Module,
}

struct State {
    limits: StoreLimits,
    log: ModuleLog,
}

impl wit::wasmgate::policy::log::Host for State {
    fn write(&mut self, level: Level, message: String) {
        self.log.write(level, &message);
    }
}

impl Runtime {
    /// Starts a module.
    ///
    /// # Errors
    ///
    /// Where it can't be started or refuses its configuration.
    pub fn start(compiled: &Compiled, config: &str, placement: &Placement, limits: Limits) -> Result<Self, WasmError> {
        let mut runtime = Self {
            compiled: compiled.clone(),
            limits,
            config: config.to_owned(),
            placement: placement.clone(),
            learned: HashMap::new(),
            order: Vec::new(),
            deadline: Instant::now(),
            calls: 0,
            instance: None,
            log: Some(ModuleLog::new(&placement.name)),
        };
        runtime.begin();
        runtime.revive()?;
        Ok(runtime)
    }

    /// Begins a load or a change: all calls from here on share one time limit.
    pub fn begin(&mut self) {
        self.deadline = Instant::now() + self.limits.evaluate;
    }

    /// Calls of the module so far.
    #[must_use]
    pub const fn calls(&self) -> u64 {
        self.calls
    }

    /// Bytes of the module's own memory limit.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    fn revive(&mut self) -> Result<(), WasmError> {
        let limits = StoreLimitsBuilder::new()
            .memory_size(self.limits.memory)
            .instances(8)
            .tables(8)
            .table_elements(100_000)
            .memories(1)
            .trap_on_grow_failure(true)
            .build();
        let engine = self.compiled.component.engine();
        let log = self.log.take().unwrap_or_else(|| ModuleLog::new(&self.placement.name));
        let mut store = Store::new(engine, State { limits, log });
        store.limiter(|state| &mut state.limits);
        let started = self.budget(&mut store).and_then(|running| {
            let mut linker = Linker::new(engine);
            wit::Module::add_to_linker::<_, HasSelf<_>>(&mut linker, |state| state)?;
            let module = wit::Module::instantiate(&mut store, &self.compiled.component, &linker)?;
            drop(running);
            Ok(module)
        });
        let module = started.map_err(|error| self.failed("starting the module", &error, None))?;
        self.instance = Some(Instance { store, module });

        let config = self.config.clone();
        let placement = wit::Placement {
            name: self.placement.name.clone(),
            tier: match self.placement.tier {
                Tier::Admin => wit::Tier::Admin,
                Tier::Tenant => wit::Tier::Tenant,
                Tier::Baseline => wit::Tier::Baseline,
            },
            tenant: self.placement.tenant.clone(),
        };
        self.call("configure", |policy, store| {
            policy.call_configure(store, &config, &placement)
        })?
        .map_err(WasmError::Configuration)?;
        let known = std::mem::take(&mut self.order);
        self.learned.clear();
        let learned = self.learn(known.iter().cloned());
        if learned.is_err() {
            // The next start tells it again.
            self.learned = known.iter().cloned().zip(0..).collect();
            self.order = known;
            self.instance = None;
        }
        learned
    }

    /// Fuel for one call, and what is left of the time.
    fn budget(&self, store: &mut Store<State>) -> wasmtime::Result<Running> {
        store.set_fuel(self.limits.fuel)?;
        let left = self.deadline.saturating_duration_since(Instant::now());
        let ticks = left.as_nanos() / TICK.as_nanos();
        store.set_epoch_deadline(u64::try_from(ticks).unwrap_or(u64::MAX) + 1);
        store.data_mut().log.begin();
        Ok(self.compiled.clock.run())
    }

    fn call<T>(
        &mut self,
        what: &str,
        run: impl FnOnce(&wit::Guest, &mut Store<State>) -> wasmtime::Result<T>,
    ) -> Result<T, WasmError> {
        let Some(mut instance) = self.instance.take() else {
            self.revive()?;
            return self.call(what, run);
        };
        self.calls += 1;
        let result = self.budget(&mut instance.store).and_then(|running| {
            let answer = run(instance.module.wasmgate_policy_policy(), &mut instance.store);
            drop(running);
            answer
        });
        match result {
            Ok(answer) => {
                self.instance = Some(instance);
                Ok(answer)
            }
            Err(error) => {
                let mut log = instance.store.into_data().log;
                let complaint = log.complaint();
                self.log = Some(log);
                Err(self.failed(what, &error, complaint))
            }
        }
    }

    fn failed(&self, call: &str, error: &wasmtime::Error, complaint: Option<String>) -> WasmError {
        let call = call.to_owned();
        let problem = match error.downcast_ref::<Trap>() {
            Some(Trap::OutOfFuel) => {
                let problem = format!(
                    "the module used up its fuel of {} (`wasm.fuel_per_call`): an endless loop?",
                    self.limits.fuel
                );
                return WasmError::Exhausted { call, problem };
            }
            Some(Trap::Interrupt) => {
                let problem = format!(
                    "the module took longer than {} ms (`wasm.evaluate_ms`)",
                    self.limits.evaluate.as_millis()
                );
                return WasmError::Exhausted { call, problem };
            }
            Some(trap) => {
                let trap = trap.to_string();
                let trap = trap.trim_start_matches("wasm trap: ");
                let said = complaint.map_or(String::new(), |said| format!(": {said}"));
                format!("the module trapped: {trap}{said}")
            }
            None => {
                let root = error.root_cause().to_string();
                if root.contains("growing memory") || root.contains("growing table") {
                    format!("the module wants more memory than `wasm.memory_mib` allows ({root})")
                } else {
                    format!("{error:#}")
                }
            }
        };
        WasmError::Call { call, problem }
    }

    /// The networks that the module wants to tell apart.
    ///
    /// # Errors
    ///
    /// Where the module fails, or names nonsense.
    pub fn networks(&mut self) -> Result<Vec<Network>, WasmError> {
        let call = "networks";
        let answer = self.call(call, |policy, store| policy.call_networks(store))?;
        check_networks(&self.placement.name, answer).map_err(|problem| WasmError::Answer {
            call: call.to_owned(),
            problem,
        })
    }

    /// What the policy makes of each pod, given with the names of the module's own networks that hold it. The inner
    /// error is about one pod.
    ///
    /// # Errors
    ///
    /// Where the module fails.
    pub fn identify(&mut self, pods: &[(&Pod, Vec<String>)]) -> Result<Vec<Result<Class, WasmError>>, WasmError> {
        let mut classes = Vec::with_capacity(pods.len());
        for pods in pods.chunks(PODS_PER_CALL) {
            let call = match pods {
                [(one, _)] => format!("identify({})", one.full_name()),
                many => format!("identify({} pods)", many.len()),
            };
            let arguments: Vec<wit::Pod> = pods.iter().map(|(pod, networks)| to_pod(pod, networks)).collect();
            let answers = self.call(&call, |policy, store| policy.call_identify(store, &arguments))?;
            if answers.len() != pods.len() {
                return Err(WasmError::Answer {
                    call,
                    problem: format!("{} classes where {} were asked for", answers.len(), pods.len()),
                });
            }
            for ((pod, _), answer) in pods.iter().zip(answers) {
                let call = format!("identify({})", pod.full_name());
                classes.push(match answer {
                    Ok(class) => check_class(class).map_err(|problem| WasmError::Answer {
                        call,
                        problem: format!("an identity that is not allowed: {problem}"),
                    }),
                    Err(problem) => Err(WasmError::Call {
                        call,
                        problem: format!("the module can't identify the pod: {problem}"),
                    }),
                });
            }
        }
        Ok(classes)
    }

    /// Tells the module of peers, once each.
    ///
    /// # Errors
    ///
    /// Where the module fails.
    pub fn learn(&mut self, peers: impl IntoIterator<Item = Arc<Who>>) -> Result<(), WasmError> {
        let mut told = HashSet::new();
        let new: Vec<Arc<Who>> = peers
            .into_iter()
            .filter(|who| !self.learned.contains_key(who) && told.insert(Arc::clone(who)))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        let arguments: Vec<wit::Peer> = new.iter().map(|who| to_peer(who)).collect();
        self.call("learn", |policy, store| policy.call_learn(store, &arguments))?;
        for who in new {
            let number = u32::try_from(self.order.len()).unwrap_or(u32::MAX);
            self.learned.insert(Arc::clone(&who), number);
            self.order.push(who);
        }
        Ok(())
    }

    /// Number of a peer that the module has learned.
    #[must_use]
    pub fn number(&self, who: &Who) -> Option<u32> {
        self.learned.get(who).copied()
    }

    /// How many peers the module has learned.
    #[must_use]
    pub fn learned(&self) -> usize {
        self.order.len()
    }

    /// Starts the module anew, with no memory of peers: numbers change.
    pub fn forget(&mut self) {
        self.learned.clear();
        self.order.clear();
        self.instance = None;
    }

    /// What the policy says for each of `subjects`, at that end, with each of `peers`, both by number.
    ///
    /// # Errors
    ///
    /// Where the module fails or answers nonsense.
    pub fn decide(&mut self, side: Direction, subjects: &[u32], peers: &[u32]) -> Result<Matrix, WasmError> {
        let at_once = (CELLS_PER_CALL / peers.len().max(1)).max(1);
        if subjects.len() <= at_once {
            return self.decide_at_once(side, subjects, peers);
        }
        let mut all = Matrix {
            decisions: Vec::new(),
            cells: Vec::with_capacity(subjects.len() * peers.len()),
        };
        let mut numbers: HashMap<Decision, u16> = HashMap::new();
        for subjects in subjects.chunks(at_once) {
            let some = self.decide_at_once(side, subjects, peers)?;
            let mut renumbered = Vec::with_capacity(some.decisions.len());
            for decision in some.decisions {
                let next = all.decisions.len();
                let number = *numbers
                    .entry(decision.clone())
                    .or_insert(u16::try_from(next).unwrap_or(u16::MAX));
                if usize::from(number) == next {
                    all.decisions.push(decision);
                }
                renumbered.push(number);
            }
            if all.decisions.len() > MAX_DECISIONS {
                return Err(too_many_decisions(
                    format!("decide({} peers)", peers.len()),
                    all.decisions.len(),
                ));
            }
            all.cells
                .extend(some.cells.iter().map(|cell| renumbered[usize::from(*cell)]));
        }
        Ok(all)
    }

    fn decide_at_once(&mut self, side: Direction, subjects: &[u32], peers: &[u32]) -> Result<Matrix, WasmError> {
        let call = format!("decide({} subjects, {} peers)", subjects.len(), peers.len());
        let side = match side {
            Direction::Egress => wit::Side::Egress,
            Direction::Ingress => wit::Side::Ingress,
        };
        let matrix = self.call(&call, |policy, store| policy.call_decide(store, side, subjects, peers))?;
        if matrix.decisions.len() > MAX_DECISIONS {
            return Err(too_many_decisions(call, matrix.decisions.len()));
        }
        check_matrix(matrix, subjects.len() * peers.len()).map_err(|problem| WasmError::Answer { call, problem })
    }
}

fn too_many_decisions(call: String, found: usize) -> WasmError {
    WasmError::Answer {
        call,
        problem: format!("{found} different decisions; at most {MAX_DECISIONS} are allowed"),
    }
}
