//! What all benchmarks have in common: how they are asked, and how they tell.

use anyhow::Context;
use serde_json::{Value, json};
use std::{fs, path::Path, process::ExitCode};

/// Status of a benchmark that has measured, but on a machine that did other things meanwhile.
pub const NOT_COMPARABLE: u8 = 3;

/// What a benchmark has measured.
pub struct Measured {
    pub figures: Value,
    /// Rows whose rounds disagree; none of the others' figures are in doubt.
    pub not_comparable: Vec<String>,
}

impl From<Value> for Measured {
    fn from(figures: Value) -> Self {
        Self {
            figures,
            not_comparable: Vec::new(),
        }
    }
}

/// Runs a benchmark, which prints its table itself, and writes its figures to the file that was asked for.
///
/// Status 0: measured. 1: it can't be measured here. [`NOT_COMPARABLE`]: measured, but rows of it can't be compared.
pub fn run(measure: impl FnOnce() -> anyhow::Result<Measured>) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Where `cargo test` runs it, too, to see that it runs, it would take its time.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    let mut after = arguments.iter().skip_while(|argument| *argument != "--json").skip(1);
    match try_to_run(measure, after.next().map(Path::new)) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn try_to_run(measure: impl FnOnce() -> anyhow::Result<Measured>, json: Option<&Path>) -> anyhow::Result<ExitCode> {
    if let Err(unsupported) = harness::check_support() {
        anyhow::bail!("this machine can't run it: {unsupported}");
    }
    harness::use_release();
    let Measured {
        mut figures,
        not_comparable,
    } = measure()?;
    figures["not_comparable"] = json!(not_comparable);
    if let Some(file) = json {
        fs::write(file, format!("{figures:#}\n")).with_context(|| file.display().to_string())?;
    }
    if not_comparable.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!("\nnot to be compared, for the machine did other things meanwhile:");
    for row in not_comparable {
        println!("* {row}");
    }
    Ok(ExitCode::from(NOT_COMPARABLE))
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

    /// Where the median of more and more of them would come to lie, with a confidence of 90 % at least; of less than five samples
    /// none has it. By order statistics: below the median is each of them with a probability of one half, whatever the noise.
    pub fn confidence(&self) -> (f64, f64) {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        // Of `count` coins none shows heads with this probability, then one, and so on.
        let mut exactly = 0.5_f64.powi(i32::try_from(count).unwrap());
        let (mut at_most, mut outside) = (exactly, 0);
        while at_most <= 0.05 && outside < count / 2 {
            outside += 1;
            #[expect(clippy::cast_precision_loss, reason = "a few hundred at the most")]
            let factor = (count - outside + 1) as f64 / outside as f64;
            exactly *= factor;
            at_most += exactly;
        }
        let lowest = outside.saturating_sub(1);
        (sorted[lowest], sorted[count - 1 - lowest])
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

#[cfg(test)]
mod tests {
    use super::Samples;

    #[test]
    fn confidence_grows_with_the_rounds() {
        let of = |count: u32| -> Samples { (1..=count).map(f64::from).collect() };
        // Tables of the sign test: with 5 the range, with 15 the fourth of either end, with 100 the 42nd.
        assert_eq!(of(5).confidence(), (1.0, 5.0));
        assert_eq!(of(15).confidence(), (4.0, 12.0));
        assert_eq!(of(100).confidence(), (42.0, 59.0));
        assert_eq!(of(1).confidence(), (1.0, 1.0));
    }
}
