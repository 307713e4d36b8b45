//! What a policy says of itself: in hostd's log with the module's name, natively on stderr.

/// How much it matters.
///
/// ```
/// assert!(policy_sdk::log::Level::Debug < policy_sdk::log::Level::Error);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// For the author.
    Debug,
    /// For the admin.
    Info,
    /// Something is odd.
    Warn,
    /// Something is wrong.
    Error,
}

/// Writes a line. hostd limits how much of it a module may write.
///
/// ```
/// policy_sdk::log::write(policy_sdk::log::Level::Info, "read 12 rules");
/// policy_sdk::info!("read {} rules", 12);
/// ```
pub fn write(level: Level, message: &str) {
    #[cfg(target_arch = "wasm32")]
    {
        use crate::guest::bindings::wasmgate::policy::log as wit;
        let level = match level {
            Level::Debug => wit::Level::Debug,
            Level::Info => wit::Level::Info,
            Level::Warn => wit::Level::Warn,
            Level::Error => wit::Level::Error,
        };
        wit::write(level, message);
    }
    #[cfg(not(target_arch = "wasm32"))]
    eprintln!("{level:?}: {message}");
}

/// Logs for the author.
///
/// ```
/// policy_sdk::debug!("{} pods", 3);
/// ```
#[macro_export]
macro_rules! debug {
    ($($text:tt)*) => { $crate::log::write($crate::log::Level::Debug, &format!($($text)*)) };
}

/// Logs for the admin.
///
/// ```
/// policy_sdk::info!("read {} rules", 12);
/// ```
#[macro_export]
macro_rules! info {
    ($($text:tt)*) => { $crate::log::write($crate::log::Level::Info, &format!($($text)*)) };
}

/// Logs something odd.
///
/// ```
/// policy_sdk::warn!("no rule names {}", "red");
/// ```
#[macro_export]
macro_rules! warn {
    ($($text:tt)*) => { $crate::log::write($crate::log::Level::Warn, &format!($($text)*)) };
}

/// Logs something wrong.
///
/// ```
/// policy_sdk::error!("{} is no tenant", "green");
/// ```
#[macro_export]
macro_rules! error {
    ($($text:tt)*) => { $crate::log::write($crate::log::Level::Error, &format!($($text)*)) };
}
