//! What invariants mean, and which make no sense.

use super::{End, Invariants};
use crate::plan::{Action, Decision, Ports, Rule, Ruling};
use abi::Identity;
use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
};

fn pod(name: &str, identity: u32, app: &str) -> End {
    let (namespace, _) = name.split_once('/').unwrap();
    End {
        name: name.to_owned(),
        identity: Identity(identity),
        pod: Some((namespace.to_owned(), namespace.to_owned())),
        labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
        networks: BTreeSet::new(),
    }
}

fn ends() -> Vec<End> {
    let host = End {
        name: "host".to_owned(),
        identity: Identity::HOST,
        pod: None,
        labels: BTreeMap::new(),
        networks: BTreeSet::new(),
    };
    vec![
        pod("red/web", 100, "web"),
        pod("red/db", 101, "db"),
        pod("red/db2", 101, "db"),
        pod("blue/web", 200, "web"),
        host,
    ]
}

/// Everything of one tenant passes; across tenants only TCP port 80.
#[expect(clippy::unnecessary_wraps, reason = "what a check asks may fail")]
fn rulings(from: &[Identity], to: &[Identity]) -> Result<Vec<Ruling>, Infallible> {
    let web = Decision {
        rules: vec![Rule {
            ports: Ports {
                protocol: Some(6),
                first: 80,
                last: 80,
            },
            action: Action::Allow,
            reason: String::new(),
        }],
        otherwise: Action::Deny,
        reason: String::new(),
    };
    let pairs = from.iter().flat_map(|from| to.iter().map(move |to| (from, to)));
    Ok(pairs
        .map(|(from, to)| {
            if from.0 / 100 == to.0 / 100 {
                Ruling::all(true)
            } else {
                web.line().settle(false)
            }
        })
        .collect())
}

fn check(text: &str) -> Vec<String> {
    let invariants = Invariants::parse(text).unwrap();
    let violations = invariants.check(&ends(), rulings).unwrap();
    violations.iter().map(ToString::to_string).collect()
}

#[test]
fn a_counterexample_names_both_ends_and_the_ports() {
    assert_eq!(
        check("tenant red never reaches tenant blue"),
        [
            "`tenant red never reaches tenant blue`: red/web may reach blue/web on tcp/80",
            "`tenant red never reaches tenant blue`: red/db may reach blue/web on tcp/80",
        ]
    );
    assert_eq!(check("tenant red never reaches tenant blue on tcp/81, udp"), [""; 0]);
    assert_eq!(
        check("web = app=web\ndb = app=db\nnothing but web reaches db"),
        [
            "`nothing but web reaches db`: host may reach red/db on tcp/80",
            "`nothing but web reaches db`: red/db may reach red/db2 on tcp, udp, sctp, icmp, icmpv6, other protocols"
        ]
    );
    assert_eq!(
        check("nothing but namespace red, host reaches app=db"),
        ["`nothing but namespace red, host reaches app=db`: blue/web may reach red/db on tcp/80"]
    );
    assert_eq!(
        check("pod blue/web reaches app=db on tcp/79-81"),
        ["`pod blue/web reaches app=db on tcp/79-81`: blue/web may not reach red/db on tcp/79, tcp/81"]
    );
    assert_eq!(
        check("app=db never reaches app=db").len(),
        1,
        "two pods of one identity"
    );
    assert_eq!(
        check("app=web, tenant red never reaches app=web, tenant red"),
        [""; 0],
        "itself"
    );
}

#[test]
fn a_network_is_part_of_the_world() {
    let mut ends = ends();
    ends.push(End {
        name: "networks{m/all}".to_owned(),
        identity: Identity(130),
        pod: None,
        labels: BTreeMap::new(),
        networks: BTreeSet::from([("m".to_owned(), "all".to_owned())]),
    });
    let invariants = Invariants::parse("world never reaches pod red/web on udp").unwrap();
    let found = invariants.check(&ends, rulings).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].from, "networks{m/all}");
}

#[test]
fn what_makes_no_sense_is_named_with_its_line() {
    for (text, expected) in [
        ("\n\nfoo bar", "line 3: this is none of"),
        ("a reaches b", "line 1: `a` is not defined"),
        ("a = app=a\na = app=b", "line 2: `a` is defined twice"),
        ("host never reaches app=x on tcp/x", "\"tcp/x\" is no port"),
        ("nothing but host", "the word `reaches` is missing"),
        ("network x never reaches host", "`network MODULE/NAME`"),
    ] {
        let error = Invariants::parse(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
    let vain = Invariants::parse("tenant green never reaches host # nobody").unwrap();
    assert_eq!(vain.about_nobody(&ends()), ["tenant green never reaches host"]);
}
