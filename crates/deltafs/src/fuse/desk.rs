//! Taking requests from a channel of a connection, one after another.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::init::{self, MAX_WRITE};

/// Room for the header and the arguments before the data of a write.
const ARGS: usize = 4096;

/// What answers the requests of a connection.
pub trait Service: Send + Sync + 'static {
    /// What a thread keeps from one request to the next.
    type Room: Default;

    /// Answers one request, which is all of `request`, by a write to the channel that it came from.
    fn answer(&self, request: &[u8], channel: &Arc<OwnedFd>, room: &mut Self::Room);
}

/// Where a thread answers requests.
#[derive(Debug)]
pub(super) struct Desk<'a, S: Service> {
    service: &'a S,
    channel: &'a Arc<OwnedFd>,
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
            if !init::answer(bytes, self.channel) {
                self.service.answer(bytes, self.channel, &mut self.room);
            }
            duty.done();
        }
        Left::Free
    }
}
