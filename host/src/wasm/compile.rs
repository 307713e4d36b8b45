//! Compiling a module, in a child process: fuel does not bound the compiler, and a thread can't be stopped.

use super::{INTERFACE, LOG_INTERFACE, Limits, WasmError, cache::Cache, clock::Clock, engine};
use crate::codec;
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use sha2::{Digest, Sha256};
use std::{
    fmt::Write as _,
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
};
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};
use wasmtime::{Engine, Module, component::Component};
use wit_component::ComponentEncoder;

/// A busy machine may take so many times a module's CPU time.
const PATIENCE: u32 = 8;

/// The hidden command that runs the child.
pub const CHILD_COMMAND: &str = "compile-module";

/// Compiles modules.
pub struct Compiler {
    engine: Engine,
    clock: Arc<Clock>,
    program: PathBuf,
    limits: Limits,
    cache: Option<Cache>,
}

/// A compiled module.
#[derive(Clone)]
pub struct Compiled {
    pub(super) component: Component,
    pub(super) clock: Arc<Clock>,
    /// SHA-256 of the module, in hexadecimal.
    pub sha256: String,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Compiled({})", self.sha256)
    }
}

/// SHA-256 of a module, in hexadecimal.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl Compiler {
    /// A compiler whose child is `program`, which is hostd. What it has compiled it keeps in `cache`, a folder.
    ///
    /// # Errors
    ///
    /// Where the machine can't run wasm, or the folder can't be used.
    pub fn new(program: PathBuf, limits: Limits, cache: Option<&Path>) -> Result<Self, WasmError> {
        let engine = engine()?;
        let open = |folder: &Path| {
            Cache::open(folder, &engine)
                .map_err(|error| WasmError::CompileCrash(format!("cache {}: {error}", folder.display())))
        };
        Ok(Self {
            cache: cache.map(open).transpose()?,
            clock: Arc::new(Clock::new(engine.clone())),
            engine,
            program,
            limits,
        })
    }

    /// Compiles a component, or a core module with the bindings' section in it, and checks what it imports and
    /// exports.
    ///
    /// # Errors
    ///
    /// Why the module is refused.
    pub async fn compile(&self, module: &[u8]) -> Result<Compiled, WasmError> {
        if module.len() > self.limits.module_bytes {
            return Err(WasmError::TooLarge {
                found: module.len(),
                limit: self.limits.module_bytes,
            });
        }
        let sha256 = sha256(module);
        let cached = self.cache.as_ref().and_then(|cache| cache.get(&sha256));
        let component = if let Some(component) = cached.and_then(|artifact| self.load(&artifact).ok()) {
            component
        } else {
            let artifact = timeout(self.limits.compile * PATIENCE, self.in_child(module))
                .await
                .map_err(|_| WasmError::CompileTime(self.limits.compile))??;
            if let Some(cache) = &self.cache
                && let Err(error) = cache.put(&sha256, &artifact)
            {
                tracing::warn!("keeping a compiled module: {error}");
            }
            self.load(&artifact)?
        };
        check_interface(&self.engine, &component)?;
        Ok(Compiled {
            component,
            clock: Arc::clone(&self.clock),
            sha256,
        })
    }

    fn load(&self, artifact: &[u8]) -> Result<Component, WasmError> {
        // SAFETY: the bytes come from our own program, started by us, over a pipe that nobody else can write to, or from
        // the cache, which has authenticated them as such; and it compiled them for the same engine settings, which
        // wasmtime checks once more.
        unsafe { Component::deserialize(&self.engine, artifact) }
            .map_err(|error| WasmError::CompileCrash(format!("{error:#}")))
    }

    async fn in_child(&self, module: &[u8]) -> Result<Vec<u8>, WasmError> {
        let crash = |error: std::io::Error| WasmError::CompileCrash(format!("{}: {error}", self.program.display()));
        let mut child = Command::new(&self.program)
            .arg(CHILD_COMMAND)
            .arg(self.limits.compile_memory.to_string())
            .arg(self.limits.compile.as_secs().to_string())
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(crash)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A child that ends early has said why.
            let _ = stdin.write_all(module).await;
        }
        let output = child.wait_with_output().await.map_err(crash)?;
        match codec::decode::<Result<Vec<u8>, String>>(&output.stdout) {
            Ok(Ok(artifact)) => Ok(artifact),
            Ok(Err(problem)) => Err(WasmError::Invalid(problem)),
            // At its hard limit of CPU time the kernel kills a process (getrlimit(2)).
            Err(_) if output.status.signal() == Some(Signal::KILL.as_raw()) => {
                Err(WasmError::CompileTime(self.limits.compile))
            }
            Err(_) => {
                let said = String::from_utf8_lossy(&output.stderr);
                let last = said.lines().last().unwrap_or("it said nothing");
                Err(WasmError::CompileCrash(format!(
                    "the compiler ended with {}: {last} (is `wasm.compile_memory_mib` too small?)",
                    output.status
                )))
            }
        }
    }
}

/// The child: module on stdin, artifact or error on stdout. It may use so many bytes of memory and seconds of CPU time.
///
/// # Errors
///
/// Where stdin or stdout fail, or the limits can't be set.
pub fn child_main(memory: u64, seconds: u64) -> anyhow::Result<()> {
    let limit = |most| Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    setrlimit(Resource::As, limit(memory))?;
    setrlimit(Resource::Cpu, limit(seconds))?;
    setrlimit(Resource::Core, limit(0))?;
    setrlimit(Resource::Fsize, limit(0))?;
    let mut module = Vec::new();
    std::io::stdin().read_to_end(&mut module)?;
    let result = engine().map_err(|error| error.to_string()).and_then(|engine| {
        let component = to_component(&engine, module)?;
        engine
            .precompile_component(&component)
            .map_err(|error| format!("{error:#}"))
    });
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&codec::encode(&result)?)?;
    stdout.flush()?;
    Ok(())
}

/// A core module becomes a component; the header's layer field tells the two apart (component model binary format). It is looked
/// at before: the encoder takes it for a whole one.
fn to_component(engine: &Engine, module: Vec<u8>) -> Result<Vec<u8>, String> {
    match module.get(..8) {
        Some([0, b'a', b's', b'm', _, _, 1, 0]) => Ok(module),
        Some([0, b'a', b's', b'm', _, _, 0, 0]) => {
            Module::validate(engine, &module).map_err(|error| format!("{error:#}"))?;
            ComponentEncoder::default()
                .module(&module)
                .and_then(|encoder| encoder.validate(true).encode())
                .map_err(|error| format!("{error:#}"))
        }
        _ => Err("it is no WebAssembly (it does not begin with `\\0asm`)".to_owned()),
    }
}

fn check_interface(engine: &Engine, component: &Component) -> Result<(), WasmError> {
    let ty = component.component_type();
    if let Some((name, _)) = ty.imports(engine).find(|(name, _)| *name != LOG_INTERFACE) {
        return Err(WasmError::Import(name.to_owned()));
    }
    let unversioned = INTERFACE.split('@').next().unwrap_or(INTERFACE);
    let mut other = None;
    for (name, _) in ty.exports(engine) {
        if name == INTERFACE {
            return Ok(());
        }
        if name.split('@').next() == Some(unversioned) {
            other = Some(name.to_owned());
        }
    }
    Err(other.map_or(WasmError::NoExport, |found| WasmError::Version { found }))
}
