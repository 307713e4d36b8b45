//! Tests of what a runtime says.

use super::{Environment, Network, check_version, pod_name};
use crate::{cni::error::Code, endpoint::check_name};
use std::collections::BTreeMap;

fn network(more: &str) -> Network {
    parse(more).unwrap_or_else(|(_, details)| panic!("{details}"))
}

fn parse(more: &str) -> Result<Network, (Code, String)> {
    let text = format!(r#"{{"cniVersion": "1.1.0", "name": "net", "type": "wasmgate-cni"{more}}}"#);
    Network::parse(&text).map_err(|error| (error.code, error.details))
}

fn environment(arguments: &str) -> Environment {
    let get = |name: &str| match name {
        "CNI_CONTAINERID" => Some("c1".to_owned()),
        "CNI_IFNAME" => Some("eth0".to_owned()),
        "CNI_NETNS" => Some("/run/netns/c1".to_owned()),
        "CNI_ARGS" => Some(arguments.to_owned()),
        _ => None,
    };
    Environment::read("ADD", get).unwrap()
}

#[test]
fn what_is_wrong_has_its_code_and_is_named() {
    for (more, code, expected) in [
        (r#", "namspace": "red""#, Code::Field, "\"namspace\": \"red\""),
        (r#", "ipam": {"type": "host-local"}"#, Code::Field, "host-local"),
        (
            r#", "runtimeConfig": {"mac": "02:00:00:00:00:01"}"#,
            Code::Field,
            "02:00:00:00:00:01",
        ),
        (r#", "labels": {"app": 1}"#, Code::Decode, "invalid type"),
        (r#", "labels": "#, Code::Decode, "line 1"),
        (r#", "socket": "run/hostd.sock""#, Code::Config, "run/hostd.sock"),
    ] {
        let (found, details) = parse(more).err().unwrap();
        assert_eq!(found, code, "{more}");
        assert!(details.contains(expected), "{more}: {details}");
    }
    let none = Network::parse(r#"{"cniVersion": "1.0.0", "type": "x"}"#).err().unwrap();
    assert_eq!((none.code, none.details.contains("`name`")), (Code::Config, true));
    for name in ["-x", "a/b", "a b", ".a"] {
        let wrong = Network::parse(&format!(r#"{{"cniVersion": "1.0.0", "name": "{name}"}}"#))
            .err()
            .unwrap();
        assert_eq!(
            (wrong.code, wrong.details.contains(name)),
            (Code::Config, true),
            "{name}"
        );
    }
    // What runtimes add, and what is there but empty.
    network(r#", "ipam": {}, "capabilities": {"ips": true}, "cni.dev/attachments": [], "disableGC": true"#);
    let pod = network(r#", "runtimeConfig": {"ips": ["10.1.0.300"]}"#).pod(&environment(""));
    assert_eq!(pod.err().unwrap().code, Code::Config);
    let pod = network(r#", "labels": {"a b": "c"}"#).pod(&environment(""));
    assert_eq!(pod.err().unwrap().code, Code::Config);
    let pod = network("").pod(&environment("WASMGATE_LABELS=app"));
    assert_eq!(pod.err().unwrap().code, Code::Environment);
}

#[test]
fn versions_that_are_not_spoken_or_have_no_such_operation_are_refused() {
    let check = |version: &str, command: &str| {
        let text = format!(r#"{{{version} "name": "net"}}"#);
        let error = check_version(&text, command).err()?;
        assert_eq!(error.code, Code::Version);
        Some(error.details)
    };
    for version in [r#""cniVersion": "2.0.0","#, r#""cniVersion": "0.1.0","#, ""] {
        let details = check(version, "DEL").unwrap();
        assert!(details.contains("0.4.0, 1.0.0, 1.1.0"), "{details}");
    }
    for (command, before, since) in [
        ("CHECK", "0.3.1", "0.4.0"),
        ("GC", "1.0.0", "1.1.0"),
        ("STATUS", "1.0.0", "1.1.0"),
    ] {
        let of = |version: &str| format!(r#""cniVersion": "{version}","#);
        let details = check(&of(before), command).unwrap();
        assert!(
            details.contains(&format!("{command} is there since {since}")),
            "{details}"
        );
        assert_eq!(check(&of(since), command), None);
        assert_eq!(check(&of("0.3.0"), "DEL"), None);
    }
}

/// What an admin has got wrong since a container came must not keep it from going.
#[test]
fn to_end_an_attachment_takes_no_more_than_its_name() {
    for more in [
        r#", "lables": {}"#,
        r#", "ipam": {"type": "x"}"#,
        r#", "labels": {"app": 1}"#,
    ] {
        assert!(parse(more).is_err());
        let text = format!(r#"{{"cniVersion": "1.0.0", "name": "net", "socket": "/x"{more}}}"#);
        let network = Network::parse_to_end(&text).unwrap_or_else(|error| panic!("{}", error.details));
        assert_eq!((network.name.as_str(), network.socket.to_str()), ("net", Some("/x")));
    }
    assert_eq!(
        Network::parse_to_end(r#"{"name": "a b"}"#).err().unwrap().code,
        Code::Config
    );
    let get = |name: &str| match name {
        "CNI_CONTAINERID" | "CNI_IFNAME" => Some("c1".to_owned()),
        "CNI_ARGS" => Some("novalue".to_owned()),
        _ => None,
    };
    assert!(Environment::read("DEL", get).is_ok());
}

#[test]
fn variables_that_are_missing_or_wrong_are_named() {
    let read = |variables: &[(&str, &str)]| {
        let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
        let get = |name: &str| variables.get(name).map(|value| (*value).to_owned());
        let error = Environment::read("ADD", get).err()?;
        assert_eq!(error.code, Code::Environment);
        Some(error.details)
    };
    let good = [("CNI_CONTAINERID", "c1"), ("CNI_NETNS", "/n"), ("CNI_IFNAME", "eth0")];
    assert_eq!(read(&good), None);
    assert_eq!(read(&good[..1]).unwrap(), "CNI_NETNS, CNI_IFNAME must be set");
    for (name, value) in [
        ("CNI_CONTAINERID", "../x"),
        ("CNI_CONTAINERID", "-x"),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", "longer-than-a-name"),
        ("CNI_IFNAME", "lo"),
        ("CNI_ARGS", "novalue"),
        ("CNI_NETNS", "run/netns/x"),
    ] {
        let with = [&good[..], &[(name, value)]].concat();
        let details = read(&with).unwrap_or_else(|| panic!("{name}={value} was taken"));
        assert!(details.contains(name), "{details}");
    }
}

#[test]
fn a_pod_is_what_the_runtime_says_and_the_network_for_what_it_does_not() {
    let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    };
    let pod = network("").pod(&environment("")).unwrap();
    assert_eq!(
        (pod.name.to_string(), pod.labels),
        ("default/c1".to_owned(), labels(&[]))
    );

    let all = r#", "namespace": "red", "labels": {"a": "network", "b": "network", "c": "network", "d": "network"},
        "args": {"labels": {"b": "args", "c": "args", "d": "args"},
                 "cni": {"ips": ["10.1.0.7/24"], "labels": [{"key": "c", "value": "cni"}, {"key": "d", "value": "cni"}]}},
        "runtimeConfig": {"labels": {"e": "capability"}}"#;
    let arguments = "IgnoreUnknown=1;K8S_POD_NAME=web-1;WASMGATE_LABELS=d:variable,e:variable;IP=10.1.0.9";
    let pod = network(all).pod(&environment(arguments)).unwrap();
    assert_eq!(pod.name.to_string(), "red/web-1");
    let expected = [
        ("a", "network"),
        ("b", "args"),
        ("c", "cni"),
        ("d", "variable"),
        ("e", "capability"),
    ];
    assert_eq!(pod.labels, labels(&expected));
    assert_eq!(pod.addresses, ["10.1.0.7".parse::<std::net::IpAddr>().unwrap()]);
    let kubernetes = environment("K8S_POD_NAMESPACE=blue;K8S_POD_NAME=db;IP=10.1.0.9");
    let pod = network(r#", "namespace": "red""#).pod(&kubernetes).unwrap();
    assert_eq!(pod.name.to_string(), "blue/db");
    assert_eq!(pod.addresses, ["10.1.0.9".parse::<std::net::IpAddr>().unwrap()]);
}

#[test]
fn every_container_has_a_name_of_its_own_that_is_one() {
    let ids = [
        "c1".to_owned(),
        "a".repeat(64),
        format!("{}b", "a".repeat(63)),
        "Upper_Case".to_owned(),
        "upper-case".to_owned(),
        "_._".to_owned(),
    ];
    let names: Vec<String> = ids.iter().map(|id| pod_name(id)).collect();
    for name in &names {
        assert!(check_name(name).is_ok(), "{name}");
    }
    let different: std::collections::BTreeSet<_> = names.iter().collect();
    assert_eq!(different.len(), ids.len(), "{names:?}");
    assert_eq!(names[0], "c1");
}
