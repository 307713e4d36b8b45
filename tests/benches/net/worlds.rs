//! The pairs of ends that are compared.

use anyhow::{Context, ensure};
use harness::{Cluster, Listener, Namespace, Options, TcpOutcome, tcp_exchange};
use std::{fmt::Write as _, fs, io::Write as _, net::IpAddr, path::Path, process::Stdio, time::Duration};

/// What there is, in the order of the table.
pub const NAMES: [&str; 5] = ["bare", "bridge_nftables", "wasmgate", "bridge_vxlan", "wasmgate_across"];

/// Ports that clients may use by TCP: [`super::load`]'s programs.
pub const PORTS: [u16; 3] = [5201, 8080, 11111];
/// And one that they may not.
const FORBIDDEN: u16 = 9999;

const MTU: &str = "1450";
const CLIENT: &str = "10.9.0.1";
const SERVER: &str = "10.9.0.2";

/// Somebody who asks, and somebody who answers.
pub struct World<'a> {
    pub name: &'static str,
    pub client: &'a Namespace,
    pub server: &'a Namespace,
    pub address: IpAddr,
}

/// Two ends, and what is between them.
struct Pair {
    client: Namespace,
    server: Namespace,
    _between: Vec<Namespace>,
}

impl Pair {
    fn world(&self, name: &'static str) -> anyhow::Result<World<'_>> {
        Ok(World {
            name,
            client: &self.client,
            server: &self.server,
            address: SERVER.parse()?,
        })
    }
}

/// All of them.
pub struct Worlds {
    bare: Pair,
    bridge: Pair,
    vxlan: Pair,
    cluster: Cluster,
}

impl Worlds {
    pub fn new() -> anyhow::Result<Self> {
        let worlds = Self {
            bare: bare()?,
            bridge: bridge()?,
            vxlan: vxlan()?,
            cluster: wasmgate()?,
        };
        for world in worlds.all() {
            check(&world).context(world.name)?;
        }
        Ok(worlds)
    }

    pub fn all(&self) -> Vec<World<'_>> {
        let pod = |name| self.cluster.pod(name);
        let pods = [("wasmgate", "bench/here"), ("wasmgate_across", "bench/there")].map(|(name, server)| World {
            name,
            client: &pod("bench/client").netns,
            server: &pod(server).netns,
            address: pod(server).address,
        });
        let others = [
            self.bare.world("bare"),
            self.bridge.world("bridge_nftables"),
            self.vxlan.world("bridge_vxlan"),
        ];
        let others = others.into_iter().map(|world| world.expect("a constant address"));
        let mut all: Vec<World<'_>> = others.chain(pods).collect();
        all.sort_by_key(|world| NAMES.iter().position(|name| *name == world.name));
        all
    }
}

/// What may be asked for is answered, and where there is a policy nothing else.
fn check(world: &World<'_>) -> anyhow::Result<()> {
    let (from, to) = (world.client.name(), world.address);
    let _listeners = [PORTS[0], FORBIDDEN]
        .map(|port| Listener::new(world.server.name(), port))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let outcome = tcp_exchange(from, to, PORTS[0], Duration::from_secs(5))?;
    ensure!(outcome == TcpOutcome::Open, "what is allowed ended as {outcome:?}");
    let expected = if matches!(world.name, "bare" | "bridge_vxlan") {
        TcpOutcome::Open
    } else {
        TcpOutcome::Silence
    };
    let outcome = tcp_exchange(from, to, FORBIDDEN, Duration::from_millis(500))?;
    ensure!(outcome == expected, "what is not allowed ended as {outcome:?}");
    Ok(())
}

fn pair(one: (&Namespace, &str), other: (&Namespace, &str), mtu: &str) -> anyhow::Result<()> {
    let ends = [
        "link",
        "add",
        one.1,
        "mtu",
        mtu,
        "netns",
        one.0.name(),
        "type",
        "veth",
        "peer",
        "name",
        other.1,
        "mtu",
        mtu,
        "netns",
        other.0.name(),
    ];
    harness::run("ip", &ends)?;
    for (netns, name) in [one, other] {
        netns.ip(&["link", "set", name, "up"])?;
    }
    Ok(())
}

fn address(netns: &Namespace, address: &str, device: &str) -> anyhow::Result<()> {
    netns.ip(&["addr", "add", &format!("{address}/24"), "dev", device])?;
    Ok(())
}

fn ends() -> anyhow::Result<(Namespace, Namespace)> {
    Ok((Namespace::new("client")?, Namespace::new("server")?))
}

fn bare() -> anyhow::Result<Pair> {
    let (client, server) = ends()?;
    pair((&client, "eth0"), (&server, "eth0"), MTU)?;
    address(&client, CLIENT, "eth0")?;
    address(&server, SERVER, "eth0")?;
    Ok(Pair {
        client,
        server,
        _between: Vec::new(),
    })
}

