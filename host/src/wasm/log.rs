//! What a module says of itself: passed on to hostd's log, as much of it as is good for the log.

use std::time::{Duration, Instant};

/// Lines that a module may write at once.
const BURST: u32 = 20;
/// One more line every so often.
const REFILL: Duration = Duration::from_millis(500);
/// Bytes of a line at the most.
const MAX_LINE: usize = 512;

/// One module's log.
pub struct ModuleLog {
    module: String,
    left: u32,
    since: Instant,
    suppressed: u64,
    /// The last error in the present call: a panic's message comes before its trap.
    last_error: Option<String>,
}

/// How much a line matters.
pub use super::wit::wasmgate::policy::log::Level;

impl ModuleLog {
    pub fn new(module: &str) -> Self {
        Self {
            module: module.to_owned(),
            left: BURST,
            since: Instant::now(),
            suppressed: 0,
            last_error: None,
        }
    }

    /// Whether there is room for one more line.
    fn admit(&mut self) -> bool {
        let earned = u32::try_from(self.since.elapsed().as_nanos() / REFILL.as_nanos()).unwrap_or(BURST);
        if earned > 0 {
            self.left = self.left.saturating_add(earned).min(BURST);
            self.since = Instant::now();
        }
        if self.left == 0 {
            self.suppressed += 1;
            return false;
        }
        self.left -= 1;
        true
    }

    pub fn write(&mut self, level: Level, message: &str) {
        let text = shorten(message);
        if level == Level::Error {
            self.last_error = Some(text.clone());
        }
        if !self.admit() {
            return;
        }
        let module = &self.module;
        if self.suppressed > 0 {
            tracing::warn!(module, "{} lines of the module's log were left out", self.suppressed);
            self.suppressed = 0;
        }
        match level {
            Level::Debug => tracing::debug!(module, "{text}"),
            Level::Info => tracing::info!(module, "{text}"),
            Level::Warn => tracing::warn!(module, "{text}"),
            Level::Error => tracing::error!(module, "{text}"),
        }
    }

    /// Begins a call.
    pub fn begin(&mut self) {
        self.last_error = None;
    }

    /// What the module complained of in the call that has just failed.
    pub fn complaint(&mut self) -> Option<String> {
        self.last_error.take()
    }
}

/// A line without control characters, and not too long.
fn shorten(message: &str) -> String {
    let end = message.floor_char_boundary(MAX_LINE.min(message.len()));
    let mut text: String = message[..end]
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if end < message.len() {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{BURST, Level, ModuleLog, shorten};

    #[test]
    fn a_module_can_not_flood_the_log() {
        let mut log = ModuleLog::new("m");
        for _ in 0..1000 {
            log.write(Level::Debug, "x");
        }
        assert!(log.suppressed >= 1000 - u64::from(BURST) - 1);
        log.write(Level::Error, "the\nreason");
        assert_eq!(log.complaint().as_deref(), Some("the reason"));
    }

    #[test]
    fn lines_are_bounded_at_a_character() {
        assert_eq!(shorten(&"ä".repeat(400)).chars().count(), 257);
    }
}
