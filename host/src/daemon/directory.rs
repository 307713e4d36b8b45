//! The pods of the cluster, by their addresses.

use super::Pod;
use abi::AddressKey;
use std::collections::{BTreeMap, btree_map};

/// Pods by their first address, under which generations and the store know them; and found by either.
#[derive(Default)]
pub struct Directory {
    pods: BTreeMap<AddressKey, Pod>,
    /// First address of the pod that has a second one.
    seconds: BTreeMap<AddressKey, AddressKey>,
}

impl Directory {
    /// The pod with this first address.
    pub fn get(&self, first: &AddressKey) -> Option<&Pod> {
        self.pods.get(first)
    }

    /// The pod with this address, first or second, under its first one.
    pub fn find(&self, address: &AddressKey) -> Option<(AddressKey, &Pod)> {
        let first = self.seconds.get(address).unwrap_or(address);
        self.pods.get(first).map(|pod| (*first, pod))
    }

    /// Takes in a pod, in place of the one with the same first address.
    pub fn insert(&mut self, first: AddressKey, pod: Pod) -> Option<Pod> {
        let second = pod.record.second;
        let before = self.pods.insert(first, pod);
        if let Some(gone) = before.as_ref().and_then(|pod| pod.record.second) {
            self.seconds.remove(&gone.into());
        }
        if let Some(second) = second {
            self.seconds.insert(second.into(), first);
        }
        before
    }

    /// Takes out a pod.
    pub fn remove(&mut self, first: &AddressKey) -> Option<Pod> {
        let pod = self.pods.remove(first)?;
        if let Some(second) = pod.record.second {
            self.seconds.remove(&second.into());
        }
        Some(pod)
    }

    /// All pods.
    pub fn iter(&self) -> btree_map::Iter<'_, AddressKey, Pod> {
        self.pods.iter()
    }

    /// Their first addresses.
    pub fn keys(&self) -> btree_map::Keys<'_, AddressKey, Pod> {
        self.pods.keys()
    }

    /// All pods, without their addresses.
    pub fn values(&self) -> btree_map::Values<'_, AddressKey, Pod> {
        self.pods.values()
    }
}

#[cfg(test)]
mod tests {
    use super::{Directory, Pod};
    use crate::store::records::PodRecord;
    use abi::AddressKey;
    use std::{collections::BTreeMap, net::IpAddr};

    fn pod(second: Option<&str>) -> Pod {
        let record = PodRecord {
            namespace: "red".to_owned(),
            name: "a".to_owned(),
            labels: BTreeMap::new(),
            address: "10.0.0.1".parse().unwrap(),
            second: second.map(|address| address.parse().unwrap()),
            node: "one".to_owned(),
            service_account: String::new(),
            ports: Vec::new(),
            incarnation: 1,
        };
        Pod { record, epoch: 1 }
    }

    #[test]
    fn a_second_address_goes_with_its_pod() {
        let key = |text: &str| AddressKey::from(text.parse::<IpAddr>().unwrap());
        let first = key("10.0.0.1");
        let mut directory = Directory::default();
        directory.insert(first, pod(Some("fd00::1")));
        assert_eq!(directory.find(&key("fd00::1")).map(|(key, _)| key), Some(first));
        assert!(directory.get(&key("fd00::1")).is_none());
        directory.insert(first, pod(Some("fd00::2")));
        assert!(directory.find(&key("fd00::1")).is_none());
        assert!(directory.find(&key("fd00::2")).is_some());
        directory.remove(&first);
        assert!(directory.find(&key("fd00::2")).is_none());
        assert!(directory.find(&first).is_none());
    }
}
