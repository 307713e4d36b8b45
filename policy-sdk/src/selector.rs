//! Label selectors, with the meaning that they have in Kubernetes ("Labels and Selectors").

use crate::Labels;
use serde::Deserialize;
use std::collections::BTreeMap;

/// How an [`Expression`] compares.
///
/// ```
/// assert_eq!(serde_json::from_str::<policy_sdk::Operator>("\"NotIn\"")?, policy_sdk::Operator::NotIn);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    /// The label has one of the values.
    In,
    /// The label has none of the values, or is absent.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

/// One condition of a [`Selector`].
///
/// ```
/// use policy_sdk::{Expression, Labels, Operator, Selector};
///
/// let tested = Expression { key: "tested".into(), operator: Operator::Exists, values: vec![] };
/// let selector = Selector { match_expressions: vec![tested], ..Selector::default() };
/// assert!(!selector.matches(&Labels::new()));
/// ```
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[serde(deny_unknown_fields)]
pub struct Expression {
    /// The label.
    pub key: String,
    /// How to compare.
    pub operator: Operator,
    /// With what.
    #[serde(default)]
    pub values: Vec<String>,
}

/// Conditions on labels, all of which must hold. An empty selector selects everything.
///
/// ```
/// use policy_sdk::{Labels, Selector};
///
/// let selector: Selector = serde_json::from_str(
///     r#"{"matchLabels": {"app": "web"}, "matchExpressions": [{"key": "env", "operator": "NotIn", "values": ["test"]}]}"#,
/// )?;
/// let labels = Labels::from([("app".into(), "web".into())]);
/// assert!(selector.matches(&labels));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// Labels with these values.
    #[serde(default, deserialize_with = "or_default")]
    pub match_labels: BTreeMap<String, String>,
    /// And these conditions.
    #[serde(default, deserialize_with = "or_default")]
    pub match_expressions: Vec<Expression>,
}

/// `null` means what absence does.
fn or_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Selector {
    /// Selects by one label.
    ///
    /// ```
    /// use policy_sdk::{Labels, Selector};
    ///
    /// assert!(!Selector::label("app", "web").matches(&Labels::new()));
    /// ```
    #[must_use]
    pub fn label(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            match_labels: BTreeMap::from([(key.into(), value.into())]),
            match_expressions: Vec::new(),
        }
    }

    /// Whether labels fulfil all conditions.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.match_labels
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
            && self
                .match_expressions
                .iter()
                .all(|expression| expression.matches(labels))
    }

    /// Checks that it makes sense.
    ///
    /// # Errors
    ///
    /// Which condition does not, and why.
    ///
    /// ```
    /// use policy_sdk::{Expression, Operator, Selector};
    ///
    /// let mut selector = Selector::default();
    /// selector.match_expressions.push(Expression { key: "app".into(), operator: Operator::In, values: vec![] });
    /// assert!(selector.check().unwrap_err().contains("`In` needs at least one value"));
    /// ```
    pub fn check(&self) -> Result<(), String> {
        for (key, value) in &self.match_labels {
            check_key(key).map_err(|problem| format!("matchLabels: {problem}"))?;
            check_value(value).map_err(|problem| format!("matchLabels.{key}: {problem}"))?;
        }
        for (index, expression) in self.match_expressions.iter().enumerate() {
            expression
                .check()
                .map_err(|problem| format!("matchExpressions[{index}]: {problem}"))?;
        }
        Ok(())
    }

    /// Whether it selects everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.match_labels.is_empty() && self.match_expressions.is_empty()
    }
}

impl Expression {
    fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => value.is_none_or(|value| !self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }

    fn check(&self) -> Result<(), String> {
        check_key(&self.key)?;
        for value in &self.values {
            check_value(value)?;
        }
        match (self.operator, self.values.is_empty()) {
            (Operator::In | Operator::NotIn, true) => Err(format!("`{:?}` needs at least one value", self.operator)),
            (Operator::Exists | Operator::DoesNotExist, false) => Err(format!("`{:?}` takes no values", self.operator)),
            _ => Ok(()),
        }
    }
}

fn check_key(key: &str) -> Result<(), String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let prefix_fits = prefix.is_none_or(|prefix| !prefix.is_empty() && prefix.len() <= 253);
    if !prefix_fits || name.is_empty() || name.len() > 63 || !is_label_text(name) {
        return Err(format!("{key:?} is no label key"));
    }
    Ok(())
}

fn check_value(value: &str) -> Result<(), String> {
    if value.len() > 63 || !is_label_text(value) {
        return Err(format!("{value:?} is no label value"));
    }
    Ok(())
}

/// Letters, digits, `-`, `_` and `.`, with a letter or digit at both ends.
fn is_label_text(text: &str) -> bool {
    let edges = [text.chars().next(), text.chars().next_back()];
    text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && edges.iter().flatten().all(char::is_ascii_alphanumeric)
}

#[cfg(test)]
mod tests {
    use super::{Expression, Operator, Selector};
    use crate::Labels;

    fn one(operator: Operator, values: &[&str]) -> Selector {
        Selector {
            match_expressions: vec![Expression {
                key: "env".to_owned(),
                operator,
                values: values.iter().map(|value| (*value).to_owned()).collect(),
            }],
            ..Selector::default()
        }
    }

    #[test]
    fn operators_mean_what_they_mean_in_kubernetes() {
        let labels = |value: Option<&str>| -> Labels {
            value
                .into_iter()
                .map(|value| ("env".to_owned(), value.to_owned()))
                .collect()
        };
        for (operator, values, absent, same, other) in [
            (Operator::In, &["a"][..], false, true, false),
            (Operator::NotIn, &["a"], true, false, true),
            (Operator::Exists, &[], false, true, true),
            (Operator::DoesNotExist, &[], true, false, false),
        ] {
            let selector = one(operator, values);
            assert!(selector.check().is_ok());
            let found = [None, Some("a"), Some("b")].map(|value| selector.matches(&labels(value)));
            assert_eq!(found, [absent, same, other], "{operator:?}");
        }
        assert!(Selector::label("k", "").matches(&Labels::from([("k".into(), String::new())])));
        assert!(!Selector::label("k", "").matches(&Labels::new()));
        assert!(Selector::default().matches(&Labels::new()));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (selector, expected) in [
            (one(Operator::In, &[]), "matchExpressions[0]: `In` needs"),
            (one(Operator::Exists, &["a"]), "`Exists` takes no values"),
            (one(Operator::In, &["a b"]), "\"a b\" is no label value"),
            (Selector::label("a/b/c", "x"), "\"a/b/c\" is no label key"),
            (Selector::label("a", "-x"), "matchLabels.a: \"-x\" is no label value"),
        ] {
            assert!(selector.check().unwrap_err().contains(expected), "{expected}");
        }
    }
}
