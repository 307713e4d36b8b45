//! Running a program on a packet, and what came of it.

use crate::{
    bench::Bench,
    frame::{Frame, NODE},
};
use abi::{
    DropReason, Event, Hook, Identity, Path,
    event::{ALLOWED, Counter},
    map,
};
use aya::{
    TestRunOptions,
    maps::{PerCpuArray, ProgramArray},
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
const GSO_SIZE: usize = 176;

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

/// A packet on its way into a program.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub hook: Hook,
    pub frame: Frame,
    pub ifindex: u32,
    /// Interface that it came in by before; 0 where it began on this node.
    pub came_in_by: u32,
    /// Remote node and VNI, where it came from the tunnel; and the address that it was sent to.
    pub outer: Option<([u8; 4], Identity)>,
    pub outer_destination: [u8; 4],
    /// Bytes of data in each of the packets that it stands for; 0 for one that stands for itself.
    pub segment: u32,
}

impl Arrival {
    pub fn new(hook: Hook, frame: &Frame, ifindex: u32) -> Self {
        Self {
            hook,
            frame: frame.clone(),
            ifindex,
            came_in_by: 0,
            outer: None,
            outer_destination: NODE,
            segment: 0,
        }
    }
}

impl Bench {
    /// Packets counted, by reason and by path.
    pub fn counted(&self) -> [Vec<u64>; 2] {
        [
            self.counts(map::DROPS, abi::drop::DROP_REASONS),
            self.counts(map::FORWARDED, abi::event::PATHS),
        ]
    }

    fn counts(&self, name: &str, length: u32) -> Vec<u64> {
        let map: PerCpuArray<_, Counter> = self.loaded.ebpf.map(name).unwrap().try_into().unwrap();
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
        let mut last = None;
        while let Some(item) = self.loaded.events.next() {
            assert_eq!(item.len(), size_of::<Event>());
            // SAFETY: an event is integers without padding, and this is one, whole.
            last = Some(unsafe { std::ptr::read_unaligned(item.as_ptr().cast()) });
        }
        last
    }

    pub fn from_pod_a(&mut self, frame: &Frame) -> Outcome {
        self.run(&Arrival::new(Hook::FromPod, frame, self.pod_a))
    }

    pub fn from_pod_b(&mut self, frame: &Frame) -> Outcome {
        self.run(&Arrival::new(Hook::FromPod, frame, self.pod_b))
    }

    pub fn from_overlay(&mut self, frame: &Frame, outer: [u8; 4], vni: Identity) -> Outcome {
        self.run(&Arrival {
            outer: Some((outer, vni)),
            ..Arrival::new(Hook::FromOverlay, frame, self.vxlan)
        })
    }

    pub fn from_netdev(&mut self, frame: &Frame) -> Outcome {
        self.run(&Arrival {
            came_in_by: self.underlay,
            ..Arrival::new(Hook::FromNetdev, frame, self.underlay)
        })
    }

    pub fn to_pod(&mut self, frame: &Frame, came_in_by: u32) -> Outcome {
        self.run(&Arrival {
            came_in_by,
            ..Arrival::new(Hook::ToPod, frame, self.pod_a)
        })
    }

    /// Runs a program on a packet, and checks that exactly the counter of the outcome says so.
    pub fn run(&mut self, arrival: &Arrival) -> Outcome {
        let before = self.counted();
        let netns = self.netns.name().to_owned();
        let outcome = in_netns(&netns, || self.run_here(arrival)).unwrap();
        let after = self.counted();
        let moved = |index: usize| -> Vec<usize> {
            let pairs = before[index].iter().zip(&after[index]).enumerate();
            pairs
                .filter(|(_, (before, after))| before != after)
                .map(|(index, _)| index)
                .collect()
        };
        let expected: [Vec<usize>; 2] = match &outcome {
            Outcome::Dropped(reason) | Outcome::Told(reason, _) => [vec![*reason as usize], vec![]],
            Outcome::Sent { path, .. } => [vec![], vec![*path as usize]],
            Outcome::Passed => [vec![], vec![]],
        };
        assert_eq!(
            [moved(0), moved(1)],
            expected,
            "a packet counts once, as what became of it"
        );
        outcome
    }

    /// The same in the bench's namespace, without a look at the counters.
    pub fn run_here(&mut self, arrival: &Arrival) -> Outcome {
        let Arrival { hook, frame, .. } = arrival;
        let mut ctx = [0; SK_BUFF];
        let mut set = |offset: usize, value: u32| ctx[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        set(IFINDEX, arrival.ifindex);
        set(INGRESS_IFINDEX, arrival.came_in_by);
        set(GSO_SIZE, arrival.segment);
        if let Some((source, vni)) = arrival.outer {
            set(CB, u32::from_be_bytes(source));
            set(CB + 4, vni.0);
            set(CB + 8, u32::from_be_bytes(arrival.outer_destination));
        }
        if self.loaded.target != Some(*hook) {
            let fd = self.program(*hook);
            let mut targets = ProgramArray::try_from(self.loaded.entry.map_mut("TARGET").unwrap()).unwrap();
            targets.set(0, &fd, 0).unwrap();
            self.loaded.target = Some(*hook);
        }
        self.last_event();
        let entry: &SchedClassifier = self.loaded.entry.program("packet_table").unwrap().try_into().unwrap();
        let mut out = vec![0; 4096];
        let mut ctx_out = [0; SK_BUFF];
        let result = entry
            .test_run(TestRunOptions {
                data_in: Some(&frame.0),
                data_out: Some(&mut out),
                ctx_in: Some(&ctx),
                ctx_out: Some(&mut ctx_out),
                ..TestRunOptions::default()
            })
            .unwrap();
        out.truncate(result.data_size_out as usize);
        let event = self.last_event();
        if let Some(event) = event.filter(|event| event.reason != ALLOWED) {
            let reason = DropReason::from_number(event.reason).unwrap();
            assert_eq!((event.hook, event.length as usize), (*hook as u8, frame.0.len()));
            if result.return_value == REDIRECT {
                return Outcome::Told(reason, Frame(out));
            }
            assert_eq!(result.return_value, SHOT);
            return Outcome::Dropped(reason);
        }
        // What is sent says where to.
        let recorded = word(&ctx_out, CB);
        if recorded == 0 {
            assert_eq!((*hook, result.return_value, event), (Hook::FromNetdev, UNSPEC, None));
            assert_eq!(out, frame.0, "what is nobody's business is not touched");
            return Outcome::Passed;
        }
        let path = Path::ALL[recorded as usize - 1];
        let ifindex = word(&ctx_out, CB + 4);
        assert_eq!(
            result.return_value,
            if ifindex == 0 { UNSPEC } else { REDIRECT },
            "{hook:?} {path:?} {frame:?} {event:?}"
        );
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
        assert_eq!(outcome.reason(), *reason, "{name}: {outcome:?}");
    }
}
