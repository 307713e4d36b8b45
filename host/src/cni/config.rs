//! What a runtime says: the network's configuration on stdin, and the environment (CNI specification 1.1.0, section 2).

use super::error::{Code, Error};
use crate::{api::PodName, attachment::Attachment, config::DEFAULT_SOCKET, endpoint, wasm::sha256};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::{Map, Value};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

/// Versions of the specification that are spoken, by their age.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", NEWEST];
const NEWEST: &str = "1.1.0";

/// What is needed of the configuration to end attachments: nothing else that is wrong with it may keep containers from going.
const ENDING: [&str; 4] = ["cniVersion", "name", "socket", "cni.dev/valid-attachments"];

/// Keys that are known besides those that begin with `cni.dev/`.
const KEYS: [&str; 17] = [
    "args",
    "capabilities",
    "cniVersion",
    "cniVersions",
    "disableCheck",
    "disableGC",
    "dns",
    "ipMasq",
    "ipam",
    "labels",
    "loadOnlyInlinedPlugins",
    "name",
    "namespace",
    "prevResult",
    "runtimeConfig",
    "socket",
    "type",
];

/// Labels, as an object or as a list of keys with values (CONVENTIONS.md, "args").
#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum Labels {
    Map(BTreeMap<String, String>),
    List(Vec<Label>),
}

#[derive(Clone, Deserialize)]
struct Label {
    key: String,
    value: String,
}

impl From<Labels> for BTreeMap<String, String> {
    fn from(labels: Labels) -> Self {
        match labels {
            Labels::Map(map) => map,
            Labels::List(list) => list.into_iter().map(|label| (label.key, label.value)).collect(),
        }
    }
}

/// What a runtime adds to the configuration: by capability, or as arguments.
#[derive(Default, Deserialize)]
struct Given {
    labels: Option<Labels>,
    ips: Option<Vec<String>>,
    mac: Option<String>,
}

#[derive(Default, Deserialize)]
struct Args {
    #[serde(default)]
    cni: Given,
    labels: Option<Labels>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Valid {
    #[serde(rename = "containerID")]
    container: String,
    ifname: String,
}

/// The network's configuration.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// Version of the specification.
    #[serde(default)]
    pub cni_version: String,
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// hostd's control socket.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Namespace of containers whose runtime does not name one.
    #[serde(default = "default_namespace")]
    namespace: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    runtime_config: Given,
    #[serde(default)]
    args: Args,
    /// What resolves names, for the runtime.
    #[serde(default)]
    pub dns: Option<Value>,
    /// What plugins before this one, or this one before, have answered.
    #[serde(default)]
    pub prev_result: Option<Map<String, Value>>,
    #[serde(default)]
    ipam: Map<String, Value>,
    #[serde(rename = "cni.dev/valid-attachments", default, deserialize_with = "present")]
    valid: Option<Vec<Valid>>,
}

/// A list that is there: one without entries may be written as null.
fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<Valid>>, D::Error> {
    let list = Option::<Vec<Valid>>::deserialize(from)?;
    Ok(Some(list.unwrap_or_default()))
}

fn default_socket() -> PathBuf {
    DEFAULT_SOCKET.into()
}

fn default_namespace() -> String {
    "default".to_owned()
}

/// Decodes JSON.
pub fn decode<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    let mut json = serde_json::Deserializer::from_str(text);
    let decoded = serde_path_to_error::deserialize(&mut json);
    decoded.map_err(|error| Error::new(Code::Decode, error.to_string()))
}

/// The version that a configuration has; empty where it can't be told.
pub fn version_of(text: &str) -> String {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    let version = value["cniVersion"].as_str().unwrap_or_default();
    version.to_owned()
}

/// The version to answer in: the newest where none is asked for.
pub fn spoken(asked: &str) -> &str {
    if asked.is_empty() { NEWEST } else { asked }
}

