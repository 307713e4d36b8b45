//! Sets of numbers that travel in an identity's labels.

use crate::Identity;
use std::fmt::Write as _;

/// A set of numbers, such as those of the rules that a pod is selected by. Written into an identity's labels, it lets
/// pods that differ in nothing else share the identity, whatever labels they have themselves.
///
/// ```
/// use policy_sdk::{Bits, Identity};
///
/// let mut rules = Bits::default();
/// rules.insert(3);
/// rules.insert(70);
/// let identity = rules.write(Identity::new("red"), "rules");
/// assert_eq!(Bits::read(&identity, "rules").iter().collect::<Vec<_>>(), [3, 70]);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bits(Vec<u64>);

/// Hexadecimal digits in one label: a multiple of a word's 16.
const DIGITS: usize = 48;

impl Bits {
    /// Adds a number.
    pub fn insert(&mut self, number: usize) {
        let word = number / 64;
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (number % 64);
    }

    /// Whether it has a number.
    #[must_use]
    pub fn contains(&self, number: usize) -> bool {
        self.0
            .get(number / 64)
            .is_some_and(|word| word >> (number % 64) & 1 != 0)
    }

    /// The numbers, rising.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().enumerate().flat_map(|(index, word)| {
            (0..64)
                .filter(move |bit| word >> bit & 1 != 0)
                .map(move |bit| index * 64 + bit)
        })
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// As labels `NAME`, `NAME1` and so on; the empty set has none.
    #[must_use]
    pub fn write(&self, identity: Identity, name: &str) -> Identity {
        let text = self.0.iter().fold(String::new(), |mut text, word| {
            let _ = write!(text, "{word:016x}");
            text
        });
        let mut identity = identity;
        for (index, start) in (0..text.len()).step_by(DIGITS).enumerate() {
            let part = &text[start..text.len().min(start + DIGITS)];
            if part.bytes().any(|digit| digit != b'0') {
                identity = identity.with_label(label(name, index), shorten(part));
            }
        }
        identity
    }

    /// From the labels that [`Self::write`] made of them.
    #[must_use]
    pub fn read(identity: &Identity, name: &str) -> Self {
        let mut bits = Self::default();
        for (key, value) in &identity.labels {
            let Some(index) = key.strip_prefix(name) else { continue };
            let index = if index.is_empty() {
                Ok(0)
            } else {
                index.parse::<usize>()
            };
            let Ok(index) = index else { continue };
            for (word, digits) in lengthen(value).as_bytes().chunks(16).enumerate() {
                let word = index * DIGITS / 16 + word;
                let value = std::str::from_utf8(digits)
                    .ok()
                    .and_then(|digits| u64::from_str_radix(digits, 16).ok());
                if bits.0.len() <= word {
                    bits.0.resize(word + 1, 0);
                }
                bits.0[word] = value.unwrap_or(0);
            }
        }
        bits
    }
}

fn label(name: &str, index: usize) -> String {
    if index == 0 {
        name.to_owned()
    } else {
        format!("{name}{index}")
    }
}

/// A single word without its leading zeros: most clusters have few policies, and people read this.
fn shorten(digits: &str) -> String {
    if digits.len() == 16 {
        digits.trim_start_matches('0').to_owned()
    } else {
        digits.to_owned()
    }
}

fn lengthen(digits: &str) -> String {
    if digits.len() < 16 {
        format!("{digits:0>16}")
    } else {
        digits.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::Bits;
    use crate::Identity;

    #[test]
    fn bits_survive_the_way_through_labels() {
        for numbers in [&[][..], &[0], &[63], &[64], &[3, 64, 191], &[192], &[1, 500, 1000]] {
            let mut bits = Bits::default();
            for number in numbers {
                bits.insert(*number);
            }
            let identity = bits.write(Identity::unclaimed(), "p");
            let read = Bits::read(&identity, "p");
            assert_eq!(read.iter().collect::<Vec<_>>(), numbers);
            assert!(identity.labels.values().all(|value| value.len() <= 63));
        }
        let mut bits = Bits::default();
        bits.insert(4);
        assert_eq!(bits.write(Identity::unclaimed(), "p").label("p"), Some("10"));
    }
}
