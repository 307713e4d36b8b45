//! Security identities: 24 bits, because that is what a VXLAN network identifier holds (RFC 7348, section 5).

/// A numeric security identity: the tenant in the high bits, the number within the tenant in the low ones.
///
/// Zero is never valid. Tenant 0 holds the reserved identities, whose numbers are Cilium's.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity(pub u32);

/// The first number that is given out; those before it are kept for reserved identities.
pub const FIRST_ALLOCATED: u32 = 16;

/// Bits of an identity, and of a VNI.
pub const IDENTITY_BITS: u32 = 24;

impl Identity {
    /// No identity: never valid in a map or a packet.
    pub const NONE: Self = Self(0);
    /// The node that a program runs on.
    pub const HOST: Self = Self(1);
    /// Everything outside the cluster.
    pub const WORLD: Self = Self(2);
    /// Health checks.
    pub const HEALTH: Self = Self(4);
    /// A pod that no policy module has identified yet.
    pub const INIT: Self = Self(5);
    /// Any other node of the cluster.
    pub const REMOTE_NODE: Self = Self(6);

    /// The reserved identities with their names.
    pub const RESERVED: [(Self, &'static str); 5] = [
        (Self::HOST, "host"),
        (Self::WORLD, "world"),
        (Self::HEALTH, "health"),
        (Self::INIT, "init"),
        (Self::REMOTE_NODE, "remote-node"),
    ];

    /// Whether it was given out, to pods or to networks, and is not one of the reserved ones: no other may arrive as a
    /// VNI. That no network's does is the ipcache's to see: it holds pods.
    #[inline(always)]
    #[must_use]
    pub const fn is_allocated(self) -> bool {
        self.0 >= FIRST_ALLOCATED && self.0 < 1 << IDENTITY_BITS
    }

    /// Name of a reserved identity.
    #[must_use]
    pub fn reserved_name(self) -> Option<&'static str> {
        Self::RESERVED
            .iter()
            .find(|(identity, _)| *identity == self)
            .map(|(_, name)| *name)
    }
}

#[cfg(feature = "user")]
impl std::fmt::Display for Identity {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.reserved_name() {
            Some(name) => out.write_str(name),
            None => write!(out, "{}", self.0),
        }
    }
}

const _: () = assert!(size_of::<Identity>() == 4);
