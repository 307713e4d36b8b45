//! The line of ports: every protocol and destination port a packet can have, cut into pieces that are treated alike.
//!
//! A position on the line is [`abi::policy::port_key`]. A [`Line`] is a list of breakpoints by rising position, the first
//! one at 0, neighbours different: so two lines that say the same are equal, however the rules were written.

use abi::policy::{ICMP, ICMPV6, PORT_KEYS, SCTP, TCP, UDP, breakpoint, port_key};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fmt};

/// What a module says of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Action {
    /// A connection may open.
    Allow,
    /// It may not.
    Deny,
    /// Left to who decides next.
    Pass,
}

impl fmt::Display for Action {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Pass => "pass",
        })
    }
}

/// Destination ports of one protocol, both ends included. ICMP has types in their place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Ports {
    /// IP protocol number; none for every protocol, or, where not all ports are meant, for every one that has ports.
    pub protocol: Option<u8>,
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}

/// Protocols that have ports.
const WITH_PORTS: [u8; 3] = [TCP, UDP, SCTP];

/// Protocols that have names here, in the order in which they are shown.
pub const CARRIED: [(u8, &str); 5] = [
    (TCP, "tcp"),
    (UDP, "udp"),
    (SCTP, "sctp"),
    (ICMP, "icmp"),
    (ICMPV6, "icmpv6"),
];

impl Ports {
    /// Every port of every protocol.
    pub const ALL: Self = Self {
        protocol: None,
        first: 0,
        last: u16::MAX,
    };

    /// The pieces of the line that are meant, each from its start up to but not including its end.
    fn pieces(self) -> Vec<(u32, u32)> {
        if self == Self::ALL {
            return vec![(0, PORT_KEYS)];
        }
        let protocols = self.protocol.as_ref().map_or(&WITH_PORTS[..], std::slice::from_ref);
        protocols
            .iter()
            .map(|protocol| (port_key(*protocol, self.first), port_key(*protocol, self.last) + 1))
            .collect()
    }
}

/// One rule of a [`Decision`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rule {
    /// For these ports.
    pub ports: Ports,
    /// Do this.
    pub action: Action,
    /// Why, in the author's words.
    pub reason: String,
}

/// What one module says of a pair: the first rule that holds the port, `otherwise` where none does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Decision {
    /// The rules, in order.
    pub rules: Vec<Rule>,
    /// For all other ports.
    pub otherwise: Action,
    /// Why, in the author's words.
    pub reason: String,
}

impl Decision {
    /// Allows these ports, and denies all others.
    pub fn allow(ports: impl IntoIterator<Item = Ports>) -> Self {
        let rules = ports.into_iter().map(|ports| Rule {
            ports,
            action: Action::Allow,
            reason: String::new(),
        });
        Self {
            rules: rules.collect(),
            otherwise: Action::Deny,
            reason: String::new(),
        }
    }

    /// The same for all ports.
    #[must_use]
    pub const fn all(action: Action) -> Self {
        Self {
            rules: Vec::new(),
            otherwise: action,
            reason: String::new(),
        }
    }

    /// What it says of a position on the line, and why.
    #[must_use]
    pub fn at(&self, key: u32) -> (Action, &str) {
        let holds = |rule: &&Rule| {
            let pieces = rule.ports.pieces();
            pieces.iter().any(|(start, end)| (*start..*end).contains(&key))
        };
        match self.rules.iter().find(holds) {
            Some(rule) => (rule.action, &rule.reason),
            None => (self.otherwise, &self.reason),
        }
    }

    /// The same as a line.
    #[must_use]
    pub fn line(&self) -> Line<Action> {
        // A sweep along the line, with the rules that hold the present position: the lowest number wins.
        let mut edges: Vec<(u32, bool, usize)> = Vec::new();
        for (number, rule) in self.rules.iter().enumerate() {
            for (start, end) in rule.ports.pieces() {
                edges.push((start, true, number));
                edges.push((end, false, number));
            }
        }
        edges.sort_unstable();
        let mut line = Line::all(self.otherwise);
        let mut holding: BTreeSet<usize> = BTreeSet::new();
        let mut edges = edges.into_iter().peekable();
        while let Some((position, begins, number)) = edges.next() {
            if begins {
                holding.insert(number);
            } else {
                holding.remove(&number);
            }
            if edges.peek().is_some_and(|(next, _, _)| *next == position) || position >= PORT_KEYS {
                continue;
            }
            let action = holding.first().map_or(self.otherwise, |rule| self.rules[*rule].action);
            line.push(position, action);
        }
        line
    }
}

/// A value for every position.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Line<T>(Vec<(u32, T)>);

impl<T: Copy + PartialEq> Line<T> {
    /// The same everywhere.
    #[must_use]
    pub fn all(value: T) -> Self {
        Self(vec![(0, value)])
    }

