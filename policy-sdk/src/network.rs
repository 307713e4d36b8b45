//! Networks: sets of addresses that a policy wants to tell apart.

use ipnet::IpNet;
use std::net::IpAddr;

/// A CIDR without some CIDRs in it.
///
/// ```
/// use policy_sdk::Network;
///
/// let office = Network::new("office").with("198.51.100.0/24".parse()?, ["198.51.100.7/32".parse()?]);
/// assert_eq!(office.blocks[0].except.len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressBlock {
    /// The CIDR.
    pub cidr: IpNet,
    /// What of it is not meant.
    pub except: Vec<IpNet>,
}

/// A set of addresses, IPv4 and IPv6, that a policy has a name for.
///
/// ```
/// use policy_sdk::Network;
///
/// let office = Network::new("office")
///     .with("198.51.100.0/24".parse()?, [])
///     .with("2001:db8::/32".parse()?, ["2001:db8:bad::/48".parse()?]);
/// assert!(office.contains("2001:db8::1".parse()?));
/// assert!(!office.contains("2001:db8:bad::1".parse()?));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its name, unique in the policy.
    pub name: String,
    /// What it is made of.
    pub blocks: Vec<AddressBlock>,
}

impl Network {
    /// A network without addresses.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            blocks: Vec::new(),
        }
    }

    /// The same with a CIDR, without `except`.
    #[must_use]
    pub fn with(mut self, cidr: IpNet, except: impl IntoIterator<Item = IpNet>) -> Self {
        let except = except.into_iter().collect();
        self.blocks.push(AddressBlock { cidr, except });
        self
    }

    /// Whether it holds an address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let holds = |block: &AddressBlock| {
            block.cidr.contains(&address) && !block.except.iter().any(|except| except.contains(&address))
        };
        self.blocks.iter().any(holds)
    }
}
