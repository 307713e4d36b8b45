//! What the modules make of pods.

use super::{Module, Stack, StackError};
use crate::{
    identity::{IdentityKey, PodKey},
    plan::Partition,
    wasm::{Class, Pod, WasmError},
};
use std::collections::BTreeMap;

/// Pods that a module may fail at, one by one, before it is taken to fail at the rest too.
const PATIENCE: usize = 16;

/// A pod's key so far.
enum Sofar {
    Key {
        tenant: Option<String>,
        classes: BTreeMap<String, Option<BTreeMap<String, String>>>,
    },
    Failed(StackError),
}

impl Stack {
    /// What the modules make of each pod: nothing where there are no modules, so that it stays `init`. The error is
    /// about one pod.
    pub fn identify(&mut self, pods: &[Pod]) -> Vec<Result<Option<IdentityKey>, StackError>> {
        if self.modules.is_empty() {
            return pods.iter().map(|_| Ok(None)).collect();
        }
        let mut keys: Vec<Sofar> = pods
            .iter()
            .map(|_| Sofar::Key {
                tenant: None,
                classes: BTreeMap::new(),
            })
            .collect();
        // First those who may say whose a pod is.
        for module in self.modules.iter_mut().filter(|module| module.tenant().is_none()) {
            let classes = module.identify(pods);
            for (key, class) in keys.iter_mut().zip(classes) {
                key.add(module, class);
            }
        }
        for (key, pod) in keys.iter_mut().zip(pods) {
            if let Sofar::Key { tenant, .. } = key {
                tenant.get_or_insert_with(|| pod.namespace.clone());
            }
        }
        for module in self.modules.iter_mut().filter(|module| module.tenant().is_some()) {
            let own: Vec<usize> = (0..keys.len())
                .filter(|index| {
                    keys[*index]
                        .tenant()
                        .is_some_and(|tenant| Some(tenant) == module.tenant())
                })
                .collect();
            let its: Vec<Pod> = own.iter().map(|index| pods[*index].clone()).collect();
            let mut closed = 0;
            for (index, class) in own.into_iter().zip(module.identify(&its)) {
                if let Err(error) = &class
                    && !module.strict
                {
                    closed += 1;
                    module.failure = Some(error.clone());
                }
                keys[index].add_tenants(module, class);
            }
            if let Some(error) = module.failure.as_ref().filter(|_| closed > 0) {
                let name = module.record.name();
                tracing::error!("module {name}: {error}; pods that are closed therefore: {closed}");
            }
        }
        keys.into_iter()
            .map(|key| match key {
                Sofar::Key { tenant, classes } => Ok(Some(IdentityKey::Pod(PodKey {
                    tenant: tenant.unwrap_or_default(),
                    classes,
                }))),
                Sofar::Failed(error) => Err(error),
            })
            .collect()
    }
}

impl Sofar {
    /// What a module says that speaks for all.
    fn add(&mut self, module: &Module, class: Result<Class, WasmError>) {
        let Self::Key { tenant, classes } = self else { return };
        match class {
            Ok(class) => {
                if tenant.is_none() && !module.record.audit {
                    *tenant = class.tenant;
                }
                if !class.labels.is_empty() {
                    classes.insert(module.record.name().to_owned(), Some(class.labels));
                }
            }
            Err(_) if module.record.audit && !module.strict => {
                classes.insert(module.record.name().to_owned(), None);
            }
            Err(error) => *self = Self::Failed(module.error(error)),
        }
    }

    /// The tenant, once it is known.
    fn tenant(&self) -> Option<&str> {
        match self {
            Self::Key { tenant, .. } => tenant.as_deref(),
            Self::Failed(_) => None,
        }
    }

    /// What a tenant's module says of its tenant's pods. Those of whom it can't say anything are closed.
    fn add_tenants(&mut self, module: &Module, class: Result<Class, WasmError>) {
        let Self::Key { classes, .. } = self else { return };
        match class {
            Ok(class) if class.labels.is_empty() => {}
            Ok(class) => {
                classes.insert(module.record.name().to_owned(), Some(class.labels));
            }
            Err(error) if module.strict => *self = Self::Failed(module.error(error)),
            Err(_) => {
                classes.insert(module.record.name().to_owned(), None);
            }
        }
    }
}

impl Module {
    /// What it makes of each pod. Where it fails at many at once it is asked for each, so that one pod does not stand
    /// for all.
    fn identify(&mut self, pods: &[Pod]) -> Vec<Result<Class, WasmError>> {
        let mut answers = Vec::with_capacity(pods.len());
        let mut failures = 0;
        for some in pods.chunks(256) {
            if let Some(error) = self.suspended() {
                answers.extend(some.iter().map(|_| Err(error.clone())));
                continue;
            }
            let asked: Vec<(&Pod, Vec<String>)> = some.iter().map(|pod| (pod, held_by(&self.networks, pod))).collect();
            let answer = match &mut self.runtime {
                Some(runtime) => {
                    // So many pods, so much time: there may be very many.
                    runtime.begin();
                    runtime.identify(&asked)
                }
                None => Err(self.failure.clone().unwrap_or_else(not_started)),
            };
            match answer {
                Ok(classes) => answers.extend(classes),
                Err(error @ WasmError::Exhausted { .. }) => {
                    self.suspend(&error);
                    answers.extend(asked.iter().map(|_| Err(error.clone())));
                }
                Err(error) if asked.len() == 1 || failures >= PATIENCE => {
                    answers.extend(asked.iter().map(|_| Err(error.clone())));
                }
                Err(_) => {
                    for one in &asked {
                        let answer = if failures < PATIENCE {
                            self.identify_one(one)
                        } else {
                            Err(WasmError::Call {
                                call: format!("identify({})", one.0.full_name()),
                                problem: "the module has failed too often".to_owned(),
                            })
                        };
                        failures += usize::from(answer.is_err());
                        answers.push(answer);
                    }
                }
            }
        }
        answers
    }

    fn identify_one(&mut self, pod: &(&Pod, Vec<String>)) -> Result<Class, WasmError> {
        let runtime = self.runtime.as_mut().ok_or_else(not_started)?;
        let classes = runtime.identify(std::slice::from_ref(pod))?;
        classes.into_iter().next().unwrap_or_else(|| Ok(Class::default()))
    }
}

pub(super) fn not_started() -> WasmError {
    WasmError::Call {
        call: "starting the module".to_owned(),
        problem: "it could not be started".to_owned(),
    }
}

/// Names of the networks that hold one of the pod's addresses.
fn held_by(networks: &Partition, pod: &Pod) -> Vec<String> {
    let mut names: Vec<String> = pod
        .addresses
        .iter()
        .flat_map(|address| networks.holding(*address))
        .map(|(_, name)| name.clone())
        .collect();
    names.sort();
    names.dedup();
    names
}
