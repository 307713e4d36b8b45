//! Decisions, with the reasons that an author gives for them.

use crate::port::PortRange;
use std::borrow::Cow;

/// What to do with a connection.
///
/// ```
/// use policy_sdk::{Action, Decision, tcp};
///
/// assert_eq!(Decision::all(Action::Deny).action(tcp(80)), Action::Deny);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// It may open.
    Allow,
    /// It may not.
    Deny,
    /// Left to who decides next: the next module, the next tier; the last word is deny.
    Pass,
}

/// One rule of a decision.
///
/// ```
/// use policy_sdk::{Decision, tcp};
///
/// let decision = Decision::ports([tcp(80)]).because("the web");
/// assert_eq!(decision.rules[0].reason, "the web");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// For these ports.
    pub ports: PortRange,
    /// Do this.
    pub action: Action,
    /// Because of this, for people.
    pub reason: Cow<'static, str>,
}

/// Whether one end lets a connection open: the first rule that holds the port says, `otherwise` where none does.
///
/// ```
/// use policy_sdk::{Action, Decision, tcp, udp};
///
/// let decision = Decision::ports([tcp(8080), udp(53)]).because("the frontend needs them").or_deny();
/// assert_eq!(decision.action(tcp(8080)), Action::Allow);
/// assert_eq!(decision.action(tcp(8081)), Action::Deny);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Decision {
    /// The rules, in order.
    pub rules: Vec<Rule>,
    /// For all other ports.
    pub otherwise: Action,
    /// Why, for people.
    pub reason: Cow<'static, str>,
}

impl Decision {
    /// The same for all ports.
    #[must_use]
    pub const fn all(action: Action) -> Self {
        Self {
            rules: Vec::new(),
            otherwise: action,
            reason: Cow::Borrowed(""),
        }
    }

    /// All traffic.
    ///
    /// ```
    /// use policy_sdk::{Action, Decision, tcp};
    ///
    /// assert_eq!(Decision::allow().because("same tenant").action(tcp(1)), Action::Allow);
    /// ```
    #[must_use]
    pub const fn allow() -> Self {
        Self::all(Action::Allow)
    }

    /// No traffic.
    ///
    /// ```
    /// use policy_sdk::{Action, Decision, tcp};
    ///
    /// assert_eq!(Decision::deny().action(tcp(1)), Action::Deny);
    /// ```
    #[must_use]
    pub const fn deny() -> Self {
        Self::all(Action::Deny)
    }

    /// Left to who decides next. hostd lets a node reach its own pods; the last word is deny.
    ///
    /// ```
    /// use policy_sdk::{Action, Decision, tcp};
    ///
    /// assert_eq!(Decision::pass().action(tcp(1)), Action::Pass);
    /// ```
    #[must_use]
    pub const fn pass() -> Self {
        Self::all(Action::Pass)
    }

    /// Allows these ports, and passes on the others.
    ///
    /// ```
    /// use policy_sdk::{Action, Decision, tcp};
    ///
    /// assert_eq!(Decision::ports([tcp(80)]).action(tcp(81)), Action::Pass);
    /// ```
    #[must_use]
    pub fn ports(ranges: impl IntoIterator<Item = PortRange>) -> Self {
        ranges
            .into_iter()
            .fold(Self::pass(), |decision, ports| decision.rule(ports, Action::Allow, ""))
    }

    /// The same with a rule after those that are there.
    ///
    /// ```
    /// use policy_sdk::{Action, Decision, tcp};
    ///
    /// let decision = Decision::allow().rule(tcp(22), Action::Deny, "no shells");
    /// assert_eq!(decision.action(tcp(22)), Action::Deny);
    /// ```
    #[must_use]
    pub fn rule(mut self, ports: PortRange, action: Action, reason: impl Into<Cow<'static, str>>) -> Self {
        self.rules.push(Rule {
            ports,
            action,
            reason: reason.into(),
        });
        self
    }

    /// The same, denying what no rule holds.
    ///
    /// ```
    /// use policy_sdk::{Action, Decision, tcp};
    ///
    /// assert_eq!(Decision::ports([tcp(80)]).or_deny().action(tcp(81)), Action::Deny);
    /// ```
    #[must_use]
    pub const fn or_deny(mut self) -> Self {
        self.otherwise = Action::Deny;
        self
    }

    /// The same with this reason, also for the rules that have none.
    ///
    /// ```
    /// let decision = policy_sdk::Decision::deny().because("red and blue do not talk");
    /// assert_eq!(decision.reason, "red and blue do not talk");
    /// ```
    #[must_use]
    pub fn because(mut self, reason: impl Into<Cow<'static, str>>) -> Self {
        self.reason = reason.into();
        for rule in &mut self.rules {
            if rule.reason.is_empty() {
                rule.reason.clone_from(&self.reason);
            }
        }
        self
    }

    /// What it says of a single port.
    ///
    /// ```
    /// use policy_sdk::{Action, Decision, udp};
    ///
    /// assert_eq!(Decision::ports([udp(53)]).action(udp(53)), Action::Allow);
    /// ```
    #[must_use]
    pub fn action(&self, port: PortRange) -> Action {
        let holds = |rule: &&Rule| rule.ports.contains(port);
        self.rules.iter().find(holds).map_or(self.otherwise, |rule| rule.action)
    }

    /// Whether it is the same decision. Most are, one after the other, and have been made from the same constants: then
    /// nothing needs to be read.
    #[cfg(target_arch = "wasm32")]
    pub(crate) fn is(&self, other: &Self) -> bool {
        let same_text = std::ptr::eq(self.reason.as_ptr(), other.reason.as_ptr())
            && self.reason.len() == other.reason.len()
            && matches!((&self.reason, &other.reason), (Cow::Borrowed(_), Cow::Borrowed(_)));
        if same_text && self.rules.is_empty() && other.rules.is_empty() {
            return self.otherwise == other.otherwise;
        }
        self == other
    }
}
