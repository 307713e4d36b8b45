//! Running a policy load: the coordinator's part of what `load.rs` describes.

use super::{
    Command, DaemonError,
    evaluate::{Candidate, micros},
    load::{now_ms, policy_key},
    revision::wanted,
};
use crate::{
    api::{LoadReport, NodeReport, PolicyChange},
    store::{
        Change, Collection, Expect, Key, Store, StoreError,
        records::{self, AnswerRecord, NodeRecord, Phase, PolicyRecord, Prepared, Revision},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};

/// Runs a load. Not on the daemon's task: that one has to prepare and commit as every other node's does.
pub struct Coordinator {
    pub store: Arc<dyn Store>,
    pub node: String,
    /// Nodes have to answer a phase within this time.
    pub phase_time: Duration,
    pub daemon: mpsc::Sender<Command>,
}

impl Coordinator {
    /// Changes the policy, or says what that would change.
    pub async fn change(&self, request: PolicyChange) -> Result<LoadReport, DaemonError> {
        let found = records::get::<PolicyRecord>(&*self.store, &policy_key()).await?;
        let (last, expect) = match found {
            Some((record, revision)) => (Some(record), Expect::Revision(revision)),
            None => (None, Expect::Absent),
        };
        let mut modules = BTreeMap::new();
        let wanted = wanted(last.as_ref(), request.what, &mut modules)?;
        let candidate = Candidate {
            revision: wanted,
            modules,
            committed: false,
            against_flows: request.against_flows,
        };
        let mut report = self.evaluate(&candidate).await?;
        if request.dry_run {
            return Ok(report);
        }
        report.dry_run = false;
        if let Some(last) = &last {
            check_free(last)?;
        }
        for (sha256, module) in &candidate.modules {
            let key = Key::new(Collection::Modules, sha256);
            if !self.store.has(&key).await? {
                self.store.put(&key, module.to_vec(), Expect::Any).await?;
            }
        }
        let mut load = self.propose(last, expect, candidate.revision).await?;
        let result = self.run(&mut load, request.skip_unreachable, &mut report).await;
        self.tidy(&load).await;
        result.map(|()| report)
    }

    async fn evaluate(&self, candidate: &Candidate) -> Result<LoadReport, DaemonError> {
        let (reply, answer) = oneshot::channel();
        let gone = || DaemonError::Request("hostd is stopping".to_owned());
        let command = Command::Evaluate(Box::new(candidate.clone()), reply);
        self.daemon.send(command).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    async fn propose(
        &self,
        last: Option<PolicyRecord>,
        expect: Expect,
        mut next: Revision,
    ) -> Result<Load, DaemonError> {
        let answers = self.store.watch(&[Collection::Answers]).await?;
        next.serial = last.as_ref().map_or(0, PolicyRecord::serial) + 1;
        if next.origin == 0 {
            next.origin = next.serial;
        }
        // Time goes on from change to change, whatever this node's clock says.
        let before = last
            .as_ref()
            .map_or(0, |last| last.next.time_ms.max(last.previous.time_ms));
        next.time_ms = now_ms().max(before + 1);
        let (previous, history) = match last {
            None => (Revision::none(), Vec::new()),
            Some(last) => {
                let in_force = last.in_force().clone();
                let mut history = last.history;
                if in_force.serial != last.previous.serial {
                    history.insert(0, last.previous);
                }
                history.retain(|revision| revision.serial != 0);
                history.truncate(HISTORY);
                (in_force, history)
            }
        };
        let record = PolicyRecord {
            phase: Phase::Prepare,
            next,
            previous,
            history,
            coordinator: self.node.clone(),
            // Two phases, each of which may take its time.
            deadline_ms: now_ms() + 2 * u64::try_from(self.phase_time.as_millis()).unwrap_or(0),
        };
        match records::put(&*self.store, &policy_key(), &record, expect).await {
            Ok(revision) => Ok(Load {
                record,
                revision,
                answers,
                phase_time: self.phase_time,
            }),
            Err(StoreError::Conflict { .. }) => Err(busy("another")),
            Err(error) => Err(error.into()),
        }
    }

    async fn run(&self, load: &mut Load, skip: bool, report: &mut LoadReport) -> Result<(), DaemonError> {
        let nodes = self.nodes().await?;
        let began = Instant::now();
        let prepared = load.wait(&nodes.alive, &nodes.all, skip).await?;
        report.steps.push(("prepare".to_owned(), micros(began)));
        // A refusal has ended the wait: nothing is known of those who have not answered by then.
        let refused = prepared.values().any(|(result, _)| result.is_err());
        // One that has joined meanwhile may refuse, too.
        let asked: BTreeSet<&String> = nodes.all.iter().chain(prepared.keys()).collect();
        let refusals: Vec<String> = asked
            .into_iter()
            .filter_map(|node| match prepared.get(node) {
                Some((Ok(_), _)) => None,
                Some((Err(problem), _)) => Some(format!("node {node} refuses: {problem}")),
                None if refused => None,
                None if skip => None,
                None => Some(format!(
                    "node {node} does not answer (is it down? `--skip-unreachable` goes on without it)"
                )),
            })
            .collect();
        if !refusals.is_empty() {
            self.advance(load, Phase::Aborted).await?;
            let problem = format!("no node has changed its policy: {}", refusals.join("; "));
            return Err(DaemonError::Request(problem));
        }

        let began = Instant::now();
        self.advance(load, Phase::Commit).await?;
        let taking_part: BTreeSet<String> = prepared.keys().cloned().collect();
        let committed = load.wait(&taking_part, &taking_part, false).await?;
        report.steps.push(("commit".to_owned(), micros(began)));
        self.advance(load, Phase::Retired).await?;

        for node in nodes.all {
            let result = match (prepared.get(&node), committed.get(&node)) {
                (None, _) => Err("skipped: it did not answer; it switches when it is back".to_owned()),
                (Some(_), None) => {
                    Err("prepared, but did not answer the commit; it switches when it is back".to_owned())
                }
                (Some(_), Some((Err(problem), _))) => Err(format!("could not switch: {problem}")),
                (Some((prepared, _)), Some(_)) => prepared.clone(),
            };
            report.nodes.push(NodeReport {
                commit_micros: committed
                    .get(&node)
                    .map(|(_, at)| u64::try_from(at.saturating_duration_since(began).as_micros()).unwrap_or(u64::MAX)),
                node,
                result,
            });
        }
        Ok(())
    }

    async fn advance(&self, load: &mut Load, phase: Phase) -> Result<(), DaemonError> {
        let record = PolicyRecord {
            phase,
            ..load.record.clone()
        };
        match records::put(&*self.store, &policy_key(), &record, Expect::Revision(load.revision)).await {
            Ok(revision) => {
                load.record = record;
                load.revision = revision;
                Ok(())
            }
            Err(StoreError::Conflict { .. }) => Err(DaemonError::Request(
                "the load took too long, and another node has aborted or replaced it".to_owned(),
            )),
            Err(error) => Err(error.into()),
        }
    }

    async fn nodes(&self) -> Result<Nodes, DaemonError> {
        let mut all = BTreeSet::new();
        for (key, value) in self.store.list(Collection::Nodes).await? {
            let record: NodeRecord = records::decode(&key, &value.value)?;
            all.insert(record.name);
        }
        let alive = self.store.list(Collection::Alive).await?;
        let alive = alive
            .into_iter()
            .map(|(key, _)| key.name)
            .filter(|name| all.contains(name))
            .collect();
        Ok(Nodes { all, alive })
    }

    /// Deletes answers that nobody needs any more, and modules: those of before this change, and those of one that was never
    /// proposed. Left behind, they would only take space. Where that takes one from another node that is about to propose it, its change
    /// is refused.
    async fn tidy(&self, load: &Load) {
        let tidied = async {
            let found = records::get::<PolicyRecord>(&*self.store, &policy_key()).await?;
            // Of another change, which may need what this one does not.
            let Some((record, _)) = found.filter(|(_, revision)| *revision == load.revision) else {
                return Ok(());
            };
            for (key, value) in self.store.list(Collection::Answers).await? {
                let answer: AnswerRecord = records::decode(&key, &value.value)?;
                if answer.serial <= record.serial() {
                    self.store.delete(&key, Expect::Any).await?;
                }
            }
            let needed = modules_of(&record);
            for key in self.store.keys(Collection::Modules).await? {
                if !needed.contains(&key.name) {
                    self.store.delete(&key, Expect::Any).await?;
                }
            }
            Ok::<(), StoreError>(())
        };
        if let Err(error) = tidied.await {
            tracing::warn!("tidying up after a policy change: {error}");
        }
    }
}

fn busy(coordinator: &str) -> DaemonError {
    DaemonError::Request(format!(
        "node {coordinator} is changing the policy; try again when it is done"
    ))
}

/// There must be no other change under way.
fn check_free(last: &PolicyRecord) -> Result<(), DaemonError> {
    if matches!(last.phase, Phase::Prepare | Phase::Commit) && now_ms() < last.deadline_ms {
        return Err(busy(&last.coordinator));
    }
    Ok(())
}

/// SHA-256 of all modules that a record speaks of.
pub fn modules_of(record: &PolicyRecord) -> BTreeSet<String> {
    let revisions = [&record.next, &record.previous].into_iter().chain(&record.history);
    revisions
        .flat_map(|revision| &revision.modules)
        .map(|module| module.sha256.clone())
        .collect()
}

/// Sets of modules that can be gone back to.
const HISTORY: usize = 10;

struct Nodes {
    all: BTreeSet<String>,
    alive: BTreeSet<String>,
}

/// A load that is under way.
struct Load {
    record: PolicyRecord,
    revision: u64,
    answers: mpsc::Receiver<Change>,
    phase_time: Duration,
}

type Answers = BTreeMap<String, (Result<Prepared, String>, Instant)>;

impl Load {
    /// Waits until every node in `all` has answered the present phase, or, where nodes may be skipped, every one that
    /// is `alive`; and no longer than a phase may take. A refusal ends the wait: nothing can come of it.
    async fn wait(
        &mut self,
        alive: &BTreeSet<String>,
        all: &BTreeSet<String>,
        skip: bool,
    ) -> Result<Answers, DaemonError> {
        let wanted = if skip { alive } else { all };
        let mut answers = Answers::new();
        let deadline = tokio::time::Instant::now() + self.phase_time;
        while !wanted.iter().all(|node| answers.contains_key(node)) {
            let Ok(Some(change)) = tokio::time::timeout_at(deadline, self.answers.recv()).await else {
                break;
            };
            let Change::Put(key, value) = change else { continue };
            let answer: AnswerRecord = records::decode(&key, &value.value)?;
            if answer.serial == self.record.serial() && answer.phase == self.record.phase {
                let refused = answer.result.is_err();
                answers.insert(answer.node, (answer.result, Instant::now()));
                if refused && self.record.phase == Phase::Prepare {
                    break;
                }
            }
        }
        Ok(answers)
    }
}
