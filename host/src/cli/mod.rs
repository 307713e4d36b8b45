//! The command line.

mod args;
mod author;
mod install;
mod log;
mod print;
mod print_policy;
mod scaffold;
mod table;
mod values;

use crate::{
    api::{
        self, Change, ClientError, EndpointAdd, EndpointLabel, Explain, LoadModule, Monitor, NamespaceLabel, PodName,
        PolicyChange, Request, Response,
    },
    config::Config,
    daemon,
    invariant::Invariants,
    store::records::ServiceRecord,
    wasm,
};
use anyhow::Context;
use args::{
    Arguments, AuthorArguments, ChangeArguments, Command, EndpointCommand, LoadArguments, MonitorArguments,
    NamespaceCommand, NodeCommand, PolicyCommand, ServiceCommand,
};
use clap::Parser;
use std::{fs, io::Write, path::Path, process::ExitCode};

/// Runs the command that the process was started with. Status 1: refused or failed; 2: wrong usage.
#[must_use]
pub fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hostd: {}", with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, each once: many of ours name their cause themselves.
fn with_causes(error: &anyhow::Error) -> String {
    error
        .chain()
        .fold(String::new(), |text, cause| match cause.to_string() {
            cause if text.contains(&cause) => text,
            cause if text.is_empty() => cause,
            cause => format!("{text}: {cause}"),
        })
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    if let Command::CompileModule { memory, seconds } = arguments.command {
        return wasm::child_main(memory, seconds);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async move {
        match arguments.command {
            Command::Run { config } => {
                log::start(std::env::var("HOSTD_LOG").ok().as_deref())?;
                Box::pin(daemon::run(Config::read(&config)?)).await
            }
            Command::Cleanup { config } => daemon::cleanup(&Config::read(&config)?).await,
            Command::Drain { config } => drain(&Config::read(&config)?, arguments.json).await,
            command => ask(&arguments.socket, arguments.json, command).await,
        }
    })
}

async fn ask(socket: &Path, json: bool, command: Command) -> anyhow::Result<()> {
    let request = match command {
        Command::Monitor(arguments) => return monitor(socket, json, arguments).await,
        Command::LoadPolicy(arguments) => read_policy(arguments)?,
        Command::Status => Request::Status,
        Command::Identity(_) => Request::IdentityList,
        Command::Ipcache(_) => Request::IpcacheList,
        Command::Policy(command) => match policy(command, json).await? {
            Some(request) => request,
            None => return Ok(()),
        },
        Command::Namespace(command) => namespace(command),
        Command::Metrics => return metrics(socket).await,
        Command::Node(NodeCommand::Delete { name }) => Request::NodeDelete(name),
        Command::Endpoint(command) => endpoint(command)?,
        Command::Service(command) => service(command),
        Command::Install(arguments) => return install::install(&arguments, &mut std::io::stdout()),
        Command::Uninstall(places) => return install::uninstall(&places, &mut std::io::stdout()),
        Command::Run { .. } | Command::Drain { .. } | Command::Cleanup { .. } | Command::CompileModule { .. } => {
            anyhow::bail!("a command that asks no daemon")
        }
    };
    let response = api::call(socket, &request).await?;
    print_response(&response, json)?;
    let incomplete = match &response {
        Response::Loaded(report) => report.nodes.iter().filter(|node| node.result.is_err()).count(),
        _ => 0,
    };
    anyhow::ensure!(
        incomplete == 0,
        "the policy is loaded, but not on {incomplete} of the nodes (see above)"
    );
    if let Response::Verified(verified) = &response {
        let broken = verified.broken.len();
        anyhow::ensure!(broken == 0, "{broken} counterexamples (see above)");
    }
    Ok(())
}

