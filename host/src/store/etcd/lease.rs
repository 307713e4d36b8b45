//! Values that are gone unless somebody keeps them.

use super::{EtcdStore, connection::get, revision_of};
use crate::store::{Expect, Key, StoreError};
use etcd_client::{Client, Error, GetOptions, PutOptions};
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Numbers of the leases that this process has taken, by what they are for.
#[derive(Default)]
pub struct Leases(Mutex<HashMap<Key, i64>>);

impl Leases {
    fn of(&self, key: &Key) -> Option<i64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).copied()
    }

    fn set(&self, key: &Key, lease: i64) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key.clone(), lease);
    }
}

/// Renews a lease; false where it has run out.
async fn renew(mut client: Client, lease: i64) -> Result<bool, Error> {
    match client.lease_keep_alive(lease).await {
        Ok(_) => Ok(true),
        Err(Error::LeaseKeepAliveError(said)) if said == "lease not found" => Ok(false),
        Err(error) => Err(error),
    }
}

impl EtcdStore {
    /// Takes a lease of some seconds.
    pub(super) async fn grant(&self, seconds: i64) -> Result<i64, StoreError> {
        let asked = self.0.connection.ask(0, |mut client, _| async move {
            let granted = client.lease_grant(seconds, None).await?;
            Ok(granted.id())
        });
        asked.await
    }

    pub(super) async fn write_leased(&self, key: &Key, value: Vec<u8>, ttl: Duration) -> Result<u64, StoreError> {
        let connection = &self.0.connection;
        let place = &self.place(key)?;
        let packed = &self.pack(key, value).await?;
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
        let known = self.0.leases.of(key);
        let kept = match known {
            Some(lease) => connection.ask(0, |client, _| renew(client, lease)).await?,
            None => false,
        };
        let lease = match known.filter(|_| kept) {
            Some(lease) => lease,
            None => self.grant(seconds).await?,
        };
        self.0.leases.set(key, lease);
        let asked = connection.ask(packed.mebibytes(), |mut client, _| async move {
            let then = packed.then(place, Some(PutOptions::new().with_lease(lease)));
            client
                .txn(Self::change(place, Expect::Any, packed.conditions(), then))
                .await
        });
        Ok(revision_of(&asked.await?))
    }

    pub(super) async fn keep_lease(&self, key: &Key) -> Result<bool, StoreError> {
        let place = &self.place(key)?;
        let Some(lease) = self.0.leases.of(key) else {
            return Ok(false);
        };
        // Somebody may have deleted the value, or entered another.
        let asked = self.0.connection.ask(0, |client, _| async move {
            if !renew(client.clone(), lease).await? {
                return Ok(false);
            }
            let found = get(&client, place.as_bytes(), GetOptions::new().with_keys_only()).await?;
            Ok(found.kvs().first().is_some_and(|found| found.lease() == lease))
        });
        asked.await
    }
}
