//! Invariants: what must hold under every policy, in the admin's words.
//!
//! ```text
//! # Definitions first: a name, and which ends it means. All conditions must hold.
//! frontend = namespace shop, app=frontend
//! db       = app=db, env!=test
//!
//! tenant red never reaches tenant blue
//! nothing but frontend, host, db reaches db
//! frontend reaches db on tcp/5432
//! world never reaches everything on tcp/22, udp/1000-2000
//! ```
//!
//! Ends are pods, by `tenant NAME`, `namespace NAME`, `pod NAMESPACE/NAME`, `KEY=VALUE` or `KEY!=VALUE` of their labels;
//! `host`, `remote-node`, `world`, `health`; `network MODULE/NAME`; or `everything`.

use crate::plan::{Action, CARRIED, Decision, Ports, Rule, Ruling};
use abi::Identity;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// A condition on an end.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    Everything,
    Tenant(String),
    Namespace(String),
    Pod(String),
    Label(String, String, bool),
    Reserved(Identity),
    Network(String, String),
}

/// Conditions that must all hold.
type Selector = Vec<Condition>;

/// What an invariant says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Claim {
    Never(Selector, Selector),
    Always(Selector, Selector),
    NothingBut(Vec<Selector>, Selector),
}

/// One invariant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invariant {
    /// As it was written.
    pub text: String,
    rule: Claim,
    ports: Ruling,
}

/// Invariants of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Invariants(pub Vec<Invariant>);

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct InvariantError {
    /// Its number, from 1.
    pub line: usize,
    /// What is wrong.
    pub problem: String,
}

/// An end that an invariant may be about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// For people: the pod, a reserved name, or networks.
    pub name: String,
    /// Its identity.
    pub identity: Identity,
    /// A pod's tenant and namespace.
    pub pod: Option<(String, String)>,
    /// A pod's labels.
    pub labels: BTreeMap<String, String>,
    /// Networks that it is in, with their modules.
    pub networks: BTreeSet<(String, String)>,
}

/// A counterexample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant, as it was written.
    pub invariant: String,
    /// Who sends.
    pub from: String,
    /// Who receives.
    pub to: String,
    /// What passes, or what does not.
    pub ports: Vec<String>,
    /// It passes though it must not.
    pub passes: bool,
}

impl fmt::Display for Violation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let may = if self.passes { "may reach" } else { "may not reach" };
        let ports = self.ports.join(", ");
        write!(out, "`{}`: {} {may} {} on {ports}", self.invariant, self.from, self.to)
    }
}

impl Invariants {
    /// Reads invariants.
    ///
    /// # Errors
    ///
    /// The first line that makes no sense.
    pub fn parse(text: &str) -> Result<Self, InvariantError> {
        let mut names: BTreeMap<String, Selector> = BTreeMap::new();
        let mut invariants = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let at = |problem: String| InvariantError {
                line: index + 1,
                problem,
            };
            if let Some((name, definition)) = definition(line) {
                if names.contains_key(name) {
                    return Err(at(format!("`{name}` is defined twice")));
                }
                let meaning = selector(definition, &names).map_err(at)?;
                names.insert(name.to_owned(), meaning);
            } else {
                invariants.push(invariant(line, &names).map_err(at)?);
            }
        }
        Ok(Self(invariants))
    }

    /// All counterexamples, at most one for each pair of identities and invariant. `rulings` says what may pass between
    /// senders and receivers; it is asked with lists, since there may be many.
    ///
    /// # Errors
    ///
    /// Those of `rulings`.
    pub fn check<E, F>(&self, ends: &[End], mut rulings: F) -> Result<Vec<Violation>, E>
    where
        F: FnMut(&[Identity], &[Identity]) -> Result<Vec<Ruling>, E>,
    {
        let mut violations = Vec::new();
        for invariant in &self.0 {
            let (from, to) = invariant.pairs(ends);
            let receivers: Vec<Identity> = to.keys().copied().collect();
            let senders: Vec<Identity> = from.keys().copied().collect();
            for some in senders.chunks(SENDERS_AT_ONCE) {
                let found = rulings(some, &receivers)?;
                let pairs = some.iter().flat_map(|from| receivers.iter().map(move |to| (from, to)));
                for ((sender, receiver), ruling) in pairs.zip(found) {
                    // A pod does not reach itself through the datapath, and only pods have policy at their end.
                    let pair = from[sender]
                        .iter()
                        .flat_map(|from| to[receiver].iter().map(move |to| (*from, *to)))
                        .find(|(from, to)| from.name != to.name && (from.pod.is_some() || to.pod.is_some()));
                    if let (Some((from, to)), Some((ports, passes))) = (pair, invariant.broken_by(&ruling)) {
                        violations.push(Violation {
                            invariant: invariant.text.clone(),
                            from: from.name.clone(),
                            to: to.name.clone(),
                            ports,
                            passes,
                        });
                    }
                }
            }
        }
        Ok(violations)
    }

    /// Invariants that are about nobody, so that nothing can break them: often a mistake.
    #[must_use]
    pub fn about_nobody(&self, ends: &[End]) -> Vec<String> {
        let nobody = |invariant: &&Invariant| {
            let (from, to) = invariant.pairs(ends);
            from.is_empty() || to.is_empty()
        };
        self.0.iter().filter(nobody).map(|one| one.text.clone()).collect()
    }
}

