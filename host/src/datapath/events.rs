//! Reports of the programs, from the ring buffer.

use super::DatapathError;
use abi::Event;
use aya::maps::{MapData, RingBuf};
use tokio::io::unix::AsyncFd;

/// Reports of the programs, as they come.
pub struct EventStream(AsyncFd<RingBuf<MapData>>);

impl EventStream {
    pub(super) fn new(ring: RingBuf<MapData>) -> Result<Self, DatapathError> {
        // SAFETY: the ring buffer owns the descriptor of its map, which is open and the same until it is dropped.
        let registered = unsafe { AsyncFd::register(ring) };
        registered
            .map(Self)
            .map_err(|error| DatapathError::io("polling the ring buffer")(error.into()))
    }

    /// Waits for reports and hands them to `sink`.
    ///
    /// # Errors
    ///
    /// Where the ring buffer can't be polled.
    pub async fn next(&mut self, mut sink: impl FnMut(Event)) -> std::io::Result<()> {
        let mut guard = self.0.readable_mut().await?;
        let ring = guard.get_inner_mut();
        while let Some(item) = ring.next() {
            if let Some(bytes) = item.first_chunk::<{ size_of::<Event>() }>() {
                // SAFETY: an event is integers without padding, written whole by our own program; the ring buffer
                // aligns its items to 8 bytes, but the copy does not depend on that.
                sink(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) });
            }
        }
        guard.clear_ready();
        Ok(())
    }
}
