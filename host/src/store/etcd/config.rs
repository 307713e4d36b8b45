//! How the cluster's etcd is reached: the `[etcd]` table of the configuration.

use crate::store::StoreError;
use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use serde::Deserialize;
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

/// What a store in etcd is named by: this, then its members' URLs, with commas between them.
pub const SCHEME: &str = "etcd:";

/// A connection is tried for so long.
const CONNECT: Duration = Duration::from_secs(2);
/// Half of it is left to the nodes whose connection was lost: their watches pause for up to 5 s before they try again.
const LEAST_HOLD: u32 = 14;
/// How often a member that says nothing is asked whether it is still there, and how long it may take to answer.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(3));

/// How the cluster's etcd is reached.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct EtcdConfig {
    /// What all keys begin with, the same on all nodes of a cluster.
    pub prefix: String,
    /// File of certificates in PEM that the members' certificates are signed by; needed for `https:`.
    pub ca: Option<PathBuf>,
    /// File of this node's own certificate in PEM, where etcd asks for one.
    pub certificate: Option<PathBuf>,
    /// File of its key in PEM.
    pub key: Option<PathBuf>,
    /// Name of the user, where etcd has authentication turned on.
    pub user: Option<String>,
    /// File of the user's password; white space at its end does not count.
    pub password_file: Option<PathBuf>,
    /// What is missing after etcd was made anew counts as deleted after so many seconds, or up to a half less.
    pub hold_seconds: u32,
    /// An answer may take so many seconds, and half a second more for each mebibyte that is sent or asked for.
    pub answer_seconds: u32,
}

impl Default for EtcdConfig {
    fn default() -> Self {
        Self {
            prefix: "/wasmgate".to_owned(),
            ca: None,
            certificate: None,
            key: None,
            user: None,
            password_file: None,
            hold_seconds: 90,
            answer_seconds: 2,
        }
    }
}

/// The URLs in the name of a store.
pub fn endpoints(store: &str) -> Vec<&str> {
    let list = store.strip_prefix(SCHEME).unwrap_or(store);
    list.split(',').map(str::trim).collect()
}

impl EtcdConfig {
    /// Checks the table beside the name of the store. No file is read.
    ///
    /// # Errors
    ///
    /// The key that is wrong, and what would be right.
    pub fn check(&self, store: &str) -> Result<(), (&'static str, String)> {
        for url in endpoints(store) {
            let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
            let host = rest.map(|rest| rest.trim_end_matches('/'));
            if host.is_none_or(|host| host.is_empty() || host.contains(['/', '@', ' '])) {
                let problem = format!("`{url}` is no URL of a member, such as https://192.0.2.10:2379");
                return Err(("store", problem));
            }
        }
        let https = endpoints(store).iter().filter(|url| url.starts_with("https:")).count();
        if https != 0 && https != endpoints(store).len() {
            return Err(("store", "some members by https and others without it".to_owned()));
        }
        let prefix = self.prefix.trim_matches('/');
        if prefix.is_empty() || self.prefix.ends_with('/') || prefix.contains(char::is_whitespace) {
            let problem = format!(
                "`{}` is not such as `/wasmgate`, without a slash at its end",
                self.prefix
            );
            return Err(("etcd.prefix", problem));
        }
        if (https != 0) != self.ca.is_some() {
            let problem = "the members' certificates are checked against it: it goes with https in `store`";
            return Err(("etcd.ca", problem.to_owned()));
        }
        if self.certificate.is_some() != self.key.is_some() || (self.certificate.is_some() && https == 0) {
            let problem = "goes with `etcd.key`, and with https in `store`";
            return Err(("etcd.certificate", problem.to_owned()));
        }
        if !(1..=60).contains(&self.answer_seconds) {
            let problem = format!("{} is not between 1 and 60", self.answer_seconds);
            return Err(("etcd.answer_seconds", problem));
        }
        if self.hold_seconds < LEAST_HOLD {
            let problem = format!(
                "{} is less than {LEAST_HOLD}: nodes need some seconds to enter what they have",
                self.hold_seconds
            );
            return Err(("etcd.hold_seconds", problem));
        }
        if self.user.is_some() != self.password_file.is_some() {
            return Err(("etcd.user", "goes with `etcd.password_file`".to_owned()));
        }
        Ok(())
    }

    /// Reads the files.
    pub(super) fn options(&self) -> Result<ConnectOptions, StoreError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some(ca) = &self.ca {
            let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(read(ca)?));
            if let (Some(certificate), Some(key)) = (&self.certificate, &self.key) {
                tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
            }
            options = options.with_tls(tls);
        }
        if let (Some(user), Some(file)) = (&self.user, &self.password_file) {
            options = options.with_user(user, read(file)?.trim_end());
        }
        Ok(options)
    }
}

fn read(path: &Path) -> Result<String, StoreError> {
    let failed = |source: io::Error| StoreError::Io {
        what: format!("read {}", path.display()),
        source,
    };
    fs::read_to_string(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::EtcdConfig;

    #[test]
    fn what_does_not_go_together_is_named() {
        let file = |name: &str| Some(name.into());
        let plain = EtcdConfig::default();
        let tls = EtcdConfig {
            ca: file("/ca.pem"),
            ..plain.clone()
        };
        assert_eq!(plain.check("etcd:http://192.0.2.1:2379,http://[fd00::1]:2379/"), Ok(()));
        assert_eq!(tls.check("etcd:https://one:2379,https://two:2379"), Ok(()));
        let cases = [
            (plain.clone(), "etcd:", "store"),
            (plain.clone(), "etcd:192.0.2.1:2379", "store"),
            (plain.clone(), "etcd:http://a:2379/path", "store"),
            (tls.clone(), "etcd:https://a:2379,http://b:2379", "store"),
            (plain.clone(), "etcd:https://a:2379", "etcd.ca"),
            (tls.clone(), "etcd:http://a:2379", "etcd.ca"),
            (
                EtcdConfig {
                    certificate: file("/c.pem"),
                    ..tls
                },
                "etcd:https://a:2379",
                "etcd.certificate",
            ),
            (
                EtcdConfig {
                    user: Some("hostd".to_owned()),
                    ..plain.clone()
                },
                "etcd:http://a:2379",
                "etcd.user",
            ),
            (
                EtcdConfig {
                    prefix: "/".to_owned(),
                    ..plain
                },
                "etcd:http://a:2379",
                "etcd.prefix",
            ),
        ];
        for (config, store, key) in cases {
            assert_eq!(config.check(store).unwrap_err().0, key, "{store}: {config:?}");
        }
    }
}
