//! Identities: what a policy makes of a pod, and the number that the kernel and the VNI carry for it.
//!
//! A number is the tenant's in the high bits and the identity's within the tenant in the low ones. Both are found by
//! probing: the key's hash says where to begin, and the first number that is free or already the key's is taken. Every
//! node probes in the same order, and the store lets only one of them create an entry, so that two nodes that meet the
//! same new labels at the same moment come out with the same number, and two different keys never do.

use crate::plan::Membership;
use abi::{
    Identity,
    identity::{FIRST_ALLOCATED, IDENTITY_BITS},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

/// Labels that matter to a module.
pub type Labels = BTreeMap<String, String>;

/// What the modules make of a pod; pods with equal keys are the same to all of them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodKey {
    /// The tenant.
    pub tenant: String,
    /// By module, the labels that matter to it; none where it could not identify the pod, and need not. Modules to which
    /// no labels matter are left out, so that loading one changes nobody's key.
    pub classes: BTreeMap<String, Option<Labels>>,
}

/// What an identity stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum IdentityKey {
    /// Pods.
    Pod(PodKey),
    /// Addresses that are no pods', in exactly these networks.
    Networks(Membership),
}

/// Name of the module that a load without a name replaces. Its labels need no prefix.
pub const DEFAULT_MODULE: &str = "default";

/// As `tenant{key=value,…}`, with `module:` before the labels of modules other than the default one.
impl fmt::Display for PodKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.tenant)?;
        let mut texts = Vec::new();
        for (module, labels) in &self.classes {
            let prefix = if module == DEFAULT_MODULE {
                String::new()
            } else {
                format!("{module}:")
            };
            match labels {
                Some(labels) => texts.extend(labels.iter().map(|(key, value)| format!("{prefix}{key}={value}"))),
                None => texts.push(format!("{prefix}?")),
            }
        }
        if texts.is_empty() {
            return Ok(());
        }
        write!(out, "{{{}}}", texts.join(","))
    }
}

/// Pods as [`PodKey`], networks as `networks{module/name,…}`.
impl fmt::Display for IdentityKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(key) => key.fmt(out),
            Self::Networks(names) => {
                let names: Vec<String> = names.iter().map(|(module, name)| format!("{module}/{name}")).collect();
                write!(out, "networks{{{}}}", names.join(","))
            }
        }
    }
}

impl IdentityKey {
    /// The tenant, where it stands for pods.
    #[must_use]
    pub fn tenant(&self) -> Option<&str> {
        match self {
            Self::Pod(key) => Some(&key.tenant),
            Self::Networks(_) => None,
        }
    }
}

/// Bytes of a tenant, and of a label's value, at the most: a Kubernetes label value's limit.
pub const MAX_TEXT: usize = 63;
/// Bytes of a label's key at the most: prefix, slash and name (Kubernetes, "Labels and Selectors").
pub const MAX_KEY: usize = 253 + 1 + 63;
/// Labels of a class at the most.
pub const MAX_LABELS: usize = 64;

/// Checks what a module says.
///
/// # Errors
///
/// What is wrong with it.
pub fn check_text(what: &str, text: &str, limit: usize) -> Result<(), String> {
    if text.len() > limit {
        return Err(format!("{what} has {} bytes; at most {limit} are allowed", text.len()));
    }
    if text.chars().any(char::is_control) {
        return Err(format!("{what} has a control character: {text:?}"));
    }
    Ok(())
}

/// Checks the labels that matter to a module.
///
/// # Errors
///
/// Which limit, and by how much.
pub fn check_labels(labels: &Labels) -> Result<(), String> {
    if labels.len() > MAX_LABELS {
        return Err(format!("{} labels; at most {MAX_LABELS} are allowed", labels.len()));
    }
    for (key, value) in labels {
        check_text("a label's key", key, MAX_KEY)?;
        check_text("a label's value", value, MAX_TEXT)?;
    }
    Ok(())
}

/// How an identity's 24 bits are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// High bits that hold the tenant.
    pub tenant_bits: u32,
}

impl Layout {
    const fn number_bits(self) -> u32 {
        IDENTITY_BITS - self.tenant_bits
    }

    /// Tenants there can be: number 0 is kept for the reserved identities.
    #[must_use]
    pub const fn tenants(self) -> u32 {
        (1 << self.tenant_bits) - 1
    }

    /// Identities that a tenant can have: number 0 is none.
    #[must_use]
    pub const fn numbers(self) -> u32 {
        (1 << self.number_bits()) - 1
    }

