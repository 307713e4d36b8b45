//! The values in the store.

use crate::{
    codec,
    identity::{IdentityKey, Labels, Layout},
    random,
    store::{Collection, Expect, Key, Store, StoreError},
    wasm::{Overrides, Placement},
};
use ipnet::IpNet;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::Arc,
};

/// What all nodes must agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Layout of the identities.
    pub layout: Layout,
    /// Which cluster this is, wherever its store may be: a number of its own, also in a backup.
    pub cluster: u64,
    /// Another number for every time that the store was made anew, or went back to an earlier state: what was known of it
    /// then need not be so any more.
    pub life: u64,
}

impl ClusterRecord {
    /// A record with a number of its own.
    ///
    /// # Errors
    ///
    /// Where the kernel gives no random number.
    pub fn new(layout: Layout) -> io::Result<Self> {
        Ok(Self {
            layout,
            cluster: u64::from_ne_bytes(random::bytes()?),
            life: u64::from_ne_bytes(random::bytes()?),
        })
    }

    /// The same with another number for what becomes of its store from now on.
    ///
    /// # Errors
    ///
    /// Where the kernel gives no random number.
    pub fn begin_life(self) -> io::Result<Self> {
        let life = u64::from_ne_bytes(random::bytes()?);
        Ok(Self { life, ..self })
    }
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name.
    pub name: String,
    /// Its underlay address.
    pub underlay: IpAddr,
    /// Its pod CIDRs.
    pub pod_cidrs: Vec<IpNet>,
}

/// What addresses a node has besides its underlay address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressesRecord {
    /// They, in order.
    pub addresses: Vec<IpAddr>,
}

impl AddressesRecord {
    /// They, each once.
    #[must_use]
    pub fn set(&self) -> BTreeSet<IpAddr> {
        self.addresses.iter().copied().collect()
    }
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRecord {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its labels; many pods have the same.
    pub labels: Arc<Labels>,
    /// Its address, the first where it has two: where it is found in the store.
    pub address: IpAddr,
    /// Its address of the other family, where it has one.
    pub second: Option<IpAddr>,
    /// The node that it is on.
    pub node: Arc<str>,
    /// Its service account; empty where it has none.
    pub service_account: Arc<str>,
    /// Names of its ports, with IP protocol number and port.
    pub ports: Vec<(String, u8, u16)>,
    /// Another number for every pod that is ever connected, also for one of the same name at the same address.
    pub incarnation: u32,
}

impl PodRecord {
    /// `NAMESPACE/NAME`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Whether this is its name.
    #[must_use]
    pub fn is_named(&self, namespace: &str, name: &str) -> bool {
        // Names differ sooner than namespaces.
        self.name == name && self.namespace == namespace
    }

    /// Whether it is on this node.
    #[must_use]
    pub fn is_on(&self, node: &str) -> bool {
        *self.node == *node
    }

    /// One address, or one of each family.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        [Some(self.address), self.second].into_iter().flatten()
    }
}

/// A service: addresses and ports that stand for others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRecord {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its addresses, one of each family at the most; none where it has node ports only.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Labels of its backends, pods of its namespace; none selects no pod.
    pub selector: BTreeMap<String, String>,
    /// Further backends.
    pub backends: Vec<IpAddr>,
    /// Seconds for which a client keeps its backend; zero for none.
    pub affinity: u32,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// IP protocol number: TCP or UDP.
    pub protocol: u8,
    /// The port.
    pub port: u16,
    /// The backends' port.
    pub target: TargetPort,
    /// The port at which every node's address stands for this one.
    pub node_port: Option<u16>,
}

/// A port of a backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetPort {
    /// By number.
    Number(u16),
    /// By the name that each pod gives it.
    Name(String),
}

impl ServiceRecord {
    /// `NAMESPACE/NAME`.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its key. No name has an underscore.
    #[must_use]
    pub fn key(namespace: &str, name: &str) -> Key {
        Key::new(Collection::Services, format_args!("{namespace}_{name}"))
    }

    /// Whether a pod is one of its backends.
    #[must_use]
    pub fn selects(&self, pod: &PodRecord) -> bool {
        let has = |(key, value): (&String, &String)| pod.labels.get(key) == Some(value);
        !self.selector.is_empty() && pod.namespace == self.namespace && self.selector.iter().all(has)
    }
}

/// A tenant, under its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantRecord {
    /// Its name.
    pub name: String,
    /// Nobody seemed to belong to it any more; as in [`IdentityRecord`].
    pub retiring: bool,
}

/// An identity, under its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityRecord {
    /// What it stands for.
    pub key: IdentityKey,
    /// Nobody seemed to use it any more: whoever does takes this back, or it will be deleted.
    pub retiring: bool,
}

/// A namespace, under its name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceRecord {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// What a lease says of the node that holds it: that it is alive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AliveRecord;

/// What a node has seen of what all nodes have to see. No node watches this: each new value would be news for all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenRecord {
    /// The node has taken in all changes of identities up to this revision of the store, that of a mark.
    pub identities: u64,
    /// The same of tenants.
    pub tenants: u64,
}

