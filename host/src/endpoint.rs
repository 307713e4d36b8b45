//! Pods of this node: their names, their addresses, and what is kept of them on disk.

use crate::{
    attachment::Attachment,
    codec,
    net::POD_INTERFACE,
    store::{Durability, StoreError, records::PodRecord, replace_file},
};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fmt::Write,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalEndpoint {
    /// The pod, as the cluster knows it.
    pub pod: PodRecord,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Name of the host's end of the veth pair.
    pub interface: String,
    /// What a container runtime calls it, where one has attached it.
    pub attachment: Option<Attachment>,
}

impl LocalEndpoint {
    /// Name of the interface inside the pod.
    #[must_use]
    pub fn pod_interface(&self) -> &str {
        self.attachment
            .as_ref()
            .map_or(POD_INTERFACE, |attachment| &attachment.interface)
    }
}

/// Checks the name of an interface inside a pod (`dev_valid_name` in `net/core/dev.c`, Linux 6.12).
///
/// # Errors
///
/// What is wrong with it.
pub fn check_interface(name: &str) -> Result<(), String> {
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." || name == "lo" || name.contains(bad) {
        return Err(format!("{name:?} is no name for a pod's interface, such as eth0"));
    }
    Ok(())
}

/// Longest name of a node, namespace or pod: a DNS label's (RFC 1123, section 2.1), as in Kubernetes.
const MAX_NAME: usize = 63;

/// Checks the name of a node, a namespace or a pod.
///
/// # Errors
///
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(format!("{name:?} has {} bytes; a name has 1 to {MAX_NAME}", name.len()));
    }
    let edges = [name.chars().next(), name.chars().next_back()];
    if !name.chars().all(fits) || edges.iter().flatten().any(|c| !c.is_ascii_alphanumeric()) {
        return Err(format!(
            "{name:?}: a name has lower-case letters, digits, `-` and `.`, and begins and ends with a letter or digit"
        ));
    }
    Ok(())
}

/// Labels of a pod at the most.
const MAX_LABELS: usize = 64;
/// Bytes of a label's key at the most: prefix, slash and name (Kubernetes, "Labels and Selectors").
const MAX_KEY: usize = 253 + 1 + 63;

/// Checks a pod's labels.
///
/// # Errors
///
/// Which label is wrong, and why.
pub fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), String> {
    if labels.len() > MAX_LABELS {
        return Err(format!("{} labels; a pod has at most {MAX_LABELS}", labels.len()));
    }
    for (key, value) in labels {
        if key.is_empty() || key.len() > MAX_KEY || key.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(format!(
                "label {key:?}: a key has 1 to {MAX_KEY} bytes and no white space"
            ));
        }
        if value.len() > MAX_NAME || value.chars().any(char::is_control) {
            return Err(format!("label {key}={value:?}: a value has at most {MAX_NAME} bytes"));
        }
    }
    Ok(())
}

/// Named ports of a pod at the most.
const MAX_PORTS: usize = 256;

/// Checks the names of a pod's ports: 1 to 15 letters, digits and `-` (RFC 6335, section 5.1), each once for a protocol.
///
/// # Errors
///
/// Which port is wrong, and why.
pub fn check_ports(ports: &[(String, u8, u16)]) -> Result<(), String> {
    if ports.len() > MAX_PORTS {
        return Err(format!("{} named ports; a pod has at most {MAX_PORTS}", ports.len()));
    }
    for (index, (name, protocol, port)) in ports.iter().enumerate() {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > 15 || !name.chars().all(fits) {
            return Err(format!(
                "port {name:?}: a port's name has 1 to 15 lower-case letters, digits and `-`"
            ));
        }
        if *port == 0 {
            return Err(format!("port {name}: 0 is no port"));
        }
        let again = |(other, proto, _): &(String, u8, u16)| other == name && proto == protocol;
        if ports[..index].iter().any(again) {
            return Err(format!("port {name}: the name is given twice"));
        }
    }
    Ok(())
}

