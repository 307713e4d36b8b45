//! The node's configuration: a TOML file, every key of which is documented in `node.example.toml`.

mod lease;

pub use lease::Lease;

use crate::store::{ETCD, EtcdConfig};
use abi::conntrack::Timeouts;
use ipnet::IpNet;
use serde::Deserialize;
use std::{
    net::{IpAddr, Ipv6Addr},
    path::{Path, PathBuf},
};

/// The configuration of one node.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the node, unique in the cluster.
    pub node: String,
    /// Address that other nodes reach this one at, of either family. It must be on one of the node's interfaces.
    pub underlay: IpAddr,
    /// Where pods get their addresses from; every address is usable.
    pub pod_cidrs: Vec<IpNet>,
    /// Where the cluster's state is: `file:FOLDER`, or `etcd:URL,URL…`.
    pub store: String,
    /// How etcd is reached.
    #[serde(default)]
    pub etcd: EtcdConfig,
    /// What this node keeps across restarts.
    #[serde(default = "defaults::state_dir")]
    pub state_dir: PathBuf,
    /// The control socket.
    #[serde(default = "defaults::socket")]
    pub socket: PathBuf,
    /// Folder for pins; hostd mounts a bpffs on it unless it is inside one.
    #[serde(default = "defaults::bpffs")]
    pub bpffs: PathBuf,
    /// How the programs are attached.
    #[serde(default)]
    pub attach: Attach,
    /// Turn on IPv4 forwarding, which traffic between pods and hosts that are no pods needs.
    #[serde(default = "defaults::forwarding")]
    pub forwarding: bool,
    /// What pods send to the outside leaves with the node's address.
    #[serde(default = "defaults::masquerade")]
    pub masquerade: bool,
    /// Destinations that see the pods' own addresses all the same.
    #[serde(default)]
    pub masquerade_except: Vec<IpNet>,
    /// Interfaces whose addresses other nodes are not told of, besides those of pods and of container bridges.
    #[serde(default)]
    pub ignore_interfaces: Vec<String>,
    /// The cgroup (version 2) whose processes are kept from sending for the tunnel; that of all processes, where none is given.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// First and last node port that a service may have.
    #[serde(default = "defaults::node_port_range")]
    pub node_port_range: [u16; 2],
    /// A file of invariants, as for `hostd policy verify`: a policy that breaks one is refused by this node.
    #[serde(default)]
    pub invariants: Option<PathBuf>,
    /// How an identity's 24 bits are laid out.
    #[serde(default)]
    pub vni: Vni,
    /// When a node is stale, and when it is gone.
    #[serde(default)]
    pub lease: Lease,
    /// How long flows are remembered.
    #[serde(default)]
    pub conntrack: Timeouts,
    /// Limits of policy modules.
    #[serde(default)]
    pub wasm: Wasm,
    /// Sizes of the BPF maps.
    #[serde(default)]
    pub maps: Maps,
}

/// How the programs are attached.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Attach {
    /// tcx links where the kernel has them, clsact filters elsewhere. A pod that comes gets filters at first in any case, for the
    /// kernel needs longer for links: these take over when no pod has come or gone for 0.1 s.
    #[default]
    Auto,
    /// tcx links from the start (Linux 6.6 and later).
    Tcx,
    /// Filters on the clsact qdisc.
    Clsact,
}

/// How an identity's 24 bits are laid out. The same on all nodes.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Vni {
    /// High bits that hold the tenant, 1 to 16. The others hold the number within the tenant.
    pub tenant_bits: u32,
    /// An identity that nobody has used for so many seconds is collected, once all nodes agree. 0: never.
    pub collect_seconds: u64,
}

impl Default for Vni {
    fn default() -> Self {
        Self {
            tenant_bits: 8,
            collect_seconds: 600,
        }
    }
}

