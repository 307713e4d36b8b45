//! What an author of Wasmgate policies uses: implement [`Policy`], [`export!`] it, test it with [`testing::Cluster`].
//!
//! ```
//! use policy_sdk::{Decision, Identity, Peer, Pod, Policy, tcp};
//!
//! /// Pods of one namespace reach each other; everybody reaches the proxy's port 3128.
//! struct Namespaces;
//!
//! impl Policy for Namespaces {
//!     type Config = ();
//!
//!     fn new((): ()) -> Result<Self, String> {
//!         Ok(Self)
//!     }
//!
//!     fn identify(&self, pod: &Pod) -> Result<Identity, String> {
//!         Ok(Identity::new(&pod.namespace).with_label_of(pod, "app"))
//!     }
//!
//!     fn decide(&self, from: &Peer, to: &Peer) -> Decision {
//!         if to.label("app") == Some("proxy") && from.pod().is_some() {
//!             Decision::ports([tcp(3128)]).because("everybody uses the proxy")
//!         } else if from.same_tenant(to) {
//!             Decision::allow().because("same namespace")
//!         } else {
//!             Decision::pass()
//!         }
//!     }
//! }
//!
//! policy_sdk::export!(Namespaces);
//! # let cluster = policy_sdk::testing::Cluster::of(Namespaces).pod("red/a", &[]).pod("red/proxy", &[("app", "proxy")]);
//! # cluster.assert_allowed("red/a", "red/proxy", tcp(3128));
//! ```

mod bits;
mod config;
mod decision;
#[doc(hidden)]
pub mod guest;
pub mod log;
mod network;
mod port;
mod selector;
#[cfg(not(target_arch = "wasm32"))]
pub mod testing;
mod types;

pub use bits::Bits;
pub use config::typed;
pub use decision::{Action, Decision, Rule};
pub use network::{AddressBlock, Network};
pub use port::{PortRange, Protocol, any, icmp, icmp_type, sctp, tcp, udp};
pub use selector::{Expression, Operator, Selector};
pub use types::{Identity, Labels, NamedPort, Peer, Placement, Pod, Reserved, Side, Tier, Who};

/// A network policy.
///
/// hostd asks it twice: which identity a pod has, and whether one identity may open a connection to another. It asks
/// ahead of traffic, and compiles the answers into the kernel's policy map. The same question must always get the same
/// answer: a module sees no clock and no randomness, and need not be asked again.
pub trait Policy: Sized + 'static {
    /// Read from the file given to `hostd load-policy --config`: TOML, YAML or JSON. `()` where there is nothing to set.
    type Config: serde::de::DeserializeOwned;

    /// Makes the policy of a configuration.
    ///
    /// # Errors
    ///
    /// A sentence for the admin, where the configuration makes no sense; the load is refused with it.
    fn new(config: Self::Config) -> Result<Self, String>;

    /// The same, for a policy to which it matters where it stands among others.
    ///
    /// # Errors
    ///
    /// As [`Policy::new`].
    fn placed(config: Self::Config, placement: &Placement) -> Result<Self, String> {
        let _ = placement;
        Self::new(config)
    }

    /// Sets of addresses to tell apart. What is in none of them is [`Reserved::World`].
    fn networks(&self) -> Vec<Network> {
        Vec::new()
    }

    /// What the policy makes of a pod. Pods with equal identities are the same to it, so take only the labels that
    /// matter: identities cost memory and time, pods do not.
    ///
    /// # Errors
    ///
    /// A sentence for the admin, where the pod can't be identified; what was to be done with it is refused.
    fn identify(&self, pod: &Pod) -> Result<Identity, String>;

    /// May `from` open a connection to `to`? Replies always pass. The same is asked for both ends; a policy that has
    /// something else to say of each implements [`Policy::decide_side`] instead.
    fn decide(&self, from: &Peer, to: &Peer) -> Decision {
        let _ = (from, to);
        Decision::pass()
    }

    /// Does `subject`, a pod, let a connection open to `peer` ([`Side::Egress`]) or from it ([`Side::Ingress`])? A
    /// connection opens only where both ends that are pods let it.
    fn decide_side(&self, side: Side, subject: &Peer, peer: &Peer) -> Decision {
        match side {
            Side::Egress => self.decide(subject, peer),
            Side::Ingress => self.decide(peer, subject),
        }
    }
}

/// Makes a [`Policy`] the one that this crate's wasm module exports. On other targets it does nothing, so that the
/// same crate can be tested natively.
#[macro_export]
macro_rules! export {
    ($policy:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            use $crate::guest::{State, bindings, bindings::exports::wasmgate::policy::policy as wit};

            struct Module;

            std::thread_local! {
                static STATE: State<$policy> = State::default();
            }

            impl wit::Guest for Module {
                fn configure(config: String, placement: wit::Placement) -> Result<(), String> {
                    STATE.with(|state| state.configure(&config, placement))
                }

                fn networks() -> Vec<wit::Network> {
                    STATE.with(|state| state.networks())
                }

                fn identify(pods: Vec<wit::Pod>) -> Vec<Result<wit::Class, String>> {
                    STATE.with(|state| state.identify(pods))
                }

                fn learn(peers: Vec<wit::Peer>) {
                    STATE.with(|state| state.learn(peers));
                }

                fn decide(side: wit::Side, subjects: Vec<u32>, peers: Vec<u32>) -> wit::Matrix {
                    STATE.with(|state| state.decide(side, &subjects, &peers))
                }
            }

    bindings::export!(Module with_types_in $crate::guest::bindings);
        };
    };
}
