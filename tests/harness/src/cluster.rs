//! A cluster: nodes joined by an underlay, a hostd on each, pods on them.

use crate::{Etcd, EtcdOptions, Namespace, Node, artifacts, node::START, probe::wait_until, warden};
use anyhow::{Context, ensure};
use serde_json::Value;
use std::{fs, net::IpAddr, path::Path};

/// How a cluster is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Nodes, 1 to 200.
    pub nodes: u8,
    /// Lines for the end of every node's configuration, before its tables.
    pub keys: String,
    /// Tables for the end of every node's configuration.
    pub tables: String,
    /// Pod CIDRs of node `n`, from 1, with `{n}` for the number and a comma between them.
    pub pod_cidr: String,
    /// The tunnel is IPv6.
    pub ipv6_underlay: bool,
    /// Pod CIDRs of each node, in place of that.
    pub pod_cidrs: Vec<Vec<String>>,
    /// Addresses of a host on the underlay that is no node. It routes to the pods by way of their nodes.
    pub externals: Vec<IpAddr>,
    /// The cluster's store is an etcd on that host; else a folder.
    pub etcd: Option<EtcdOptions>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 2,
            keys: String::new(),
            tables: String::new(),
            pod_cidr: "10.{n}.0.0/24".to_owned(),
            ipv6_underlay: false,
            pod_cidrs: Vec::new(),
            externals: Vec::new(),
            etcd: None,
        }
    }
}

/// A pod: a namespace that hostd has connected.
#[derive(Debug)]
pub struct Pod {
    /// Its namespace.
    pub netns: Namespace,
    /// `NAMESPACE/NAME`.
    pub name: String,
    /// Its address, or the first of them.
    pub address: IpAddr,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Index of its node.
    pub node: usize,
}

/// Nodes and pods, removed when dropped.
pub struct Cluster {
    // Dropped in this order: pods, then nodes with their hostd, then what joins them and the store, then the files.
    /// The pods.
    pub pods: Vec<Pod>,
    /// The nodes.
    pub nodes: Vec<Node>,
    /// The host with the addresses that are no pods'.
    pub external: Option<Namespace>,
    /// The store, where it is none in a folder.
    pub etcd: Option<Etcd>,
    _underlay: Option<Namespace>,
    folder: tempfile::TempDir,
}

/// The network between the nodes: TEST-NET-1 (RFC 5737), and IPv6's for documentation (RFC 3849).
const UNDERLAY: &str = "192.0.2.";
const UNDERLAY6: &str = "2001:db8:0:2::";
/// Number of the host that is no node.
const EXTERNAL: u8 = 254;

/// Gives an interface its addresses on the underlay, all of which are there at once.
fn address(netns: &Namespace, number: u8) -> anyhow::Result<()> {
    netns.ip(&["link", "set", "underlay", "addrgenmode", "none"])?;
    netns.ip(&["addr", "add", &format!("{UNDERLAY}{number}/24"), "dev", "underlay"])?;
    for v6 in [format!("{UNDERLAY6}{number}/64"), format!("fe80::{number}/64")] {
        netns.ip(&["addr", "add", &v6, "dev", "underlay", "nodad"])?;
    }
    netns.ip(&["link", "set", "underlay", "up"])?;
    Ok(())
}

impl Cluster {
    /// Two nodes with hostd on them.
    ///
    /// # Errors
    ///
    /// Where something can't be made.
    pub fn new() -> anyhow::Result<Self> {
        Self::with(&Options::default())
    }

    /// One node with hostd on it.
    ///
    /// # Errors
    ///
    /// Where something can't be made.
    pub fn one_node() -> anyhow::Result<Self> {
        Self::with(&Options {
            nodes: 1,
            ..Options::default()
        })
    }

