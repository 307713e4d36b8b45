//! A side: one policy, with what it has made of the cluster's pods and networks.

use super::{Daemon, DaemonError};
use crate::{
    identity::{IdentityKey, Labels, Next},
    plan::{Change, Generation, NetworkSide, PlanError, Shape},
    stack::{Stack, StackError},
    store::{
        Collection, Expect, Key, StoreError,
        records::{self, IdentityRecord, PodRecord, Revision, TenantRecord},
    },
    wasm,
};
use abi::{AddressKey, Identity};
use std::sync::Arc;
use tokio::task::block_in_place;

/// The label that every namespace has, with its name.
pub const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// One policy, with what it has made of the cluster's pods and networks.
pub struct Side {
    /// The modules, and the change that they came by.
    pub revision: Revision,
    /// The modules, running.
    pub stack: Stack,
    pub generation: Generation,
    /// Identity of each set of networks, by its index in the partition.
    pub networks: Vec<Identity>,
}

impl Side {
    /// No policy and no pods.
    pub fn empty(shape: Shape) -> Self {
        Self {
            revision: Revision::none(),
            stack: Stack::empty(),
            generation: Generation::new(shape),
            networks: vec![Identity::WORLD],
        }
    }

    /// What the policy makes of a pod; `None` for `init`.
    pub fn identify(&mut self, pod: wasm::Pod) -> Result<Option<IdentityKey>, StackError> {
        self.stack.begin();
        let keys = block_in_place(|| self.stack.identify(&[pod]));
        keys.into_iter().next().unwrap_or(Ok(None))
    }

    /// Gives an address its identity in this side's generation.
    pub fn assign(
        &mut self,
        address: AddressKey,
        identity: Identity,
        key: Option<Arc<IdentityKey>>,
        local: bool,
    ) -> Result<Change, PlanError<StackError>> {
        self.stack.learn(identity, key);
        block_in_place(|| self.generation.assign(address, identity, local, &mut self.stack))
    }

    /// What it makes of the networks.
    pub fn network_side(&self) -> NetworkSide<'_> {
        NetworkSide {
            partition: self.stack.networks(),
            identities: &self.networks,
            generation: &self.generation,
        }
    }

    /// Gives back what nobody uses any more.
    pub fn release(&mut self) -> Change {
        let change = self.generation.release();
        let generation = &self.generation;
        let (live, _) = generation.counts();
        self.stack.forget_except(live, |identity| generation.holds(identity));
        if self.stack.forget_rulings() {
            self.generation.forget_rulings();
        }
        change
    }
}

impl Daemon {
    /// A pod, as modules are told of it.
    pub(super) fn facts(&self, record: &PodRecord) -> wasm::Pod {
        wasm::Pod {
            namespace: record.namespace.clone(),
            name: record.name.clone(),
            labels: Labels::clone(&record.labels),
            namespace_labels: self.namespace_labels(&record.namespace),
            service_account: record.service_account.to_string(),
            addresses: record.addresses().collect(),
            ports: record.ports.clone(),
        }
    }

    /// Labels of a namespace, with the one that says its name (Kubernetes, "Automatic labelling" of namespaces).
    pub(super) fn namespace_labels(&self, namespace: &str) -> Labels {
        let mut labels = self.namespaces.get(namespace).cloned().unwrap_or_default();
        labels.insert(NAMESPACE_NAME.to_owned(), namespace.to_owned());
        labels
    }

    /// Number of an identity, the same on all nodes: the first node that needs it enters it in the store.
    pub(super) async fn number(&mut self, key: Option<&IdentityKey>) -> Result<Identity, DaemonError> {
        let Some(key) = key else { return Ok(Identity::INIT) };
        loop {
            match self.registry.next(key)? {
                Next::Known(identity) => return Ok(identity),
                Next::CreateTenant(number) => {
                    let place = Key::new(Collection::Tenants, number);
                    let tenant = TenantRecord {
                        name: key.tenant().unwrap_or_default().to_owned(),
                        retiring: false,
                    };
                    let tenant: TenantRecord = self.create(&place, tenant).await?;
                    self.registry.insert_tenant(number, tenant.name);
                    self.registry.set_tenant_retiring(number, tenant.retiring);
                }
                Next::CreateIdentity(identity) => {
                    let place = Key::new(Collection::Identities, identity.0);
                    let record = IdentityRecord {
                        key: key.clone(),
                        retiring: false,
                    };
                    let found: IdentityRecord = self.create(&place, record).await?;
                    self.note_identity(identity, found);
                }
                Next::Revive(identity) => self.revive(identity).await?,
                Next::ReviveTenant(number) => self.revive_tenant(number).await?,
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

    pub(super) fn note_identity(&mut self, identity: Identity, record: IdentityRecord) {
        self.names_mut().set_identity(identity, record.key.to_string());
        self.registry.insert(identity, record.key);
        self.registry.set_retiring(identity, record.retiring);
    }
}
