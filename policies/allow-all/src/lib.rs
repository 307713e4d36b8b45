//! Everybody reaches everybody, the nodes included.

use policy_sdk::{Decision, Identity, Peer, Pod, Policy};

/// See the crate.
pub struct AllowAll;

impl Policy for AllowAll {
    type Config = ();

    fn new((): ()) -> Result<Self, String> {
        Ok(Self)
    }

    fn identify(&self, pod: &Pod) -> Result<Identity, String> {
        Ok(Identity::new(&pod.namespace))
    }

    fn decide(&self, _from: &Peer, _to: &Peer) -> Decision {
        Decision::allow()
    }
}

policy_sdk::export!(AllowAll);

#[cfg(test)]
mod tests {
    use super::AllowAll;
    use policy_sdk::{tcp, testing::Cluster};

    #[test]
    fn everybody_reaches_everybody() {
        let cluster = Cluster::of(AllowAll).pod("red/a", &[]).pod("blue/b", &[]);
        cluster.assert_allowed("red/a", "blue/b", tcp(80));
        cluster.assert_allowed("blue/b", "red/a", tcp(80));
        cluster.assert_allowed("red/a", "host", tcp(22));
    }
}
