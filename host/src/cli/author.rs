//! What authors of policies use, without a daemon: a new crate, and a module tested, measured and looked into.

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
use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Instant,
};
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

const MANIFEST: &str = r#"[package]
name = "NAME"
version = "0.1.0"
edition = "2024"
publish = false

[lib]
crate-type = ["cdylib", "rlib"]

[dependencies]
policy-sdk = { path = "SDK" }
serde = { version = "1", features = ["derive"] }
WORKSPACE"#;

const SOURCE: &str = r#"//! Pods of one namespace reach each other; everybody reaches the open ports.

use policy_sdk::{Decision, Identity, Peer, Pod, Policy, tcp};

/// What an admin can set.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// TCP ports that everybody reaches, in pods with the label `open`.
    #[serde(default)]
    open_ports: Vec<u16>,
}

/// See the crate.
pub struct MyPolicy(Config);

impl Policy for MyPolicy {
    type Config = Config;

    fn new(config: Config) -> Result<Self, String> {
        if config.open_ports.contains(&0) {
            return Err("open_ports: 0 is no port".to_owned());
        }
        Ok(Self(config))
    }

    /// Take over only what matters: pods with equal identities are the same to the policy.
    fn identify(&self, pod: &Pod) -> Result<Identity, String> {
        Ok(Identity::new(&pod.namespace).with_label_of(pod, "open"))
    }

    fn decide(&self, from: &Peer, to: &Peer) -> Decision {
        if from.same_tenant(to) {
            Decision::allow().because("pods of one namespace reach each other")
        } else if to.label("open").is_some() {
            Decision::ports(self.0.open_ports.iter().map(|port| tcp(*port))).because("the port is open to all")
        } else {
            Decision::pass()
        }
    }
}

policy_sdk::export!(MyPolicy);

#[cfg(test)]
mod tests {
    use super::MyPolicy;
    use policy_sdk::{tcp, testing::Cluster};

    #[test]
    fn namespaces_are_apart_but_for_the_open_ports() {
        let cluster = Cluster::<MyPolicy>::configured("open_ports = [443]")
            .unwrap()
            .pod("red/a", &[])
            .pod("red/web", &[("open", "yes")])
            .pod("blue/b", &[]);
        cluster.assert_matrix(
            tcp(80),
            "
                     red/a  red/web  blue/b
            red/a    X      X        .
            red/web  X      X        .
            blue/b   .      .        X
            ",
        );
        cluster.assert_allowed("blue/b", "red/web", tcp(443));
        cluster.assert_denied("blue/b", "red/a", tcp(443));
    }

    #[test]
    fn a_wrong_configuration_is_refused() {
        let error = Cluster::<MyPolicy>::configured("open_ports = [0]").err().unwrap();
        assert!(error.contains("0 is no port"), "{error}");
    }
}
"#;

/// Names that a policy's crate can't have: those of the workspace, of crates that it needs, and of Rust's own words.
const TAKEN: &[&str] = &[
    "abi",
    "abstract",
    "alloc",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "const",
    "continue",
    "core",
    "crate",
    "do",
    "dyn",
    "else",
    "enum",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "harness",
    "hostd",
    "hostile",
    "if",
    "impl",
    "in",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "override",
    "policy-sdk",
    "priv",
    "proc-macro",
    "pub",
    "ref",
    "return",
    "self",
    "serde",
    "static",
    "std",
    "struct",
    "super",
    "test",
    "toolchain",
    "trait",
    "true",
    "try",
    "type",
    "typeof",
    "unsafe",
    "unsized",
    "use",
    "virtual",
    "wasmgate-tests",
    "where",
    "while",
    "xtask",
    "yield",
];

/// `hostd policy new NAME`: a crate that builds and tests.
pub fn new(name: &str, sdk: Option<&Path>) -> anyhow::Result<()> {
    let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(letters),
        "{name:?}: a crate's name has lower-case letters, digits and `-`, and begins with a letter"
    );
    ensure!(
        !TAKEN.contains(&name),
        "{name:?}: a crate of this name there is already, or Rust means something else by it; choose another one"
    );
    let folder = PathBuf::from(name);
    ensure!(
        !folder.exists(),
        "{} exists already; choose another name, or remove it",
        folder.display()
    );
    let (sdk, inside) = match sdk {
        Some(path) => (
            fs::canonicalize(path).with_context(|| path.display().to_string())?,
            false,
        ),
        None => find_sdk()?,
    };
    ensure!(
        sdk.join("wit/policy.wit").is_file(),
        "{} is not the folder `policy-sdk` of a checkout of Wasmgate",
        sdk.display()
    );
    // A crate in somebody else's workspace would want to be a member of it.
    let workspace = if inside { "" } else { "\n[workspace]\n" };
    let manifest = MANIFEST
        .replace("NAME", name)
        .replace(
            "SDK",
            &if inside {
                "../../policy-sdk".to_owned()
            } else {
                sdk.display().to_string()
            },
        )
        .replace("WORKSPACE", workspace);
    fs::create_dir_all(folder.join("src"))?;
    fs::write(folder.join("Cargo.toml"), manifest)?;
    fs::write(folder.join("src/lib.rs"), SOURCE)?;
    println!("made {}", folder.display());
    println!("  cd {name} && cargo test    # natively, without wasm and without root");
    if inside {
        println!("  cargo xtask build          # puts {name}.wasm into target/policies");
    } else {
        println!(
            "  cargo build --release --target wasm32-unknown-unknown    # after `rustup target add` of that target"
        );
    }
    Ok(())
}

/// The SDK of the checkout that this is done in; whether the new crate is one of its policies.
fn find_sdk() -> anyhow::Result<(PathBuf, bool)> {
    let here = std::env::current_dir()?;
    for folder in here.ancestors() {
        let sdk = folder.join("policy-sdk");
        if sdk.join("wit/policy.wit").is_file() {
            return Ok((sdk, here == folder.join("policies")));
        }
    }
    bail!("there is no checkout of Wasmgate around here: say where its SDK is with --sdk PATH/policy-sdk")
}

/// For `hostd policy inspect`: whether what is meant is a file.
pub fn is_file(module: &str) -> bool {
    Path::new(module)
        .extension()
        .is_some_and(|extension| extension == "wasm")
}