    /// The value from `position` on, which is not before the last breakpoint.
    fn push(&mut self, position: u32, value: T) {
        if let Some((last, there)) = self.0.last_mut()
            && *last == position
        {
            *there = value;
            let repeats = self.0.len() >= 2 && self.0[self.0.len() - 2].1 == value;
            if repeats {
                self.0.pop();
            }
        } else if self.0.last().is_none_or(|(_, there)| *there != value) {
            self.0.push((position, value));
        }
    }

    /// The value at a position.
    ///
    /// # Panics
    ///
    /// Never: the first breakpoint is at 0.
    #[must_use]
    pub fn at(&self, position: u32) -> T {
        let after = self.0.partition_point(|(start, _)| *start <= position);
        self.0[after - 1].1
    }

    /// The value, where it is the same everywhere.
    #[must_use]
    pub fn constant(&self) -> Option<T> {
        match self.0[..] {
            [(_, value)] => Some(value),
            _ => None,
        }
    }

    /// Both lines at once.
    #[must_use]
    pub fn merge<U: Copy + PartialEq, V: Copy + PartialEq>(
        &self,
        other: &Line<U>,
        join: impl Fn(T, U) -> V,
    ) -> Line<V> {
        let mut merged = Line(Vec::with_capacity(self.0.len().max(other.0.len())));
        let (mut left, mut right) = (0, 0);
        let mut position = 0;
        loop {
            merged.push(position, join(self.0[left].1, other.0[right].1));
            let next_left = self.0.get(left + 1).map_or(PORT_KEYS, |(start, _)| *start);
            let next_right = other.0.get(right + 1).map_or(PORT_KEYS, |(start, _)| *start);
            position = next_left.min(next_right);
            if position == PORT_KEYS {
                return merged;
            }
            left += usize::from(next_left == position);
            right += usize::from(next_right == position);
        }
    }

    /// Breakpoints: where a piece begins, and its value.
    #[must_use]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (u32, T)> {
        self.0.iter().copied()
    }
}

impl Line<Action> {
    /// What this line passes on, `next` decides.
    #[must_use]
    pub fn then(&self, next: &Self) -> Self {
        self.merge(next, |first, second| if first == Action::Pass { second } else { first })
    }

    /// The last word: what is still passed on is allowed or not.
    #[must_use]
    pub fn settle(&self, passed: bool) -> Ruling {
        self.merge(&Line::all(()), |action, ()| match action {
            Action::Allow => true,
            Action::Deny => false,
            Action::Pass => passed,
        })
    }
}

/// What may pass, by position on the line.
pub type Ruling = Line<bool>;

impl Ruling {
    /// Breakpoints as the kernel's pool holds them.
    #[must_use]
    pub fn breakpoints(&self) -> Vec<u64> {
        self.iter().map(|(key, allow)| breakpoint(key, allow)).collect()
    }

    /// The other way round.
    #[must_use]
    pub fn from_breakpoints(breakpoints: &[u64]) -> Self {
        let mut line = Self(Vec::new());
        for one in breakpoints {
            let (key, allow) = (abi::policy::breakpoint_key(*one), abi::policy::breakpoint_allows(*one));
            if line.0.is_empty() && key != 0 {
                line.push(0, false);
            }
            line.push(key, allow);
        }
        if line.0.is_empty() { Self::all(false) } else { line }
    }

    /// What passes, as `tcp/8080`, `udp/5000-5010`, `icmp`, `protocol 47`, and `other protocols` where all without a name do.
    #[must_use]
    pub fn allowed(&self) -> Vec<String> {
        let mut texts = Vec::new();
        for (protocol, name) in CARRIED {
            let (start, end) = (port_key(protocol, 0), port_key(protocol, u16::MAX));
            let mut position = start;
            while position <= end {
                let after = self.0.partition_point(|(start, _)| *start <= position);
                let until = self.0.get(after).map_or(PORT_KEYS, |(start, _)| *start) - 1;
                if self.0[after - 1].1 {
                    texts.push(range_text(name, position - start, until.min(end) - start));
                }
                position = until + 1;
            }
        }
        // They have no ports: the first place of each is all of it.
        let is_named = |number: &u8| CARRIED.iter().any(|(named, _)| named == number);
        let others: Vec<u8> = (0..=u8::MAX).filter(|number| !is_named(number)).collect();
        let passing = || others.iter().filter(|number| self.at(port_key(**number, 0)));
        if passing().count() == others.len() {
            texts.push("other protocols".to_owned());
        } else {
            texts.extend(passing().map(|number| protocol_name(*number)));
        }
        texts
    }

    /// Whether everything passes.
    #[must_use]
    pub fn is_all(&self) -> bool {
        let allowed = self.allowed();
        allowed.len() == CARRIED.len() + 1 && allowed.iter().all(|text| !text.contains('/'))
    }
}

/// `allow`, `deny`, or what passes.
impl fmt::Display for Ruling {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.constant() {
            Some(true) => out.write_str("allow"),
            Some(false) => out.write_str("deny"),
            None if self.is_all() => out.write_str("allow"),
            None => match self.allowed() {
                allowed if allowed.is_empty() => out.write_str("deny"),
                allowed => write!(out, "allow {}", allowed.join(", ")),
            },
        }
    }
}

