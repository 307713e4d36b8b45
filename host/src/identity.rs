//! Identities: what a policy makes of a pod, and the number that the kernel and the VNI carry for it.
//!
//! A number is the tenant's in the high bits and the identity's within the tenant in the low ones. Both are found by
//! probing: the key's hash says where to begin, and the first number that is free or already the key's is taken. Every
//! node probes in the same order, and the store lets only one of them create an entry, so that two nodes that meet the
//! same new labels at the same moment come out with the same number, and two different keys never do.

use abi::{Identity, identity::IDENTITY_BITS};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

/// What a policy makes of a pod; pods with equal keys are the same to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct IdentityKey {
    /// The tenant.
    pub tenant: String,
    /// The labels that matter.
    pub labels: BTreeMap<String, String>,
}

/// As `tenant{key=value,…}`.
impl fmt::Display for IdentityKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.tenant)?;
        if self.labels.is_empty() {
            return Ok(());
        }
        let labels: Vec<String> = self
            .labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        write!(out, "{{{}}}", labels.join(","))
    }
}

/// Bytes of a tenant, and of a label's key or value, at the most: a Kubernetes label value's limit.
pub const MAX_TEXT: usize = 63;
/// Labels of an identity at the most.
pub const MAX_LABELS: usize = 16;

impl IdentityKey {
    /// Checks the limits.
    ///
    /// # Errors
    ///
    /// Which limit, and by how much.
    pub fn check(&self) -> Result<(), String> {
        if self.tenant.is_empty() {
            return Err("the tenant is empty".to_owned());
        }
        if self.labels.len() > MAX_LABELS {
            return Err(format!(
                "{} labels; at most {MAX_LABELS} are allowed",
                self.labels.len()
            ));
        }
        let texts = self
            .labels
            .iter()
            .flat_map(|(key, value)| [("a label's key", key), ("a label's value", value)]);
        for (what, text) in std::iter::once(("the tenant", &self.tenant)).chain(texts) {
            if text.len() > MAX_TEXT {
                return Err(format!(
                    "{what} has {} bytes; at most {MAX_TEXT} are allowed",
                    text.len()
                ));
            }
            if text.chars().any(char::is_control) {
                return Err(format!("{what} has a control character: {text:?}"));
            }
        }
        Ok(())
    }
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
    by_number: BTreeMap<Identity, IdentityKey>,
    by_key: HashMap<IdentityKey, Identity>,
}

/// What to try next to give a key its number.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// It has one.
    Known(Identity),
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
}

impl Registry {
    /// An empty registry.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            tenants: BTreeMap::new(),
            by_number: BTreeMap::new(),
            by_key: HashMap::new(),
        }
    }

    /// Takes note of a tenant in the store.
    pub fn insert_tenant(&mut self, number: u32, name: String) {
        self.tenants.insert(number, name);
    }

    /// Takes note of an identity in the store.
    pub fn insert(&mut self, identity: Identity, key: IdentityKey) {
        self.by_key.insert(key.clone(), identity);
        self.by_number.insert(identity, key);
    }

    /// The key with this number.
    #[must_use]
    pub fn key(&self, identity: Identity) -> Option<&IdentityKey> {
        self.by_number.get(&identity)
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
        self.by_number.iter().map(|(identity, key)| (*identity, key))
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
            return Ok(Next::Known(*identity));
        }
        let tenants = self.layout.tenants();
        let tenant = probe(&key.tenant, tenants)
            .find(|number| self.tenants.get(number).is_none_or(|name| *name == key.tenant))
            .ok_or(Exhausted::Tenants(tenants))?;
        if !self.tenants.contains_key(&tenant) {
            return Ok(Next::CreateTenant(tenant));
        }
        let numbers = self.layout.numbers();
        probe(&key.to_string(), numbers)
            .map(|number| self.layout.identity(tenant, number))
            .find(|identity| !self.by_number.contains_key(identity))
            .map(Next::CreateIdentity)
            .ok_or_else(|| Exhausted::Identities(key.tenant.clone(), numbers))
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
                Next::CreateTenant(number) => self.insert_tenant(number, key.tenant.clone()),
                Next::CreateIdentity(identity) => self.insert(identity, key.clone()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{IdentityKey, Layout, Registry};
    use abi::Identity;
    use std::collections::{BTreeMap, BTreeSet};

    fn key(tenant: &str, app: &str) -> IdentityKey {
        IdentityKey {
            tenant: tenant.to_owned(),
            labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
        }
    }

    #[test]
    fn numbers_do_not_depend_on_who_came_first() {
        let mut one = Registry::new(Layout { tenant_bits: 8 });
        let mut other = Registry::new(Layout { tenant_bits: 8 });
        let keys: Vec<_> = (0..50).map(|n| key("red", &n.to_string())).collect();
        let forward: Vec<_> = keys.iter().map(|key| one.assign(key).unwrap()).collect();
        // The other node learns of the first one's entries before it probes: as through the store.
        for (identity, key) in one.iter() {
            other.insert(identity, key.clone());
        }
        let again: Vec<_> = keys.iter().map(|key| other.assign(key).unwrap()).collect();
        assert_eq!(forward, again);
        assert_eq!(forward.iter().collect::<BTreeSet<_>>().len(), 50);
    }

    #[test]
    fn the_tenant_is_in_the_high_bits_and_never_zero() {
        for tenant_bits in [1, 8, 16] {
            let layout = Layout { tenant_bits };
            let mut registry = Registry::new(layout);
            let red = registry.assign(&key("red", "a")).unwrap();
            let also_red = registry.assign(&key("red", "b")).unwrap();
            assert_eq!(layout.tenant(red), layout.tenant(also_red));
            assert_ne!(layout.tenant(red), 0);
            assert_ne!(red, also_red);
            assert!(red.0 < 1 << 24 && red.is_pod());
            assert_eq!(layout.tenant(Identity::REMOTE_NODE), 0);
        }
    }

    #[test]
    fn running_out_is_an_error_that_says_of_what() {
        let mut registry = Registry::new(Layout { tenant_bits: 1 });
        registry.assign(&key("red", "a")).unwrap();
        let error = registry.assign(&key("blue", "a")).unwrap_err();
        assert!(error.to_string().contains("all 1 tenant numbers"), "{error}");

        let mut registry = Registry::new(Layout { tenant_bits: 16 });
        for n in 0..255 {
            registry.assign(&key("red", &n.to_string())).unwrap();
        }
        let error = registry.assign(&key("red", "more")).unwrap_err();
        assert!(
            error.to_string().contains("all 255 identity numbers of tenant red"),
            "{error}"
        );
    }

    #[test]
    fn limits_name_what_is_too_long() {
        let mut long = key(&"t".repeat(64), "a");
        assert!(long.check().unwrap_err().contains("the tenant has 64 bytes"));
        long.tenant = String::new();
        assert!(long.check().unwrap_err().contains("empty"));
        let mut many = key("red", "a");
        many.labels.extend((0..16).map(|n| (n.to_string(), String::new())));
        assert!(many.check().unwrap_err().contains("17 labels"));
        assert!(key("red", "a\nb").check().unwrap_err().contains("control character"));
    }
}
