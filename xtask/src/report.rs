//! Where the time of a test run goes.

use anyhow::Context;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// How many of the slowest tests are shown.
const SLOWEST: usize = 20;

/// A part of a run.
#[derive(Debug, PartialEq, Serialize)]
pub struct Step {
    pub name: String,
    pub seconds: f64,
}

/// A test that was run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Test {
    /// Package, and the file of an integration test: `hostd`, `wasmgate-tests::nodes`.
    pub file: String,
    pub name: String,
    pub seconds: f64,
}

/// Seconds that the tests of a file took; with several at once, their sum is longer than the run.
#[derive(Debug, PartialEq, Serialize)]
struct OfFile<'a> {
    file: &'a str,
    tests: usize,
    seconds: f64,
}

/// What a run has spent its time on.
#[derive(Debug, Default)]
pub struct Times {
    pub steps: Vec<Step>,
    pub tests: Vec<Test>,
}

impl Times {
    /// Does a part of the run, and notes how long it took, also where it fails.
    pub fn step<T>(&mut self, name: &str, work: impl FnOnce(&mut Self) -> anyhow::Result<T>) -> anyhow::Result<T> {
        println!("== {name}");
        let began = Instant::now();
        let result = work(self);
        self.took(name, began.elapsed());
        result
    }

    fn took(&mut self, name: &str, time: Duration) {
        self.steps.push(Step {
            name: name.to_owned(),
            seconds: time.as_secs_f64(),
        });
    }

    fn by_file(&self) -> Vec<OfFile<'_>> {
        let mut files: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
        for test in &self.tests {
            let file = files.entry(&test.file).or_default();
            *file = (file.0 + 1, file.1 + test.seconds);
        }
        let mut files: Vec<_> = files
            .into_iter()
            .map(|(file, (tests, seconds))| OfFile { file, tests, seconds })
            .collect();
        files.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        files
    }

    fn slowest(&self) -> Vec<&Test> {
        let mut tests: Vec<&Test> = self.tests.iter().collect();
        tests.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        tests.truncate(SLOWEST);
        tests
    }

    /// Prints the tables.
    pub fn print(&self) {
        println!("\n{:>8}  STEP", "SECONDS");
        for Step { name, seconds } in &self.steps {
            println!("{seconds:8.1}  {name}");
        }
        let all: f64 = self.steps.iter().map(|step| step.seconds).sum();
        println!("{all:8.1}  all of it");
        if self.tests.is_empty() {
            return;
        }
        println!("\n{:>8}  TESTS  FILE (several run at once)", "SECONDS");
        for OfFile { file, tests, seconds } in self.by_file() {
            println!("{seconds:8.1}  {tests:5}  {file}");
        }
        println!("{:>8}  {:5}  all", "", self.tests.len());
        println!("\n{:>8}  SLOWEST TESTS", "SECONDS");
        for Test { file, name, seconds } in self.slowest() {
            println!("{seconds:8.1}  {file} {name}");
        }
        println!();
    }

    /// Writes the same to a file, with all tests.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let all = serde_json::json!({ "steps": self.steps, "files": self.by_file(), "tests": self.tests });
        fs::write(path, format!("{all:#}\n")).with_context(|| path.display().to_string())
    }

    /// Adds the tests of a report in `JUnit`'s format, as nextest writes it.
    pub fn add_junit(&mut self, path: &Path) -> anyhow::Result<()> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        self.tests.extend(junit(&text)?);
        Ok(())
    }
}

fn junit(text: &str) -> anyhow::Result<Vec<Test>> {
    let report = roxmltree::Document::parse(text)?;
    let cases = report.descendants().filter(|node| node.has_tag_name("testcase"));
    cases
        .map(|case| {
            let attribute = |name: &str| {
                case.attribute(name)
                    .with_context(|| format!("a test case without {name}"))
            };
            Ok(Test {
                file: attribute("classname")?.to_owned(),
                name: attribute("name")?.to_owned(),
                seconds: attribute("time")?.parse()?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Test, Times, junit};

    #[test]
    fn tests_are_summed_up_by_file_and_the_slowest_shown() {
        let tests = junit(
            r#"<?xml version="1.0" encoding="UTF-8"?>
            <testsuites name="all" tests="2"><testsuite name="wasmgate-tests::nodes" tests="1">
            <testcase name="meet" classname="wasmgate-tests::nodes" timestamp="x" time="2.5"/>
            <testcase name="part" classname="wasmgate-tests::nodes" time="0.5"><failure type="x">no &lt;</failure></testcase>
            </testsuite><testsuite name="hostd"><testcase name="a::b" classname="hostd" time="0.001"/></testsuite></testsuites>"#,
        );
        let tests = tests.unwrap();
        assert_eq!(tests.len(), 3);
        let times = Times {
            tests,
            ..Times::default()
        };
        let files: Vec<_> = times
            .by_file()
            .iter()
            .map(|file| (file.file, file.tests, file.seconds))
            .collect();
        assert_eq!(files, [("wasmgate-tests::nodes", 2, 3.0), ("hostd", 1, 0.001)]);
        let slowest = Test {
            file: "wasmgate-tests::nodes".to_owned(),
            name: "meet".to_owned(),
            seconds: 2.5,
        };
        assert_eq!(times.slowest()[0], &slowest);
    }

    #[test]
    fn a_step_that_fails_is_in_the_table() {
        let mut times = Times::default();
        let failed: anyhow::Result<()> = times.step("one", |_| anyhow::bail!("no"));
        assert!(failed.is_err());
        assert_eq!(times.steps[0].name, "one");
    }
}