/// A bridge with a port to a pod.
fn bridge_to(node: &Namespace, pod: &Namespace, own: &str) -> anyhow::Result<()> {
    if node.ip(&["link", "show", "bridge"]).is_err() {
        node.ip(&["link", "add", "bridge", "mtu", MTU, "type", "bridge"])?;
        node.ip(&["link", "set", "bridge", "up"])?;
    }
    let port = format!("port{}", own.rsplit('.').next().unwrap_or_default());
    pair((pod, "eth0"), (node, &port), MTU)?;
    node.ip(&["link", "set", &port, "master", "bridge"])?;
    address(pod, own, "eth0")
}

/// The policy as nftables has it: established connections go on, others are looked up by both addresses, protocol and port.
/// The kernel gives what is bridged to these chains (`br_netfilter`).
fn ruleset() -> String {
    let mut elements = String::new();
    for port in PORTS {
        let _ = write!(elements, "{CLIENT} . {SERVER} . tcp . {port}, ");
    }
    format!(
        "table inet pods {{\n\
         set allowed {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; elements = {{ {elements} \
         {CLIENT} . {SERVER} . udp . {} }}; }}\n\
         chain forward {{ type filter hook forward priority filter; policy drop;\n\
         ct state established,related accept\n\
         ip saddr . ip daddr . meta l4proto . th dport @allowed accept\n\
         }}\n}}\n",
        PORTS[0]
    )
}

fn bridge() -> anyhow::Result<Pair> {
    let (client, server) = ends()?;
    let node = Namespace::new("bridge")?;
    bridge_to(&node, &client, CLIENT)?;
    bridge_to(&node, &server, SERVER)?;
    filter_bridged(&node, true)?;
    let mut nft = node.command("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn()?;
    nft.stdin.take().context("no stdin")?.write_all(ruleset().as_bytes())?;
    ensure!(nft.wait()?.success(), "nft refuses the policy");
    Ok(Pair {
        client,
        server,
        _between: vec![node],
    })
}

/// Whether nftables sees what is bridged.
fn filter_bridged(node: &Namespace, on: bool) -> anyhow::Result<()> {
    let value = if on { "1" } else { "0" };
    harness::in_netns(node.name(), || {
        let folder = Path::new("/proc/sys/net/bridge");
        fs::write(folder.join("bridge-nf-call-iptables"), value)
    })?
    .context("the kernel has no br_netfilter")
}

fn vxlan() -> anyhow::Result<Pair> {
    let (client, server) = ends()?;
    let nodes = [Namespace::new("left")?, Namespace::new("right")?];
    pair((&nodes[0], "underlay"), (&nodes[1], "underlay"), "1500")?;
    for (node, (pod, own), (here, there)) in [
        (&nodes[0], (&client, CLIENT), ("192.0.2.1", "192.0.2.2")),
        (&nodes[1], (&server, SERVER), ("192.0.2.2", "192.0.2.1")),
    ] {
        address(node, here, "underlay")?;
        bridge_to(node, pod, own)?;
        let tunnel = [
            "link",
            "add",
            "tunnel",
            "mtu",
            MTU,
            "type",
            "vxlan",
            "id",
            "7",
            "local",
            here,
            "remote",
            there,
            "dstport",
            "4789",
            "noudpcsum",
            "dev",
            "underlay",
        ];
        node.ip(&tunnel)?;
        node.ip(&["link", "set", "tunnel", "master", "bridge", "up"])?;
        filter_bridged(node, false)?;
    }
    Ok(Pair {
        client,
        server,
        _between: nodes.into(),
    })
}

/// The same policy as `network-policy` has it: the client may ask the servers at their ports, and nobody may anything else.
fn policy() -> String {
    let tcp = PORTS
        .map(|port| format!("{{ protocol: TCP, port: {port} }}"))
        .join(", ");
    let ports = format!("[{tcp}, {{ protocol: UDP, port: {} }}]", PORTS[0]);
    let object = |name: &str, direction: &str, end: &str, peer: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{ name: {name}, namespace: bench }}\n\
             spec:\n  podSelector: {{ matchLabels: {{ role: {name} }} }}\n  policyTypes: [Ingress, Egress]\n  \
             {direction}: [{{ {end}: [{{ podSelector: {{ matchLabels: {{ role: {peer} }} }} }}], ports: {ports} }}]\n"
        )
    };
    [
        object("server", "ingress", "from", "client"),
        object("client", "egress", "to", "server"),
    ]
    .join("---\n")
}

fn wasmgate() -> anyhow::Result<Cluster> {
    let mut cluster = Cluster::with(&Options::default())?;
    for (node, name, role) in [
        (0, "bench/client", "client"),
        (0, "bench/here", "server"),
        (1, "bench/there", "server"),
    ] {
        cluster.add_pod(node, name, &[("role", role)])?;
    }
    cluster.settle()?;
    let config = cluster.folder().join("policy.yaml");
    fs::write(&config, policy())?;
    let module = harness::policy("network-policy")?;
    let (module, config) = (module.display().to_string(), config.display().to_string());
    cluster.nodes[0].json(&["load-policy", &module, "--config", &config])?;
    Ok(cluster)
}
