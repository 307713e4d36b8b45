//! Names for numbers: what the monitor shows. Kept beside the daemon's state, so that reports do not wait for it.

use abi::{AddressKey, Identity};
use std::collections::HashMap;

/// Names of addresses and identities.
#[derive(Debug, Default)]
pub struct Names {
    addresses: HashMap<AddressKey, String>,
    identities: HashMap<Identity, String>,
}

impl Names {
    pub fn set_address(&mut self, address: AddressKey, name: String) {
        self.addresses.insert(address, name);
    }

    pub fn remove_address(&mut self, address: &AddressKey) {
        self.addresses.remove(address);
    }

    pub fn set_identity(&mut self, identity: Identity, name: String) {
        self.identities.insert(identity, name);
    }

    pub fn address(&self, address: &AddressKey) -> String {
        self.addresses.get(address).cloned().unwrap_or_default()
    }

    pub fn identity(&self, identity: Identity) -> String {
        match (identity, identity.reserved_name()) {
            (Identity::NONE, _) => String::new(),
            (_, Some(name)) => name.to_owned(),
            (_, None) => self
                .identities
                .get(&identity)
                .cloned()
                .unwrap_or_else(|| format!("identity {}", identity.0)),
        }
    }
}
