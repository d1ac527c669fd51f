//! Taking requests from a channel of a connection, one after another.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::init::MAX_WRITE;
use super::ring::Late;

/// Room for the header and the arguments before the data of a write.
const ARGS: usize = 4096;

/// What answers the requests of a connection.
pub trait Service: Send + Sync + 'static {
    /// What a thread keeps from one request to the next.
    type Room: Default;

    /// The answer to one request, which is all of `request`: a header and what follows, in two pieces of which the first has the header. None if
    /// nobody waits for an answer, or it is sent to the channel later.
    fn answer<'a>(
        &'a self,
        request: &[u8],
        channel: &Channel,
        room: &'a mut Self::Room,
    ) -> Option<[&'a [u8]; 2]>;

    /// The last request is done with. Tells whether the kernel took its answer.
    fn answered(&self, _taken: bool, _room: &mut Self::Room) {}
}

/// Where a request came from, and where its answer goes.
#[derive(Clone, Debug)]
pub struct Channel(Way);

#[derive(Clone, Debug)]
enum Way {
    /// A descriptor of `/dev/fuse`.
    Device(Arc<OwnedFd>),
    /// A place of a ring, which another thread may serve.
    Ring(Arc<Late>, usize),
}

impl Channel {
    pub(super) fn of_device(device: &Arc<OwnedFd>) -> Self {
        Self(Way::Device(Arc::clone(device)))
    }

    pub(super) fn of_ring(late: &Arc<Late>, place: usize) -> Self {
        Self(Way::Ring(Arc::clone(late), place))
    }

    /// Sends an answer, as [`Service::answer`] gives it.
    pub(super) fn send(&self, message: [&[u8]; 2]) -> io::Result<()> {
        match (&self.0, message) {
            (Way::Device(device), [all, []]) => rustix::io::write(device, all)?,
            (Way::Device(device), parts) => rustix::io::writev(device, &parts.map(IoSlice::new))?,
            (Way::Ring(late, place), _) => return late.send(*place, message),
        };
        Ok(())
    }
}

/// Where a thread answers requests.
#[derive(Debug)]
pub(super) struct Desk<'a, S: Service> {
    service: &'a S,
    channel: &'a OwnedFd,
    /// The same.
    origin: Channel,
    buffer: Vec<u8>,
    room: S::Room,
}

/// How a thread goes about requests.
pub(super) trait Duty {
    /// Whether it is to wait for one more.
    fn stays(&mut self, channel: &OwnedFd) -> bool;

    /// It has got this one.
    fn begin(&mut self, channel: &OwnedFd, request: &[u8]);

    /// It has answered it.
    fn done(&mut self);
}

/// Why a thread does not serve any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// It is not needed.
    Free,
    /// There will be no request any more.
    Closed,
}

impl<'a, S: Service> Desk<'a, S> {
    pub(super) fn new(service: &'a S, channel: &'a Arc<OwnedFd>) -> Self {
        Self {
            service,
            channel,
            origin: Channel::of_device(channel),
            buffer: vec![0; MAX_WRITE + ARGS],
            room: S::Room::default(),
        }
    }

    /// Serves requests as long as the duty says so.
    pub(super) fn serve(&mut self, duty: &mut impl Duty) -> Left {
        while duty.stays(self.channel) {
            let len = match rustix::io::read(self.channel, &mut self.buffer[..]) {
                Ok(len) => len,
                // The request was taken back, or the read was interrupted.
                Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
                Err(error) => {
                    if !matches!(error, Errno::NODEV | Errno::CONNABORTED) {
                        tracing::error!(%error, "a thread of a DeltaFS mount cannot read requests and ends");
                    }
                    return Left::Closed;
                }
            };
            let bytes = &self.buffer[..len];
            duty.begin(self.channel, bytes);
            let message = self.service.answer(bytes, &self.origin, &mut self.room);
            let taken = message.is_none_or(|message| self.origin.send(message).is_ok());
            self.service.answered(taken, &mut self.room);
            duty.done();
        }
        Left::Free
    }
}