impl Network {
    /// Reads and checks a configuration.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let keys: Map<String, Value> = decode(text)?;
        if let Some((key, value)) = keys
            .iter()
            .find(|(key, _)| !KEYS.contains(&key.as_str()) && !key.starts_with("cni.dev/"))
        {
            return Err(Error::new(
                Code::Field,
                format!("{key:?}: {value}: there is no such key"),
            ));
        }
        let network: Self = decode(text)?;
        network.check()?;
        if !network.ipam.is_empty() {
            let details = format!("\"ipam\": {}: addresses are hostd's to give", keys["ipam"]);
            return Err(Error::new(Code::Field, details));
        }
        if let Some(mac) = &network.runtime_config.mac {
            let details = format!("\"mac\": {mac:?}: MAC addresses are hostd's to give");
            return Err(Error::new(Code::Field, details));
        }
        Ok(network)
    }

    /// Reads and checks what is needed of a configuration to end attachments.
    pub fn parse_to_end(text: &str) -> Result<Self, Error> {
        let mut keys: Map<String, Value> = decode(text)?;
        keys.retain(|key, _| ENDING.contains(&key.as_str()));
        let network: Self = decode(&Value::Object(keys).to_string())?;
        network.check()?;
        Ok(network)
    }

    fn check(&self) -> Result<(), Error> {
        let invalid = |problem| Error::new(Code::Config, problem);
        if self.name.is_empty() {
            return Err(invalid("`name` is missing".to_owned()));
        }
        check_network(&self.name).map_err(invalid)?;
        if !self.socket.is_absolute() {
            let socket = self.socket.display();
            return Err(invalid(format!(
                "\"socket\": {socket:?}: it begins with `/`: runtimes start plugins in any folder"
            )));
        }
        Ok(())
    }

    /// Containers and interfaces that are still attached.
    pub fn valid(&self) -> Result<BTreeSet<(String, String)>, Error> {
        let missing = || Error::new(Code::Config, "`cni.dev/valid-attachments` is missing");
        let valid = self.valid.as_ref().ok_or_else(missing)?;
        Ok(valid
            .iter()
            .map(|one| (one.container.clone(), one.ifname.clone()))
            .collect())
    }

    /// The pod: what the runtime says, the configuration for what it does not.
    pub fn pod(&self, environment: &Environment) -> Result<Pod, Error> {
        let arguments = &environment.arguments;
        let argument = |key: &str| arguments.get(key).filter(|value| !value.is_empty());
        let name = PodName {
            namespace: argument("K8S_POD_NAMESPACE").unwrap_or(&self.namespace).clone(),
            name: argument("K8S_POD_NAME").map_or_else(|| pod_name(&environment.container), |name| pod_name(name)),
        };
        let invalid = |problem| Error::new(Code::Config, problem);
        endpoint::check_name(&name.namespace).map_err(|problem| invalid(format!("namespace {problem}")))?;
        // What is said for one container counts more than what is said for all of the network.
        let mut labels = self.labels.clone();
        for more in [&self.args.labels, &self.args.cni.labels].into_iter().flatten() {
            labels.extend(BTreeMap::from(more.clone()));
        }
        if let Some(list) = argument("WASMGATE_LABELS") {
            for pair in list.split(',') {
                let (key, value) = pair.split_once(':').ok_or_else(|| {
                    let details = format!("CNI_ARGS: WASMGATE_LABELS: {pair:?} is no KEY:VALUE");
                    Error::new(Code::Environment, details)
                })?;
                labels.insert(key.to_owned(), value.to_owned());
            }
        }
        if let Some(more) = &self.runtime_config.labels {
            labels.extend(BTreeMap::from(more.clone()));
        }
        endpoint::check_labels(&labels).map_err(invalid)?;
        // Deprecated, so the last that counts (CONVENTIONS.md, "CNI_ARGS").
        let asked = self.runtime_config.ips.clone().or_else(|| self.args.cni.ips.clone());
        let asked = asked
            .or_else(|| argument("IP").map(|ip| vec![ip.clone()]))
            .unwrap_or_default();
        let parse = |text: &String| {
            let address = text.split('/').next().unwrap_or_default().parse();
            address.map_err(|_| Error::new(Code::Config, format!("{text:?} is no IP address")))
        };
        Ok(Pod {
            name,
            labels,
            addresses: asked.iter().map(parse).collect::<Result<_, _>>()?,
        })
    }
}

/// Checks a network's name (CNI specification 1.1.0, "Network configuration format").
///
/// # Errors
///
/// What is wrong with it.
pub fn check_network(name: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(fits) {
        return Ok(());
    }
    Err(format!(
        "network {name:?}: a name has letters, digits, `_`, `.` and `-`, and begins with a letter or digit"
    ))
}

