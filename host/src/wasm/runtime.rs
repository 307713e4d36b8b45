//! Running a module: every call has fuel, a deadline and bounded memory, and every answer is checked.

use super::{
    Compiled, WasmError,
    clock::{Running, TICK},
};
use crate::{
    identity::IdentityKey,
    plan::{Decision, Row},
    store::records::PodRecord,
};
use abi::{Identity, PortRule, policy::ANY_PROTOCOL, policy::PORT_RULES};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Instant,
};
use wasmtime::{
    Store, StoreLimits, StoreLimitsBuilder, Trap,
    component::{Linker, bindgen},
};

bindgen!({
    world: "module",
    path: "../policy-sdk/wit",
});
use exports::wasmgate::policy::policy as wit;

/// Different decisions in one row at the most.
const MAX_DECISIONS: usize = 4096;

/// A module with its configuration, ready to be asked.
pub struct Runtime {
    compiled: Compiled,
    config: String,
    /// Peers that the module has learned, by their number there.
    learned: HashMap<Identity, u32>,
    order: Vec<(Identity, Option<IdentityKey>)>,
    deadline: Instant,
    /// `None` after a trap: a component instance can't be entered again, so the next call starts another.
    instance: Option<Instance>,
}

struct Instance {
    store: Store<StoreLimits>,
    module: Module,
}

impl Runtime {
    /// Starts a module.
    ///
    /// # Errors
    ///
    /// Where it can't be started or refuses its configuration.
    pub fn start(compiled: &Compiled, config: &str) -> Result<Self, WasmError> {
        let mut runtime = Self {
            compiled: compiled.clone(),
            config: config.to_owned(),
            learned: HashMap::new(),
            order: Vec::new(),
            deadline: Instant::now(),
            instance: None,
        };
        runtime.begin();
        runtime.revive()?;
        Ok(runtime)
    }

    /// Begins a load or a change: all calls from here on share one time limit.
    pub fn begin(&mut self) {
        self.deadline = Instant::now() + self.compiled.limits.evaluate;
    }

    fn revive(&mut self) -> Result<(), WasmError> {
        let limits = StoreLimitsBuilder::new()
            .memory_size(self.compiled.limits.memory)
            .instances(8)
            .tables(8)
            .table_elements(100_000)
            .memories(1)
            .trap_on_grow_failure(true)
            .build();
        let engine = self.compiled.component.engine();
        let mut store = Store::new(engine, limits);
        store.limiter(|limits| limits);
        let fuel = self.compiled.limits.fuel;
        let started = self.budget(&mut store).and_then(|running| {
            let module = Module::instantiate(&mut store, &self.compiled.component, &Linker::new(engine))?;
            drop(running);
            Ok(module)
        });
        let module =
            started.map_err(|error| failed("starting the module", fuel, self.compiled.limits.evaluate, &error))?;
        self.instance = Some(Instance { store, module });

        let config = self.config.clone();
        self.call("configure", |policy, store| policy.call_configure(store, &config))?
            .map_err(WasmError::Configuration)?;
        let known = std::mem::take(&mut self.order);
        self.learned.clear();
        let learned = self.learn(known.clone());
        if learned.is_err() {
            // The next start tells it again.
            self.learned = (0..)
                .zip(&known)
                .map(|(number, (identity, _))| (*identity, number))
                .collect();
            self.order = known;
            self.instance = None;
        }
        learned
    }

    /// Fuel for one call, and what is left of the time.
    fn budget(&self, store: &mut Store<StoreLimits>) -> wasmtime::Result<Running> {
        store.set_fuel(self.compiled.limits.fuel)?;
        let left = self.deadline.saturating_duration_since(Instant::now());
        let ticks = left.as_nanos() / TICK.as_nanos();
        store.set_epoch_deadline(u64::try_from(ticks).unwrap_or(u64::MAX) + 1);
        Ok(self.compiled.clock.run())
    }

