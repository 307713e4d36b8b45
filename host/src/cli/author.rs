//! What authors of policies use, without a daemon: a module tested, measured and looked into.

use super::{args::AuthorArguments, policy_config, read_document, table::Table};
use crate::{
    config::Wasm,
    identity::{IdentityKey, Layout, Registry},
    invariant::parse_ports,
    plan::Oracle,
    stack::{Stack, Start},
    store::records::ModuleRecord,
    survey::Survey,
    wasm::{self, Compiler, Limits, Overrides, Placement},
};
use abi::{Direction, Identity, policy::port_key};
use anyhow::{Context, ensure};
use serde::Deserialize;
use std::{collections::BTreeMap, fs, io::Write, net::IpAddr, path::Path, time::Instant};
use tokio::task::block_in_place;

/// A module that runs here.
struct Local {
    stack: Stack,
    record: ModuleRecord,
    size: usize,
    compile: f64,
    start: f64,
}

/// Compiles and starts a module, with the limits that nodes have by default.
async fn start(arguments: &AuthorArguments) -> anyhow::Result<Local> {
    let file = &arguments.file;
    let module = fs::read(file).with_context(|| format!("policy module {}", file.display()))?;
    let config = match &arguments.config {
        Some(path) => policy_config(path)?,
        None => String::new(),
    };
    let record = ModuleRecord {
        placement: Placement {
            name: crate::identity::DEFAULT_MODULE.to_owned(),
            tier: arguments.tier.map(Into::into).unwrap_or_default(),
            priority: 0,
            tenant: None,
        },
        file: file.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        audit: false,
        overrides: Overrides::default(),
        sha256: wasm::sha256(&module),
        config,
    };
    let limits = Limits::from(Wasm::default());
    let began = Instant::now();
    let compiled = Compiler::new("/proc/self/exe".into(), limits, None)?
        .compile(&module)
        .await;
    let compile = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let start = Start {
        record: &record,
        compiled: &compiled,
        limits,
        strict: true,
    };
    let stack = block_in_place(|| Stack::start(&[start]))?;
    Ok(Local {
        stack,
        size: module.len(),
        compile,
        start: began.elapsed().as_secs_f64(),
        record,
    })
}

/// `hostd policy inspect FILE.wasm`.
pub async fn inspect(arguments: &AuthorArguments, json: bool) -> anyhow::Result<()> {
    let local = start(arguments).await?;
    let view = local.stack.inspect(local.record.name()).context("the module is gone")?;
    let mut out = std::io::stdout().lock();
    if json {
        let value = serde_json::json!({
            "file": local.record.file, "sha256": local.record.sha256, "bytes": local.size,
            "compile_ms": local.compile * 1e3, "start_ms": local.start * 1e3, "interface": wasm::INTERFACE,
            "networks": view.networks,
        });
        return Ok(writeln!(out, "{value:#}")?);
    }
    writeln!(out, "module      {} ({} bytes)", local.record.file, local.size)?;
    writeln!(out, "sha256      {}", local.record.sha256)?;
    writeln!(out, "interface   {}", wasm::INTERFACE)?;
    writeln!(
        out,
        "compiled in {:.1} ms, started in {:.1} ms",
        local.compile * 1e3,
        local.start * 1e3
    )?;
    for (name, blocks) in &view.networks {
        writeln!(out, "network     {name}: {}", blocks.join(", "))?;
    }
    Ok(())
}

/// A file of pods, and who should reach whom.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    #[serde(default)]
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pods: Vec<PodCase>,
    expect: Vec<Expectation>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PodCase {
    /// `NAMESPACE/NAME`.
    name: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    address: Option<IpAddr>,
    #[serde(default)]
    service_account: String,
    /// As `http: tcp/8080`.
    #[serde(default)]
    ports: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expectation {
    from: String,
    to: String,
    port: String,
    allow: bool,
}

impl PodCase {
    fn facts(&self, namespaces: &BTreeMap<String, BTreeMap<String, String>>) -> anyhow::Result<wasm::Pod> {
        let (namespace, name) = self.name.split_once('/').context("a pod's name is NAMESPACE/NAME")?;
        let mut ports = Vec::new();
        for (name, port) in &self.ports {
            let range = parse_ports(port).map_err(anyhow::Error::msg)?;
            let protocol = range.protocol.context("a named port has a protocol")?;
            ports.push((name.clone(), protocol, range.first));
        }
        Ok(wasm::Pod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            labels: self.labels.clone(),
            namespace_labels: namespaces.get(namespace).cloned().unwrap_or_default(),
            service_account: self.service_account.clone(),
            addresses: self.address.into_iter().collect(),
            ports,
        })
    }
}

/// Numbers for keys, and what the module makes of the networks.
struct Numbered {
    registry: Registry,
    networks: Vec<Identity>,
}

impl Numbered {
    fn new(stack: &mut Stack) -> anyhow::Result<Self> {
        let mut registry = Registry::new(Layout { tenant_bits: 8 });
        let memberships = stack.networks().memberships().to_vec();
        let mut networks = Vec::new();
        for names in memberships {
            if names.is_empty() {
                networks.push(Identity::WORLD);
                continue;
            }
            let key = IdentityKey::Networks(names);
            let identity = registry.assign(&key)?;
            stack.learn(identity, registry.shared(identity));
            networks.push(identity);
        }
        Ok(Self { registry, networks })
    }

    fn identify(&mut self, stack: &mut Stack, pods: &[wasm::Pod]) -> anyhow::Result<Vec<Identity>> {
        stack.begin();
        let keys = block_in_place(|| stack.identify(pods));
        keys.into_iter()
            .map(|key| {
                let Some(key) = key? else { return Ok(Identity::INIT) };
                let identity = self.registry.assign(&key)?;
                stack.learn(identity, self.registry.shared(identity));
                Ok(identity)
            })
            .collect()
    }
}

