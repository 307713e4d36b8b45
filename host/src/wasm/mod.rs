//! Policy modules: compiled in a process of their own, run with fuel, a deadline and bounded memory, and believed only
//! after what they answer was checked.

mod cache;
mod check;
mod clock;
mod compile;
mod log;
mod runtime;
mod wit;

pub use compile::{CHILD_COMMAND, Compiled, Compiler, child_main, sha256};
pub use runtime::{Class, Matrix, Pod, Runtime, Who};

use crate::config;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use wasmtime::{Config, Engine};

/// The interface that a module must export.
pub const INTERFACE: &str = "wasmgate:policy/policy@0.2.0";
/// The one that it may import.
pub const LOG_INTERFACE: &str = "wasmgate:policy/log@0.2.0";

/// Why a module was refused, or what it did wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WasmError {
    /// Larger than the limit.
    #[error("the module has {found} bytes; `wasm.max_module_bytes` allows {limit}")]
    TooLarge {
        /// Its size.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// Neither a component nor a core module that can be made one.
    #[error("not a policy module: {0}")]
    Invalid(String),
    /// The compiler was stopped.
    #[error("the module takes longer than {} s to compile (`wasm.compile_seconds`)", .0.as_secs())]
    CompileTime(Duration),
    /// The compiler ended by itself.
    #[error("compiling the module failed: {0}")]
    CompileCrash(String),
    /// It wants something of the host.
    #[error(
        "the module imports `{0}`; a policy module may import nothing but `{LOG_INTERFACE}` (no WASI: no clock, no \
         files, no randomness)"
    )]
    Import(String),
    /// It exports another version of the interface.
    #[error(
        "the module exports `{found}`; this hostd speaks `{INTERFACE}`: build it with the policy-sdk of this release"
    )]
    Version {
        /// What it exports.
        found: String,
    },
    /// It does not export the interface.
    #[error("the module does not export `{INTERFACE}`: does it call `policy_sdk::export!`?")]
    NoExport,
    /// It refused its configuration.
    #[error("the module refuses its configuration: {0}")]
    Configuration(String),
    /// It trapped or hit a limit.
    #[error("{call}: {problem}")]
    Call {
        /// What was asked.
        call: String,
        /// What happened.
        problem: String,
    },
    /// It used up its fuel or its time.
    #[error("{call}: {problem}")]
    Exhausted {
        /// What was asked.
        call: String,
        /// What was used up.
        problem: String,
    },
    /// It answered nonsense.
    #[error("{call}: the module answered {problem}")]
    Answer {
        /// What was asked.
        call: String,
        /// What is wrong with the answer.
        problem: String,
    },
}

/// Limits of modules, from the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of a module, in bytes.
    pub module_bytes: usize,
    /// CPU time to compile one, in whole seconds.
    pub compile: Duration,
    /// Memory to compile one, in bytes.
    pub compile_memory: u64,
    /// Time for all that one load or one change asks of a module.
    pub evaluate: Duration,
    /// Memory of a module, in bytes.
    pub memory: usize,
    /// Fuel for one call.
    pub fuel: u64,
}

impl From<config::Wasm> for Limits {
    fn from(config: config::Wasm) -> Self {
        Self {
            module_bytes: config.max_module_bytes,
            compile: Duration::from_secs(config.compile_seconds),
            compile_memory: config.compile_memory_mib << 20,
            evaluate: Duration::from_millis(config.evaluate_ms),
            memory: config.memory_mib << 20,
            fuel: config.fuel_per_call,
        }
    }
}

/// What a module may use instead of what the configuration says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overrides {
    /// Time for all that one load or one change asks of it, in milliseconds.
    pub evaluate_ms: Option<u64>,
    /// Its memory, in mebibytes.
    pub memory_mib: Option<u32>,
    /// Fuel for one call.
    pub fuel_per_call: Option<u64>,
}

impl Limits {
    /// The same with what one module may use instead.
    #[must_use]
    pub fn with(mut self, overrides: Overrides) -> Self {
        if let Some(ms) = overrides.evaluate_ms {
            self.evaluate = Duration::from_millis(ms);
        }
        if let Some(mib) = overrides.memory_mib {
            self.memory = (mib as usize) << 20;
        }
        if let Some(fuel) = overrides.fuel_per_call {
            self.fuel = fuel;
        }
        self
    }
}

/// When a module is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// First: the admin's, for all.
    Admin,
    /// Second.
    #[default]
    Tenant,
    /// Last.
    Baseline,
}

impl Tier {
    /// Name, as on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Tenant => "tenant",
            Self::Baseline => "baseline",
        }
    }
}

/// Where a module stands among those that are loaded.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Placement {
    /// Its name, unique.
    pub name: String,
    /// Its tier.
    pub tier: Tier,
    /// Its place in the tier: the lowest is asked first, then by name.
    pub priority: u32,
    /// Whose it is: then it is asked only about this tenant's pods as subjects.
    pub tenant: Option<String>,
}

/// The engine that modules are compiled for and run on: the same settings in both processes, and nothing in them that
/// would let two runs differ.
fn engine() -> Result<Engine, WasmError> {
    let mut config = Config::new();
    config
        .consume_fuel(true)
        .epoch_interruption(true)
        .cranelift_nan_canonicalization(true)
        .wasm_relaxed_simd(false);
    Engine::new(&config).map_err(|error| WasmError::CompileCrash(format!("{error:#}")))
}