    fn call<T>(
        &mut self,
        what: &str,
        run: impl FnOnce(&wit::Guest, &mut Store<StoreLimits>) -> wasmtime::Result<T>,
    ) -> Result<T, WasmError> {
        let Some(mut instance) = self.instance.take() else {
            self.revive()?;
            return self.call(what, run);
        };
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
            Err(error) => Err(failed(
                what,
                self.compiled.limits.fuel,
                self.compiled.limits.evaluate,
                &error,
            )),
        }
    }

    /// What the policy makes of a pod.
    ///
    /// # Errors
    ///
    /// Where the module fails, can't identify the pod, or answers an identity beyond the limits.
    pub fn identify(&mut self, pod: &PodRecord) -> Result<IdentityKey, WasmError> {
        let call = format!("identify({})", pod.full_name());
        let argument = wit::Pod {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            labels: to_labels(&pod.labels),
        };
        let answer = self
            .call(&call, |policy, store| policy.call_identify(store, &argument))?
            .map_err(|problem| WasmError::Call {
                call: call.clone(),
                problem: format!("the module can't identify the pod: {problem}"),
            })?;
        let count = answer.labels.len();
        let key = IdentityKey {
            tenant: answer.tenant,
            labels: answer
                .labels
                .into_iter()
                .map(|label| (label.key, label.value))
                .collect(),
        };
        let problem = if key.labels.len() == count {
            key.check().err()
        } else {
            Some("the same label twice".to_owned())
        };
        match problem {
            None => Ok(key),
            Some(problem) => Err(WasmError::Answer {
                call,
                problem: format!("an identity that is not allowed: {problem}"),
            }),
        }
    }

    /// Tells the module of peers, once each; `None` for a reserved identity's key.
    ///
    /// # Errors
    ///
    /// Where the module fails.
    pub fn learn(&mut self, peers: impl IntoIterator<Item = (Identity, Option<IdentityKey>)>) -> Result<(), WasmError> {
        // Many addresses share an identity; the module numbers each peer that it is told of.
        let mut told = HashSet::new();
        let new: Vec<_> = peers
            .into_iter()
            .filter(|(identity, _)| !self.learned.contains_key(identity) && told.insert(*identity))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        let arguments: Vec<wit::Peer> = new
            .iter()
            .map(|(identity, key)| peer(*identity, key.as_ref()))
            .collect();
        self.call("learn", |policy, store| policy.call_learn(store, &arguments))?;
        for (identity, key) in new {
            let number = u32::try_from(self.order.len()).unwrap_or(u32::MAX);
            self.learned.insert(identity, number);
            self.order.push((identity, key));
        }
        Ok(())
    }

    fn number(&self, identity: Identity) -> Result<u32, WasmError> {
        self.learned.get(&identity).copied().ok_or_else(|| WasmError::Call {
            call: "decide".to_owned(),
            problem: format!("identity {identity} was never learned: a defect of hostd"),
        })
    }

    /// May `from` open a connection to each of `to`?
    ///
    /// # Errors
    ///
    /// Where the module fails or answers nonsense.
    pub fn decide(&mut self, from: Identity, to: &[Identity]) -> Result<Row, WasmError> {
        if self.instance.is_none() {
            self.revive()?;
        }
        let from_number = self.number(from)?;
        let numbers = to.iter().map(|to| self.number(*to)).collect::<Result<Vec<_>, _>>()?;
        let call = format!("decide(from {from}, to {} peers)", to.len());
        let row = self.call(&call, |policy, store| policy.call_decide(store, from_number, &numbers))?;
        check_row(row, to.len()).map_err(|problem| WasmError::Answer { call, problem })
    }
}

fn check_row(row: wit::Row, expected: usize) -> Result<Row, String> {
    if row.cells.len() != expected {
        return Err(format!("{} cells where {expected} were asked for", row.cells.len()));
    }
    if row.decisions.len() > MAX_DECISIONS {
        return Err(format!(
            "{} different decisions; at most {MAX_DECISIONS} are allowed",
            row.decisions.len()
        ));
    }
    let count = row.decisions.len();
    if let Some(cell) = row.cells.iter().find(|cell| usize::from(**cell) >= count) {
        return Err(format!("index {cell} into a table of {count} decisions"));
    }
    Ok(Row {
        decisions: row.decisions.into_iter().map(decision).collect::<Result<_, _>>()?,
        cells: row.cells,
    })
}

fn decision(decision: wit::Decision) -> Result<Decision, String> {
    Ok(match decision {
        wit::Decision::Allow => Decision::Allow,
        wit::Decision::Deny => Decision::Deny,
        wit::Decision::Pass => Decision::Pass,
        wit::Decision::Ports(ranges) => {
            if ranges.len() > PORT_RULES {
                return Err(format!(
                    "{} port ranges in one decision; at most {PORT_RULES} are allowed",
                    ranges.len()
                ));
            }
            Decision::Ports(ranges.into_iter().map(port_rule).collect::<Result<_, _>>()?)
        }
    })
}

fn port_rule(range: wit::PortRange) -> Result<PortRule, String> {
    if range.first > range.last {
        return Err(format!("the port range {} to {}", range.first, range.last));
    }
    let protocol = match range.protocol {
        wit::Protocol::Any => ANY_PROTOCOL,
        wit::Protocol::Icmp => 1,
        wit::Protocol::Tcp => 6,
        wit::Protocol::Udp => 17,
        wit::Protocol::Sctp => 132,
    };
    Ok(PortRule {
        first: range.first,
        last: range.last,
        protocol,
        zero: 0,
    })
}

fn to_labels(labels: &BTreeMap<String, String>) -> Vec<wit::Label> {
    labels
        .iter()
        .map(|(key, value)| wit::Label {
            key: key.clone(),
            value: value.clone(),
        })
        .collect()
}

fn peer(identity: Identity, key: Option<&IdentityKey>) -> wit::Peer {
    match (identity, key) {
        (_, Some(key)) => wit::Peer::Pod(wit::Identity {
            tenant: key.tenant.clone(),
            labels: to_labels(&key.labels),
        }),
        (Identity::HOST, None) => wit::Peer::Reserved(wit::Reserved::Host),
        (Identity::HEALTH, None) => wit::Peer::Reserved(wit::Reserved::Health),
        (Identity::INIT, None) => wit::Peer::Reserved(wit::Reserved::Init),
        (Identity::REMOTE_NODE, None) => wit::Peer::Reserved(wit::Reserved::RemoteNode),
        // Whoever is neither a pod nor of the cluster is the world.
        _ => wit::Peer::Reserved(wit::Reserved::World),
    }
}

fn failed(call: &str, fuel: u64, time: std::time::Duration, error: &wasmtime::Error) -> WasmError {
    let problem = match error.downcast_ref::<Trap>() {
        Some(Trap::OutOfFuel) => {
            format!("the module used up its fuel of {fuel} (`wasm.fuel_per_call`): an endless loop?")
        }
        Some(Trap::Interrupt) => format!(
            "the module took longer than {} ms (`wasm.evaluate_ms`)",
            time.as_millis()
        ),
        Some(trap) => {
            let trap = trap.to_string();
            format!("the module trapped: {}", trap.trim_start_matches("wasm trap: "))
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
    WasmError::Call {
        call: call.to_owned(),
        problem,
    }
}