/// `hostd policy test FILE.wasm CASES`: the module as it will run, against expectations.
pub async fn test(arguments: &AuthorArguments, cases: &Path) -> anyhow::Result<()> {
    let context = || format!("cases {}", cases.display());
    let document: Cases = serde_json::from_value(read_document(cases)?).with_context(context)?;
    let mut stack = start(arguments).await?.stack;
    let mut numbered = Numbered::new(&mut stack)?;
    let mut facts = Vec::new();
    for pod in &document.pods {
        facts.push(
            pod.facts(&document.namespaces)
                .with_context(|| format!("{}: pod {}", context(), pod.name))?,
        );
    }
    let identities = numbered.identify(&mut stack, &facts)?;
    let resolve = |name: &str| -> anyhow::Result<Identity> {
        if let Some(index) = document.pods.iter().position(|pod| pod.name == name) {
            return Ok(identities[index]);
        }
        if let Some((identity, _)) = Identity::RESERVED.iter().find(|(_, reserved)| *reserved == name) {
            return Ok(*identity);
        }
        let address: IpAddr = name.parse().with_context(|| {
            format!(
                "{}: {name:?} is no pod of the file, no reserved name and no address",
                context()
            )
        })?;
        Ok(numbered.networks[stack.networks().find(address.into())])
    };
    let mut asked = Vec::new();
    for one in &document.expect {
        let range = parse_ports(&one.port).map_err(|problem| anyhow::anyhow!("{}: {problem}", context()))?;
        let first = match (range.protocol, range.first, range.last) {
            // ICMP without a type is an echo.
            (Some(1), 0, u16::MAX) => 8,
            (_, first, _) => first,
        };
        let key = port_key(range.protocol.unwrap_or(0), first);
        asked.push((resolve(&one.from)?, resolve(&one.to)?, key));
    }
    let mut wrong = 0;
    for (one, (from, to, key)) in document.expect.iter().zip(asked) {
        stack.begin();
        let (senders, receivers) = ([from], [to]);
        let survey = block_in_place(|| Survey::between(&mut stack, &senders, &receivers))?;
        if survey.ruling(from, to).at(key) != one.allow {
            wrong += 1;
            let (should, is) = if one.allow {
                ("allowed", "denied")
            } else {
                ("denied", "allowed")
            };
            println!("{} -> {} {}: should be {should}, is {is}", one.from, one.to, one.port);
            for (side, subject, peer) in [(Direction::Egress, from, to), (Direction::Ingress, to, from)] {
                if crate::survey::is_end(&stack, subject) {
                    for step in stack.steps(side, subject, peer, key)? {
                        println!("  {side:?}: {} {}", step.action, step.reason);
                    }
                }
            }
        }
    }
    println!("{} expectations, {wrong} wrong", document.expect.len());
    ensure!(wrong == 0, "the policy is not as expected");
    Ok(())
}

/// `hostd policy bench FILE.wasm`: what the module costs at so many identities.
pub async fn bench(arguments: &AuthorArguments, identities: usize) -> anyhow::Result<()> {
    ensure!((1..=60_000).contains(&identities), "between 1 and 60000 identities");
    let local = start(arguments).await?;
    let mut stack = local.stack;
    let mut numbered = Numbered::new(&mut stack)?;
    let pods: Vec<wasm::Pod> = (0..identities)
        .map(|number| wasm::Pod {
            namespace: format!("ns-{}", number % 16),
            name: format!("pod-{number}"),
            labels: BTreeMap::from([("app".to_owned(), format!("app-{number}"))]),
            namespace_labels: BTreeMap::new(),
            service_account: String::new(),
            addresses: Vec::new(),
            ports: Vec::new(),
        })
        .collect();
    let began = Instant::now();
    let mut members = numbered.identify(&mut stack, &pods)?;
    let identify = began.elapsed().as_secs_f64();
    members.sort_unstable();
    members.dedup();
    let subjects: Vec<Identity> = members.iter().copied().take(250).collect();
    let before = stack.calls();
    stack.begin();
    let began = Instant::now();
    block_in_place(|| -> anyhow::Result<()> {
        for side in [Direction::Egress, Direction::Ingress] {
            for some in subjects.chunks(16) {
                stack.decide(side, some, &members)?;
            }
        }
        Ok(())
    })?;
    let decide = began.elapsed().as_secs_f64();
    let calls = stack.calls() - before;
    let pairs = 2 * subjects.len() * members.len();
    let mut table = Table::new(["WHAT", "TIME", ""]);
    let line = |what: &str, seconds: f64, note: String| [what.to_owned(), format!("{:.3} ms", seconds * 1e3), note];
    table.row(line("compile", local.compile, format!("{} bytes", local.size)));
    table.row(line("start", local.start, String::new()));
    table.row(line(
        "identify",
        identify,
        format!("{identities} pods, {} identities", members.len()),
    ));
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let rate = pairs as f64 / decide / 1e6;
    table.row(line(
        "decide",
        decide,
        format!(
            "{} by {} pairs of both ends, {calls} calls, {rate:.1} million a second",
            subjects.len(),
            members.len()
        ),
    ));
    Ok(table.print(&mut std::io::stdout().lock())?)
}

/// For `hostd policy inspect`: whether what is meant is a file.
pub fn is_file(module: &str) -> bool {
    Path::new(module)
        .extension()
        .is_some_and(|extension| extension == "wasm")
}
