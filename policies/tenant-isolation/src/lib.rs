//! Pods of one tenant reach each other, and everybody reaches the tenant `shared-services`. Nothing else passes.
//!
//! A pod's tenant is its label `tenant`, or its namespace where it has none.

use policy_sdk::{Decision, Identity, Peer, Pod, Policy};

const SHARED: &str = "shared-services";

/// See the crate.
pub struct TenantIsolation;

impl Policy for TenantIsolation {
    type Config = ();

    fn new((): ()) -> Result<Self, String> {
        Ok(Self)
    }

    fn identify(&self, pod: &Pod) -> Result<Identity, String> {
        Ok(Identity::new(pod.label("tenant").unwrap_or(&pod.namespace)))
    }

    fn decide(&self, from: &Peer, to: &Peer) -> Decision {
        if from.same_tenant(to) {
            Decision::allow().because("same tenant")
        } else if from.pod().is_some() && to.tenant() == Some(SHARED) {
            Decision::allow().because("the shared services are for all")
        } else {
            Decision::pass()
        }
    }
}

policy_sdk::export!(TenantIsolation);

#[cfg(test)]
mod tests {
    use super::TenantIsolation;
    use policy_sdk::{tcp, testing::Cluster};

    fn cluster() -> Cluster<TenantIsolation> {
        Cluster::of(TenantIsolation)
            .pod("red/a", &[])
            .pod("red/b", &[])
            .pod("blue/a", &[])
            .pod("blue/guest", &[("tenant", "red")])
            .pod("infra/dns", &[("tenant", "shared-services")])
    }

    #[test]
    fn a_tenant_reaches_itself_and_the_shared_services() {
        cluster().assert_allowed("red/a", "red/b", tcp(80));
        cluster().assert_allowed("red/a", "infra/dns", tcp(53));
        cluster().assert_allowed("blue/a", "infra/dns", tcp(53));
    }

    #[test]
    fn nobody_else_reaches_anybody() {
        cluster().assert_denied("red/a", "blue/a", tcp(80));
        cluster().assert_denied("blue/a", "red/a", tcp(80));
        cluster().assert_denied("infra/dns", "red/a", tcp(80));
        cluster().assert_denied("red/a", "host", tcp(80));
    }

    #[test]
    fn the_label_outweighs_the_namespace() {
        cluster().assert_allowed("blue/guest", "red/a", tcp(80));
        cluster().assert_denied("blue/guest", "blue/a", tcp(80));
    }

    #[test]
    fn the_node_reaches_its_pods() {
        cluster().assert_allowed("host", "red/a", tcp(80));
    }
}