/// Bounds what one question takes.
const SENDERS_AT_ONCE: usize = 256;

/// Ends by identity, two for each at the most: enough to find two that are different.
type Selected<'a> = BTreeMap<Identity, Vec<&'a End>>;

fn select(ends: &[End], wanted: impl Fn(&End) -> bool) -> Selected<'_> {
    let mut selected = Selected::new();
    for end in ends.iter().filter(|end| wanted(end)) {
        let same = selected.entry(end.identity).or_default();
        if same.len() < 2 {
            same.push(end);
        }
    }
    selected
}

impl Invariant {
    fn pairs<'a>(&self, ends: &'a [End]) -> (Selected<'a>, Selected<'a>) {
        match &self.rule {
            Claim::Never(from, to) | Claim::Always(from, to) => {
                (select(ends, |end| holds(from, end)), select(ends, |end| holds(to, end)))
            }
            Claim::NothingBut(allowed, to) => (
                select(ends, |end| !allowed.iter().any(|one| holds(one, end))),
                select(ends, |end| holds(to, end)),
            ),
        }
    }

    /// Which ports break it.
    fn broken_by(&self, ruling: &Ruling) -> Option<(Vec<String>, bool)> {
        let passes = !matches!(self.rule, Claim::Always(..));
        let wrong = ruling.merge(&self.ports, |allowed, meant| meant && allowed == passes);
        let ports = wrong.allowed();
        (!ports.is_empty()).then_some((ports, passes))
    }
}

fn holds(selector: &Selector, end: &End) -> bool {
    selector.iter().all(|condition| match condition {
        Condition::Everything => true,
        Condition::Tenant(name) => end.pod.as_ref().is_some_and(|(tenant, _)| tenant == name),
        Condition::Namespace(name) => end.pod.as_ref().is_some_and(|(_, namespace)| namespace == name),
        Condition::Pod(name) => end.pod.is_some() && end.name == *name,
        Condition::Label(key, value, equal) => end.pod.is_some() && (end.labels.get(key) == Some(value)) == *equal,
        // An address does not leave the world when a module names a network that holds it.
        Condition::Reserved(Identity::WORLD) => {
            end.identity == Identity::WORLD || (end.pod.is_none() && !end.networks.is_empty())
        }
        Condition::Reserved(identity) => end.identity == *identity,
        Condition::Network(module, name) => end.networks.contains(&(module.clone(), name.clone())),
    })
}

/// `NAME = SELECTOR`; the spaces tell it from a label.
fn definition(line: &str) -> Option<(&str, &str)> {
    let (name, definition) = line.split_once(" = ")?;
    let name = name.trim();
    (!name.contains(char::is_whitespace)).then_some((name, definition))
}

fn invariant(line: &str, names: &BTreeMap<String, Selector>) -> Result<Invariant, String> {
    let (statement, ports) = match line.split_once(" on ") {
        Some((statement, ports)) => (statement, port_list(ports)?),
        None => (line, Ruling::all(true)),
    };
    let rule = if let Some(rest) = statement.strip_prefix("nothing but ") {
        let (allowed, to) = rest
            .split_once(" reaches ")
            .ok_or("`nothing but WHO reaches WHOM`: the word `reaches` is missing")?;
        let allowed = allowed
            .split(',')
            .map(|one| selector(one, names))
            .collect::<Result<_, _>>()?;
        Claim::NothingBut(allowed, selector(to, names)?)
    } else if let Some((from, to)) = statement.split_once(" never reaches ") {
        Claim::Never(selector(from, names)?, selector(to, names)?)
    } else if let Some((from, to)) = statement.split_once(" reaches ") {
        Claim::Always(selector(from, names)?, selector(to, names)?)
    } else {
        return Err(
            "this is none of `WHO never reaches WHOM`, `WHO reaches WHOM`, `nothing but WHO reaches WHOM` and \
             `NAME = WHO`"
                .to_owned(),
        );
    };
    Ok(Invariant {
        text: line.to_owned(),
        rule,
        ports,
    })
}

