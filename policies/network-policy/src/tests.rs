//! What the objects mean, and which ones are refused.

use super::NetworkPolicy;
use policy_sdk::{Pod, Policy, tcp, testing::Cluster, udp};

const SHOP: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from:
    - podSelector: {matchExpressions: [{key: app, operator: In, values: [backend]}]}
    ports: [{port: sql}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: backend, namespace: shop}
spec:
  podSelector: {matchLabels: {app: backend}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{namespaceSelector: {matchLabels: {team: web}}}]
    ports: [{port: 8000, endPort: 8080}, {port: 53, protocol: UDP}]
  egress:
  - to: [{podSelector: {matchLabels: {app: db}}}]
  - to: [{ipBlock: {cidr: 203.0.113.0/24, except: [203.0.113.128/25]}}]
    ports: [{port: 443}]
";

fn shop(config: &str) -> Cluster<NetworkPolicy> {
    Cluster::configured(config)
        .unwrap()
        .namespace("shop", &[])
        .namespace("web", &[("team", "web")])
        .with_pod(
            Pod::new("shop", "db")
                .with_label("app", "db")
                .with_port("sql", tcp(5432)),
        )
        .pod("shop/backend", &[("app", "backend")])
        .pod("shop/other", &[])
        .pod("web/front", &[])
        .outside("203.0.113.1".parse().unwrap())
        .outside("203.0.113.129".parse().unwrap())
}

#[test]
fn selected_pods_are_isolated_and_rules_add_up() {
    let cluster = shop(SHOP);
    cluster.assert_matrix(
        tcp(5432),
        "
                        shop/db  shop/backend  shop/other  web/front  203.0.113.1
        shop/db         .        .             X           X          X
        shop/backend    X        .             .           .          .
        shop/other      .        .             X           X          X
        web/front       .        .             X           X          X
        host            X        X             X           X          X
        ",
    );
    cluster.assert_denied("shop/backend", "shop/db", tcp(5433));
    cluster.assert_allowed("web/front", "shop/backend", tcp(8042));
    cluster.assert_allowed("web/front", "shop/backend", udp(53));
    cluster.assert_denied("web/front", "shop/backend", tcp(53));
    cluster.assert_denied("shop/other", "shop/backend", tcp(8042));
    cluster.assert_allowed("shop/backend", "203.0.113.1", tcp(443));
    cluster.assert_denied("shop/backend", "203.0.113.129", tcp(443));
    cluster.assert_denied("203.0.113.1", "shop/backend", tcp(8042));
}

#[test]
fn pods_that_are_the_same_to_the_policies_share_an_identity() {
    let cluster = shop(SHOP);
    let identity = |name: &str, labels: &[(&str, &str)]| cluster.identity(name, labels).unwrap();
    assert_eq!(
        identity("shop/a", &[("build", "1")]),
        identity("shop/b", &[("build", "2"), ("zone", "x")])
    );
    assert_ne!(identity("shop/a", &[]), identity("shop/a", &[("app", "db")]));
}

#[test]
fn policy_types_have_their_defaults() {
    let with = |spec: &str| {
        let object = format!(
            "{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: p, namespace: shop}}, spec: {spec}}}"
        );
        let cluster = shop(&object);
        [
            ("shop/other", "shop/db"),
            ("web/front", "shop/db"),
            ("shop/db", "web/front"),
        ]
        .map(|(from, to)| cluster.allows(from, to, tcp(80)))
    };
    assert_eq!(with("{podSelector: {}}"), [false, false, true], "ingress alone");
    assert_eq!(with("{podSelector: {}, ingress: [{}]}"), [true, true, true]);
    assert_eq!(
        with("{podSelector: {}, ingress: [{from: [], ports: []}]}"),
        [true, true, true]
    );
    assert_eq!(with("{podSelector: {}, policyTypes: [Egress]}"), [false, true, false]);
    assert_eq!(
        with("{podSelector: {}, egress: [{to: [{podSelector: {}}]}]}"),
        [false, false, false]
    );
    assert_eq!(
        with("{podSelector: {}, policyTypes: [Egress], egress: [{to: [{podSelector: {}}]}]}"),
        [true, true, false]
    );
    assert_eq!(
        with("{podSelector: {}, policyTypes: [Ingress], egress: []}"),
        [false, false, true],
        "a section that policyTypes does not name is ignored"
    );
    assert_eq!(
        with("{podSelector: {}, ingress: null, policyTypes: []}"),
        [false, false, true]
    );
}

