//! What the modules say of pairs.
//!
//! A cell's way through the modules is a line of what they have said so far; equal lines share a number. Each module
//! moves every cell that is not final on by one step, and a step is worked out once for each pair of numbers.

use super::{Include, Interner, Keys, Matrix, Module, Stack, StackError, identify::not_started, who};
use crate::{
    identity::IdentityKey,
    plan::{Action, Decision, Line, Ruling},
    wasm::{Tier, WasmError, Who},
};
use abi::{Direction, Identity};
use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

/// What one module says of a pair, for one position on the line of ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The module.
    pub module: String,
    /// Its tier.
    pub tier: Tier,
    /// Whose it is.
    pub tenant: Option<String>,
    /// It is only audited.
    pub audit: bool,
    /// What it makes of the subject and of the peer.
    pub classes: (String, String),
    /// What it says.
    pub action: Action,
    /// Why, in the author's words.
    pub reason: String,
}

/// Different decisions of a tenant's module at the most, and breakpoints of them.
const MAX_TENANT_LINES: usize = 256;
const MAX_TENANT_BREAKPOINTS: usize = 2048;

/// No number yet.
const UNKNOWN: u32 = u32::MAX;

/// The last word: a node may reach its own pods, so that their health can be checked. All else that the modules pass is
/// denied.
fn last_word(side: Direction, peer: Identity) -> bool {
    side == Direction::Ingress && peer == Identity::HOST
}

impl Stack {
    /// Numbers of rulings, subject by subject.
    ///
    /// # Errors
    ///
    /// Where a module fails that speaks for all, or must not fail.
    pub fn judge(
        &mut self,
        include: Include<'_>,
        side: Direction,
        subjects: &[Identity],
        peers: &[Identity],
    ) -> Result<Vec<u32>, StackError> {
        if self.lines.is_bulky() {
            // Their numbers are only known here.
            self.lines.clear();
            for module in &mut self.modules {
                module.lines.clear();
                module.breakpoints = 0;
            }
        }
        let undecided = self.lines.number(Line::all(Action::Pass));
        let mut cells = vec![undecided; subjects.len() * peers.len()];
        for module in &mut self.modules {
            let asked = match include {
                Include::Enforced => !module.record.audit,
                Include::Audited(name) => !module.record.audit || module.record.name() == name,
            };
            if !asked {
                continue;
            }
            let rows = module.own(subjects, &self.keys);
            if rows.is_empty() {
                continue;
            }
            let deny = self.lines.number(Line::all(Action::Deny));
            // Of those whom a tenant's module does not know nothing can be said.
            let (rows, unknown): (Vec<usize>, Vec<usize>) = rows
                .into_iter()
                .partition(|row| !module.is_unknown(subjects[*row], &self.keys));
            close(&mut cells, &unknown, peers.len(), deny);
            let identities: Vec<Identity> = rows.iter().map(|row| subjects[*row]).collect();
            let answer = match module.suspended() {
                Some(error) => Err(error),
                None => module.ask(side, &identities, peers, &self.keys, &self.common),
            };
            let answer = answer.and_then(|answer| module.afford(answer));
            match answer {
                Ok(answer) => module.advance(&mut self.lines, &mut cells, &rows, peers.len(), &answer),
                Err(error) if module.strict || module.tenant().is_none() => return Err(module.error(error)),
                Err(error) => {
                    let known = module.failure.as_ref().map(ToString::to_string);
                    if known != Some(error.to_string()) {
                        tracing::error!(
                            "module {}: {error}; its tenant's pods are closed to those that it could not decide about",
                            module.record.name()
                        );
                    }
                    if matches!(error, WasmError::Exhausted { .. }) && module.suspended().is_none() {
                        module.suspend(&error);
                    }
                    module.failure = Some(error);
                    close(&mut cells, &rows, peers.len(), deny);
                }
            }
        }
        self.settle_cells(side, peers, &mut cells);
        Ok(cells)
    }

    /// Lines become rulings.
    fn settle_cells(&mut self, side: Direction, peers: &[Identity], cells: &mut [u32]) {
        let mut known: [Vec<u32>; 2] = [Vec::new(), Vec::new()];
        for row in cells.chunks_exact_mut(peers.len().max(1)) {
            for (cell, peer) in row.iter_mut().zip(peers) {
                let passed = last_word(side, *peer);
                let known = &mut known[usize::from(passed)];
                let index = *cell as usize;
                if known.len() <= index {
                    known.resize(index + 1, UNKNOWN);
                }
                if known[index] == UNKNOWN {
                    known[index] = self.rulings.number(self.lines.get(*cell).settle(passed));
                }
                *cell = known[index];
            }
        }
    }