fn selector(text: &str, names: &BTreeMap<String, Selector>) -> Result<Selector, String> {
    let mut conditions = Selector::new();
    for part in text.split(',').map(str::trim) {
        let words: Vec<&str> = part.split_whitespace().collect();
        match words[..] {
            ["everything"] => conditions.push(Condition::Everything),
            ["tenant", name] => conditions.push(Condition::Tenant(name.to_owned())),
            ["namespace", name] => conditions.push(Condition::Namespace(name.to_owned())),
            ["pod", name] if name.contains('/') => conditions.push(Condition::Pod(name.to_owned())),
            ["network", name] => {
                let (module, name) = name.split_once('/').ok_or("`network MODULE/NAME`")?;
                conditions.push(Condition::Network(module.to_owned(), name.to_owned()));
            }
            [word] => conditions.extend(one_word(word, names)?),
            _ => {
                return Err(format!(
                    "{part:?}: who is meant? Ends are `tenant NAME`, `namespace NAME`, `pod NAMESPACE/NAME`, `KEY=VALUE`, \
                     `KEY!=VALUE`, `network MODULE/NAME`, host, remote-node, world, health, everything, or a name that \
                     was defined"
                ));
            }
        }
    }
    Ok(conditions)
}

fn one_word(word: &str, names: &BTreeMap<String, Selector>) -> Result<Selector, String> {
    if let Some(meaning) = names.get(word) {
        return Ok(meaning.clone());
    }
    if let Some((key, value)) = word.split_once("!=") {
        return Ok(vec![Condition::Label(key.to_owned(), value.to_owned(), false)]);
    }
    if let Some((key, value)) = word.split_once('=') {
        return Ok(vec![Condition::Label(key.to_owned(), value.to_owned(), true)]);
    }
    let reserved = Identity::RESERVED.iter().find(|(_, name)| *name == word);
    reserved
        .map(|(identity, _)| vec![Condition::Reserved(*identity)])
        .ok_or_else(|| {
            format!(
                "`{word}` is not defined: is it `tenant {word}` or `namespace {word}`? Or define it in a line before this, \
                 as `{word} = app={word}`"
            )
        })
}

/// Reads `tcp/80`, `udp/5000-5010`, `icmp` and the like.
///
/// # Errors
///
/// What is none of these.
pub fn parse_ports(text: &str) -> Result<Ports, String> {
    let (name, range) = match text.split_once('/') {
        Some((name, range)) => (name, Some(range)),
        None => (text, None),
    };
    let protocol = CARRIED
        .iter()
        .find(|(_, known)| *known == name)
        .map(|(number, _)| *number);
    let wrong = || format!("{text:?} is no port: write tcp/80, udp/5000-5010, sctp/7, icmp or icmp/8");
    let protocol = protocol.ok_or_else(wrong)?;
    let (first, last) = match range {
        None => (0, u16::MAX),
        Some(range) => {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let number = |text: &str| text.trim().parse::<u16>().map_err(|_| wrong());
            (number(first)?, number(last)?)
        }
    };
    if first > last {
        return Err(wrong());
    }
    Ok(Ports {
        protocol: Some(protocol),
        first,
        last,
    })
}

fn port_list(text: &str) -> Result<Ruling, String> {
    let rules = text
        .split(',')
        .map(|one| {
            Ok(Rule {
                ports: parse_ports(one.trim())?,
                action: Action::Allow,
                reason: String::new(),
            })
        })
        .collect::<Result<Vec<_>, String>>()?;
    let meant = Decision {
        rules,
        otherwise: Action::Deny,
        reason: String::new(),
    };
    Ok(meant.line().settle(false))
}

#[cfg(test)]
#[path = "invariant_tests.rs"]
mod tests;