/// A pod's name, for a container's: names longer than a DNS label's 63 bytes, or with other characters, are cut, and
/// told apart by a digest.
fn pod_name(container: &str) -> String {
    if endpoint::check_name(container).is_ok() {
        return container.to_owned();
    }
    let fits = |c: char| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_lowercase()
        } else {
            '-'
        }
    };
    let begin: String = container.chars().take(40).map(fits).collect();
    let digest = &sha256(container.as_bytes())[..12];
    format!("{}-{digest}", begin.trim_matches('-'))
        .trim_start_matches('-')
        .to_owned()
}

/// A pod as its runtime describes it.
#[derive(Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: PodName,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Addresses that it should have.
    pub addresses: Vec<IpAddr>,
}

/// Checks that the version that a configuration has is spoken, and has an operation (CNI specification 0.4.0 and 1.1.0, "Parameters").
pub fn check_version(text: &str, command: &str) -> Result<(), Error> {
    let version = version_of(text);
    let wrong = |details| Error::new(Code::Version, details);
    let age = |version: &str| VERSIONS.iter().position(|known| *known == version);
    let Some(its) = age(&version) else {
        let spoken = VERSIONS.join(", ");
        let version = if version.is_empty() {
            "missing".to_owned()
        } else {
            format!("{version:?}")
        };
        return Err(wrong(format!("`cniVersion` is {version}; this plugin speaks {spoken}")));
    };
    let since = match command {
        "CHECK" => "0.4.0",
        "GC" | "STATUS" => "1.1.0",
        _ => VERSIONS[0],
    };
    if Some(its) < age(since) {
        return Err(wrong(format!(
            "`cniVersion` is {version:?}: {command} is there since {since}"
        )));
    }
    Ok(())
}

/// The environment, as far as an operation needs it.
#[derive(Debug, Default)]
pub struct Environment {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_NETNS`.
    pub netns: String,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// `CNI_ARGS`.
    pub arguments: BTreeMap<String, String>,
}

impl Environment {
    /// Reads what an operation needs, by `get`.
    pub fn read(command: &str, get: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let needed: &[&str] = match command {
            "ADD" | "CHECK" => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
            "DEL" => &["CNI_CONTAINERID", "CNI_IFNAME"],
            _ => &[],
        };
        let value = |name: &str| get(name).unwrap_or_default();
        let missing: Vec<&str> = needed.iter().copied().filter(|name| value(name).is_empty()).collect();
        let wrong = |problem: String| Error::new(Code::Environment, problem);
        if !missing.is_empty() {
            return Err(wrong(format!("{} must be set", missing.join(", "))));
        }
        let container = value("CNI_CONTAINERID");
        let begins = container.starts_with(|c: char| c.is_ascii_alphanumeric());
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if needed.contains(&"CNI_CONTAINERID") && !(begins && container.chars().all(fits)) {
            return Err(wrong(format!(
                "CNI_CONTAINERID={container}: it begins with a letter or digit, and has letters, digits, `_`, `.` and `-`"
            )));
        }
        let interface = value("CNI_IFNAME");
        if needed.contains(&"CNI_IFNAME") {
            endpoint::check_interface(&interface).map_err(|problem| wrong(format!("CNI_IFNAME: {problem}")))?;
        }
        let netns = value("CNI_NETNS");
        if needed.contains(&"CNI_NETNS") && !netns.starts_with('/') {
            return Err(wrong(format!("CNI_NETNS={netns}: it begins with `/`")));
        }
        let arguments = if command == "ADD" {
            value("CNI_ARGS")
        } else {
            String::new()
        };
        let pairs = arguments.split(';').filter(|pair| !pair.is_empty());
        let arguments = pairs.map(|pair| {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| wrong(format!("CNI_ARGS: {pair:?} is no KEY=VALUE")))?;
            Ok((key.to_owned(), value.to_owned()))
        });
        Ok(Self {
            container,
            netns,
            interface,
            arguments: arguments.collect::<Result<_, Error>>()?,
        })
    }

    /// The attachment to a network.
    pub fn attachment(&self, network: &str) -> Attachment {
        Attachment {
            network: network.to_owned(),
            container: self.container.clone(),
            interface: self.interface.clone(),
        }
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
