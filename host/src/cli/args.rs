//! Arguments of the command line.

use crate::{api::PodName, config::DEFAULT_SOCKET};
use clap::{Args, Parser, Subcommand};
use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

const EXAMPLE: &str = "\
Examples:
  hostd run --config /etc/wasmgate/node.toml
  hostd endpoint add --netns web --namespace red --name web --label app=frontend
  hostd load-policy tenant-isolation.wasm --dry-run

All but `run` and `cleanup` ask the daemon, as root. Exit status: 0 done, 1 refused or failed, 2 wrong usage.";

/// Wasmgate's daemon and its command: forwards between pods, and lets wasm modules decide who may talk to whom.
#[derive(Parser)]
#[command(name = "hostd", version, max_term_width = 100, after_help = EXAMPLE)]
pub struct Arguments {
    /// Control socket of the hostd to ask; `run` and `cleanup` take theirs from the configuration.
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
    /// that the new policy does not allow end; the others lose no packet. The policy is named after its file. Status 1
    /// says that it was refused, or, with `--skip-unreachable`, that it is loaded but not on all nodes.
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
    /// Show the policy in force.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Remove nodes that are gone.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Show drops and new flows as they happen, one line each. Without options: both.
    Monitor(MonitorArguments),
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
pub struct LoadArguments {
    /// The module: a WebAssembly component, or a core module built with policy-sdk.
    #[arg(value_name = "FILE.wasm")]
    pub file: PathBuf,
    /// The module's configuration: JSON, or TOML in a file named .toml.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Only print which pairs would change.
    #[arg(long)]
    pub dry_run: bool,
    /// Go on without nodes that are down or do not answer; they switch when they are back.
    #[arg(long)]
    pub skip_unreachable: bool,
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
        /// The pod's address, a free one of the node's pod CIDRs; without it, the first free one.
        #[arg(long)]
        address: Option<IpAddr>,
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
pub enum PolicyCommand {
    /// Show the module in force, and what may pass between which identities.
    Show,
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

/// A change of a label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabelChange {
    Set(String, String),
    Remove(String),
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| "a label is KEY=VALUE".to_owned())
}

fn parse_label_change(text: &str) -> Result<LabelChange, String> {
    if let Ok((key, value)) = parse_label(text) {
        return Ok(LabelChange::Set(key, value));
    }
    text.strip_suffix('-')
        .map(|key| LabelChange::Remove(key.to_owned()))
        .ok_or_else(|| "KEY=VALUE sets a label, KEY- takes one away".to_owned())
}

/// What to set, and what to take away.
pub fn split_label_changes(changes: Vec<LabelChange>) -> (BTreeMap<String, String>, Vec<String>) {
    let mut set = BTreeMap::new();
    let mut remove = Vec::new();
    for change in changes {
        match change {
            LabelChange::Set(key, value) => {
                set.insert(key, value);
            }
            LabelChange::Remove(key) => remove.push(key),
        }
    }
    (set, remove)
}

#[cfg(test)]
mod tests {
    use super::{Arguments, LabelChange, parse_label_change};
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

    #[test]
    fn label_changes_are_told_apart() {
        let set = |key: &str, value: &str| LabelChange::Set(key.to_owned(), value.to_owned());
        assert_eq!(parse_label_change("app=web").unwrap(), set("app", "web"));
        assert_eq!(parse_label_change("app=").unwrap(), set("app", ""));
        assert_eq!(parse_label_change("a=b-").unwrap(), set("a", "b-"));
        assert_eq!(
            parse_label_change("app-").unwrap(),
            LabelChange::Remove("app".to_owned())
        );
        assert!(parse_label_change("app").is_err());
    }
}
