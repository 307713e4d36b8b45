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
    pub outer_destination: u32,
    pub vni: u32,
    /// Whether what became of each packet is counted: [`Watch`].
    pub watch: u32,
    zero: u32,
}

/// A way that packets may go, and how many went it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Watched {
    ifindex: u32,
    mac: [u8; 4],
    source: [u8; 4],
    destination: [u8; 4],
    packets: u64,
}

impl Watched {
    /// From one pod to another, which is behind this interface.
    pub fn new(ifindex: u32, mac: [u8; 6], source: [u8; 4], destination: [u8; 4]) -> Self {
        Self {
            ifindex,
            mac: [mac[2], mac[3], mac[4], mac[5]],
            source,
            destination,
            packets: 0,
        }
    }
}

/// What is counted of a [`Stage`]'s packets, but for the last one of each row.
pub struct Watch {
    ways: Array<MapData, Watched>,
    stray: Array<MapData, u64>,
}

impl Watch {
    /// Packets that went one of the ways.
    pub fn packets(&self, way: u32) -> u64 {
        self.ways.get(&way, 0).unwrap().packets
    }

    /// Packets that went any other way.
    pub fn stray(&self) -> u64 {
        self.stray.get(&0, 0).unwrap()
    }
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
            outer_destination: 0,
            vni: 0,
            watch: 0,
            zero: 0,
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

    /// Watches what goes these ways from now on, and what goes elsewhere.
    pub fn watch(&mut self, ways: [Watched; 4]) -> anyhow::Result<Watch> {
        let mut map: Array<MapData, Watched> = self.ebpf.take_map("WATCHED").context("no map")?.try_into()?;
        for (index, watched) in (0..).zip(ways) {
            map.set(index, watched, 0)?;
        }
        Ok(Watch {
            ways: map,
            stray: self.ebpf.take_map("STRAY").context("no map")?.try_into()?,
        })
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