/// Name of the host's end of a pod's veth pair: 15 bytes, the most that an interface's name can have.
#[must_use]
pub fn interface_name(namespace: &str, name: &str) -> String {
    let digest = Sha256::digest(format!("{namespace}/{name}").as_bytes());
    digest.iter().take(6).fold("wg-".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Whether an interface's name is one that [`interface_name`] gives.
#[must_use]
pub fn is_interface_name(name: &str) -> bool {
    let digits = name.strip_prefix("wg-").unwrap_or_default();
    digits.len() == 12 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Why a pod got no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Asked for one that is not this node's.
    #[error("{address} is in none of this node's pod CIDRs ({cidrs})")]
    Foreign {
        /// The address.
        address: IpAddr,
        /// The CIDRs.
        cidrs: String,
    },
    /// Asked for one that is taken.
    #[error("{address} belongs to {owner} already")]
    Taken {
        /// The address.
        address: IpAddr,
        /// Whose it is.
        owner: String,
    },
    /// Asked for two of one family.
    #[error("{0} is the second address of its family: a pod has one of each")]
    Twice(IpAddr),
    /// Nothing left.
    #[error("every address of this node's pod CIDRs ({cidrs}) is taken; add a CIDR or delete pods")]
    Full {
        /// The CIDRs.
        cidrs: String,
    },
}

/// Finds the address for a pod: the one that was asked for, or the first free one.
///
/// # Errors
///
/// Where that one is foreign or taken, or none is free.
pub fn choose_address(
    cidrs: &[IpNet],
    asked: Option<IpAddr>,
    owner: impl Fn(IpAddr) -> Option<String>,
) -> Result<IpAddr, AddressError> {
    let names = || cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if let Some(address) = asked {
        if !cidrs.iter().any(|cidr| cidr.contains(&address)) {
            return Err(AddressError::Foreign {
                address,
                cidrs: names(),
            });
        }
        return match owner(address) {
            Some(owner) => Err(AddressError::Taken { address, owner }),
            None => Ok(address),
        };
    }
    cidrs
        .iter()
        .flat_map(every_address)
        .find(|address| owner(*address).is_none())
        .ok_or_else(|| AddressError::Full { cidrs: names() })
}

/// Finds a pod's addresses, one for each family that the CIDRs have; first that of the first CIDR.
///
/// # Errors
///
/// As [`choose_address`]; also where two are `asked` for in one family.
pub fn choose_addresses(
    cidrs: &[IpNet],
    asked: &[IpAddr],
    owner: impl Fn(IpAddr) -> Option<String>,
) -> Result<(IpAddr, Option<IpAddr>), AddressError> {
    for (index, address) in asked.iter().enumerate() {
        if asked[..index].iter().any(|other| other.is_ipv4() == address.is_ipv4()) {
            return Err(AddressError::Twice(*address));
        }
        // Also of a family that no CIDR has.
        choose_address(cidrs, Some(*address), &owner)?;
    }
    let first_is_v4 = cidrs.first().is_some_and(|cidr| cidr.addr().is_ipv4());
    let choose = |v4: bool| {
        let its: Vec<IpNet> = cidrs
            .iter()
            .filter(|cidr| cidr.addr().is_ipv4() == v4)
            .copied()
            .collect();
        let asked = asked.iter().find(|address| address.is_ipv4() == v4).copied();
        (!its.is_empty())
            .then(|| choose_address(&its, asked, &owner))
            .transpose()
    };
    let first = choose(first_is_v4)?.ok_or_else(|| AddressError::Full { cidrs: String::new() })?;
    Ok((first, choose(!first_is_v4)?))
}

/// All addresses of a CIDR, the first and the last included: no broadcast domain gives them a meaning of their own. But
/// for the first one of IPv6, which is the anycast address of the subnet's routers (RFC 4291, section 2.6.1).
fn every_address(cidr: &IpNet) -> Box<dyn Iterator<Item = IpAddr>> {
    match cidr {
        IpNet::V4(v4) => {
            let range = u32::from(v4.network())..=u32::from(v4.broadcast());
            Box::new(range.map(|address| IpAddr::V4(address.into())))
        }
        IpNet::V6(v6) => {
            let first = u128::from(v6.network()) + u128::from(v6.prefix_len() < 127);
            let range = first..=u128::from(v6.broadcast());
            Box::new(range.map(|address| IpAddr::V6(address.into())))
        }
    }
}

/// The file that keeps a node's endpoints across restarts.
#[derive(Clone, Debug)]
pub struct EndpointFile(PathBuf);

impl EndpointFile {
    /// The file in a node's state folder, which is made where it is missing.
    ///
    /// # Errors
    ///
    /// Where the folder can't be made.
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(state_dir)?;
        Ok(Self(state_dir.join("endpoints")))
    }

    /// What was saved last; nothing where there is no file.
    ///
    /// # Errors
    ///
    /// Where the file can't be read, or is torn or foreign.
    pub fn load(&self) -> Result<Vec<LocalEndpoint>, StoreError> {
        match fs::read(&self.0) {
            Ok(bytes) => codec::decode(&bytes).map_err(|source| StoreError::Content {
                file: self.0.display().to_string(),
                source,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(StoreError::Io {
                what: format!("read {}", self.0.display()),
                source,
            }),
        }
    }

    /// Copies a file that can't be read out of the way; where the copy is.
    ///
    /// # Errors
    ///
    /// Where it can't be copied.
    pub fn put_aside(&self) -> Result<PathBuf, StoreError> {
        let aside = self.0.with_extension("damaged");
        fs::copy(&self.0, &aside).map_err(|source| StoreError::Io {
            what: format!("copy {}", self.0.display()),
            source,
        })?;
        Ok(aside)
    }

    /// Whether there is one.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.0.exists()
    }

    /// Replaces the file. A crash of the machine may bring the one before it back: none of these pods outlives that.
    ///
    /// # Errors
    ///
    /// Where it can't be written.
    pub fn save<'a>(&self, endpoints: impl Iterator<Item = &'a LocalEndpoint>) -> Result<(), StoreError> {
        let endpoints: Vec<&LocalEndpoint> = endpoints.collect();
        let bytes = codec::encode(&endpoints).map_err(|source| StoreError::Content {
            file: self.0.display().to_string(),
            source,
        })?;
        replace_file(&self.0, &bytes, Durability::Memory)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        AddressError, check_labels, check_name, choose_address, choose_addresses, interface_name, is_interface_name,
    };
    use ipnet::IpNet;
    use std::{collections::BTreeMap, net::IpAddr};

    fn cidrs() -> Vec<IpNet> {
        vec!["10.0.0.0/31".parse().unwrap(), "10.9.0.7/32".parse().unwrap()]
    }

    #[test]
    fn every_address_of_every_cidr_is_used_then_it_is_full() {
        let mut taken: Vec<IpAddr> = Vec::new();
        for expected in ["10.0.0.0", "10.0.0.1", "10.9.0.7"] {
            let address = choose_address(&cidrs(), None, |a| taken.contains(&a).then(String::new)).unwrap();
            assert_eq!(address.to_string(), expected);
            taken.push(address);
        }
        let error = choose_address(&cidrs(), None, |a| taken.contains(&a).then(String::new)).unwrap_err();
        assert!(error.to_string().contains("10.0.0.0/31, 10.9.0.7/32"), "{error}");
    }

    #[test]
    fn an_address_that_was_asked_for_must_be_ours_and_free() {
        let asked = |address: &str, owner: Option<&str>| {
            choose_address(&cidrs(), Some(address.parse().unwrap()), |_| owner.map(str::to_owned))
        };
        assert!(asked("10.0.0.1", None).is_ok());
        assert!(matches!(asked("10.0.0.2", None), Err(AddressError::Foreign { .. })));
        let error = asked("10.0.0.1", Some("red/a")).unwrap_err();
        assert_eq!(error.to_string(), "10.0.0.1 belongs to red/a already");
    }

    #[test]
    fn a_pod_has_one_address_of_each_family_that_the_node_has() {
        let both: Vec<IpNet> = ["fd00::/64", "10.0.0.0/24"].map(|cidr| cidr.parse().unwrap()).to_vec();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let choose = |cidrs: &[IpNet], asked: &[&str]| {
            let asked: Vec<IpAddr> = asked.iter().map(|text| address(text)).collect();
            choose_addresses(cidrs, &asked, |_| None)
        };
        assert_eq!(
            choose(&both, &[]).unwrap(),
            (address("fd00::1"), Some(address("10.0.0.0")))
        );
        let asked = choose(&both, &["10.0.0.7", "fd00::9"]).unwrap();
        assert_eq!(asked, (address("fd00::9"), Some(address("10.0.0.7"))));
        assert_eq!(choose(&both[..1], &[]).unwrap(), (address("fd00::1"), None));
        assert!(matches!(
            choose(&both[..1], &["10.0.0.7"]),
            Err(AddressError::Foreign { .. })
        ));
        assert!(matches!(
            choose(&both, &["10.0.0.7", "10.0.0.8"]),
            Err(AddressError::Twice(_))
        ));
    }

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "web-1", "a.b", "0"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a/b", "a b", "ä", &"x".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_are_bounded() {
        let one = |key: &str, value: &str| check_labels(&BTreeMap::from([(key.to_owned(), value.to_owned())]));
        assert!(one("app.kubernetes.io/name", "web").is_ok());
        assert!(one("app", "").is_ok());
        assert!(one("", "x").is_err());
        assert!(one("a b", "x").is_err());
        assert!(one("app", &"x".repeat(64)).is_err());
        let many = (0..65).map(|n| (n.to_string(), String::new())).collect();
        assert!(check_labels(&many).is_err());
    }

    #[test]
    fn an_interface_name_fits_the_kernel_and_differs_by_pod() {
        assert_eq!(interface_name("red", "a").len(), 15);
        assert_ne!(interface_name("red", "a"), interface_name("red", "b"));
        assert!(is_interface_name(&interface_name("red", "a")));
        for other in ["wg-mesh", "wg0", "wg-0123456789ag", "eth0"] {
            assert!(!is_interface_name(other), "{other}");
        }
    }
}
