//! Pods of one namespace reach each other; everybody reaches the open ports.

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
