//! The pods of the cluster, by their addresses.

use super::Pod;
use crate::identity::Labels;
use abi::AddressKey;
use hashbrown::HashTable;
use std::{
    collections::{BTreeMap, HashSet},
    hash::{BuildHasher, Hash, RandomState},
    sync::Arc,
};

/// Pods by their first address, under which generations and the store know them; and found by either.
#[derive(Default)]
pub struct Directory {
    pods: BTreeMap<AddressKey, Box<Pod>>,
    /// First address of the pod that has a second one.
    seconds: BTreeMap<AddressKey, AddressKey>,
    /// First addresses of all pods, to be found by the pods' names, which are in their records alone.
    names: HashTable<AddressKey>,
    hasher: RandomState,
    /// Labels of all pods, each set once.
    labels: HashSet<Arc<Labels>>,
    /// Names of their nodes and service accounts, each once.
    texts: HashSet<Arc<str>>,
}

/// Makes what many have the one that is known.
fn share<T: Eq + Hash + ?Sized>(known: &mut HashSet<Arc<T>>, one: &mut Arc<T>) {
    match known.get(one) {
        Some(known) => *one = Arc::clone(known),
        None => {
            known.insert(Arc::clone(one));
        }
    }
}

/// Somebody is gone that had it: the last of its kind has it, as the set does.
fn forget<T: Eq + Hash + ?Sized>(known: &mut HashSet<Arc<T>>, one: &Arc<T>) {
    if Arc::strong_count(one) <= 2 {
        known.remove(one);
    }
}

impl Directory {
    /// The pod with this first address.
    pub fn get(&self, first: &AddressKey) -> Option<&Pod> {
        self.pods.get(first).map(|pod| &**pod)
    }

    /// The pod with this address, first or second, under its first one.
    pub fn find(&self, address: &AddressKey) -> Option<(AddressKey, &Pod)> {
        let first = self.seconds.get(address).unwrap_or(address);
        self.pods.get(first).map(|pod| (*first, &**pod))
    }

    /// A pod of this name.
    pub fn named(&self, namespace: &str, name: &str) -> Option<(AddressKey, &Pod)> {
        let is_it = |first: &AddressKey| {
            let pod = self.pods.get(first);
            pod.is_some_and(|pod| pod.record.is_named(namespace, name))
        };
        let first = self.names.find(self.hasher.hash_one((namespace, name)), is_it)?;
        self.pods.get(first).map(|pod| (*first, &**pod))
    }

    fn name_hash(pods: &BTreeMap<AddressKey, Box<Pod>>, hasher: &RandomState, first: &AddressKey) -> u64 {
        // All that the table has is there.
        pods.get(first).map_or(0, |pod| {
            hasher.hash_one((pod.record.namespace.as_str(), pod.record.name.as_str()))
        })
    }

    /// Before the pod itself is forgotten.
    fn forget_name(&mut self, first: &AddressKey) {
        let hash = Self::name_hash(&self.pods, &self.hasher, first);
        if let Ok(known) = self.names.find_entry(hash, |known| known == first) {
            known.remove();
        }
    }

    /// Takes in a pod, in place of the one with the same first address.
    pub fn insert(&mut self, first: AddressKey, mut pod: Pod) -> Option<Pod> {
        share(&mut self.labels, &mut pod.record.labels);
        share(&mut self.texts, &mut pod.record.node);
        share(&mut self.texts, &mut pod.record.service_account);
        let second = pod.record.second;
        self.forget_name(&first);
        let before = self.pods.insert(first, Box::new(pod)).map(|before| *before);
        let hash = |first: &AddressKey| Self::name_hash(&self.pods, &self.hasher, first);
        self.names.insert_unique(hash(&first), first, hash);
        if let Some(gone) = before.as_ref().and_then(|pod| pod.record.second) {
            self.forget_second(&gone.into(), &first);
        }
        if let Some(second) = second {
            self.seconds.insert(second.into(), first);
        }
        if let Some(before) = &before {
            self.forget_shared(before);
        }
        before
    }

    /// Takes out a pod.
    pub fn remove(&mut self, first: &AddressKey) -> Option<Pod> {
        self.forget_name(first);
        let pod = *self.pods.remove(first)?;
        if let Some(second) = pod.record.second {
            self.forget_second(&second.into(), first);
        }
        self.forget_shared(&pod);
        Some(pod)
    }

    /// Another pod may have the address by now.
    fn forget_second(&mut self, second: &AddressKey, first: &AddressKey) {
        if self.seconds.get(second) == Some(first) {
            self.seconds.remove(second);
        }
    }