/// A hostd that runs takes its pods away in its own order, and stops; what is left then is removed as by `cleanup`.
async fn drain(config: &Config, json: bool) -> anyhow::Result<()> {
    daemon::check_here(config)?;
    match api::call(&config.socket, &Request::Drain).await {
        Ok(response) => print_response(&response, json)?,
        Err(ClientError::Connect { .. }) => {
            eprintln!("hostd does not run on this node: what it has left is removed, as by `hostd cleanup`");
        }
        Err(error) => return Err(error.into()),
    }
    daemon::until_stopped(&config.state_dir).await?;
    daemon::cleanup(config).await
}

fn print_response(response: &Response, json: bool) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    if json {
        print::json(&mut stdout, response)
    } else {
        print::text(&mut stdout, response)
    }
}

async fn metrics(socket: &Path) -> anyhow::Result<()> {
    match api::call(socket, &Request::Status).await? {
        Response::Status(status) => print::metrics(&mut std::io::stdout().lock(), &status),
        _ => anyhow::bail!("hostd answered something else"),
    }
}

fn namespace(command: NamespaceCommand) -> Request {
    match command {
        NamespaceCommand::List => Request::NamespaceList,
        NamespaceCommand::Label { namespace, changes } => {
            let (set, remove) = values::split_label_changes(changes);
            Request::NamespaceLabel(NamespaceLabel { namespace, set, remove })
        }
    }
}

/// What to ask the daemon; nothing where it was done without one.
async fn policy(command: PolicyCommand, json: bool) -> anyhow::Result<Option<Request>> {
    Ok(Some(match command {
        PolicyCommand::New { name, sdk } => {
            scaffold::new(&name, sdk.as_deref())?;
            return Ok(None);
        }
        PolicyCommand::Test { module, cases } => {
            author::test(&module, &cases).await?;
            return Ok(None);
        }
        PolicyCommand::Bench { module, identities } => {
            author::bench(&module, identities).await?;
            return Ok(None);
        }
        PolicyCommand::Inspect { module, config, tier } if author::is_file(&module) => {
            let file = module.into();
            author::inspect(&AuthorArguments { file, config, tier }, json).await?;
            return Ok(None);
        }
        PolicyCommand::Show => Request::PolicyShow,
        PolicyCommand::List => Request::PolicyList,
        PolicyCommand::Audit => Request::PolicyAudit,
        PolicyCommand::Inspect { module, .. } => Request::PolicyInspect(module),
        PolicyCommand::Unload { name, change } => policy_change(Change::Unload(name), change),
        PolicyCommand::Rollback { to, change } => policy_change(Change::Rollback(to), change),
        PolicyCommand::Explain {
            from,
            to,
            protocol,
            port,
        } => Request::Explain(Explain {
            from,
            to,
            protocol,
            port,
        }),
        PolicyCommand::Verify { file } => {
            let context = || format!("invariants {}", file.display());
            let text = fs::read_to_string(&file).with_context(context)?;
            Invariants::parse(&text).with_context(context)?;
            Request::PolicyVerify(text)
        }
    }))
}

fn policy_change(what: Change, arguments: ChangeArguments) -> Request {
    Request::PolicyChange(PolicyChange {
        what,
        dry_run: arguments.dry_run,
        against_flows: arguments.against.is_some(),
        skip_unreachable: arguments.skip_unreachable,
    })
}

fn endpoint(command: EndpointCommand) -> anyhow::Result<Request> {
    Ok(match command {
        EndpointCommand::Add {
            pod,
            netns,
            labels,
            ports,
            service_account,
            addresses,
        } => Request::EndpointAdd(EndpointAdd {
            pod: pod.into(),
            netns: absolute(netns)?,
            labels: labels.into_iter().collect(),
            service_account,
            ports,
            addresses,
            attachment: None,
        }),
        EndpointCommand::Delete { pod } => Request::EndpointDelete(pod.into()),
        EndpointCommand::List => Request::EndpointList,
        EndpointCommand::Label { pod, changes } => {
            let (set, remove) = values::split_label_changes(changes);
            Request::EndpointLabel(EndpointLabel {
                pod: pod.into(),
                set,
                remove,
            })
        }
    })
}

