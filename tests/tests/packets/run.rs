//! Running a program on a packet, and what came of it.

use super::{bench::Bench, frame::Frame};
use abi::{DropReason, Event, Hook, Identity, Path, event::Counter, map};
use aya::{
    TestRunOptions,
    maps::{PerCpuArray, ProgramArray, RingBuf},
    programs::{SchedClassifier, TestRun},
};
use harness::in_netns;

/// `TC_ACT_*` (`include/uapi/linux/pkt_cls.h`).
const UNSPEC: u32 = u32::MAX;
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

/// Offsets in `struct __sk_buff` (`include/uapi/linux/bpf.h`).
const SK_BUFF: usize = 192;
const INGRESS_IFINDEX: usize = 36;
const IFINDEX: usize = 40;
const CB: usize = 48;

fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

/// What the programs did with one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Dropped(DropReason),
    /// Nobody's business here.
    Passed,
    /// Dropped, and the sender was told with this.
    Told(DropReason, Frame),
    Sent {
        path: Path,
        /// Interface that it was redirected to; 0 where it went on by itself.
        ifindex: u32,
        /// VNI and remote node, where it went into the tunnel.
        tunnel: Option<(Identity, [u8; 4])>,
        frame: Frame,
    },
}

impl Outcome {
    /// The path of a packet that was not dropped.
    pub fn path(&self) -> Path {
        match self {
            Self::Sent { path, .. } => *path,
            Self::Dropped(reason) | Self::Told(reason, _) => panic!("dropped: {}", reason.name()),
            Self::Passed => panic!("passed"),
        }
    }

    /// The reason of a packet that was dropped.
    pub fn reason(&self) -> DropReason {
        match self {
            Self::Dropped(reason) | Self::Told(reason, _) => *reason,
            Self::Sent { path, .. } => panic!("sent: {}", path.name()),
            Self::Passed => panic!("passed"),
        }
    }
}

#[expect(clippy::wrong_self_convention, reason = "methods are named after the hooks")]
impl Bench {
    fn drops(&self) -> Vec<u64> {
        self.counts(map::DROPS, abi::drop::DROP_REASONS)
    }

    fn counts(&self, name: &str, length: u32) -> Vec<u64> {
        let map: PerCpuArray<_, Counter> = self.ebpf.map(name).unwrap().try_into().unwrap();
        let sum = |index| {
            map.get(&index, 0)
                .unwrap()
                .iter()
                .map(|counter: &Counter| counter.packets)
                .sum()
        };
        (0..length).map(sum).collect()
    }

    fn last_event(&mut self) -> Option<Event> {
        let mut ring = RingBuf::try_from(self.ebpf.map_mut(map::EVENTS).unwrap()).unwrap();
        let mut last = None;
        while let Some(item) = ring.next() {
            assert_eq!(item.len(), size_of::<Event>());
            // SAFETY: an event is integers without padding, and this is one, whole.
            last = Some(unsafe { std::ptr::read_unaligned(item.as_ptr().cast()) });
        }
        last
    }

    pub fn from_pod_a(&mut self, frame: &Frame) -> Outcome {
        let ifindex = self.pod_a;
        self.run(Hook::FromPod, frame, ifindex, 0, None)
    }

    pub fn from_pod_b(&mut self, frame: &Frame) -> Outcome {
        let ifindex = self.pod_b;
        self.run(Hook::FromPod, frame, ifindex, 0, None)
    }

    pub fn from_overlay(&mut self, frame: &Frame, outer: [u8; 4], vni: Identity) -> Outcome {
        let ifindex = self.vxlan;
        self.run(Hook::FromOverlay, frame, ifindex, 0, Some((outer, vni)))
    }

    pub fn from_netdev(&mut self, frame: &Frame) -> Outcome {
        let ifindex = self.underlay;
        self.run(Hook::FromNetdev, frame, ifindex, ifindex, None)
    }

    pub fn to_pod(&mut self, frame: &Frame, came_in_by: u32) -> Outcome {
        let ifindex = self.pod_a;
        self.run(Hook::ToPod, frame, ifindex, came_in_by, None)
    }

