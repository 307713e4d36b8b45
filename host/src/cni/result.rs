//! What a runtime is answered (CNI specification 1.1.0, section 5, and those of the versions before it).

use super::config::{Network, VERSIONS, spoken};
use crate::api::AttachedView;
use serde_json::{Map, Value, json};
use std::net::IpAddr;

/// The answer to `VERSION`.
pub fn versions(asked: &str) -> Value {
    json!({ "cniVersion": spoken(asked), "supportedVersions": VERSIONS })
}

/// The answer to `ADD`: what plugins before this one have made, and this one.
pub fn added(network: Network, attached: &AttachedView, interface: &str, netns: &str) -> Value {
    let version = network.cni_version;
    let mut result = network.prev_result.unwrap_or_default();
    result.insert("cniVersion".to_owned(), json!(version));
    let interfaces = list(&mut result, "interfaces");
    let mut host = json!({ "name": attached.interface, "mac": attached.mac });
    let mut pod = json!({ "name": interface, "mac": attached.pod_mac, "sandbox": netns });
    if version == "1.1.0" {
        host["mtu"] = json!(attached.mtu);
        pod["mtu"] = json!(attached.pod_mtu);
    }
    interfaces.extend([host, pod]);
    let index = interfaces.len() - 1;
    for (address, gateway) in &attached.addresses {
        let (whole, everything) = match address {
            IpAddr::V4(_) => (32, "0.0.0.0/0"),
            IpAddr::V6(_) => (128, "::/0"),
        };
        let mut ip = json!({ "address": format!("{address}/{whole}"), "gateway": gateway, "interface": index });
        // Until 1.0.0 it was said with each address of which family it is.
        if version.starts_with("0.") {
            ip["version"] = json!(if address.is_ipv4() { "4" } else { "6" });
        }
        list(&mut result, "ips").push(ip);
        list(&mut result, "routes").push(json!({ "dst": everything, "gw": gateway }));
    }
    if let Some(dns) = network.dns {
        result.insert("dns".to_owned(), dns);
    }
    Value::Object(result)
}

fn list<'a>(result: &'a mut Map<String, Value>, key: &str) -> &'a mut Vec<Value> {
    let value = result.entry(key.to_owned()).or_insert_with(|| json!([]));
    if !value.is_array() {
        *value = json!([]);
    }
    match value {
        Value::Array(list) => list,
        _ => unreachable!("it is a list by now"),
    }
}

/// What a result says of a container's interface.
#[derive(Debug, PartialEq, Eq)]
pub struct Told {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its MAC address, where it is said.
    pub mac: Option<String>,
    /// Gateways of the routes to everything.
    pub routes: Vec<IpAddr>,
}

