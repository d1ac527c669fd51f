//! FUSE over `io_uring`: each processor has a queue, and a thread that is bound to it and serves who runs there.
//!
//! So caller and server share a processor, and neither wakes another one. `/dev/fuse` goes on to bring what needs no answer,
//! and takes notices.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::EventfdFlags;
use rustix::thread::{CpuSet, sched_setaffinity};

use super::desk::{Channel, Service};
use super::init::MAX_WRITE;
use crate::sys::ring::{Event, Ring};

/// Says whether the kernel offers it.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
/// The kernel has a queue for each of these, and waits until all are served.
const PROCESSORS: &str = "/sys/devices/system/cpu/possible";
/// With more processors than this, each volume would have too many threads.
const MAX_QUEUES: u16 = 16;
/// Requests that a queue may have at a time, besides those that wait for something.
const PLACES: usize = 2;

/// Answers that are given by other threads than the one that serves a ring.
#[derive(Debug)]
pub(super) struct Late {
    answers: Mutex<Vec<(usize, Vec<u8>)>>,
    /// Tells the thread.
    event: OwnedFd,
}

impl Late {
    fn new() -> io::Result<Arc<Self>> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Arc::new(Self {
            answers: Mutex::default(),
            event: rustix::event::eventfd(0, flags)?,
        }))
    }

    /// Has the thread that serves the ring give the answer to the request at a place.
    pub(super) fn send(&self, place: usize, message: [&[u8]; 2]) -> io::Result<()> {
        self.answers.lock().push((place, message.concat()));
        rustix::io::write(&self.event, &1_u64.to_ne_bytes())?;
        Ok(())
    }

    fn take(&self) -> Vec<(usize, Vec<u8>)> {
        // If it is not ready, another one has been told of in the meantime.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        std::mem::take(&mut self.answers.lock())
    }
}

/// Whether volumes that are mounted now are served over `io_uring`: the kernel has it (Linux 6.14), it is turned on
/// (`fuse.enable_uring`), and there are not too many processors.
pub fn io_uring_is_offered() -> bool {
    queues().is_some()
}

/// How many queues there are, if requests can come over rings.
pub(super) fn queues() -> Option<u16> {
    let state = std::fs::read_to_string(SWITCH).ok()?;
    let processors = std::fs::read_to_string(PROCESSORS).ok()?;
    let last = processors.trim().rsplit(['-', ',']).next()?;
    let count = last.parse::<u16>().ok()?.checked_add(1)?;
    (state.starts_with('Y') && count <= MAX_QUEUES).then_some(count)
}

/// Serves a queue until the connection ends.
///
/// # Errors
/// If it cannot be served (any more), though the connection goes on.
pub(super) fn serve<S: Service>(service: &S, device: &Arc<OwnedFd>, queue: u16) -> io::Result<()> {
    let mut only = CpuSet::new();
    only.set(queue.into());
    // Elsewhere it serves as well, but slower.
    let _ = sched_setaffinity(None, &only);
    let late = Late::new()?;
    let mut ring = Ring::new(device, queue)?;
    for _ in 0..PLACES {
        ring.add_place(MAX_WRITE)?;
    }
    ring.await_ready(&late.event)?;
    let mut room = S::Room::default();
    loop {
        ring.enter()?;
        while let Some(event) = ring.next() {
            match event {
                Event::Request(place) => answer(service, &mut ring, place, &late, &mut room)?,
                Event::Ready => {
                    for (place, message) in late.take() {
                        ring.answer(place, [&message, &[]])?;
                    }
                    ring.await_ready(&late.event)?;
                }
                Event::Refused(libc::ENOTCONN | libc::ECANCELED) => return Ok(()),
                Event::Refused(error) => return Err(io::Error::from_raw_os_error(error)),
            }
        }
    }
}

fn answer<S: Service>(
    service: &S,
    ring: &mut Ring,
    place: usize,
    late: &Arc<Late>,
    room: &mut S::Room,
) -> io::Result<()> {
    let channel = Channel::of_ring(late, place);
    let request = ring.request(place).ok_or(io::ErrorKind::InvalidData)?;
    match service.answer(request, &channel, room) {
        Some(message) => ring.answer(place, message)?,
        // It keeps its place until it is answered later.
        None => ring.add_place(MAX_WRITE)?,
    }
    service.answered(true, room);
    Ok(())
}
