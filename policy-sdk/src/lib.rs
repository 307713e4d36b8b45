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
//!         match (from.pod(), to.pod()) {
//!             (Some(_), Some(to)) if to.label("app") == Some("proxy") => Decision::ports([tcp(3128)]),
//!             (Some(from), Some(to)) if from.tenant == to.tenant => Decision::Allow,
//!             _ => Decision::Pass,
//!         }
//!     }
//! }
//!
//! policy_sdk::export!(Namespaces);
//! # let cluster = policy_sdk::testing::Cluster::of(Namespaces).pod("red/a", &[]).pod("red/proxy", &[("app", "proxy")]);
//! # cluster.assert_allowed("red/a", "red/proxy", tcp(3128));
//! ```

#[doc(hidden)]
pub mod guest;
pub mod testing;
mod types;

pub use types::{Decision, Identity, Labels, Peer, Pod, PortRange, Protocol, Reserved, icmp, tcp, udp};

/// A network policy.
///
/// hostd asks it twice: which identity a pod has, and whether one identity may open a connection to another. It asks
/// ahead of traffic, and compiles the answers into the kernel's policy map. The same question must always get the same
/// answer: a module sees no clock and no randomness, and need not be asked again.
pub trait Policy: Sized + 'static {
    /// Read from the file given to `hostd load-policy --config`, TOML or JSON. `()` where there is nothing to set.
    type Config: serde::de::DeserializeOwned;

    /// Makes the policy of a configuration.
    ///
    /// # Errors
    ///
    /// A sentence for the admin, where the configuration makes no sense; the load is refused with it.
    fn new(config: Self::Config) -> Result<Self, String>;

    /// What the policy makes of a pod. Pods with equal identities are the same to it, so take only the labels that
    /// matter: identities cost memory and time, pods do not.
    ///
    /// # Errors
    ///
    /// A sentence for the admin, where the pod can't be identified; what was to be done with it is refused.
    fn identify(&self, pod: &Pod) -> Result<Identity, String>;

    /// May `from` open a connection to `to`? Replies always pass.
    fn decide(&self, from: &Peer, to: &Peer) -> Decision;
}

/// Makes a [`Policy`] the one that this crate's wasm module exports. On other targets it does nothing, so that the
/// same crate can be tested natively.
#[macro_export]
macro_rules! export {
    ($policy:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            use $crate::guest::{State, bindings};

            struct Module;

            std::thread_local! {
                static STATE: State<$policy> = State::default();
            }

            impl bindings::exports::wasmgate::policy::policy::Guest for Module {
                fn configure(config: String) -> Result<(), String> {
                    STATE.with(|state| state.configure(&config))
                }

                fn identify(
                    pod: bindings::exports::wasmgate::policy::policy::Pod,
                ) -> Result<bindings::exports::wasmgate::policy::policy::Identity, String> {
                    STATE.with(|state| state.identify(pod))
                }

                fn learn(peers: Vec<bindings::exports::wasmgate::policy::policy::Peer>) {
                    STATE.with(|state| state.learn(peers));
                }

                fn decide(from: u32, to: Vec<u32>) -> bindings::exports::wasmgate::policy::policy::Row {
                    STATE.with(|state| state.decide(from, &to))
                }
            }

    bindings::export!(Module with_types_in $crate::guest::bindings);
        };
    };
}