    /// Runs a program on a packet, and checks that exactly the counter and the report of the outcome say so.
    pub fn run(
        &mut self,
        hook: Hook,
        frame: &Frame,
        ifindex: u32,
        came_in_by: u32,
        outer: Option<([u8; 4], Identity)>,
    ) -> Outcome {
        let mut ctx = [0; SK_BUFF];
        let mut set = |offset: usize, value: u32| ctx[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        set(IFINDEX, ifindex);
        set(INGRESS_IFINDEX, came_in_by);
        if let Some((source, vni)) = outer {
            set(CB, u32::from_be_bytes(source));
            set(CB + 4, vni.0);
        }
        let target: &SchedClassifier = self.ebpf.program(hook.name()).unwrap().try_into().unwrap();
        let fd = target.fd().unwrap().try_clone().unwrap();
        let mut targets = ProgramArray::try_from(self.entry.map_mut("TARGET").unwrap()).unwrap();
        targets.set(0, &fd, 0).unwrap();
        let (drops, paths) = (self.drops(), self.counts(map::FORWARDED, abi::event::PATHS));
        self.last_event();

        let entry: &SchedClassifier = self.entry.program("packet_table").unwrap().try_into().unwrap();
        let mut out = vec![0; 4096];
        let mut ctx_out = [0; SK_BUFF];
        let result = in_netns(self.netns.name(), || {
            entry.test_run(TestRunOptions {
                data_in: Some(&frame.0),
                data_out: Some(&mut out),
                ctx_in: Some(&ctx),
                ctx_out: Some(&mut ctx_out),
                ..TestRunOptions::default()
            })
        })
        .unwrap()
        .unwrap();
        out.truncate(result.data_size_out as usize);

        let moved = |before: &[u64], after: &[u64]| -> Vec<usize> {
            let pairs = before.iter().zip(after).enumerate();
            pairs
                .filter(|(_, (before, after))| before != after)
                .map(|(index, _)| index)
                .collect()
        };
        let dropped = moved(&drops, &self.drops());
        let forwarded = moved(&paths, &self.counts(map::FORWARDED, abi::event::PATHS));
        let event = self.last_event();
        if !dropped.is_empty() {
            assert_eq!(
                (dropped.len(), forwarded.len()),
                (1, 0),
                "a drop counts once, as a drop"
            );
            let reason = DropReason::from_number(u8::try_from(dropped[0]).unwrap()).unwrap();
            let event = event.expect("a drop is reported");
            assert_eq!((event.reason, event.hook), (reason as u8, hook as u8));
            assert_eq!(event.length as usize, frame.0.len());
            if result.return_value == REDIRECT {
                return Outcome::Told(reason, Frame(out));
            }
            assert_eq!(result.return_value, SHOT);
            return Outcome::Dropped(reason);
        }
        if hook == Hook::FromNetdev && forwarded.is_empty() {
            assert_eq!((result.return_value, event), (UNSPEC, None));
            assert_eq!(out, frame.0, "what is nobody's business is not touched");
            return Outcome::Passed;
        }
        assert_eq!(
            (dropped.len(), forwarded.len()),
            (0, 1),
            "a packet that is sent counts once, by its path"
        );
        let path = Path::ALL[word(&ctx_out, CB) as usize - 1];
        assert_eq!(forwarded[0], path as usize);
        let ifindex = word(&ctx_out, CB + 4);
        assert_eq!(result.return_value, if ifindex == 0 { UNSPEC } else { REDIRECT });
        let remote = word(&ctx_out, CB + 12);
        Outcome::Sent {
            path,
            ifindex,
            tunnel: (remote != 0).then(|| (Identity(word(&ctx_out, CB + 8)), remote.to_be_bytes())),
            frame: Frame(out),
        }
    }
}

/// What is wrong with a packet, in words, and how it is sent.
pub type BadPacket = (DropReason, &'static str, fn(&mut Bench) -> Outcome);

/// Sends each packet of a table, none of which may live on another's entries.
pub fn every_one_is_dropped_for_its_own_reason(table: &[BadPacket]) {
    let mut bench = Bench::new();
    for (reason, name, run) in table {
        bench.reset();
        let outcome = run(&mut bench);
        assert_eq!(outcome, Outcome::Dropped(*reason), "{name}");
    }
}