fn service(command: ServiceCommand) -> Request {
    match command {
        ServiceCommand::Add {
            namespace,
            name,
            addresses,
            ports,
            selector,
            backends,
            affinity,
        } => Request::ServiceAdd(Box::new(ServiceRecord {
            namespace,
            name,
            addresses,
            ports,
            selector: selector.into_iter().collect(),
            backends,
            affinity,
        })),
        ServiceCommand::Delete { namespace, name } => Request::ServiceDelete(PodName { namespace, name }),
        ServiceCommand::List => Request::ServiceList,
    }
}

/// hostd may have another working directory.
fn absolute(netns: String) -> anyhow::Result<String> {
    if !netns.contains('/') {
        return Ok(netns);
    }
    let path = std::path::absolute(&netns)?;
    path.into_os_string()
        .into_string()
        .map_err(|path| anyhow::anyhow!("{} is no UTF-8", path.display()))
}

fn read_policy(arguments: LoadArguments) -> anyhow::Result<Request> {
    let file = arguments.file;
    let module = fs::read(&file).with_context(|| format!("policy module {}", file.display()))?;
    let config = match &arguments.config {
        Some(path) => Some(policy_config(path)?),
        None => arguments.no_config.then(String::new),
    };
    let load = LoadModule {
        name: arguments.name,
        file: file.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        tier: arguments.tier.map(Into::into),
        priority: arguments.priority,
        tenant: arguments.tenant,
        audit: (arguments.audit || arguments.enforce).then_some(arguments.audit),
        overrides: (!arguments.limits.is_empty()).then(|| values::overrides(&arguments.limits)),
        module,
        config,
    };
    Ok(policy_change(Change::Load(Box::new(load)), arguments.change))
}

/// A module gets its configuration as JSON, whatever the admin wrote it in.
fn policy_config(path: &Path) -> anyhow::Result<String> {
    let value = read_document(path).context("policy configuration")?;
    Ok(value.to_string())
}

/// A file of JSON, or TOML or YAML where its name says so. Many documents of YAML are a list.
fn read_document(path: &Path) -> anyhow::Result<serde_json::Value> {
    let context = || path.display().to_string();
    let text = fs::read_to_string(path).with_context(context)?;
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension {
        Some("toml") => toml::from_str(&text).with_context(context),
        Some("yaml" | "yml") => {
            // In YAML 1.2 `no` and `y` are words, not booleans.
            let options = serde_saphyr::options! { strict_booleans: true };
            let documents: Vec<serde_json::Value> =
                serde_saphyr::from_multiple_with_options(&text, options).with_context(context)?;
            Ok(match <[_; 1]>::try_from(documents) {
                Ok([one]) => one,
                Err(many) => serde_json::Value::Array(many),
            })
        }
        _ => serde_json::from_str(&text).with_context(|| {
            format!(
                "{}: JSON, or TOML in a file named .toml, or YAML in one named .yaml",
                context()
            )
        }),
    }
}

async fn monitor(socket: &Path, json: bool, arguments: MonitorArguments) -> anyhow::Result<()> {
    let what = Monitor {
        drops: !arguments.flows,
        flows: !arguments.drops,
    };
    let mut left = arguments.count;
    let mut problem = None;
    let ended = api::monitor(socket, what, |response| {
        let mut stdout = std::io::stdout().lock();
        let printed = if json {
            print::json_line(&mut stdout, &response)
        } else {
            print::text(&mut stdout, &response)
        };
        // A reader that closes the pipe has seen enough.
        if let Err(error) = printed.and_then(|()| Ok(stdout.flush()?)) {
            problem = Some(error);
            return false;
        }
        if matches!(response, Response::Packet(_)) {
            left = left.map(|left| left.saturating_sub(1));
        }
        left != Some(0)
    });
    tokio::select! {
        ended = ended => match ended {
            Ok(()) | Err(ClientError::Closed) => {}
            Err(error) => return Err(error.into()),
        },
        interrupted = tokio::signal::ctrl_c() => interrupted?,
    }
    match problem {
        Some(error) if !is_broken_pipe(&error) => Err(error),
        _ => Ok(()),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
