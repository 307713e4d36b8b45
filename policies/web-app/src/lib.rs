//! A web application in each namespace: the frontend reaches the backend, the backend reaches the database, and
//! everybody reaches DNS. A pod's part is its label `app`.

use policy_sdk::{Decision, Identity, Peer, Pod, Policy, tcp, udp};

/// See the crate.
pub struct WebApp;

impl Policy for WebApp {
    type Config = ();

    fn new((): ()) -> Result<Self, String> {
        Ok(Self)
    }

    fn identify(&self, pod: &Pod) -> Result<Identity, String> {
        Ok(Identity::new(&pod.namespace).with_label_of(pod, "app"))
    }

    fn decide(&self, from: &Peer, to: &Peer) -> Decision {
        let (Some(from), Some(to)) = (from.pod(), to.pod()) else {
            return Decision::pass();
        };
        let same_app = from.tenant == to.tenant;
        match (from.label("app"), to.label("app")) {
            (_, Some("dns")) => Decision::ports([udp(53), tcp(53)]).because("everybody uses DNS"),
            (Some("frontend"), Some("backend")) if same_app => {
                Decision::ports([tcp(8080)]).because("the frontend uses the backend")
            }
            (Some("backend"), Some("db")) if same_app => {
                Decision::ports([tcp(5432)]).because("the backend uses the database")
            }
            _ => Decision::pass(),
        }
    }
}

policy_sdk::export!(WebApp);

#[cfg(test)]
mod tests {
    use super::WebApp;
    use policy_sdk::{icmp, tcp, testing::Cluster, udp};

    fn cluster() -> Cluster<WebApp> {
        Cluster::of(WebApp)
            .pod("shop/frontend", &[("app", "frontend")])
            .pod("shop/backend", &[("app", "backend")])
            .pod("shop/db", &[("app", "db")])
            .pod("blog/backend", &[("app", "backend")])
            .pod("infra/dns", &[("app", "dns")])
    }

    #[test]
    fn each_part_reaches_the_next_one_at_its_port() {
        cluster().assert_allowed("shop/frontend", "shop/backend", tcp(8080));
        cluster().assert_allowed("shop/backend", "shop/db", tcp(5432));
        cluster().assert_denied("shop/frontend", "shop/backend", tcp(8081));
        cluster().assert_denied("shop/frontend", "shop/backend", udp(8080));
        cluster().assert_denied("shop/frontend", "shop/backend", icmp());
    }

    #[test]
    fn no_part_is_skipped_or_reached_backwards() {
        cluster().assert_denied("shop/frontend", "shop/db", tcp(5432));
        cluster().assert_denied("shop/db", "shop/backend", tcp(8080));
    }

    #[test]
    fn applications_are_apart() {
        cluster().assert_denied("shop/frontend", "blog/backend", tcp(8080));
    }

    #[test]
    fn everybody_reaches_dns() {
        cluster().assert_allowed("shop/db", "infra/dns", udp(53));
        cluster().assert_allowed("blog/backend", "infra/dns", tcp(53));
        cluster().assert_denied("shop/db", "infra/dns", tcp(80));
    }
}