#[test]
fn unselected_pods_can_be_left_to_others() {
    let passing = format!("apiVersion: wasmgate.dev/v1\nkind: Defaults\nunselected: Pass\n---{SHOP}");
    shop(&passing).assert_denied("web/front", "shop/other", tcp(80));
    shop("[]").assert_allowed("web/front", "shop/db", tcp(80));
}

#[test]
fn wrong_objects_are_refused_by_name_field_and_reason() {
    let spec = |spec: &str| {
        format!(
            "{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: p, namespace: n}}, spec: {spec}}}"
        )
    };
    for (config, expected) in [
        (String::new(), "give the policies with --config"),
        ("kind: Deployment".to_owned(), "kind \"Deployment\" is neither"),
        (
            "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy}".to_owned(),
            "metadata.name is missing",
        ),
        (
            spec("{podSelector: {matchLabel: {}}}"),
            "NetworkPolicy n/p: spec.podSelector.matchLabel: unknown field",
        ),
        (
            spec("{policyTypes: [Both]}"),
            "spec.policyTypes[0]: unknown variant `Both`",
        ),
        (
            spec("{ingress: [{from: [{}]}]}"),
            "spec.ingress[0].from[0]: one of podSelector",
        ),
        (
            spec("{ingress: [{ports: [{port: 1, endPort: 0}]}]}"),
            "spec.ingress[0].ports[0].endPort: 0 is less",
        ),
        (
            spec("{ingress: [{ports: [{port: a, endPort: 9}]}]}"),
            "endPort: goes with a number",
        ),
        (spec("{ingress: [{ports: [{port: A_B}]}]}"), "\"A_B\" is no port's name"),
        (
            spec("{ingress: [{ports: [{port: 70000}]}]}"),
            "spec.ingress[0].ports[0].port",
        ),
        (
            spec("{egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]}"),
            "an ipBlock stands alone",
        ),
        (
            spec("{egress: [{to: [{ipBlock: {cidr: 10.0.0.0}}]}]}"),
            "spec.egress[0].to[0].ipBlock.cidr",
        ),
        (
            spec("{egress: [{to: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]}"),
            "spec.egress[0].to[0].ipBlock.except[0]: 11.0.0.0/16 is not a part of",
        ),
        (
            spec("{podSelector: {matchExpressions: [{key: a, operator: In}]}}"),
            "spec.podSelector: matchExpressions[0]: `In` needs at least one value",
        ),
        (
            format!("{}\n---\n{}", spec("{}"), spec("{}")),
            "NetworkPolicy n/p: given twice",
        ),
    ] {
        let error = Cluster::<NetworkPolicy>::configured(&config).err().unwrap();
        assert!(error.contains(expected), "{config}:\n{error}");
    }
}

#[test]
fn what_is_the_same_in_other_words_is_the_same() {
    let policy = |name: &str, block: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{podSelector: {{}}, ingress: [{{from: [{{ipBlock: {block}}}]}}]}}\n---\n"
        )
    };
    let config = [
        policy("a", "{cidr: 203.0.113.0/24, except: [203.0.113.4/32, 203.0.113.8/32]}"),
        policy("b", "{cidr: 203.0.113.9/24, except: [203.0.113.8/32, 203.0.113.4/32]}"),
        policy("c", "{cidr: 198.51.100.0/24, except: []}"),
        policy("d", "{cidr: 198.51.100.0/24}"),
    ];
    let cluster = Cluster::<NetworkPolicy>::configured(&config.concat()).unwrap();
    assert_eq!(cluster.policy().networks().len(), 2);
}

#[test]
fn many_policies_have_a_short_reason() {
    let one = |number: usize| {
        let name = format!("{}{number}", "n".repeat(60));
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{podSelector: {{}}}}\n---\n"
        )
    };
    let config: String = (0..40).map(one).collect();
    let cluster = shop(&config);
    let decision = cluster.decision(policy_sdk::Side::Ingress, "web/front", "shop/db");
    assert!(
        decision.reason.len() < 512 && decision.reason.contains("and 37 more"),
        "{}",
        decision.reason
    );
}
