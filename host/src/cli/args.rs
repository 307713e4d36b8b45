//! Arguments of the command line.

use super::values::{
    LabelChange, TierArgument, parse_label, parse_label_change, parse_limit, parse_named_port, parse_protocol,
    parse_service_port,
};
use crate::{api::PodName, config::DEFAULT_SOCKET, identity::DEFAULT_MODULE, store::records::ServicePort};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::{net::IpAddr, path::PathBuf};

const EXAMPLE: &str = "\
Examples:
  hostd run --config /etc/wasmgate/node.toml
  hostd endpoint add --netns web --namespace red --name web --label app=frontend
  hostd load-policy tenant-isolation.wasm --dry-run

All but `run`, `drain`, `cleanup`, `install` and `uninstall` ask the daemon, as root. Exit status: 0 done, 1 refused or failed, 2 wrong usage.";

/// Wasmgate's daemon and its command: forwards between pods, and lets wasm modules decide who may talk to whom.
#[derive(Parser)]
#[command(name = "hostd", version, max_term_width = 100, after_help = EXAMPLE)]
pub struct Arguments {
    /// Control socket of the hostd to ask; `run`, `drain` and `cleanup` take theirs from the configuration.
    #[arg(long, global = true, help_heading = "Global options", env = "HOSTD_SOCKET", default_value = DEFAULT_SOCKET, value_name = "PATH")]
    pub socket: PathBuf,
    /// Print JSON.
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run the daemon of this node.
    ///
    /// It stays in the foreground and needs root.
    ///
    /// It logs to stderr; `HOSTD_LOG` sets the level, as in `HOSTD_LOG=debug`. When it is stopped, traffic goes on under
    /// the policy that is in force.
    Run {
        /// The node's configuration; `node.example.toml` documents every key.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Show how the node is: policy, pods, nodes, map usage, packets by path and by drop reason.
    Status,
    /// Load a policy module on all nodes of the cluster.
    ///
    /// All nodes prepare it, then all switch to it; if one refuses or does not answer, none does. Live connections
    /// that the new policy does not allow end; the others lose no packet. A module replaces the one of the same name;
    /// without --name it is named `default`. Status 1 says that it was refused, or, with `--skip-unreachable`, that it
    /// is loaded but not on all nodes.
    LoadPolicy(LoadArguments),
    /// Connect, disconnect and relabel pods.
    #[command(subcommand)]
    Endpoint(EndpointCommand),
    /// Show the cluster's identities.
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// Show what the kernel knows of every address.
    #[command(subcommand)]
    Ipcache(IpcacheCommand),
    /// Show, explain, check, change and write policies.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Label namespaces.
    #[command(subcommand)]
    Namespace(NamespaceCommand),
    /// Give addresses and ports to sets of pods.
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Print the node's counters and how full its maps are, in the text format of Prometheus.
    Metrics,
    /// Remove nodes that are gone.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Show drops and new flows as they happen, one line each. Without options: both.
    Monitor(MonitorArguments),
    /// Make this node's container runtimes attach their containers by hostd.
    ///
    /// Copies the CNI plugin, then writes a network's configuration.
    Install(InstallArguments),
    /// Take the plugin and the network's configuration away again. Containers that are attached stay so.
    Uninstall(PlaceArguments),
    /// Take a node out of its cluster: disconnect its pods, stop its hostd, then do what `cleanup` does.
    ///
    /// A service manager must not start hostd again meanwhile.
    Drain {
        /// The node's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Take away everything that hostd has made on this node. hostd must not be running.
    ///
    /// The node's pods lose their connection, and the cluster forgets the node.
    Cleanup {
        /// The node's configuration.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Compile a module from stdin to stdout, for the daemon.
    #[command(hide = true, name = crate::wasm::CHILD_COMMAND)]
    CompileModule {
        /// Memory that it may use, in bytes.
        memory: u64,
        /// CPU time that it may use, in seconds.
        seconds: u64,
    },
}

#[derive(Args)]
pub struct InstallArguments {
    /// The node's configuration, of which the control socket is taken.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Namespace of containers whose runtime does not name one.
    #[arg(long, value_name = "NS", default_value = "default")]
    pub namespace: String,
    /// The plugin; the one beside hostd where none is given.
    #[arg(long, value_name = "FILE")]
    pub plugin: Option<PathBuf>,
    #[command(flatten)]
    pub places: PlaceArguments,
}

#[derive(Args)]
pub struct PlaceArguments {
    /// Where runtimes look for plugins.
    #[arg(long, value_name = "FOLDER", default_value = "/opt/cni/bin")]
    pub bin_dir: PathBuf,
    /// Where runtimes look for networks.
    #[arg(long, value_name = "FOLDER", default_value = "/etc/cni/net.d")]
    pub conf_dir: PathBuf,
    /// The network's name; its file is `10-NAME.conflist`.
    #[arg(long, value_name = "NAME", default_value = "wasmgate")]
    pub network: String,
}

#[derive(Args)]
pub struct LoadArguments {
    /// The module: a WebAssembly component, or a core module built with policy-sdk.
    #[arg(value_name = "FILE.wasm")]
    pub file: PathBuf,
    /// The module's configuration: JSON, TOML in a file named .toml, or YAML in one named .yaml or .yml, whose many
    /// documents are a list.
    ///
    /// Without it another version of the same module (a file of the same name) keeps the one that it has.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Take the configuration away.
    #[arg(long, conflicts_with = "config")]
    pub no_config: bool,
    /// The module's name.
    #[arg(long, default_value = DEFAULT_MODULE)]
    pub name: String,
    /// When the module is asked: admin before tenant before baseline. `tenant` where it is not given.
    #[arg(long)]
    pub tier: Option<TierArgument>,
    /// Its place in the tier: the lowest number is asked first. 500 for a new module; one that is replaced keeps its own.
    #[arg(long, value_name = "NUMBER")]
    pub priority: Option<u32>,
    /// Whose module it is: it decides only over this tenant's own ends of connections.
    #[arg(long)]
    pub tenant: Option<String>,
    /// Enforce nothing of it, but report what it would have denied (`hostd policy audit`).
    #[arg(long)]
    pub audit: bool,
    /// Enforce a module that was only audited so far; without this, and without --audit, it stays as it is.
    #[arg(long, conflicts_with = "audit")]
    pub enforce: bool,
    /// What the module may use, in place of the nodes' own limits: `fuel_per_call`, `evaluate_ms` or `memory_mib`.
    #[arg(long = "limit", value_name = "LIMIT=NUMBER", value_parser = parse_limit)]
    pub limits: Vec<(String, u64)>,
    #[command(flatten)]
    pub change: ChangeArguments,
}

#[derive(Args)]
pub struct AuthorArguments {
    /// The module.
    #[arg(value_name = "FILE.wasm")]
    pub file: PathBuf,
    /// The module's configuration: JSON, or TOML or YAML in a file named so.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The tier that it is meant for.
    #[arg(long)]
    pub tier: Option<TierArgument>,
}

#[derive(Args, Clone, Copy)]
pub struct ChangeArguments {
    /// Only print which pairs would change.
    #[arg(long)]
    pub dry_run: bool,
    /// Print what would no longer pass of the flows that are tracked on this node. Goes with --dry-run.
    #[arg(long, value_name = "WHAT", requires = "dry_run")]
    pub against: Option<Against>,
    /// Go on without nodes that are down or do not answer; they switch when they are back.
    #[arg(long)]
    pub skip_unreachable: bool,
}

/// What a dry run is held against.
#[derive(Clone, Copy, ValueEnum)]
pub enum Against {
    /// Flows that are tracked on this node.
    Flows,
}

#[derive(Args)]
pub struct PodArguments {
    /// The pod's namespace.
    #[arg(long, value_name = "NS")]
    namespace: String,
    /// The pod's name.
    #[arg(long, value_name = "POD")]
    name: String,
}

impl From<PodArguments> for PodName {
    fn from(arguments: PodArguments) -> Self {
        Self {
            namespace: arguments.namespace,
            name: arguments.name,
        }
    }
}

#[derive(Subcommand)]
pub enum EndpointCommand {
    /// Connect a pod; traffic can flow when this returns.
    ///
    /// The namespace must exist and have no `eth0`; a pod that is connected already is an error.
    Add {
        #[command(flatten)]
        pod: PodArguments,
        /// The pod's network namespace: a name among those of `ip netns`, or a path.
        #[arg(long, value_name = "NAME|PATH")]
        netns: String,
        /// A label; may be given many times.
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
        labels: Vec<(String, String)>,
        /// A name for one of the pod's ports, as `http=tcp/8080`; may be given many times.
        #[arg(long = "port", value_name = "NAME=PROTOCOL/PORT", value_parser = parse_named_port)]
        ports: Vec<(String, u8, u16)>,
        /// The pod's service account.
        #[arg(long, value_name = "NAME", default_value = "")]
        service_account: String,
        /// The pod's address, a free one of the node's pod CIDRs, once for each family; without it, the first free one.
        #[arg(long = "address", value_name = "IP")]
        addresses: Vec<IpAddr>,
    },
    /// Disconnect a pod. If it is not there, that is no error.
    Delete {
        #[command(flatten)]
        pod: PodArguments,
    },
    /// Show this node's pods.
    List,
    /// Change a pod's labels while it runs.
    Label {
        #[command(flatten)]
        pod: PodArguments,
        /// `KEY=VALUE` sets a label, `KEY-` takes one away.
        #[arg(required = true, value_name = "KEY=VALUE|KEY-", value_parser = parse_label_change)]
        changes: Vec<LabelChange>,
    },
}

#[derive(Subcommand)]
pub enum ServiceCommand {
    /// Add a service on all nodes of the cluster, or replace the one of that name as a whole.
    ///
    /// Each connection to its address goes to one of its backends, as policy lets the client reach that backend: policy
    /// knows nothing of services. A change moves few connections of others to another backend, and none that is open.
    Add {
        /// The service's namespace.
        #[arg(long, value_name = "NS")]
        namespace: String,
        /// The service's name.
        #[arg(long, value_name = "SERVICE")]
        name: String,
        /// Its address, which is in no pod CIDR; once for each family. A service with node ports may have none.
        #[arg(long = "address", value_name = "IP")]
        addresses: Vec<IpAddr>,
        /// A port, as `tcp/80`; where the backends have another, `tcp/80=8080`, or its name, `tcp/80=http`; and where
        /// every node's address stands for it at a port, that one: `tcp/80=8080@30080`. May be given many times.
        #[arg(long = "port", required = true, value_name = "PROTOCOL/PORT[=TARGET][@NODEPORT]", value_parser = parse_service_port)]
        ports: Vec<ServicePort>,
        /// A label of its backends: pods of its namespace that have all of these. May be given many times.
        #[arg(long = "selector", value_name = "KEY=VALUE", value_parser = parse_label)]
        selector: Vec<(String, String)>,
        /// A backend besides, which need be no pod; may be given many times. At node ports only pods are backends.
        #[arg(long = "backend", value_name = "IP")]
        backends: Vec<IpAddr>,
        /// A client keeps its backend for so many seconds after its last new connection.
        #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=86400))]
        affinity: u32,
    },
    /// Remove a service on all nodes. Connections through it that are open are reset. If it is not there, that is no error.
    Delete {
        /// The service's namespace.
        #[arg(long, value_name = "NS")]
        namespace: String,
        /// The service's name.
        #[arg(long, value_name = "SERVICE")]
        name: String,
    },
    /// List services, with their backends.
    List,
}

#[derive(Subcommand)]
pub enum IdentityCommand {
    /// List identities: number (which is the VNI), tenant, labels, and how many addresses have it.
    List,
}

#[derive(Subcommand)]
pub enum IpcacheCommand {
    /// List addresses: identity, and the node that each lives behind.
    List,
}

#[derive(Subcommand)]
pub enum NamespaceCommand {
    /// Change a namespace's labels; its pods get the identities that follow from it.
    Label {
        /// The namespace.
        #[arg(value_name = "NS")]
        namespace: String,
        /// `KEY=VALUE` sets a label, `KEY-` takes one away.
        #[arg(required = true, value_name = "KEY=VALUE|KEY-", value_parser = parse_label_change)]
        changes: Vec<LabelChange>,
    },
    /// List namespaces that have pods or labels.
    List,
}

#[derive(Subcommand)]
pub enum PolicyCommand {
    /// Show what may pass between which identities.
    Show,
    /// List the modules in force, in the order in which they are asked, and earlier sets of them.
    List,
    /// Show a module: one in force, by its name, or one in a file, for which no daemon is needed.
    Inspect {
        /// A name, or a file whose name ends in .wasm.
        #[arg(value_name = "NAME|FILE.wasm")]
        module: String,
        /// For a file: the module's configuration.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// For a file: the tier that it is meant for.
        #[arg(long)]
        tier: Option<TierArgument>,
    },
    /// Make a crate for a new policy in the present folder, which builds and has tests.
    New {
        /// Its name.
        name: String,
        /// The folder `policy-sdk` of a checkout of Wasmgate; found by itself inside one.
        #[arg(long, value_name = "PATH")]
        sdk: Option<PathBuf>,
    },
    /// Run a module without a daemon, and compare who reaches whom with a file of expectations.
    ///
    /// The file has `pods` (name, labels, address, `service_account`, ports), `namespaces` with their labels, and `expect`
    /// (from, to, port as tcp/80, allow). Status 1: an expectation is not met.
    Test {
        #[command(flatten)]
        module: AuthorArguments,
        /// The expectations: JSON, or TOML or YAML in a file named so.
        #[arg(value_name = "CASES")]
        cases: PathBuf,
    },
    /// Measure a module without a daemon: compiling, identifying, deciding.
    Bench {
        #[command(flatten)]
        module: AuthorArguments,
        /// Pods, each with a label `app` of its own.
        #[arg(long, default_value_t = 1000, value_name = "N")]
        identities: usize,
    },
    /// Take a module away, on all nodes.
    Unload {
        /// Its name.
        name: String,
        #[command(flatten)]
        change: ChangeArguments,
    },
    /// Go back to an earlier set of modules, on all nodes: the one before the present one, or that of a change.
    Rollback {
        /// Number of the change that had put it in force, as `hostd policy list` shows it.
        #[arg(long, value_name = "CHANGE")]
        to: Option<u64>,
        #[command(flatten)]
        change: ChangeArguments,
    },
    /// Say who may reach whom, and why: what each module says, and what the kernel has.
    ///
    /// FROM and TO are pods (`NAMESPACE/NAME`), addresses, identities by number, `host`, `world`, `remote-node`, `health`,
    /// or the labels of a pod that need not exist (`NAMESPACE{KEY=VALUE,…}`).
    Explain {
        /// Who opens the connection.
        from: String,
        /// To whom.
        to: String,
        /// Protocol: tcp, udp, sctp, icmp, icmpv6, or a number. Without it: every port.
        #[arg(long, value_parser = parse_protocol)]
        protocol: Option<u8>,
        /// Destination port, or type of ICMP, which is an echo request without this.
        #[arg(long)]
        port: Option<u16>,
    },
    /// Check invariants against the policy in force, over all identities.
    ///
    /// Each line of the file is one of `WHO never reaches WHOM`, `WHO reaches WHOM`, `nothing but WHO, … reaches WHOM`,
    /// each perhaps with `on tcp/80, udp`, or a definition `NAME = WHO`. WHO is made of `tenant NAME`, `namespace NAME`,
    /// `pod NS/NAME`, `KEY=VALUE`, `KEY!=VALUE`, `network MODULE/NAME`, `host`, `remote-node`, `world`, `everything`.
    /// Status 1: one does not hold. To have every policy checked before it is loaded, set `invariants` in the nodes'
    /// configuration.
    Verify {
        /// The invariants.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Show what audited modules (`load-policy --audit`) would have denied on this node.
    Audit,
}

#[derive(Subcommand)]
pub enum NodeCommand {
    /// Remove a node whose lease has expired (`hostd status` shows it as stale), and its pods.
    Delete {
        /// The node.
        name: String,
    },
}

#[derive(Args)]
pub struct MonitorArguments {
    /// Only drops.
    #[arg(long, conflicts_with = "flows")]
    pub drops: bool,
    /// Only first packets of allowed flows.
    #[arg(long)]
    pub flows: bool,
    /// End after so many lines.
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::Arguments;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_and_argument_has_a_help_text() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                assert!(
                    argument.get_help().is_some(),
                    "{} {}",
                    command.get_name(),
                    argument.get_id()
                );
            }
            for sub in command.get_subcommands() {
                assert!(sub.get_about().is_some(), "{}", sub.get_name());
                check(sub);
            }
        }
        check(&Arguments::command());
    }
}
