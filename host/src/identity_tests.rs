//! Numbers that do not depend on who came first, limits, and collecting.

use super::{DEFAULT_MODULE, IdentityKey, Layout, Next, PodKey, Registry, check_labels, check_text};
use abi::Identity;
use std::collections::{BTreeMap, BTreeSet};

fn key(tenant: &str, app: &str) -> IdentityKey {
    let labels = BTreeMap::from([("app".to_owned(), app.to_owned())]);
    IdentityKey::Pod(PodKey {
        tenant: tenant.to_owned(),
        classes: BTreeMap::from([(DEFAULT_MODULE.to_owned(), Some(labels))]),
    })
}

fn networks(name: &str) -> IdentityKey {
    IdentityKey::Networks(BTreeSet::from([("m".to_owned(), name.to_owned())]))
}

#[test]
fn networks_are_nobodys_and_no_reserved_identity() {
    for tenant_bits in [1, 8, 16] {
        let layout = Layout { tenant_bits };
        let mut registry = Registry::new(layout);
        let all: BTreeSet<_> = (0..200)
            .map(|n| registry.assign(&networks(&n.to_string())).unwrap())
            .collect();
        assert_eq!(all.len(), 200);
        assert!(all.iter().all(|one| layout.tenant(*one) == 0 && one.is_allocated()));
    }
}

#[test]
fn a_tenant_keeps_its_number_when_another_goes_and_is_revived_before_it_is_used() {
    let layout = Layout { tenant_bits: 1 };
    let mut registry = Registry::new(layout);
    registry.assign(&key("red", "a")).unwrap();
    assert!(registry.has_identities(1) && !registry.has_identities(0));
    assert!(registry.next(&key("blue", "a")).is_err());
    registry.set_tenant_retiring(1, true);
    assert_eq!(registry.next(&key("red", "b")), Ok(Next::ReviveTenant(1)));
    registry.remove_tenant(1);
    assert_eq!(registry.next(&key("blue", "a")), Ok(Next::CreateTenant(1)));
}

#[test]
fn what_is_about_to_be_collected_is_not_used_as_it_is() {
    let mut registry = Registry::new(Layout { tenant_bits: 8 });
    let red = registry.assign(&key("red", "a")).unwrap();
    registry.set_retiring(red, true);
    assert_eq!(registry.next(&key("red", "a")), Ok(Next::Revive(red)));
    registry.set_retiring(red, false);
    assert_eq!(registry.next(&key("red", "a")), Ok(Next::Known(red)));
    registry.remove(red);
    assert_eq!(registry.next(&key("red", "a")), Ok(Next::CreateIdentity(red)));
}

#[test]
fn what_is_in_the_way_and_about_to_be_collected_is_settled_first() {
    let layout = Layout { tenant_bits: 16 };
    let mut registry = Registry::new(layout);
    let there = registry.assign(&key("red", "a")).unwrap();
    let begins_there = |name: &String| {
        let mut others = Registry::new(layout);
        others.insert_tenant(layout.tenant(there), "red".to_owned());
        others.next(&key("red", name)) == Ok(Next::CreateIdentity(there))
    };
    let other = (0..100_000).map(|n| n.to_string()).find(begins_there).unwrap();
    let other = key("red", &other);
    assert!(matches!(registry.next(&other), Ok(Next::CreateIdentity(next)) if next != there));
    // Whoever knows that it is gone already would take its number.
    registry.set_retiring(there, true);
    assert_eq!(registry.next(&other), Ok(Next::Revive(there)));
    assert!(registry.assign(&other).is_ok_and(|next| next != there));

    let tenants = Layout { tenant_bits: 1 };
    let mut registry = Registry::new(tenants);
    registry.assign(&key("red", "a")).unwrap();
    registry.set_tenant_retiring(1, true);
    assert_eq!(registry.next(&key("blue", "a")), Ok(Next::ReviveTenant(1)));
}

#[test]
fn names_tell_modules_apart() {
    let IdentityKey::Pod(mut pod) = key("red", "web") else {
        unreachable!()
    };
    assert_eq!(pod.to_string(), "red{app=web}");
    pod.classes.insert(
        "net".to_owned(),
        Some(BTreeMap::from([("zone".to_owned(), "a".to_owned())])),
    );
    pod.classes.insert("other".to_owned(), None);
    assert_eq!(pod.to_string(), "red{app=web,net:zone=a,other:?}");
    assert_eq!(networks("office").to_string(), "networks{m/office}");
}

#[test]
fn numbers_do_not_depend_on_who_came_first() {
    let mut one = Registry::new(Layout { tenant_bits: 8 });
    let mut other = Registry::new(Layout { tenant_bits: 8 });
    let keys: Vec<_> = (0..50).map(|n| key("red", &n.to_string())).collect();
    let forward: Vec<_> = keys.iter().map(|key| one.assign(key).unwrap()).collect();
    // The other node learns of the first one's entries before it probes: as through the store.
    for (identity, key) in one.iter() {
        other.insert(identity, key.clone());
    }
    let again: Vec<_> = keys.iter().map(|key| other.assign(key).unwrap()).collect();
    assert_eq!(forward, again);
    assert_eq!(forward.iter().collect::<BTreeSet<_>>().len(), 50);
}

#[test]
fn the_tenant_is_in_the_high_bits_and_never_zero() {
    for tenant_bits in [1, 8, 16] {
        let layout = Layout { tenant_bits };
        let mut registry = Registry::new(layout);
        let red = registry.assign(&key("red", "a")).unwrap();
        let also_red = registry.assign(&key("red", "b")).unwrap();
        assert_eq!(layout.tenant(red), layout.tenant(also_red));
        assert_ne!(layout.tenant(red), 0);
        assert_ne!(red, also_red);
        assert!(red.0 < 1 << 24 && red.is_allocated());
        assert_eq!(layout.tenant(Identity::REMOTE_NODE), 0);
    }
}

#[test]
fn running_out_is_an_error_that_says_of_what() {
    let mut registry = Registry::new(Layout { tenant_bits: 1 });
    registry.assign(&key("red", "a")).unwrap();
    let error = registry.assign(&key("blue", "a")).unwrap_err();
    assert!(error.to_string().contains("all 1 tenant numbers"), "{error}");

    let mut registry = Registry::new(Layout { tenant_bits: 16 });
    for n in 0..255 {
        registry.assign(&key("red", &n.to_string())).unwrap();
    }
    let error = registry.assign(&key("red", "more")).unwrap_err();
    assert!(
        error.to_string().contains("all 255 identity numbers of tenant red"),
        "{error}"
    );
}

#[test]
fn limits_name_what_is_too_long() {
    assert!(
        check_text("the tenant", &"t".repeat(64), 63)
            .unwrap_err()
            .contains("the tenant has 64 bytes")
    );
    let many: BTreeMap<String, String> = (0..65).map(|n| (n.to_string(), String::new())).collect();
    assert!(check_labels(&many).unwrap_err().contains("65 labels"));
    let odd = BTreeMap::from([("a".to_owned(), "a\nb".to_owned())]);
    assert!(check_labels(&odd).unwrap_err().contains("control character"));
}