    /// A pod is gone that had these.
    fn forget_shared(&mut self, pod: &Pod) {
        forget(&mut self.labels, &pod.record.labels);
        for text in [&pod.record.node, &pod.record.service_account] {
            forget(&mut self.texts, text);
        }
    }

    /// All pods.
    pub fn iter(&self) -> impl Iterator<Item = (&AddressKey, &Pod)> {
        self.pods.iter().map(|(first, pod)| (first, &**pod))
    }

    /// Their first addresses.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &AddressKey> {
        self.pods.keys()
    }

    /// All pods, without their addresses.
    pub fn values(&self) -> impl ExactSizeIterator<Item = &Pod> {
        self.pods.values().map(|pod| &**pod)
    }
}

#[cfg(test)]
mod tests {
    use super::{Directory, Pod};
    use crate::store::records::PodRecord;
    use abi::AddressKey;
    use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

    fn pod(second: Option<&str>, app: &str) -> Pod {
        let labels = BTreeMap::from([("app".to_owned(), app.to_owned())]);
        let record = PodRecord {
            namespace: "red".to_owned(),
            name: "a".to_owned(),
            labels: Arc::new(labels),
            address: "10.0.0.1".parse().unwrap(),
            second: second.map(|address| address.parse().unwrap()),
            node: "one".into(),
            service_account: "".into(),
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
        directory.insert(first, pod(Some("fd00::1"), "web"));
        assert_eq!(directory.find(&key("fd00::1")).map(|(key, _)| key), Some(first));
        assert!(directory.get(&key("fd00::1")).is_none());
        directory.insert(first, pod(Some("fd00::2"), "web"));
        assert!(directory.find(&key("fd00::1")).is_none());
        assert!(directory.find(&key("fd00::2")).is_some());
        directory.remove(&first);
        assert!(directory.find(&key("fd00::2")).is_none());
        assert!(directory.find(&first).is_none());
    }

    #[test]
    fn a_second_address_that_another_pod_has_by_now_stays_its() {
        let key = |text: &str| AddressKey::from(text.parse::<IpAddr>().unwrap());
        let mut directory = Directory::default();
        directory.insert(key("10.0.0.1"), pod(Some("fd00::1"), "web"));
        // It is heard of before that the first one is gone.
        directory.insert(key("10.0.0.2"), pod(Some("fd00::1"), "web"));
        directory.remove(&key("10.0.0.1"));
        assert_eq!(
            directory.find(&key("fd00::1")).map(|(first, _)| first),
            Some(key("10.0.0.2"))
        );
    }

    #[test]
    fn a_pod_is_found_by_its_name_as_long_as_it_has_it() {
        let key = |number: u32| AddressKey::from(IpAddr::from(number.to_be_bytes()));
        let named = |name: String| {
            let mut pod = pod(None, "web");
            pod.record.name = name;
            pod
        };
        let mut directory = Directory::default();
        for number in 0..1000 {
            directory.insert(key(number), named(format!("pod-{number}")));
        }
        let find = |directory: &Directory, name: &str| directory.named("red", name).map(|(address, _)| address);
        assert_eq!(find(&directory, "pod-700"), Some(key(700)));
        assert!(directory.named("blue", "pod-700").is_none());
        directory.insert(key(700), named("other".to_owned()));
        assert_eq!(find(&directory, "pod-700"), None);
        assert_eq!(find(&directory, "other"), Some(key(700)));
        // It comes back elsewhere before it is heard that it has gone here.
        directory.insert(key(5000), named("pod-3".to_owned()));
        directory.remove(&key(3));
        assert_eq!(find(&directory, "pod-3"), Some(key(5000)));
        for number in 0..1000 {
            directory.remove(&key(number));
        }
        assert_eq!(directory.names.len(), 1);
    }

    #[test]
    fn labels_are_kept_once_and_as_long_as_somebody_has_them() {
        let key = |text: &str| AddressKey::from(text.parse::<IpAddr>().unwrap());
        let [one, other] = ["10.0.0.1", "10.0.0.2"].map(key);
        let mut directory = Directory::default();
        directory.insert(one, pod(None, "web"));
        directory.insert(other, pod(None, "web"));
        let labels = |address| Arc::clone(&directory.get(address).unwrap().record.labels);
        assert!(Arc::ptr_eq(&labels(&one), &labels(&other)));
        assert_eq!(directory.labels.len(), 1);
        directory.insert(other, pod(None, "db"));
        assert_eq!(directory.labels.len(), 2);
        directory.remove(&one);
        assert_eq!(directory.labels.len(), 1, "nobody is web any more");
        directory.remove(&other);
        assert!(directory.labels.is_empty());
    }
}
