//! What interrupts a module that takes too long: an engine's epoch, raised every few milliseconds while a module runs.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};
use wasmtime::Engine;

/// Length of an epoch.
pub const TICK: Duration = Duration::from_millis(5);

#[derive(Default)]
struct State {
    running: u32,
    stopped: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Raises an engine's epoch while anything runs on it, and sleeps otherwise.
pub struct Clock(Arc<Shared>);

/// Something runs on the engine.
pub struct Running(Arc<Shared>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock {
    pub fn new(engine: Engine) -> Self {
        let shared = Arc::new(Shared::default());
        let clock = Self(Arc::clone(&shared));
        thread::spawn(move || {
            loop {
                let state = shared
                    .changed
                    .wait_while(shared.lock(), |state| state.running == 0 && !state.stopped)
                    .unwrap_or_else(PoisonError::into_inner);
                if state.stopped {
                    return;
                }
                drop(state);
                thread::sleep(TICK);
                engine.increment_epoch();
            }
        });
        clock
    }

    /// Lets epochs pass until the answer is dropped.
    pub fn run(&self) -> Running {
        self.0.lock().running += 1;
        self.0.changed.notify_one();
        Running(Arc::clone(&self.0))
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.0.lock().stopped = true;
        self.0.changed.notify_one();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
    }
}