    /// What may pass between two identities, at one end.
    ///
    /// # Errors
    ///
    /// As [`Stack::judge`].
    pub fn ruling_of(
        &mut self,
        include: Include<'_>,
        side: Direction,
        subject: Identity,
        peer: Identity,
    ) -> Result<Ruling, StackError> {
        let numbers = self.judge(include, side, &[subject], &[peer])?;
        Ok(numbers
            .first()
            .map_or_else(|| Ruling::all(false), |number| self.rulings.get(*number).clone()))
    }

    /// What each module says of a pair at one end, for one position on the line of ports, in the order in which they are
    /// asked, also those whose word does not count any more.
    ///
    /// # Errors
    ///
    /// Which module fails.
    pub fn steps(
        &mut self,
        side: Direction,
        subject: Identity,
        peer: Identity,
        key: u32,
    ) -> Result<Vec<Step>, StackError> {
        let mut steps = Vec::new();
        for module in &mut self.modules {
            if module.own(&[subject], &self.keys).is_empty() {
                continue;
            }
            let answer = match module.suspended() {
                Some(error) => Err(error),
                None if module.is_unknown(subject, &self.keys) => Err(WasmError::Call {
                    call: "identify".to_owned(),
                    problem: "the module could not identify the pod".to_owned(),
                }),
                None => module.ask(side, &[subject], &[peer], &self.keys, &self.common),
            };
            let (action, reason) = match answer {
                Ok(answer) => {
                    let (action, reason) = answer.decision(0).at(key);
                    (action, reason.to_owned())
                }
                // As it is when the maps are filled.
                Err(error) if module.tenant().is_some() => (Action::Deny, format!("the module fails: {error}")),
                Err(error) => return Err(module.error(error)),
            };
            let class = |identity| {
                let key = self.keys.get(&identity).map(|key| &**key);
                describe(&who(&module.record, &self.common, identity, key))
            };
            steps.push(Step {
                module: module.record.name().to_owned(),
                tier: module.record.placement.tier,
                tenant: module.record.placement.tenant.clone(),
                audit: module.record.audit,
                classes: (class(subject), class(peer)),
                action,
                reason,
            });
        }
        Ok(steps)
    }
}

/// Nothing passes in these rows.
fn close(cells: &mut [u32], rows: &[usize], columns: usize, deny: u32) {
    for row in rows {
        cells[row * columns..][..columns].fill(deny);
    }
}

/// What a module sees of an identity, for people.
fn describe(who: &Who) -> String {
    match who {
        Who::Pod(tenant, labels) if labels.is_empty() => tenant.clone(),
        Who::Pod(tenant, labels) => {
            let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("{tenant}{{{}}}", labels.join(","))
        }
        Who::Reserved(identity) => identity.to_string(),
        Who::Networks(names) => format!("networks{{{}}}", names.join(",")),
        Who::Unknown(tenant) => format!("{tenant}{{?}}"),
    }
}

/// A module's answer: a matrix of different peers, and where each subject and each peer is in it.
struct Answer {
    matrix: Matrix,
    width: usize,
    subjects: Vec<usize>,
    peers: Vec<usize>,
}

impl Answer {
    fn decision(&self, subject: usize) -> &Decision {
        let cell = self.subjects[subject] * self.width + self.peers[0];
        &self.matrix.decisions[usize::from(self.matrix.cells[cell])]
    }
}

/// Numbers without repetition, and where each of them is among those.
fn distinct(numbers: &[u32]) -> (Vec<u32>, Vec<usize>) {
    let mut places: HashMap<u32, usize> = HashMap::with_capacity(numbers.len());
    let mut different = Vec::new();
    let indexes = numbers
        .iter()
        .map(|number| {
            *places.entry(*number).or_insert_with(|| {
                different.push(*number);
                different.len() - 1
            })
        })
        .collect();
    (different, indexes)
}

impl Module {
    /// Which of the subjects it decides about.
    fn own(&self, subjects: &[Identity], keys: &Keys) -> Vec<usize> {
        let is_own = |identity: &Identity| match self.tenant() {
            None => true,
            Some(tenant) => keys.get(identity).and_then(|key| key.tenant()) == Some(tenant),
        };
        (0..subjects.len()).filter(|index| is_own(&subjects[*index])).collect()
    }

