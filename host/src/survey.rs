//! What a policy says of pairs of identities, both ends together.

use crate::{
    plan::{Oracle, Ruling},
    stack::{Include, Stack, StackError},
};
use abi::{Direction, Identity};
use std::collections::HashMap;

/// Whether an identity is a pod's, so that policy is enforced at its end.
#[must_use]
pub fn is_end(stack: &Stack, identity: Identity) -> bool {
    identity == Identity::INIT || stack.is_pod(identity)
}

/// Rulings for ordered pairs.
pub struct Survey {
    from: HashMap<Identity, usize>,
    to: HashMap<Identity, usize>,
    pairs: Vec<u32>,
    rulings: Vec<Ruling>,
}

fn places(identities: &[Identity]) -> HashMap<Identity, usize> {
    identities.iter().copied().zip(0..).collect()
}

impl Survey {
    /// Asks for every pair of one list.
    ///
    /// # Errors
    ///
    /// Where a module fails.
    pub fn new(stack: &mut Stack, identities: &[Identity]) -> Result<Self, StackError> {
        Self::between(stack, identities, identities)
    }

    /// Asks for every pair of two lists, neither of which names an identity twice.
    ///
    /// # Errors
    ///
    /// Where a module fails.
    pub fn between(stack: &mut Stack, from: &[Identity], to: &[Identity]) -> Result<Self, StackError> {
        let ends = |stack: &Stack, identities: &[Identity]| -> Vec<Identity> {
            let ends = identities.iter().copied();
            ends.filter(|identity| is_end(stack, *identity)).collect()
        };
        let (senders, receivers) = (ends(stack, from), ends(stack, to));
        let egress = stack.judge(Include::Enforced, Direction::Egress, &senders, to)?;
        let ingress = stack.judge(Include::Enforced, Direction::Ingress, &receivers, from)?;
        let (sender_rows, receiver_rows) = (places(&senders), places(&receivers));
        let mut numbers: HashMap<(Option<u32>, Option<u32>), u32> = HashMap::new();
        let mut rulings = Vec::new();
        let mut pairs = Vec::with_capacity(from.len() * to.len());
        for (sender_place, sender) in from.iter().enumerate() {
            for (receiver_place, receiver) in to.iter().enumerate() {
                let out = sender_rows
                    .get(sender)
                    .map(|row| egress[row * to.len() + receiver_place]);
                let into = receiver_rows
                    .get(receiver)
                    .map(|row| ingress[row * from.len() + sender_place]);
                let number = *numbers.entry((out, into)).or_insert_with(|| {
                    let ruling = |number: Option<u32>| {
                        number.map_or_else(|| Ruling::all(true), |number| stack.ruling(number).clone())
                    };
                    rulings.push(ruling(out).merge(&ruling(into), |out, into| out && into));
                    u32::try_from(rulings.len() - 1).unwrap_or(u32::MAX)
                });
                pairs.push(number);
            }
        }
        Ok(Self {
            from: places(from),
            to: places(to),
            pairs,
            rulings,
        })
    }

    /// What may pass from one to another. Nothing where either was not asked about.
    #[must_use]
    pub fn ruling(&self, from: Identity, to: Identity) -> Ruling {
        let places = self.from.get(&from).zip(self.to.get(&to));
        places.map_or_else(
            || Ruling::all(false),
            |(from, to)| {
                let number = self.pairs[from * self.to.len() + to];
                self.rulings[number as usize].clone()
            },
        )
    }
}
