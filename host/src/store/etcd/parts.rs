//! Values that are longer than what etcd takes at once (`--max-request-bytes`, 1.5 MiB unless told otherwise): policy
//! modules.
//!
//! Every value has a byte before it that says whether it is whole. One that is not names its parts, which are entered first,
//! under a lease; the transaction that enters the value takes the lease from them, if they are still there, and removes those of
//! the value before it. So there is never a value without its parts, and what a writer that died has left goes with
//! its lease.

use super::{EtcdStore, Inner, connection::get, unsigned};
use crate::store::{Key, StoreError, Versioned};
use etcd_client::{Compare, CompareOp, DeleteOptions, GetOptions, KeyValue, PutOptions, TxnOp};
use rustix::rand::{GetRandomFlags, getrandom};

/// Length of a part in bytes.
const PART: usize = 1 << 20;
/// Parts of a value at the most: etcd's `--max-txn-ops` is 128 unless told otherwise.
const MAX_PARTS: usize = 96;
/// Seconds that a writer has for all parts.
const LEASE: i64 = 120;

const WHOLE: u8 = 0;
const IN_PARTS: u8 = 1;

/// A value as it is entered.
pub struct Packed {
    pub value: Vec<u8>,
    /// Keys of its parts.
    parts: Vec<String>,
    /// Ranges of the parts that other values at this key may have.
    others: Vec<(String, String)>,
}

impl Packed {
    /// Mebibytes that are entered with it.
    pub fn mebibytes(&self) -> u32 {
        u32::try_from(self.parts.len()).unwrap_or(u32::MAX)
    }

    /// Its parts must be there.
    pub fn conditions(&self) -> Vec<Compare> {
        let there = |part: &String| Compare::create_revision(part.as_str(), CompareOp::Greater, 0);
        self.parts.iter().map(there).collect()
    }

    /// What enters it.
    pub fn then(&self, place: &str, options: Option<PutOptions>) -> Vec<TxnOp> {
        let value = TxnOp::put(place, self.value.clone(), options);
        let keep = |part: &String| {
            let options = PutOptions::new().with_ignore_value();
            TxnOp::put(part.as_str(), Vec::new(), Some(options))
        };
        let remove = |(from, to): &(String, String)| delete_range(from, to);
        [value]
            .into_iter()
            .chain(self.parts.iter().map(keep))
            .chain(self.others.iter().map(remove))
            .collect()
    }
}

fn delete_range(from: &str, to: &str) -> TxnOp {
    TxnOp::delete(from, Some(DeleteOptions::new().with_range(to)))
}

/// The end of the range of all keys that begin with `folder`, which ends with a slash.
pub fn after(folder: &str) -> String {
    // `0` comes after `/`.
    format!("{}0", folder.trim_end_matches('/'))
}

impl Inner {
    /// Where the parts of a value are: under a name that is no collection's.
    fn parts_folder(&self, place: &str) -> String {
        format!(
            "{}/parts{}/",
            self.prefix,
            place.trim_start_matches(self.prefix.as_str())
        )
    }

    /// Removes all parts of a value.
    pub fn delete_parts(&self, place: &str) -> TxnOp {
        let folder = self.parts_folder(place);
        delete_range(&folder, &after(&folder))
    }
}

impl EtcdStore {
    /// Makes a value ready to be entered: the parts of a long one are entered.
    pub(super) async fn pack(&self, key: &Key, value: Vec<u8>) -> Result<Packed, StoreError> {
        let folder = self.0.parts_folder(&self.place(key)?);
        let all = (folder.clone(), after(&folder));
        if value.len() < PART {
            return Ok(Packed {
                value: [&[WHOLE], value.as_slice()].concat(),
                parts: Vec::new(),
                others: vec![all],
            });
        }
        let count = value.len().div_ceil(PART);
        if count > MAX_PARTS {
            let problem = format!("{key}: {} bytes; at most {} are taken", value.len(), MAX_PARTS * PART);
            return Err(self.0.connection.refused(problem));
        }
        let mut number = [0; 8];
        getrandom(&mut number, GetRandomFlags::empty()).map_err(|error| StoreError::Io {
            what: "ask for a random number".to_owned(),
            source: error.into(),
        })?;
        let group = format!("{folder}{:016x}/", u64::from_ne_bytes(number));
        let lease = self.grant(LEASE).await?;
        let mut parts = Vec::with_capacity(count);
        for (index, bytes) in value.chunks(PART).enumerate() {
            let part = format!("{group}{index:04}");
            let name = &part;
            self.0
                .connection
                .ask(1, |mut client, _| async move {
                    let options = PutOptions::new().with_lease(lease);
                    client.put(name.as_str(), bytes, Some(options)).await
                })
                .await?;
            parts.push(part);
        }
        Ok(Packed {
            value: [&[IN_PARTS, u8::try_from(count).unwrap_or(u8::MAX)], group.as_bytes()].concat(),
            others: vec![(all.0, group.clone()), (after(&group), all.1)],
            parts,
        })
    }

    /// A value as it was given. None where it is in parts which are gone, as they are when it was changed meanwhile.
    pub(super) async fn unpack(&self, key: &Key, found: KeyValue) -> Result<Option<Versioned>, StoreError> {
        let revision = unsigned(found.mod_revision());
        let (_, mut value) = found.into_key_value();
        let foreign = || self.0.connection.refused(format!("{key} was not entered by hostd"));
        match value.first() {
            Some(&WHOLE) => {
                value.remove(0);
                Ok(Some(Versioned { revision, value }))
            }
            Some(&IN_PARTS) => {
                let (&count, group) = value[1..].split_first().ok_or_else(foreign)?;
                let group = std::str::from_utf8(group).map_err(|_| foreign())?;
                let mut whole = Vec::new();
                for index in 0..count {
                    let part = &format!("{group}{index:04}");
                    let asked = self.0.connection.ask(1, |client, _| async move {
                        let mut answer = get(&client, part.as_bytes(), GetOptions::new()).await?;
                        Ok(answer.take_kvs().into_iter().next())
                    });
                    let Some(found) = asked.await? else { return Ok(None) };
                    whole.extend_from_slice(found.value());
                }
                Ok(Some(Versioned { revision, value: whole }))
            }
            _ => Err(foreign()),
        }
    }
}