fn range_text(protocol: &str, first: u32, last: u32) -> String {
    match (first, last) {
        (0, 0xffff) => protocol.to_owned(),
        (first, last) if first == last => format!("{protocol}/{first}"),
        (first, last) => format!("{protocol}/{first}-{last}"),
    }
}

/// Name of an IP protocol.
#[must_use]
pub fn protocol_name(protocol: u8) -> String {
    match CARRIED.iter().find(|(number, _)| *number == protocol) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("protocol {protocol}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, Decision, Line, Ports, Rule, Ruling};
    use abi::policy::{SCTP, TCP, UDP, port_key};
    use proptest::prelude::*;

    fn rule(protocol: Option<u8>, first: u16, last: u16, action: Action) -> Rule {
        Rule {
            ports: Ports { protocol, first, last },
            action,
            reason: String::new(),
        }
    }

    fn decision(rules: Vec<Rule>, otherwise: Action) -> Decision {
        Decision {
            rules,
            otherwise,
            reason: String::new(),
        }
    }

    #[test]
    fn the_first_rule_that_holds_the_port_decides() {
        let decision = decision(
            vec![
                rule(Some(TCP), 80, 80, Action::Deny),
                rule(Some(TCP), 1, 100, Action::Allow),
                rule(None, 53, 53, Action::Allow),
            ],
            Action::Pass,
        );
        let line = decision.line();
        for (protocol, port, expected) in [
            (TCP, 0, Action::Pass),
            (TCP, 79, Action::Allow),
            (TCP, 80, Action::Deny),
            (TCP, 81, Action::Allow),
            (TCP, 101, Action::Pass),
            (UDP, 53, Action::Allow),
            (SCTP, 53, Action::Allow),
            (1, 53, Action::Pass),
        ] {
            assert_eq!(line.at(port_key(protocol, port)), expected, "{protocol}/{port}");
        }
        let settled = line.settle(false);
        assert_eq!(settled.to_string(), "allow tcp/1-79, tcp/81-100, udp/53, sctp/53");
    }

    #[test]
    fn lines_that_say_the_same_are_equal() {
        let one = decision(
            vec![
                rule(Some(TCP), 1, 10, Action::Allow),
                rule(Some(TCP), 11, 20, Action::Allow),
            ],
            Action::Deny,
        );
        let other = decision(
            vec![
                rule(Some(TCP), 5, 20, Action::Allow),
                rule(Some(TCP), 1, 7, Action::Allow),
            ],
            Action::Deny,
        );
        assert_eq!(one.line(), other.line());
        assert_eq!(
            one.line().iter().len(),
            3,
            "a range takes as many breakpoints as a port"
        );
        let whole = decision(vec![rule(None, 0, u16::MAX, Action::Allow)], Action::Deny);
        assert_eq!(whole.line(), Line::all(Action::Allow));
    }

    prop_compose! {
        fn any_rule()(
            protocol in prop::sample::select(vec![None, Some(1), Some(TCP), Some(UDP), Some(SCTP)]),
            first in prop::sample::select(vec![0_u16, 1, 79, 80, 81, 65534, u16::MAX]),
            length in prop::sample::select(vec![0_u16, 1, 2, 100, u16::MAX]),
            action in prop::sample::select(vec![Action::Allow, Action::Deny, Action::Pass]),
        ) -> Rule {
            rule(protocol, first, first.saturating_add(length), action)
        }
    }

    fn any_decision() -> impl Strategy<Value = Decision> {
        (
            prop::collection::vec(any_rule(), 0..8),
            prop::sample::select(vec![Action::Allow, Action::Deny, Action::Pass]),
        )
            .prop_map(|(rules, otherwise)| decision(rules, otherwise))
    }

    fn probes() -> impl Iterator<Item = u32> {
        [1, 2, TCP, UDP, SCTP].into_iter().flat_map(|protocol| {
            [0, 1, 2, 78, 79, 80, 81, 82, 180, 65533, 65534, 65535].map(|port| port_key(protocol, port))
        })
    }

    proptest! {
        #[test]
        fn a_line_says_what_its_decision_says(decision in any_decision()) {
            let line = decision.line();
            for key in probes() {
                prop_assert_eq!(line.at(key), decision.at(key).0);
            }
        }

        #[test]
        fn what_is_passed_on_the_next_one_decides(first in any_decision(), second in any_decision(), last: bool) {
            let ruling = first.line().then(&second.line()).settle(last);
            prop_assert_eq!(&Ruling::from_breakpoints(&ruling.breakpoints()), &ruling);
            for key in probes() {
                let expected = match (first.at(key).0, second.at(key).0) {
                    (Action::Pass, Action::Pass) => last,
                    (Action::Pass, second) => second == Action::Allow,
                    (first, _) => first == Action::Allow,
                };
                prop_assert_eq!(ruling.at(key), expected);
            }
        }
    }
}
