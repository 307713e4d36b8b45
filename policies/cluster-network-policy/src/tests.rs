//! What the objects mean, and which ones are refused.

use super::ClusterNetworkPolicy;
use policy_sdk::{Action, Placement, Pod, Side, Tier, tcp, testing::Cluster, udp};

const OBJECTS: &str = "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: dns}
spec:
  tier: Admin
  priority: 10
  subject: {namespaces: {}}
  egress:
  - name: to-dns
    action: Accept
    to: [{pods: {podSelector: {matchLabels: {app: dns}}}}]
    protocols: [{udp: {destinationPort: {number: 53}}}, {destinationNamedPort: metrics}]
  - action: Pass
    to: [{namespaces: {matchLabels: {team: web}}}]
  - action: Deny
    to: [{networks: [10.0.0.0/8]}]
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: late}
spec:
  tier: Admin
  priority: 20
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: dns}}}}
  ingress:
  - {action: Deny, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {range: {start: 50, end: 60}}}}]}
  egress:
  - {action: Deny, to: [{namespaces: {}}]}
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: base}
spec:
  tier: Baseline
  priority: 0
  subject: {namespaces: {matchLabels: {team: web}}}
  ingress: [{action: Deny, from: [{namespaces: {}}]}]
";

fn cluster(tier: Tier) -> Cluster<ClusterNetworkPolicy> {
    let placement = Placement {
        name: "cnp".to_owned(),
        tier,
        tenant: None,
    };
    Cluster::placed(OBJECTS, &placement)
        .unwrap()
        .namespace("web", &[("team", "web")])
        .namespace("infra", &[])
        .with_pod(
            Pod::new("infra", "dns")
                .with_label("app", "dns")
                .with_port("metrics", tcp(9153)),
        )
        .pod("web/a", &[])
        .with_pod(Pod::new("infra", "old").with_address("10.1.2.3".parse().unwrap()))
}

#[test]
fn rules_are_taken_in_order_and_pass_leaves_the_tier() {
    let cluster = cluster(Tier::Admin);
    let egress = |from: &str, to: &str, port| cluster.decision(Side::Egress, from, to).action(port);
    assert_eq!(egress("web/a", "infra/dns", udp(53)), Action::Allow);
    assert_eq!(egress("web/a", "infra/dns", tcp(9153)), Action::Allow, "by name");
    assert_eq!(egress("web/a", "infra/dns", tcp(53)), Action::Pass);
    assert_eq!(
        egress("web/a", "infra/old", tcp(1)),
        Action::Deny,
        "a network holds pods, too"
    );
    assert_eq!(
        egress("infra/dns", "web/a", tcp(1)),
        Action::Pass,
        "Pass stands before the later Deny"
    );
    assert_eq!(egress("infra/dns", "infra/old", tcp(1)), Action::Deny);
    assert_eq!(
        egress("web/a", "remote-node", tcp(10250)),
        Action::Deny,
        "other nodes may be in the network"
    );
    let ingress = |port| cluster.decision(Side::Ingress, "web/a", "infra/dns").action(port);
    assert_eq!(
        [49, 50, 60, 61].map(|port| ingress(tcp(port))),
        [Action::Pass, Action::Deny, Action::Deny, Action::Pass]
    );
    assert_eq!(
        cluster.decision(Side::Ingress, "host", "infra/dns").action(tcp(55)),
        Action::Allow
    );
    let reason = &cluster.decision(Side::Egress, "web/a", "infra/dns").rules[0].reason;
    assert_eq!(reason, "ClusterNetworkPolicy dns, egress[0] (to-dns)");
}

#[test]
fn the_baseline_has_its_own_objects_and_allows_the_rest() {
    let cluster = cluster(Tier::Baseline);
    cluster.assert_denied("infra/dns", "web/a", tcp(1));
    cluster.assert_allowed("web/a", "infra/dns", tcp(55));
}

#[test]
fn wrong_objects_are_refused_by_name_field_and_reason() {
    let object = |spec: &str| {
        format!(
            "{{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {{name: p}}, spec: {spec}}}"
        )
    };
    let with = |rest: &str| {
        object(&format!(
            "{{tier: Admin, priority: 1, subject: {{namespaces: {{}}}}, {rest}}}"
        ))
    };
    for (config, expected) in [
        (
            "{apiVersion: policy.networking.k8s.io/v1alpha1, kind: AdminNetworkPolicy}".to_owned(),
            "is no `policy",
        ),
        (
            object("{tier: Admin}"),
            "ClusterNetworkPolicy p: spec.missing field `priority`",
        ),
        (
            object("{tier: User, priority: 1, subject: {}}"),
            "spec.tier: unknown variant `User`",
        ),
        (
            object("{tier: Admin, priority: 1001, subject: {namespaces: {}}}"),
            "spec.priority: 1001 is above 1000",
        ),
        (
            object("{tier: Admin, priority: 1, subject: {}}"),
            "spec.subject: exactly one of namespaces and pods",
        ),
        (
            with("ingress: [{action: Allow, from: []}]"),
            "spec.ingress[0].action: unknown variant `Allow`",
        ),
        (
            with("ingress: [{action: Deny, from: []}]"),
            "spec.ingress[0].from: 0 items; there must be 1 to 25",
        ),
        (
            with("egress: [{action: Deny, to: [{nodes: {}}]}]"),
            "spec.egress[0].to[0].nodes: nodes have no labels",
        ),
        (
            with("egress: [{action: Deny, to: [{}]}]"),
            "spec.egress[0].to[0]: exactly one of",
        ),
        (
            with("egress: [{action: Deny, to: [{namespaces: {}}], protocols: [{tcp: {}, udp: {}}]}]"),
            "spec.egress[0].protocols[0]: exactly one of tcp",
        ),
        (
            with(
                "egress: [{action: Deny, to: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {range: {start: 5, end: 5}}}}]}]",
            ),
            "the range 5 to 5 does not rise",
        ),
        (
            with("egress: [{action: Deny, to: [{networks: [::/0]}], protocols: [{destinationNamedPort: http}]}]"),
            "networks have no named ports",
        ),
    ] {
        let error = Cluster::<ClusterNetworkPolicy>::configured(&config).err().unwrap();
        let placement = Placement {
            name: "cnp".to_owned(),
            tier: Tier::Admin,
            tenant: None,
        };
        let error = Cluster::<ClusterNetworkPolicy>::placed(&config, &placement)
            .err()
            .unwrap_or(error);
        assert!(error.contains(expected), "{config}:\n{error}");
    }
    let elsewhere = Cluster::<ClusterNetworkPolicy>::configured("").err().unwrap();
    assert!(elsewhere.contains("tier `admin` or `baseline`"));
}