/// A policy module with its configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleRecord {
    /// Its name, and where it stands among others.
    pub placement: Placement,
    /// Name of the file that it was loaded from.
    pub file: String,
    /// Enforces nothing; what it would have denied is reported.
    pub audit: bool,
    /// What it may use instead of what the nodes' configurations say.
    pub overrides: Overrides,
    /// SHA-256 of the module, in hexadecimal: its key in [`Collection::Modules`].
    pub sha256: String,
    /// Configuration as JSON text, empty for none.
    pub config: String,
}

impl ModuleRecord {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.placement.name
    }
}

/// A set of modules that was in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// The change that it came by.
    pub serial: u64,
    /// The change that had put it in force first, where it was gone back to; else the same.
    pub origin: u64,
    /// That change, for people.
    pub what: String,
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// The modules, in the order in which they are asked.
    pub modules: Vec<ModuleRecord>,
}

/// Where a policy load stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Nodes compile the new policy aside, and accept its identities beside the old ones.
    Prepare,
    /// Nodes switch.
    Commit,
    /// Every node has switched; nodes accept the old identities no longer.
    Retired,
    /// A node refused or did not answer; the old policy stays.
    Aborted,
}

/// The policy of the cluster: one value, changed only by comparison.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRecord {
    /// Where the change stands.
    pub phase: Phase,
    /// What it puts in force; its serial is raised by every change.
    pub next: Revision,
    /// What was in force before it; serial 0 and no modules before the first one.
    pub previous: Revision,
    /// What was in force before that, the newest first.
    pub history: Vec<Revision>,
    /// The node that runs the change.
    pub coordinator: String,
    /// When it gives up, in milliseconds since 1970: after that anybody may abort it before its commit.
    pub deadline_ms: u64,
}

impl PolicyRecord {
    /// Number of the change.
    #[must_use]
    pub const fn serial(&self) -> u64 {
        self.next.serial
    }

    /// What a node with nothing of its own should enforce now.
    #[must_use]
    pub const fn in_force(&self) -> &Revision {
        match self.phase {
            Phase::Commit | Phase::Retired => &self.next,
            Phase::Prepare | Phase::Aborted => &self.previous,
        }
    }
}

impl Revision {
    /// Whether it is of before another one, as in a store that was restored from a backup. Not by serial alone, since a restored
    /// store gives serials out again; not by time alone, since nodes' clocks differ.
    #[must_use]
    pub const fn is_before(&self, other: &Self) -> bool {
        self.serial < other.serial && self.time_ms < other.time_ms
    }

    /// Before the first change.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            serial: 0,
            origin: 0,
            what: String::new(),
            time_ms: 0,
            modules: Vec::new(),
        }
    }
}

/// A node's answer to a phase of a policy load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerRecord {
    /// The node.
    pub node: String,
    /// Which load.
    pub serial: u64,
    /// Which phase.
    pub phase: Phase,
    /// What the node did, or why it refused.
    pub result: Result<Prepared, String>,
}

/// What a node did for a policy load.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// Identities in the cluster.
    pub identities: u32,
    /// Identities of the node's own pods.
    pub local_identities: u32,
    /// Cells of the policy matrix that were decided.
    pub cells: u64,
    /// Time that the phase took on the node, in microseconds.
    pub micros: u64,
}

/// Name of the one policy record.
pub const POLICY: &str = "state";
/// Name of the one cluster record.
pub const CLUSTER: &str = "cluster";

impl AnswerRecord {
    /// Its key.
    #[must_use]
    pub fn key(serial: u64, phase: Phase, node: &str) -> Key {
        let phase = match phase {
            Phase::Prepare => "prepare",
            Phase::Commit => "commit",
            Phase::Retired => "retired",
            Phase::Aborted => "aborted",
        };
        Key::new(Collection::Answers, format_args!("{serial}.{phase}.{node}"))
    }
}

/// Decodes a value.
///
/// # Errors
///
/// Where it is torn or foreign, with its key.
pub fn decode<T: DeserializeOwned>(key: &Key, value: &[u8]) -> Result<T, StoreError> {
    codec::decode(value).map_err(|source| StoreError::Content {
        file: key.to_string(),
        source,
    })
}

/// Gets and decodes a value, with its revision.
///
/// # Errors
///
/// Where the store fails, or the value is torn or foreign.
pub async fn get<T: DeserializeOwned>(store: &dyn Store, key: &Key) -> Result<Option<(T, u64)>, StoreError> {
    match store.get(key).await? {
        Some(found) => Ok(Some((decode(key, &found.value)?, found.revision))),
        None => Ok(None),
    }
}

/// Encodes and puts a value; the answer is its revision.
///
/// # Errors
///
/// Where the store fails or the comparison does.
pub async fn put<T: Serialize>(store: &dyn Store, key: &Key, value: &T, expect: Expect) -> Result<u64, StoreError> {
    store.put(key, encode(key, value)?, expect).await
}

/// Encodes a value.
///
/// # Errors
///
/// Where it is too long.
pub fn encode<T: Serialize>(key: &Key, value: &T) -> Result<Vec<u8>, StoreError> {
    codec::encode(value).map_err(|source| StoreError::Content {
        file: key.to_string(),
        source,
    })
}