/// Limits of policy modules.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Wasm {
    /// Size of a module, in bytes.
    pub max_module_bytes: usize,
    /// CPU time to compile a module, in seconds.
    pub compile_seconds: u64,
    /// Memory for compiling a module, in mebibytes.
    pub compile_memory_mib: u64,
    /// Time for all that one load or one change asks of a module, in milliseconds.
    pub evaluate_ms: u64,
    /// Memory of a module, in mebibytes.
    pub memory_mib: usize,
    /// Fuel for one call; one unit is about one wasm instruction.
    pub fuel_per_call: u64,
}

impl Default for Wasm {
    fn default() -> Self {
        Self {
            max_module_bytes: 16 << 20,
            compile_seconds: 2,
            compile_memory_mib: 1024,
            evaluate_ms: 2000,
            memory_mib: 64,
            fuel_per_call: 200_000_000,
        }
    }
}

/// Sizes of the BPF maps, as numbers of entries.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Maps {
    /// Pods on this node.
    pub endpoints: u32,
    /// Addresses in the cluster.
    pub addresses: u32,
    /// Identities in the cluster: columns of the policy matrix.
    pub identities: u32,
    /// Identities of this node's pods: rows of the policy matrix.
    pub local_identities: u32,
    /// Different port sets.
    pub port_sets: u32,
    /// Breakpoints of all port sets together: at most two for each port or range.
    pub breakpoints: u32,
    /// Prefixes of networks and pod CIDRs.
    pub networks: u32,
    /// Tracked flows.
    pub conntrack: u32,
    /// Packets whose later fragments are awaited.
    pub fragments: u32,
    /// Frontends of services: addresses with ports, and node ports.
    pub services: u32,
    /// Clients whose backend is remembered by their address.
    pub affinity: u32,
}

impl Default for Maps {
    fn default() -> Self {
        Self {
            endpoints: 512,
            addresses: 65536,
            identities: 4096,
            local_identities: 256,
            port_sets: 1024,
            breakpoints: 16_384,
            networks: 16_384,
            conntrack: 131_072,
            fragments: 8192,
            services: 4096,
            affinity: 65536,
        }
    }
}

mod defaults {
    use std::path::PathBuf;

    pub const fn forwarding() -> bool {
        true
    }

    /// Kubernetes's `--service-node-port-range`; below Linux's `ip_local_port_range`.
    pub const fn node_port_range() -> [u16; 2] {
        [30000, 32767]
    }

    pub const fn masquerade() -> bool {
        true
    }

    pub fn state_dir() -> PathBuf {
        "/var/lib/wasmgate".into()
    }
    pub fn socket() -> PathBuf {
        super::DEFAULT_SOCKET.into()
    }
    pub fn bpffs() -> PathBuf {
        "/sys/fs/bpf/wasmgate".into()
    }
}

/// Where hostd listens, and its commands look for it, unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/wasmgate/hostd.sock";

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// No TOML, a key that is unknown or missing, or a value of the wrong type.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where, as the parser says it.
        source: Box<toml::de::Error>,
    },
    /// A value that makes no sense.
    #[error("{path}: `{key}`: {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

impl Config {
    /// Pods have IPv6 addresses.
    #[must_use]
    pub fn has_ipv6(&self) -> bool {
        self.pod_cidrs.iter().any(|cidr| matches!(cidr, IpNet::V6(_)))
    }