    /// Nodes with hostd on them.
    ///
    /// # Errors
    ///
    /// Where something can't be made.
    pub fn with(options: &Options) -> anyhow::Result<Self> {
        let mut cluster = Self::without_hostd(options)?;
        for node in &mut cluster.nodes {
            node.start()?;
        }
        // Every node knows every other one.
        let count = cluster.nodes.len();
        for node in &cluster.nodes {
            let met = wait_until(START, || {
                node.json(&["status"])
                    .is_ok_and(|status| status["nodes"].as_array().is_some_and(|nodes| nodes.len() == count))
            });
            ensure!(met, "node {} does not see all others: {}", node.name, node.log());
        }
        Ok(cluster)
    }

    /// Nodes that are configured, on which hostd does not run yet.
    ///
    /// # Errors
    ///
    /// Where something can't be made.
    pub fn without_hostd(options: &Options) -> anyhow::Result<Self> {
        let folder = warden::folder()?;
        let mut nodes = Vec::new();
        for number in 1..=options.nodes {
            let name = format!("node{number}");
            let prefix = if options.ipv6_underlay { UNDERLAY6 } else { UNDERLAY };
            let node = Node {
                netns: Namespace::new(&name)?,
                underlay: format!("{prefix}{number}").parse()?,
                folder: folder.path().join(&name),
                hostd: None,
                name,
            };
            fs::create_dir(&node.folder)?;
            nodes.push(node);
        }
        let external = if options.externals.is_empty() && options.etcd.is_none() {
            None
        } else {
            Some(Namespace::new("external")?)
        };
        let underlay = join(&nodes, external.as_ref())?;
        for (number, node) in (1..).zip(&nodes) {
            address(&node.netns, number)?;
        }
        if let Some(external) = &external {
            connect_external(external, &nodes, options)?;
        }
        let etcd = match (&external, &options.etcd) {
            (Some(external), Some(etcd)) => {
                let address = format!("{UNDERLAY}{EXTERNAL}").parse()?;
                Some(Etcd::start(external, address, etcd.clone())?)
            }
            _ => None,
        };
        let (store, table) = match &etcd {
            Some(etcd) => etcd.configuration(),
            None => (
                format!("store = \"file:{}\"\n", folder.path().join("store").display()),
                String::new(),
            ),
        };
        for (number, node) in (1..).zip(&nodes) {
            node.configure(options, number, &store, &table)?;
        }
        Ok(Self {
            pods: Vec::new(),
            nodes,
            external,
            etcd,
            _underlay: underlay,
            folder,
        })
    }