/// What a result says of an interface of a container; none where it names no such interface. One without a sandbox, or with an empty
/// one, is the node's.
pub fn told(result: &Map<String, Value>, interface: &str) -> Option<Told> {
    let of = |key: &str| result.get(key).and_then(Value::as_array).into_iter().flatten();
    let sandboxed = |one: &Value| one["sandbox"].as_str().is_some_and(|sandbox| !sandbox.is_empty());
    let (index, its) = of("interfaces")
        .enumerate()
        .find(|(_, one)| one["name"] == interface && sandboxed(one))?;
    let is_on_it = |ip: &&Value| ip["interface"].as_u64().map(usize::try_from) == Some(Ok(index));
    let address = |ip: &Value| ip["address"].as_str()?.split('/').next()?.parse().ok();
    let to_everything = |route: &&Value| matches!(route["dst"].as_str(), Some("0.0.0.0/0" | "::/0"));
    Some(Told {
        addresses: of("ips").filter(is_on_it).filter_map(address).collect(),
        mac: its["mac"].as_str().map(str::to_owned),
        routes: of("routes")
            .filter(to_everything)
            .filter_map(|route| route["gw"].as_str()?.parse().ok())
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::{added, told, versions};
    use crate::{api::AttachedView, cni::config::Network};
    use serde_json::{Value, json};

    fn add(version: &str, more: &str) -> Value {
        let text = format!(r#"{{"cniVersion": "{version}", "name": "net", "type": "wasmgate-cni" {more}}}"#);
        let attached = AttachedView {
            interface: "wg-0123456789ab".to_owned(),
            mac: "02:00:00:00:00:01".to_owned(),
            pod_mac: "02:00:00:00:00:02".to_owned(),
            mtu: 65535,
            pod_mtu: 1450,
            addresses: vec![
                ("10.1.0.5".parse().unwrap(), "169.254.1.1".parse().unwrap()),
                ("fd00::5".parse().unwrap(), "fe80::1".parse().unwrap()),
            ],
        };
        added(Network::parse(&text).unwrap(), &attached, "eth0", "/run/netns/x")
    }

    #[test]
    fn the_newest_version_says_all() {
        let dns = r#", "dns": {"nameservers": ["192.0.2.53"]}"#;
        assert_eq!(
            add("1.1.0", dns),
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [
                    { "name": "wg-0123456789ab", "mac": "02:00:00:00:00:01", "mtu": 65535 },
                    { "name": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1450, "sandbox": "/run/netns/x" },
                ],
                "ips": [
                    { "address": "10.1.0.5/32", "gateway": "169.254.1.1", "interface": 1 },
                    { "address": "fd00::5/128", "gateway": "fe80::1", "interface": 1 },
                ],
                "routes": [
                    { "dst": "0.0.0.0/0", "gw": "169.254.1.1" },
                    { "dst": "::/0", "gw": "fe80::1" },
                ],
                "dns": { "nameservers": ["192.0.2.53"] },
            })
        );
    }

    #[test]
    fn older_versions_have_what_they_had() {
        let old = add("0.4.0", "");
        assert_eq!(old["ips"][0]["version"], "4");
        assert_eq!(old["ips"][1]["version"], "6");
        assert!(old["interfaces"][0].get("mtu").is_none());
        assert!(add("1.0.0", "")["ips"][0].get("version").is_none());
        assert!(add("1.0.0", "")["interfaces"][1].get("mtu").is_none());
    }

    #[test]
    fn what_others_have_made_before_stays() {
        let before = r#", "prevResult": {"cniVersion": "1.0.0",
            "interfaces": [{"name": "lo", "sandbox": "/run/netns/x"}],
            "ips": [{"address": "127.0.0.1/8", "interface": 0}]}"#;
        let result = add("1.0.0", before);
        assert_eq!(result["interfaces"].as_array().unwrap().len(), 3);
        assert_eq!(result["ips"][0]["address"], "127.0.0.1/8");
        assert_eq!(result["ips"][1]["interface"], 2);
        let result = result.as_object().unwrap();
        let its = told(result, "eth0").unwrap();
        assert_eq!(
            its.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.1.0.5", "fd00::5"]
        );
        assert_eq!(its.mac.as_deref(), Some("02:00:00:00:00:02"));
        assert_eq!(
            its.routes.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["169.254.1.1", "fe80::1"]
        );
        assert_eq!(told(result, "net1"), None);
    }

    #[test]
    fn the_nodes_interface_of_the_same_name_is_not_the_containers() {
        let result = json!({
            "interfaces": [{"name": "eth0", "sandbox": ""}, {"name": "eth0", "sandbox": "/run/netns/x"}],
            "ips": [{"address": "192.0.2.1/24", "interface": 0}, {"address": "10.1.0.5/32", "interface": 1},
                    {"address": "192.0.2.9/24"}],
        });
        let its = told(result.as_object().unwrap(), "eth0").unwrap();
        assert_eq!(its.addresses, ["10.1.0.5".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!((its.mac, its.routes), (None, vec![]));
    }

    #[test]
    fn versions_are_told_in_the_version_that_was_asked_in() {
        assert_eq!(versions("")["cniVersion"], "1.1.0");
        assert_eq!(versions("0.2.0")["cniVersion"], "0.2.0");
        assert!(
            versions("0.2.0")["supportedVersions"]
                .as_array()
                .unwrap()
                .contains(&json!("1.1.0"))
        );
    }
}
