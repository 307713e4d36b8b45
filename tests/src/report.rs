//! What all benchmarks have in common: how they are asked, and how they tell.

use anyhow::Context;
use serde_json::{Value, json};
use std::{fs, path::PathBuf};

/// What `cargo xtask bench` says to a benchmark.
pub struct Arguments {
    json: Option<PathBuf>,
}

impl Arguments {
    /// Nothing where `cargo test` runs it: that runs benchmarks too, to see that they run, and these take their time.
    ///
    /// # Errors
    ///
    /// Where this machine can't run it.
    pub fn read() -> anyhow::Result<Option<Self>> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        if !arguments.iter().any(|argument| argument == "--bench") {
            return Ok(None);
        }
        if let Err(unsupported) = harness::check_support() {
            anyhow::bail!("this machine can't run it: {unsupported}");
        }
        harness::use_release();
        let mut after = arguments.iter().skip_while(|argument| *argument != "--json").skip(1);
        Ok(Some(Self {
            json: after.next().map(PathBuf::from),
        }))
    }

    /// Writes what was measured to the file that was asked for.
    ///
    /// # Errors
    ///
    /// Where it can't be written.
    pub fn write(&self, figures: &Value) -> anyhow::Result<()> {
        match &self.json {
            Some(file) => fs::write(file, format!("{figures:#}\n")).with_context(|| file.display().to_string()),
            None => Ok(()),
        }
    }
}

/// What was measured, time after time.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The value that this share of them is not above.
    pub fn at(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an index within the samples"
        )]
        let index = ((sorted.len() - 1) as f64 * share) as usize;
        sorted[index]
    }

    pub fn median(&self) -> f64 {
        self.at(0.5)
    }

    #[expect(clippy::cast_precision_loss, reason = "a few thousand at the most")]
    pub fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// Of the mean.
    #[expect(clippy::cast_precision_loss, reason = "a few thousand at the most")]
    pub fn standard_error(&self) -> f64 {
        let (mean, count) = (self.mean(), self.0.len() as f64);
        let squares: f64 = self.0.iter().map(|value| (value - mean).powi(2)).sum();
        (squares / (count - 1.0) / count).sqrt()
    }

    pub fn least(&self) -> f64 {
        self.at(0.0)
    }

    pub fn most(&self) -> f64 {
        self.at(1.0)
    }

    /// How many times one half of the run was the other: 1 where the machine did the same work in the same time all along.
    pub fn drift(&self) -> f64 {
        let (first, second) = self.0.split_at(self.0.len() / 2);
        let [first, second] = [first, second].map(|half| Self(half.to_vec()).median());
        first.max(second) / first.min(second)
    }

    /// Each of them by the one of the same round.
    pub fn over(&self, other: &Self) -> Self {
        self.0.iter().zip(&other.0).map(|(one, other)| one / other).collect()
    }

    pub fn json(&self) -> Value {
        json!({"median": self.median(), "least": self.least(), "most": self.most()})
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<T: IntoIterator<Item = f64>>(values: T) -> Self {
        Self(values.into_iter().collect())
    }
}
