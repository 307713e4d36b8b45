//! What makes packets for the programs, many in a row.

use crate::frame::Frame;
use abi::AddressKey;
use anyhow::{Context, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod, TestRunOptions,
    maps::{Array, HashMap, MapData, ProgramArray},
    programs::{ProgramFd, SchedClassifier, TestRun},
};

/// Packets in a row: short, so that a round has all paths side by side.
pub const REPEAT: u32 = 1000;
/// Words of a frame; as in `ebpf/src/yardstick.rs`, like all of [`Replay`].
const WORDS: usize = 11;
/// Size of the structure that a test run is given (`struct __sk_buff`, `include/uapi/linux/bpf.h`), and a field in it.
const SK_BUFF: usize = 192;
const IFINDEX: usize = 40;

/// What packets are made of.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Replay {
    frame: [u64; WORDS],
    count: u64,
    pub source_ports: u32,
    pub destination_ports: u32,
    pub destinations: u32,
    pub outer: u32,
    pub vni: u32,
    /// Whether what became of each packet is counted: [`Watched`].
    pub watch: u32,
}

/// Where packets may go, and how many went there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Watched {
    pub ifindex: u32,
    /// The first four bytes of the MAC of the pod behind it, as they are in memory.
    pub mac: u32,
    pub delivered: u64,
    /// Packets to that interface with another pod's MAC.
    pub torn: u64,
}

// SAFETY: integers without padding, for which any bytes are a value.
unsafe impl Pod for Watched {}

// SAFETY: integers without padding, for which any bytes are a value.
unsafe impl Pod for Replay {}

impl Replay {
    pub fn of(frame: &Frame) -> Self {
        let mut bytes = frame.0.clone();
        bytes.resize(WORDS * 8, 0);
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        }
        Self {
            frame: words,
            count: 0,
            source_ports: 0,
            destination_ports: 0,
            destinations: 0,
            outer: 0,
            vni: 0,
            watch: 0,
        }
    }
}

/// The programs of `ebpf/src/yardstick.rs`.
pub struct Stage {
    ebpf: Ebpf,
}

impl Stage {
    pub fn new() -> anyhow::Result<Self> {
        let path = toolchain::target_dir().join("bpf/bpfel-unknown-none/release/yardstick");
        let mut ebpf = EbpfLoader::new().load_file(path)?;
        for (_, program) in ebpf.programs_mut() {
            let program: &mut SchedClassifier = program.try_into()?;
            program.load()?;
        }
        let mut hot: HashMap<_, [u32; 4], u64> = ebpf.map_mut("HOT").context("no map")?.try_into()?;
        for number in 0..16 {
            hot.insert([number, 0, 0, 7], u64::from(number), 0)?;
        }
        let mut addresses: HashMap<_, AddressKey, [u64; 10]> =
            ebpf.map_mut("ADDRESSES").context("no map")?.try_into()?;
        for number in 0..60_000_u32 {
            addresses.insert(AddressKey::v4((0x0a00_0000 | number).to_be_bytes()), [0; 10], 0)?;
        }
        Ok(Self { ebpf })
    }

    /// A program of its own.
    pub fn program(&self, name: &str) -> anyhow::Result<&SchedClassifier> {
        Ok(self.ebpf.program(name).context("no program")?.try_into()?)
    }

    /// Says what packets are made of from now on.
    pub fn make(&mut self, replay: &Replay) -> anyhow::Result<()> {
        let mut map: Array<_, Replay> = self.ebpf.map_mut("REPLAY").context("no map")?.try_into()?;
        Ok(map.set(0, replay, 0)?)
    }

    /// What they are made of: where the turns go on.
    pub fn made(&self) -> anyhow::Result<Replay> {
        let map: Array<_, Replay> = self.ebpf.map("REPLAY").context("no map")?.try_into()?;
        Ok(map.get(&0, 0)?)
    }

    /// Says which program gets them.
    pub fn target(&mut self, program: &ProgramFd) -> anyhow::Result<()> {
        let mut targets: ProgramArray<_> = self.ebpf.map_mut("TARGET").context("no map")?.try_into()?;
        Ok(targets.set(0, program, 0)?)
    }

    /// Watches two interfaces from now on; the answer is where it is counted what goes there.
    pub fn watch(&mut self, watched: [Watched; 2]) -> anyhow::Result<Array<MapData, Watched>> {
        let mut map: Array<MapData, Watched> = self.ebpf.take_map("WATCHED").context("no map")?.try_into()?;
        for (index, watched) in (0..).zip(watched) {
            map.set(index, watched, 0)?;
        }
        Ok(map)
    }

    /// Nanoseconds a packet, of so many; the last one must have this answer.
    pub fn run(&self, name: &str, ifindex: u32, repeat: u32, returns: u32) -> anyhow::Result<f64> {
        let (taken, answer) = self.run_any(name, ifindex, repeat)?;
        ensure!(
            answer == returns,
            "{name} returned {} in place of {returns}",
            answer.cast_signed()
        );
        Ok(taken)
    }

    /// The same, with whatever answer.
    pub fn run_any(&self, name: &str, ifindex: u32, repeat: u32) -> anyhow::Result<(f64, u32)> {
        let mut ctx = [0; SK_BUFF];
        ctx[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        // The kernel takes the protocol from what it is given at first.
        let made = self.made()?;
        let frame: Vec<u8> = made.frame.iter().flat_map(|word| word.to_le_bytes()).collect();
        let result = self.program(name)?.test_run(TestRunOptions {
            data_in: Some(&frame),
            ctx_in: Some(&ctx),
            repeat,
            ..TestRunOptions::default()
        })?;
        #[expect(clippy::cast_precision_loss, reason = "nanoseconds of one packet")]
        Ok((result.duration.as_nanos() as f64, result.return_value))
    }
}