    /// The identity with this tenant and number.
    #[must_use]
    pub const fn identity(self, tenant: u32, number: u32) -> Identity {
        Identity((tenant << self.number_bits()) | number)
    }

    /// The tenant's number, 0 for the reserved identities.
    #[must_use]
    pub const fn tenant(self, identity: Identity) -> u32 {
        identity.0 >> self.number_bits()
    }
}

/// The numbers 1 to `count` in the order in which every node tries them for a key.
pub fn probe(key: &str, count: u32) -> impl Iterator<Item = u32> {
    let digest = Sha256::digest(key.as_bytes());
    let start = u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]]) % count;
    (0..count).map(move |step| (start + step) % count + 1)
}

/// What is known of the store's identities: never wrong, for an entry is never changed, but perhaps not the newest.
#[derive(Clone, Debug)]
pub struct Registry {
    layout: Layout,
    tenants: BTreeMap<u32, String>,
    retiring_tenants: BTreeSet<u32>,
    /// Shared with whoever else needs them: there may be very many.
    by_number: BTreeMap<Identity, Arc<IdentityKey>>,
    by_key: HashMap<Arc<IdentityKey>, Identity>,
    /// About to be collected: nobody may use them as they are.
    retiring: BTreeSet<Identity>,
}

/// What to try next to give a key its number.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// It has one.
    Known(Identity),
    /// It has one, which is about to be collected: keep it in the store, then ask again.
    Revive(Identity),
    /// Its tenant is about to be collected: keep it in the store, then ask again.
    ReviveTenant(u32),
    /// Create the tenant with this number, then ask again.
    CreateTenant(u32),
    /// Create the identity, then ask again.
    CreateIdentity(Identity),
}

/// There are no numbers left.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exhausted {
    /// For tenants.
    #[error("all {0} tenant numbers are taken; a cluster with a larger `vni.tenant_bits` has more")]
    Tenants(u32),
    /// For identities of a tenant.
    #[error("all {1} identity numbers of tenant {0} are taken; a smaller `vni.tenant_bits` leaves more")]
    Identities(String, u32),
    /// For sets of networks.
    #[error("all {0} numbers for sets of networks are taken; a smaller `vni.tenant_bits` leaves more")]
    Networks(u32),
}

