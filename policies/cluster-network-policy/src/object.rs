//! The objects as users have them (`policy.networking.k8s.io/v1alpha2`), read and checked. What is wrong is refused by
//! the object's name, the field and the reason.

use ipnet::IpNet;
use policy_sdk::{Action, Protocol, Selector, typed};
use serde::Deserialize;
use serde_json::Value;

/// Group and version.
pub const API_VERSION: &str = "policy.networking.k8s.io/v1alpha2";

/// A `ClusterNetworkPolicy`.
#[derive(Clone, Debug)]
pub struct Object {
    pub name: String,
    pub spec: Spec,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    pub tier: Tier,
    pub priority: u32,
    pub subject: Pods,
    #[serde(default)]
    pub ingress: Option<Vec<IngressRule>>,
    #[serde(default)]
    pub egress: Option<Vec<EgressRule>>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum Tier {
    Admin,
    Baseline,
}

/// Pods by their namespaces, or by those and their own labels: exactly one of the two.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Pods {
    #[serde(default)]
    pub namespaces: Option<Selector>,
    #[serde(default)]
    pub pods: Option<NamespacedPod>,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NamespacedPod {
    #[serde(default)]
    pub namespace_selector: Selector,
    #[serde(default)]
    pub pod_selector: Selector,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IngressRule {
    #[serde(default)]
    pub name: String,
    pub action: RuleAction,
    pub from: Vec<Pods>,
    #[serde(default)]
    pub protocols: Option<Vec<ProtocolSpec>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressRule {
    #[serde(default)]
    pub name: String,
    pub action: RuleAction,
    pub to: Vec<EgressPeer>,
    #[serde(default)]
    pub protocols: Option<Vec<ProtocolSpec>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EgressPeer {
    #[serde(default)]
    pub namespaces: Option<Selector>,
    #[serde(default)]
    pub pods: Option<NamespacedPod>,
    #[serde(default)]
    pub networks: Option<Vec<IpNet>>,
    #[serde(default)]
    pub nodes: Option<Selector>,
    #[serde(default)]
    pub domain_names: Option<Vec<String>>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum RuleAction {
    Accept,
    Deny,
    Pass,
}

impl From<RuleAction> for Action {
    fn from(action: RuleAction) -> Self {
        match action {
            RuleAction::Accept => Self::Allow,
            RuleAction::Deny => Self::Deny,
            RuleAction::Pass => Self::Pass,
        }
    }
}

/// Exactly one of its fields.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProtocolSpec {
    #[serde(default)]
    pub tcp: Option<Ports>,
    #[serde(default)]
    pub udp: Option<Ports>,
    #[serde(default)]
    pub sctp: Option<Ports>,
    #[serde(default)]
    pub destination_named_port: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ports {
    #[serde(default)]
    pub destination_port: Option<Port>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    #[serde(default)]
    pub number: Option<u16>,
    #[serde(default)]
    pub range: Option<Range>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    pub start: u16,
    pub end: u16,
}

/// Reads one object, a list of them, or a `List`.
pub fn read(config: Value) -> Result<Vec<Object>, String> {
    let mut objects = Vec::new();
    match config {
        Value::Null => {}
        Value::Array(documents) => {
            for (index, document) in documents.into_iter().enumerate() {
                add(&mut objects, &document, &format!("document {}", index + 1))?;
            }
        }
        document => add(&mut objects, &document, "the document")?,
    }
    Ok(objects)
}

fn add(objects: &mut Vec<Object>, document: &Value, place: &str) -> Result<(), String> {
    if document.is_null() {
        return Ok(()); // an empty document between two `---`
    }
    let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default();
    match (text("apiVersion"), text("kind")) {
        (API_VERSION, "ClusterNetworkPolicy") => {}
        ("v1", "List") | (API_VERSION, "ClusterNetworkPolicyList") => {
            let items = document.get("items").and_then(Value::as_array);
            for (index, item) in items.into_iter().flatten().enumerate() {
                add(objects, item, &format!("{place}, item {}", index + 1))?;
            }
            return Ok(());
        }
        (version, kind) => {
            return Err(format!(
                "{place}: apiVersion {version:?} with kind {kind:?} is no `{API_VERSION}` ClusterNetworkPolicy"
            ));
        }
    }
    let name = document.pointer("/metadata/name").and_then(Value::as_str);
    let name = name
        .ok_or_else(|| format!("{place}: metadata.name is missing"))?
        .to_owned();
    let place = format!("ClusterNetworkPolicy {name}");
    if objects.iter().any(|other| other.name == name) {
        return Err(format!("{place}: given twice"));
    }
    for key in document.as_object().into_iter().flat_map(serde_json::Map::keys) {
        if !["apiVersion", "kind", "metadata", "spec", "status"].contains(&key.as_str()) {
            return Err(format!("{place}: unknown field `{key}`"));
        }
    }
    let spec = document.get("spec").unwrap_or(&Value::Null);
    let spec: Spec = typed(spec).map_err(|problem| format!("{place}: spec.{problem}"))?;
    spec.check().map_err(|problem| format!("{place}: spec.{problem}"))?;
    objects.push(Object { name, spec });
    Ok(())
}

/// Items of one list at the most.
const MAX_ITEMS: usize = 25;

fn check_length(field: &str, length: usize) -> Result<(), String> {
    if length == 0 || length > MAX_ITEMS {
        return Err(format!("{field}: {length} items; there must be 1 to {MAX_ITEMS}"));
    }
    Ok(())
}

impl Spec {
    fn check(&self) -> Result<(), String> {
        if self.priority > 1000 {
            return Err(format!("priority: {} is above 1000", self.priority));
        }
        self.subject.check().map_err(|problem| format!("subject{problem}"))?;
        for (index, rule) in self.ingress.iter().flatten().enumerate() {
            let at = |problem| format!("ingress[{index}].{problem}");
            check_length("from", rule.from.len()).map_err(at)?;
            for (number, peer) in rule.from.iter().enumerate() {
                peer.check().map_err(|problem| at(format!("from[{number}]{problem}")))?;
            }
            check_rule(&rule.name, rule.protocols.as_deref()).map_err(at)?;
        }
        for (index, rule) in self.egress.iter().flatten().enumerate() {
            let at = |problem| format!("egress[{index}].{problem}");
            check_length("to", rule.to.len()).map_err(at)?;
            for (number, peer) in rule.to.iter().enumerate() {
                peer.check().map_err(|problem| at(format!("to[{number}]{problem}")))?;
            }
            check_rule(&rule.name, rule.protocols.as_deref()).map_err(at)?;
            let named = |one: &ProtocolSpec| one.destination_named_port.is_some();
            if rule.to.iter().any(|peer| peer.networks.is_some()) && rule.protocols.iter().flatten().any(named) {
                return Err(at("protocols: networks have no named ports".to_owned()));
            }
        }
        for (field, length) in [
            ("ingress", self.ingress.as_ref().map_or(0, Vec::len)),
            ("egress", self.egress.as_ref().map_or(0, Vec::len)),
        ] {
            if length > MAX_ITEMS {
                return Err(format!("{field}: {length} rules; at most {MAX_ITEMS} are allowed"));
            }
        }
        Ok(())
    }
}

impl Pods {
    fn check(&self) -> Result<(), String> {
        match (&self.namespaces, &self.pods) {
            (Some(namespaces), None) => namespaces.check().map_err(|problem| format!(".namespaces: {problem}")),
            (None, Some(pods)) => pods.check(),
            _ => Err(": exactly one of namespaces and pods is needed".to_owned()),
        }
    }
}

impl NamespacedPod {
    fn check(&self) -> Result<(), String> {
        let namespaces = self.namespace_selector.check();
        namespaces.map_err(|problem| format!(".pods.namespaceSelector: {problem}"))?;
        let pods = self.pod_selector.check();
        pods.map_err(|problem| format!(".pods.podSelector: {problem}"))
    }
}

impl EgressPeer {
    fn check(&self) -> Result<(), String> {
        if self.nodes.is_some() {
            return Err(".nodes: nodes have no labels here (an experimental field)".to_owned());
        }
        if self.domain_names.is_some() {
            return Err(".domainNames: names are not resolved (an experimental field)".to_owned());
        }
        match (&self.networks, self.pods()) {
            (Some(networks), None) => check_length(".networks", networks.len()),
            (None, Some(pods)) => pods.check(),
            _ => Err(": exactly one of namespaces, pods and networks is needed".to_owned()),
        }
    }

    /// The pods that it selects, where it selects pods.
    pub fn pods(&self) -> Option<Pods> {
        let pods = Pods {
            namespaces: self.namespaces.clone(),
            pods: self.pods.clone(),
        };
        (pods.namespaces.is_some() || pods.pods.is_some()).then_some(pods)
    }
}

fn check_rule(name: &str, protocols: Option<&[ProtocolSpec]>) -> Result<(), String> {
    if name.len() > 100 {
        return Err(format!("name: {} characters; at most 100 are allowed", name.len()));
    }
    let Some(protocols) = protocols else { return Ok(()) };
    check_length("protocols", protocols.len())?;
    for (index, one) in protocols.iter().enumerate() {
        one.check().map_err(|problem| format!("protocols[{index}]{problem}"))?;
    }
    Ok(())
}

impl ProtocolSpec {
    fn check(&self) -> Result<(), String> {
        let ports = [&self.tcp, &self.udp, &self.sctp];
        let given =
            ports.iter().filter(|one| one.is_some()).count() + usize::from(self.destination_named_port.is_some());
        if given != 1 {
            return Err(": exactly one of tcp, udp, sctp and destinationNamedPort is needed".to_owned());
        }
        let port = ports
            .into_iter()
            .flatten()
            .find_map(|ports| ports.destination_port.as_ref());
        match port.map(|port| (port.number, port.range)) {
            None | Some((Some(1..), None)) => Ok(()),
            Some((None, Some(Range { start: 1.., end }))) if port.is_some_and(|one| one.starts_before(end)) => Ok(()),
            Some((None, Some(range))) => Err(format!(
                ": the range {} to {} does not rise from 1 or more",
                range.start, range.end
            )),
            Some(_) => Err(": destinationPort has a number from 1 or a range, and not both".to_owned()),
        }
    }

    /// Protocol and ports; none where they have a name.
    pub fn range(&self) -> Option<(Protocol, u16, u16)> {
        let (protocol, ports) = match self {
            Self { tcp: Some(ports), .. } => (Protocol::Tcp, ports),
            Self { udp: Some(ports), .. } => (Protocol::Udp, ports),
            Self { sctp: Some(ports), .. } => (Protocol::Sctp, ports),
            _ => return None,
        };
        Some(match &ports.destination_port {
            Some(Port {
                number: Some(number), ..
            }) => (protocol, *number, *number),
            Some(Port { range: Some(range), .. }) => (protocol, range.start, range.end),
            _ => (protocol, 0, u16::MAX),
        })
    }
}

impl Port {
    fn starts_before(&self, end: u16) -> bool {
        self.range.is_some_and(|range| range.start < end)
    }
}