    /// Whether it could not identify those with this identity.
    fn is_unknown(&self, identity: Identity, keys: &Keys) -> bool {
        matches!(
            keys.get(&identity).map(|key| &**key),
            Some(IdentityKey::Pod(pod)) if pod.classes.get(self.record.name()) == Some(&None)
        )
    }

    /// Asks for every subject with every peer; about each class only once.
    fn ask(
        &mut self,
        side: Direction,
        subjects: &[Identity],
        peers: &[Identity],
        keys: &Keys,
        common: &BTreeSet<String>,
    ) -> Result<Answer, WasmError> {
        let new: BTreeSet<Identity> = subjects
            .iter()
            .chain(peers)
            .filter(|identity| !self.numbers.contains_key(identity))
            .copied()
            .collect();
        if !new.is_empty() {
            let runtime = self.runtime.as_mut().ok_or_else(not_started)?;
            let record = &self.record;
            let seen: Vec<(Identity, Arc<Who>)> = new
                .into_iter()
                .map(|identity| {
                    let key = keys.get(&identity).map(|key| &**key);
                    (identity, Arc::new(who(record, common, identity, key)))
                })
                .collect();
            runtime.learn(seen.iter().map(|(_, who)| Arc::clone(who)))?;
            for (identity, who) in seen {
                if let Some(number) = runtime.number(&who) {
                    self.numbers.insert(identity, number);
                }
            }
        }
        let number = |identity: &Identity| self.numbers.get(identity).copied().unwrap_or(0);
        let (subjects, subject_places) = distinct(&subjects.iter().map(number).collect::<Vec<_>>());
        let (peers, peer_places) = distinct(&peers.iter().map(number).collect::<Vec<_>>());
        Ok(Answer {
            matrix: self
                .runtime
                .as_mut()
                .ok_or_else(not_started)?
                .decide(side, &subjects, &peers)?,
            width: peers.len(),
            subjects: subject_places,
            peers: peer_places,
        })
    }

    /// A tenant's module may say only so many different things: each takes room that all share.
    fn afford(&mut self, answer: Answer) -> Result<Answer, WasmError> {
        if self.tenant().is_none() {
            return Ok(answer);
        }
        let new = answer
            .matrix
            .decisions
            .iter()
            .filter(|one| !self.lines.contains_key(*one));
        let new: Vec<usize> = new.map(|decision| decision.line().iter().len()).collect();
        let (lines, points) = (
            self.lines.len() + new.len(),
            self.breakpoints + new.iter().sum::<usize>(),
        );
        if lines > MAX_TENANT_LINES || points > MAX_TENANT_BREAKPOINTS {
            return Err(WasmError::Answer {
                call: "decide".to_owned(),
                problem: format!(
                    "{lines} different decisions with {points} breakpoints of ports so far; a tenant's module may have \
                     {MAX_TENANT_LINES} and {MAX_TENANT_BREAKPOINTS}"
                ),
            });
        }
        self.breakpoints = points;
        Ok(answer)
    }

    /// Moves the cells of `rows` on by what the module has said.
    fn advance(
        &mut self,
        lines: &mut Interner<Action>,
        cells: &mut [u32],
        rows: &[usize],
        columns: usize,
        answer: &Answer,
    ) {
        let said: Vec<u32> = answer
            .matrix
            .decisions
            .iter()
            .map(|decision| {
                if let Some(number) = self.lines.get(decision) {
                    return *number;
                }
                let number = lines.number(decision.line());
                self.lines.insert(decision.clone(), number);
                number
            })
            .collect();
        // By the cell's line so far, then by what was said.
        let mut steps: Vec<Vec<u32>> = Vec::new();
        for (subject, row) in rows.iter().enumerate() {
            let from = answer.subjects[subject] * answer.width;
            let decisions = &answer.matrix.cells[from..][..answer.width];
            for (cell, peer) in cells[row * columns..][..columns].iter_mut().zip(&answer.peers) {
                let decision = usize::from(decisions[*peer]);
                let before = *cell as usize;
                if steps.len() <= before {
                    steps.resize(before + 1, Vec::new());
                }
                let next = &mut steps[before];
                if next.is_empty() {
                    next.resize(said.len(), UNKNOWN);
                }
                if next[decision] == UNKNOWN {
                    let after = lines.get(*cell).then(lines.get(said[decision]));
                    next[decision] = lines.number(after);
                }
                *cell = next[decision];
            }
        }
    }
}