    /// Folder of the cluster's files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Connects a new pod, given as `NAMESPACE/NAME`; the answer is its index.
    ///
    /// # Errors
    ///
    /// Where hostd refuses.
    pub fn add_pod(&mut self, node: usize, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<usize> {
        let labels = labels
            .iter()
            .flat_map(|(key, value)| ["--label".to_owned(), format!("{key}={value}")]);
        self.add_pod_with(node, name, &labels.collect::<Vec<_>>())
    }

    /// Connects a new pod, with more arguments for `hostd endpoint add`; the answer is its index.
    ///
    /// # Errors
    ///
    /// Where hostd refuses.
    pub fn add_pod_with(&mut self, node: usize, name: &str, more: &[String]) -> anyhow::Result<usize> {
        let netns = Namespace::new(&name.replace('/', "-"))?;
        let (namespace, pod) = name.split_once('/').context("a pod is NAMESPACE/NAME")?;
        let mut arguments = vec![
            "endpoint",
            "add",
            "--netns",
            netns.name(),
            "--namespace",
            namespace,
            "--name",
            pod,
        ];
        arguments.extend(more.iter().map(String::as_str));
        let added = self.nodes[node].json(&arguments)?;
        let addresses = added["addresses"].as_array().context("hostd names no addresses")?;
        let addresses = addresses
            .iter()
            .map(|address| Ok(address.as_str().context("an address that is no text")?.parse()?))
            .collect::<anyhow::Result<Vec<IpAddr>>>()?;
        let address = *addresses.first().context("hostd names no address")?;
        self.pods.push(Pod {
            netns,
            name: name.to_owned(),
            address,
            addresses,
            node,
        });
        Ok(self.pods.len() - 1)
    }

    /// Disconnects a pod, and removes its namespace.
    ///
    /// # Errors
    ///
    /// Where there is no such pod, or hostd refuses.
    pub fn remove_pod(&mut self, name: &str) -> anyhow::Result<()> {
        let index = self
            .pods
            .iter()
            .position(|pod| pod.name == name)
            .context("no such pod")?;
        let pod = self.pods.remove(index);
        let (namespace, name) = name.split_once('/').context("a pod is NAMESPACE/NAME")?;
        let arguments = ["endpoint", "delete", "--namespace", namespace, "--name", name];
        self.nodes[pod.node].json(&arguments)?;
        Ok(())
    }

    /// A pod by name.
    ///
    /// # Panics
    ///
    /// Where there is none.
    #[must_use]
    pub fn pod(&self, name: &str) -> &Pod {
        let found = self.pods.iter().find(|pod| pod.name == name);
        found.unwrap_or_else(|| panic!("no pod {name}"))
    }

    /// Waits until every node's ipcache has an entry for every pod: what one node does others learn a moment later.
    ///
    /// # Errors
    ///
    /// Where they do not in time.
    pub fn settle(&self) -> anyhow::Result<()> {
        let expected = self.addresses();
        for node in &self.nodes {
            let settled = wait_until(START, || {
                node.others_addresses().is_ok_and(|entries| entries.len() == expected)
            });
            ensure!(settled, "node {} does not know all pods: {}", node.name, node.log());
        }
        Ok(())
    }

    /// Waits until each pod of every node has both of its tcx links: with `attach = "auto"` they come some time after the pod.
    ///
    /// # Errors
    ///
    /// Where they do not in time.
    pub fn wait_for_links(&self) -> anyhow::Result<()> {
        for node in &self.nodes {
            let pods = node.json(&["endpoint", "list"])?.as_array().map_or(0, Vec::len);
            let linked = wait_until(START, || {
                let pins = fs::read_dir(node.bpffs().join("links"));
                let names = pins.into_iter().flatten().flatten().map(|pin| pin.file_name());
                names.filter(|name| name.to_string_lossy().ends_with("_pod")).count() == 2 * pods
            });
            ensure!(
                linked,
                "node {} has not linked its {pods} pods: {}",
                node.name,
                node.log()
            );
        }
        Ok(())
    }

    fn addresses(&self) -> usize {
        self.pods.iter().map(|pod| pod.addresses.len()).sum()
    }

    /// Waits until all nodes say the same of every address: what one node does others learn a moment later.
    ///
    /// # Errors
    ///
    /// Where they do not in time.
    pub fn agree(&self) -> anyhow::Result<()> {
        let identities = |node: &Node| -> anyhow::Result<Vec<(String, u64)>> {
            let entries = node.others_addresses()?;
            let mut identities: Vec<(String, u64)> = entries
                .iter()
                .map(|entry| {
                    let address = entry["address"].as_str().unwrap_or_default().to_owned();
                    (address, entry["identity"].as_u64().unwrap_or(0))
                })
                .collect();
            identities.sort();
            Ok(identities)
        };
        let mut problem = None;
        let agreed = wait_until(START, || {
            let all: Result<Vec<_>, _> = self.nodes.iter().map(identities).collect();
            match all {
                Ok(all) => all[0].len() == self.addresses() && all.iter().all(|one| *one == all[0]),
                Err(error) => {
                    problem = Some(error);
                    false
                }
            }
        });
        ensure!(agreed, "the nodes do not agree: {problem:?}");
        Ok(())
    }

    /// Makes a service, with the options of `hostd service add` as one writes them; on return all nodes know it.
    ///
    /// # Errors
    ///
    /// Where hostd refuses, or a node never hears of it.
    pub fn add_service(&self, name: &str, options: &str) -> anyhow::Result<Value> {
        let options: Vec<&str> = options.split_whitespace().collect();
        let answer = self.service("add", name, &options)?;
        let expected = self.nodes[0].json(&["service", "list"])?;
        let known = wait_until(START, || {
            let knows = |node: &Node| node.json(&["service", "list"]).is_ok_and(|list| list == expected);
            self.nodes.iter().all(knows)
        });
        anyhow::ensure!(known, "not all nodes know service {name}");
        Ok(answer)
    }

    /// Ends a service; the answer says whether there was one.
    ///
    /// # Errors
    ///
    /// Where hostd refuses.
    pub fn delete_service(&self, name: &str) -> anyhow::Result<bool> {
        let answer = self.service("delete", name, &[])?;
        answer["deleted"].as_bool().context("no answer")
    }

    fn service(&self, command: &str, name: &str, options: &[&str]) -> anyhow::Result<Value> {
        let (namespace, name) = name.split_once('/').context("a service is NAMESPACE/NAME")?;
        let arguments = ["service", command, "--namespace", namespace, "--name", name];
        self.nodes[0].json(&[&arguments, options].concat())
    }

    /// Loads a policy by its name among those built, on the first node.
    ///
    /// # Errors
    ///
    /// Where hostd refuses.
    pub fn load(&self, policy: &str) -> anyhow::Result<Value> {
        let path = artifacts::policy(policy)?;
        self.nodes[0].json(&["load-policy", &path.display().to_string()])
    }
}

/// Gives the external host its addresses and everybody the routes that they need.
fn connect_external(external: &Namespace, nodes: &[Node], options: &Options) -> anyhow::Result<()> {
    address(external, EXTERNAL)?;
    let underlay = |v4: bool, number: u8| {
        let prefix = if v4 { UNDERLAY } else { UNDERLAY6 };
        format!("{prefix}{number}")
    };
    for address in &options.externals {
        let length = if address.is_ipv4() { 32 } else { 128 };
        external.ip(&["addr", "add", &format!("{address}/{length}"), "dev", "lo"])?;
        let via = underlay(address.is_ipv4(), EXTERNAL);
        for node in nodes {
            node.netns.ip(&["route", "add", &address.to_string(), "via", &via])?;
        }
    }
    for (number, _) in (1..).zip(nodes) {
        for cidr in options.cidrs_of(number) {
            let via = underlay(!cidr.contains(':'), number);
            external.ip(&["route", "add", &cidr, "via", &via])?;
        }
    }
    Ok(())
}

impl Options {
    /// Pods have an address of each family.
    #[must_use]
    pub fn dual_stack() -> Self {
        Self {
            pod_cidr: "10.{n}.0.0/24,fd00:10:{n}::/64".to_owned(),
            ..Self::default()
        }
    }

    pub(crate) fn cidrs_of(&self, number: u8) -> Vec<String> {
        if let Some(cidrs) = self.pod_cidrs.get(usize::from(number) - 1) {
            return cidrs.clone();
        }
        let cidrs = self.pod_cidr.replace("{n}", &number.to_string());
        cidrs.split(',').map(str::to_owned).collect()
    }
}

/// Joins the nodes: two by a veth pair, more by a bridge in a namespace of its own.
fn join(nodes: &[Node], external: Option<&Namespace>) -> anyhow::Result<Option<Namespace>> {
    if let ([one, other], None) = (nodes, external) {
        one.netns.connect("underlay", &other.netns, "underlay")?;
        return Ok(None);
    }
    let bridge = Namespace::new("underlay")?;
    bridge.ip(&["link", "add", "bridge", "type", "bridge"])?;
    bridge.ip(&["link", "set", "bridge", "up"])?;
    let namespaces = nodes.iter().map(|node| &node.netns).chain(external);
    for (index, netns) in namespaces.enumerate() {
        let port = format!("port{index}");
        bridge.connect(&port, netns, "underlay")?;
        bridge.ip(&["link", "set", &port, "master", "bridge", "up"])?;
    }
    Ok(Some(bridge))
}
