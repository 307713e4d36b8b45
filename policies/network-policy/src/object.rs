//! The objects as users have them (Kubernetes `networking.k8s.io/v1`, "Network Policies"), read and checked. What is
//! wrong is refused by the object's name, the field and the reason.

use ipnet::IpNet;
use policy_sdk::{Protocol, Selector, typed};
use serde::Deserialize;
use serde_json::Value;

/// Where an object without a namespace is.
const DEFAULT_NAMESPACE: &str = "default";

/// A `NetworkPolicy`.
#[derive(Clone, Debug)]
pub struct Object {
    pub namespace: String,
    pub name: String,
    pub spec: Spec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    #[serde(default)]
    pub pod_selector: Option<Selector>,
    #[serde(default)]
    pub policy_types: Option<Vec<PolicyType>>,
    #[serde(default)]
    pub ingress: Option<Vec<IngressRule>>,
    #[serde(default)]
    pub egress: Option<Vec<EgressRule>>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum PolicyType {
    Ingress,
    Egress,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IngressRule {
    #[serde(default)]
    pub from: Option<Vec<PeerSpec>>,
    #[serde(default)]
    pub ports: Option<Vec<PortSpec>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressRule {
    #[serde(default)]
    pub to: Option<Vec<PeerSpec>>,
    #[serde(default)]
    pub ports: Option<Vec<PortSpec>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PeerSpec {
    #[serde(default)]
    pub pod_selector: Option<Selector>,
    #[serde(default)]
    pub namespace_selector: Option<Selector>,
    #[serde(default)]
    pub ip_block: Option<IpBlock>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct IpBlock {
    pub cidr: IpNet,
    #[serde(default)]
    pub except: Option<Vec<IpNet>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PortSpec {
    #[serde(default)]
    pub protocol: Option<Transport>,
    #[serde(default)]
    pub port: Option<NumberOrName>,
    #[serde(default)]
    pub end_port: Option<u16>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "UPPERCASE")]
pub enum Transport {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

impl From<Transport> for Protocol {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Tcp => Self::Tcp,
            Transport::Udp => Self::Udp,
            Transport::Sctp => Self::Sctp,
        }
    }
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(untagged, expecting = "neither a port from 1 to 65535 nor a port's name")]
pub enum NumberOrName {
    Number(u16),
    Name(String),
}

/// What pods that no policy selects may do.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
pub enum Unselected {
    /// Everything, as Kubernetes has it.
    #[default]
    Allow,
    /// What the modules after this one say.
    Pass,
}

/// Everything that was configured.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    pub policies: Vec<Object>,
    pub unselected: Unselected,
}

impl Objects {
    /// Reads one object, a list of them, or a `List`.
    pub fn read(config: Value) -> Result<Self, String> {
        let mut objects = Self::default();
        match config {
            Value::Null => {}
            Value::Array(documents) => {
                for (index, document) in documents.into_iter().enumerate() {
                    objects.add(&document, &format!("document {}", index + 1))?;
                }
            }
            document => objects.add(&document, "the document")?,
        }
        Ok(objects)
    }

    fn add(&mut self, document: &Value, place: &str) -> Result<(), String> {
        if document.is_null() {
            return Ok(()); // an empty document between two `---`
        }
        let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        match (text("apiVersion").as_str(), text("kind").as_str()) {
            ("networking.k8s.io/v1", "NetworkPolicy") => self.add_policy(document, place),
            ("v1" | "networking.k8s.io/v1", "List" | "NetworkPolicyList") => {
                let items = document.get("items").and_then(Value::as_array).cloned();
                let items = items.ok_or_else(|| format!("{place}: a list without `items`"))?;
                for (index, item) in items.iter().enumerate() {
                    self.add(item, &format!("{place}, item {}", index + 1))?;
                }
                Ok(())
            }
            ("wasmgate.dev/v1", "Defaults") => {
                #[derive(Deserialize)]
                #[serde(rename_all = "camelCase", deny_unknown_fields)]
                struct Defaults {
                    #[serde(rename = "apiVersion")]
                    _api_version: String,
                    #[serde(rename = "kind")]
                    _kind: String,
                    unselected: Unselected,
                }
                let defaults: Defaults = typed(document).map_err(|problem| format!("{place}: {problem}"))?;
                self.unselected = defaults.unselected;
                Ok(())
            }
            (version, kind) => Err(format!(
                "{place}: apiVersion {version:?} with kind {kind:?} is neither a `networking.k8s.io/v1` NetworkPolicy \
                 nor the module's own `wasmgate.dev/v1` Defaults"
            )),
        }
    }

    fn add_policy(&mut self, document: &Value, place: &str) -> Result<(), String> {
        let field = |key: &str| document.pointer(&format!("/metadata/{key}")).and_then(Value::as_str);
        let name = field("name").filter(|name| !name.is_empty());
        let name = name
            .ok_or_else(|| format!("{place}: metadata.name is missing"))?
            .to_owned();
        let namespace = field("namespace").unwrap_or(DEFAULT_NAMESPACE).to_owned();
        let place = format!("NetworkPolicy {namespace}/{name}");
        if self
            .policies
            .iter()
            .any(|other| other.name == name && other.namespace == namespace)
        {
            return Err(format!("{place}: given twice"));
        }
        for key in document.as_object().into_iter().flat_map(serde_json::Map::keys) {
            if !["apiVersion", "kind", "metadata", "spec", "status"].contains(&key.as_str()) {
                return Err(format!("{place}: unknown field `{key}`"));
            }
        }
        let spec = document.get("spec").cloned().unwrap_or(Value::Null);
        let spec: Spec = if spec.is_null() {
            Spec::default()
        } else {
            typed(&spec).map_err(|problem| format!("{place}: spec.{problem}"))?
        };
        spec.check().map_err(|problem| format!("{place}: spec.{problem}"))?;
        self.policies.push(Object { namespace, name, spec });
        Ok(())
    }
}

impl Spec {
    fn check(&self) -> Result<(), String> {
        if let Some(selector) = &self.pod_selector {
            selector.check().map_err(|problem| format!("podSelector: {problem}"))?;
        }
        for (index, rule) in self.ingress.iter().flatten().enumerate() {
            let at = |problem| format!("ingress[{index}].{problem}");
            check_peers("from", rule.from.as_deref()).map_err(at)?;
            check_ports(rule.ports.as_deref()).map_err(at)?;
        }
        for (index, rule) in self.egress.iter().flatten().enumerate() {
            let at = |problem| format!("egress[{index}].{problem}");
            check_peers("to", rule.to.as_deref()).map_err(at)?;
            check_ports(rule.ports.as_deref()).map_err(at)?;
        }
        Ok(())
    }

    /// Whether it isolates pods for this direction: what `policyTypes` says; without it ingress always, egress where
    /// there is a rule for it.
    pub fn isolates(&self, direction: PolicyType) -> bool {
        match self.policy_types.as_deref() {
            Some(types) if !types.is_empty() => types.contains(&direction),
            _ => match direction {
                PolicyType::Ingress => true,
                PolicyType::Egress => self.egress.as_ref().is_some_and(|rules| !rules.is_empty()),
            },
        }
    }
}

fn check_peers(field: &str, peers: Option<&[PeerSpec]>) -> Result<(), String> {
    for (index, peer) in peers.into_iter().flatten().enumerate() {
        peer.check().map_err(|problem| format!("{field}[{index}]{problem}"))?;
    }
    Ok(())
}

impl PeerSpec {
    fn check(&self) -> Result<(), String> {
        for (field, selector) in [
            ("podSelector", &self.pod_selector),
            ("namespaceSelector", &self.namespace_selector),
        ] {
            if let Some(selector) = selector {
                selector.check().map_err(|problem| format!(".{field}: {problem}"))?;
            }
        }
        let selects = self.pod_selector.is_some() || self.namespace_selector.is_some();
        match (&self.ip_block, selects) {
            (Some(_), true) => Err(": an ipBlock stands alone, without podSelector and namespaceSelector".to_owned()),
            (None, false) => Err(": one of podSelector, namespaceSelector and ipBlock is needed".to_owned()),
            (Some(block), false) => block.check().map_err(|problem| format!(".ipBlock{problem}")),
            (None, true) => Ok(()),
        }
    }
}

impl IpBlock {
    fn check(&self) -> Result<(), String> {
        for (index, except) in self.except.iter().flatten().enumerate() {
            if !self.cidr.contains(except) || self.cidr.trunc() == except.trunc() {
                return Err(format!(
                    ".except[{index}]: {except} is not a part of {}, strictly smaller",
                    self.cidr
                ));
            }
        }
        Ok(())
    }
}

fn check_ports(ports: Option<&[PortSpec]>) -> Result<(), String> {
    for (index, port) in ports.into_iter().flatten().enumerate() {
        port.check().map_err(|problem| format!("ports[{index}].{problem}"))?;
    }
    Ok(())
}

impl PortSpec {
    fn check(&self) -> Result<(), String> {
        match (&self.port, self.end_port) {
            (Some(NumberOrName::Number(0)), _) => Err("port: 0 is no port".to_owned()),
            (Some(NumberOrName::Name(name)), None) => check_port_name(name),
            (Some(NumberOrName::Name(_)), Some(_)) => {
                Err("endPort: goes with a number in `port`, not a name".to_owned())
            }
            (None, Some(_)) => Err("endPort: needs `port`".to_owned()),
            (Some(NumberOrName::Number(port)), Some(end)) if end < *port => {
                Err(format!("endPort: {end} is less than the port, {port}"))
            }
            _ => Ok(()),
        }
    }
}

/// RFC 6335, section 5.1.
fn check_port_name(name: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let letter = name.chars().any(|c| c.is_ascii_lowercase());
    let edges = !name.starts_with('-') && !name.ends_with('-') && !name.contains("--");
    if name.is_empty() || name.len() > 15 || !name.chars().all(fits) || !letter || !edges {
        return Err(format!(
            "port: {name:?} is no port's name (at most 15 lower-case letters, digits and single `-`, one letter at least)"
        ));
    }
    Ok(())
}