impl Registry {
    /// An empty registry.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            tenants: BTreeMap::new(),
            retiring_tenants: BTreeSet::new(),
            by_number: BTreeMap::new(),
            by_key: HashMap::new(),
            retiring: BTreeSet::new(),
        }
    }

    /// Takes note of a tenant in the store.
    pub fn insert_tenant(&mut self, number: u32, name: String) {
        self.tenants.insert(number, name);
    }

    /// Takes note that a tenant is about to be collected, or that it is not.
    pub fn set_tenant_retiring(&mut self, number: u32, retiring: bool) {
        if retiring {
            self.retiring_tenants.insert(number);
        } else {
            self.retiring_tenants.remove(&number);
        }
    }

    /// Takes note that a tenant is gone from the store.
    pub fn remove_tenant(&mut self, number: u32) {
        self.tenants.remove(&number);
        self.retiring_tenants.remove(&number);
    }

    /// Name of a tenant.
    #[must_use]
    pub fn tenant(&self, number: u32) -> Option<&str> {
        self.tenants.get(&number).map(String::as_str)
    }

    /// Whether any identity is a tenant's.
    #[must_use]
    pub fn has_identities(&self, tenant: u32) -> bool {
        let first = self.layout.identity(tenant, 0);
        let last = self.layout.identity(tenant, self.layout.numbers());
        self.by_number.range(first..=last).next().is_some()
    }

    /// Numbers of the tenants.
    pub fn tenant_numbers(&self) -> impl Iterator<Item = u32> {
        self.tenants.keys().copied()
    }

    /// Names of the tenants.
    pub fn tenants(&self) -> impl Iterator<Item = &str> {
        self.tenants.values().map(String::as_str)
    }

    /// Takes note of an identity in the store.
    pub fn insert(&mut self, identity: Identity, key: IdentityKey) {
        let key = Arc::new(key);
        // A number that was collected and given out again: it is the old key's no longer.
        if let Some(old) = self.by_number.get(&identity).filter(|old| **old != key) {
            self.by_key.remove(old);
        }
        self.by_key.insert(Arc::clone(&key), identity);
        self.by_number.insert(identity, key);
    }

    /// Takes note that an identity is about to be collected, or that it is not.
    pub fn set_retiring(&mut self, identity: Identity, retiring: bool) {
        if retiring {
            self.retiring.insert(identity);
        } else {
            self.retiring.remove(&identity);
        }
    }

    /// Whether an identity is about to be collected.
    #[must_use]
    pub fn is_retiring(&self, identity: Identity) -> bool {
        self.retiring.contains(&identity)
    }

    /// Takes note that an identity is gone from the store.
    pub fn remove(&mut self, identity: Identity) {
        if let Some(key) = self.by_number.remove(&identity) {
            self.by_key.remove(&key);
        }
        self.retiring.remove(&identity);
    }

    /// The key with this number.
    #[must_use]
    pub fn key(&self, identity: Identity) -> Option<&IdentityKey> {
        self.by_number.get(&identity).map(|key| &**key)
    }

    /// The same, to be kept.
    #[must_use]
    pub fn shared(&self, identity: Identity) -> Option<Arc<IdentityKey>> {
        self.by_number.get(&identity).cloned()
    }

    /// The number of a key.
    #[must_use]
    pub fn get(&self, key: &IdentityKey) -> Option<Identity> {
        self.by_key.get(key).copied()
    }

    /// Name of an identity, for people.
    #[must_use]
    pub fn name(&self, identity: Identity) -> String {
        match (identity.reserved_name(), self.key(identity)) {
            (Some(name), _) => name.to_owned(),
            (None, Some(key)) => key.to_string(),
            (None, None) => format!("identity {}", identity.0),
        }
    }

    /// All identities.
    pub fn iter(&self) -> impl Iterator<Item = (Identity, &IdentityKey)> {
        self.by_number.iter().map(|(identity, key)| (*identity, &**key))
    }

    /// The layout.
    #[must_use]
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// What to try next to give `key` its number.
    ///
    /// # Errors
    ///
    /// Where all numbers are taken.
    pub fn next(&self, key: &IdentityKey) -> Result<Next, Exhausted> {
        if let Some(identity) = self.by_key.get(key) {
            return Ok(if self.retiring.contains(identity) {
                Next::Revive(*identity)
            } else {
                Next::Known(*identity)
            });
        }
        let numbers = self.layout.numbers();
        let Some(name) = key.tenant() else {
            // Networks are nobody's.
            let free = numbers + 1 - FIRST_ALLOCATED;
            return self
                .free(key, free, |number| {
                    self.layout.identity(0, number + FIRST_ALLOCATED - 1)
                })
                .ok_or(Exhausted::Networks(free));
        };
        let tenants = self.layout.tenants();
        // The one that it has may not be the first that is free: others that were in its way may have been collected.
        let known = self
            .tenants
            .iter()
            .find(|(_, there)| *there == name)
            .map(|(number, _)| *number);
        let Some(tenant) = known else {
            return probe(name, tenants)
                .find_map(|number| {
                    if !self.tenants.contains_key(&number) {
                        Some(Next::CreateTenant(number))
                    } else if self.retiring_tenants.contains(&number) {
                        Some(Next::ReviveTenant(number))
                    } else {
                        None
                    }
                })
                .ok_or(Exhausted::Tenants(tenants));
        };
        if self.retiring_tenants.contains(&tenant) {
            return Ok(Next::ReviveTenant(tenant));
        }
        self.free(key, numbers, |number| self.layout.identity(tenant, number))
            .ok_or_else(|| Exhausted::Identities(name.to_owned(), numbers))
    }

    /// The first number that is free. One in the way that is about to be collected must stay first, or be gone: another node
    /// that has seen more than this one may take it for the same key.
    fn free(&self, key: &IdentityKey, count: u32, identity: impl Fn(u32) -> Identity) -> Option<Next> {
        probe(&key.to_string(), count).map(identity).find_map(|identity| {
            if !self.by_number.contains_key(&identity) {
                Some(Next::CreateIdentity(identity))
            } else if self.retiring.contains(&identity) {
                Some(Next::Revive(identity))
            } else {
                None
            }
        })
    }

    /// Gives `key` a number in this registry alone: for an evaluation that must leave the store as it is.
    ///
    /// # Errors
    ///
    /// Where all numbers are taken.
    pub fn assign(&mut self, key: &IdentityKey) -> Result<Identity, Exhausted> {
        loop {
            match self.next(key)? {
                Next::Known(identity) => return Ok(identity),
                Next::Revive(identity) => self.set_retiring(identity, false),
                Next::ReviveTenant(number) => self.set_tenant_retiring(number, false),
                Next::CreateTenant(number) => {
                    self.insert_tenant(number, key.tenant().unwrap_or_default().to_owned());
                }
                Next::CreateIdentity(identity) => self.insert(identity, key.clone()),
            }
        }
    }
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