    /// Reads and checks a configuration file.
    ///
    /// # Errors
    ///
    /// What is wrong, in which file, at which key or line.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        config.check().map_err(|(key, problem)| ConfigError::Value {
            path: path.to_owned(),
            key,
            problem,
        })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        crate::endpoint::check_name(&self.node).map_err(|problem| ("node", problem))?;
        if let IpAddr::V6(v6) = self.underlay
            && !is_global(v6)
        {
            return Err(("underlay", format!("{v6} is not a global or unique local address")));
        }
        if self.underlay.is_unspecified() || self.underlay.is_loopback() || self.underlay.is_multicast() {
            return Err(("underlay", format!("{} is no address of a node", self.underlay)));
        }
        if !self.socket.is_absolute() {
            let problem = format!("{} does not begin with `/`", self.socket.display());
            return Err(("socket", problem));
        }
        if self.pod_cidrs.is_empty() {
            return Err(("pod_cidrs", "give at least one, such as [\"10.1.0.0/24\"]".into()));
        }
        for (index, cidr) in self.pod_cidrs.iter().enumerate() {
            self.check_cidr(index, cidr).map_err(|problem| ("pod_cidrs", problem))?;
        }
        if !(1..=16).contains(&self.vni.tenant_bits) {
            let problem = format!("{} is not between 1 and 16", self.vni.tenant_bits);
            return Err(("vni.tenant_bits", problem));
        }
        let [first, last] = self.node_port_range;
        if first == 0 || first > last || (first..=last).contains(&abi::node::TUNNEL_PORT) {
            let problem = format!("[{first}, {last}] is no range of ports without the tunnel's, as [30000, 32767] is");
            return Err(("node_port_range", problem));
        }
        if self.lease.ttl_seconds == 0 {
            return Err(("lease.ttl_seconds", "must be 1 or more".into()));
        }
        for (key, value, least, most) in [
            ("lease.load_seconds", self.lease.load_seconds, 1, 3600),
            ("conntrack.tcp_syn", self.conntrack.tcp_syn, 1, 1 << 20),
            ("conntrack.tcp_established", self.conntrack.tcp_established, 1, 1 << 20),
            ("conntrack.tcp_half_closed", self.conntrack.tcp_half_closed, 1, 1 << 20),
            ("conntrack.tcp_closed", self.conntrack.tcp_closed, 1, 1 << 20),
            ("conntrack.unreplied", self.conntrack.unreplied, 1, 1 << 20),
            ("conntrack.assured", self.conntrack.assured, 1, 1 << 20),
            ("maps.endpoints", self.maps.endpoints, 1, 65536),
            ("maps.addresses", self.maps.addresses, 16, 1 << 22),
            ("maps.identities", self.maps.identities, 64, 65536),
            ("maps.local_identities", self.maps.local_identities, 2, 4096),
            ("maps.port_sets", self.maps.port_sets, 1, 65533),
            ("maps.breakpoints", self.maps.breakpoints, 16, 1 << 22),
            ("maps.networks", self.maps.networks, 64, 1 << 20),
            ("maps.conntrack", self.maps.conntrack, 1024, 1 << 24),
            ("maps.fragments", self.maps.fragments, 1024, 1 << 20),
            ("maps.services", self.maps.services, 16, 1 << 16),
            ("maps.affinity", self.maps.affinity, 1024, 1 << 20),
        ] {
            if !(least..=most).contains(&value) {
                return Err((key, format!("{value} is not between {least} and {most}")));
            }
        }
        if self.store.starts_with(ETCD) {
            self.etcd.check(&self.store)
        } else if self.store.starts_with("file:/") {
            Ok(())
        } else {
            let problem = format!(
                "`{}` is neither `file:` and an absolute path nor `etcd:` and URLs",
                self.store
            );
            Err(("store", problem))
        }
    }

    fn check_cidr(&self, index: usize, cidr: &IpNet) -> Result<(), String> {
        if let IpNet::V6(v6) = cidr
            && !is_global(v6.network())
        {
            return Err(format!(
                "{cidr}: pods' addresses are global or unique local ones, as in fd00:10:1::/64"
            ));
        }
        if cidr.contains(&self.underlay) {
            return Err(format!("{cidr} contains the node's own address {}", self.underlay));
        }
        let overlaps = |other: &&IpNet| other.contains(&cidr.network()) || cidr.contains(&other.network());
        match self.pod_cidrs[..index].iter().find(overlaps) {
            Some(other) => Err(format!("{cidr} overlaps {other}")),
            None => Ok(()),
        }
    }
}

/// Neither link-local nor multicast, nor any of what begins with eight zero bits (RFC 4291, section 2.4).
const fn is_global(address: Ipv6Addr) -> bool {
    address.segments()[0] >> 8 != 0 && !address.is_multicast() && !address.is_unicast_link_local()
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
