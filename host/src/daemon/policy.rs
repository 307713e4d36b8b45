//! A side: one policy, with what it has made of the cluster's pods.

use super::{Daemon, DaemonError};
use crate::{
    identity::{IdentityKey, Next},
    plan::{Change, Decision, Generation, Oracle, PlanError, Row, Shape},
    store::{
        Collection, Expect, Key, StoreError,
        records::{self, IdentityRecord, ModuleRecord, PodRecord, TenantRecord},
    },
    wasm::{Compiled, Runtime, WasmError},
};
use abi::{AddressKey, Identity};

/// A policy module that runs, or the absence of one: then every pod is `init`, and the policy passes everything on to
/// the baseline.
pub struct Asked(Option<Runtime>);

impl Asked {
    pub const fn nobody() -> Self {
        Self(None)
    }

    /// Starts a module.
    pub fn start(compiled: &Compiled, record: &ModuleRecord) -> Result<Self, WasmError> {
        let runtime = tokio::task::block_in_place(|| Runtime::start(compiled, &record.config))?;
        Ok(Self(Some(runtime)))
    }

    /// Begins a load or a change, with a time limit of its own.
    pub fn begin(&mut self) {
        if let Some(runtime) = &mut self.0 {
            runtime.begin();
        }
    }

    /// What the policy makes of a pod; `None` for `init`.
    pub fn identify(&mut self, pod: &PodRecord) -> Result<Option<IdentityKey>, WasmError> {
        tokio::task::block_in_place(|| self.0.as_mut().map(|runtime| runtime.identify(pod)).transpose())
    }

    /// Tells the module of peers.
    pub fn learn(&mut self, peers: impl IntoIterator<Item = (Identity, Option<IdentityKey>)>) -> Result<(), WasmError> {
        match &mut self.0 {
            Some(runtime) => tokio::task::block_in_place(|| runtime.learn(peers)),
            None => Ok(()),
        }
    }

    /// Tells the module of the reserved peers.
    pub fn learn_reserved(&mut self) -> Result<(), WasmError> {
        self.learn(Identity::RESERVED.iter().map(|(identity, _)| (*identity, None)))
    }
}

impl Oracle for Asked {
    type Error = WasmError;

    fn decide(&mut self, from: Identity, to: &[Identity]) -> Result<Row, WasmError> {
        match &mut self.0 {
            Some(runtime) => runtime.decide(from, to),
            None => Ok(Row {
                decisions: vec![Decision::Pass],
                cells: vec![0; to.len()],
            }),
        }
    }
}

/// One policy, with what it has made of the cluster's pods.
pub struct Side {
    /// The module; `None` before any was loaded.
    pub module: Option<ModuleRecord>,
    /// The load that it came by; 0 before any.
    pub serial: u64,
    pub asked: Asked,
    pub generation: Generation,
}

impl Side {
    /// No policy and no pods.
    pub fn empty(shape: Shape) -> Self {
        Self {
            module: None,
            serial: 0,
            asked: Asked::nobody(),
            generation: Generation::new(shape),
        }
    }

    /// Gives an address its identity in this side's generation.
    pub fn assign(
        &mut self,
        address: AddressKey,
        identity: Identity,
        key: Option<IdentityKey>,
        local: bool,
    ) -> Result<Change, PlanError<WasmError>> {
        self.asked.learn([(identity, key)]).map_err(PlanError::Oracle)?;
        tokio::task::block_in_place(|| self.generation.assign(address, identity, local, &mut self.asked))
    }
}

impl Daemon {
    /// Number of an identity, the same on all nodes: the first node that needs it enters it in the store.
    pub(super) async fn number(&mut self, key: Option<&IdentityKey>) -> Result<Identity, DaemonError> {
        let Some(key) = key else { return Ok(Identity::INIT) };
        loop {
            match self.registry.next(key)? {
                Next::Known(identity) => return Ok(identity),
                Next::CreateTenant(number) => {
                    let place = Key::new(Collection::Tenants, number);
                    let tenant = TenantRecord {
                        name: key.tenant.clone(),
                    };
                    let tenant: TenantRecord = self.create(&place, tenant).await?;
                    self.registry.insert_tenant(number, tenant.name);
                }
                Next::CreateIdentity(identity) => {
                    let place = Key::new(Collection::Identities, identity.0);
                    let found: IdentityRecord = self.create(&place, key.clone()).await?;
                    self.note_identity(identity, found);
                }
            }
        }
    }

    /// Enters a value unless there is one; the answer is what is there then.
    async fn create<T: serde::Serialize + serde::de::DeserializeOwned>(
        &self,
        key: &Key,
        value: T,
    ) -> Result<T, DaemonError> {
        match records::put(&*self.store, key, &value, Expect::Absent).await {
            Ok(_) => Ok(value),
            Err(StoreError::Conflict { found: Some(found), .. }) => Ok(records::decode(key, &found.value)?),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn note_identity(&mut self, identity: Identity, key: IdentityKey) {
        self.names_mut().set_identity(identity, key.to_string());
        self.registry.insert(identity, key);
    }
}
