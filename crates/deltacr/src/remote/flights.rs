//! Batches that threads of a process run while the engine does other things.

use std::io;

use super::{CAPACITY, Outcome, Remote, STUB_ROOM, Standing};
use crate::ids::HostPid;
use crate::sys::process;

/// A batch that a thread of the process runs while the engine does other things.
pub(super) struct Flight {
    tid: HostPid,
    /// Where in the area it is.
    at: u64,
    len: usize,
    state: FlightState,
}

enum FlightState {
    Under,
    /// It has come to its end, and brought this.
    Landed(Vec<u8>),
    /// What it brought was taken, or it failed.
    Over,
}

/// Names a batch that was launched.
#[derive(Debug)]
pub(crate) struct FlightId(usize);

impl Remote {
    /// Sets a thread going on a batch, and does not wait for its end; other threads may run theirs meanwhile. `None` if the
    /// area has no room for it beside those.
    pub(crate) fn launch(
        &mut self,
        tid: HostPid,
        batch: &Standing,
    ) -> io::Result<Option<FlightId>> {
        let begin = self.map_area()? + STUB_ROOM;
        let last = self.flights.last();
        let at = last.map_or(begin, |f| (f.at + f.len as u64).next_multiple_of(64));
        if at + batch.encoded_len() as u64 > begin + CAPACITY as u64 {
            return Ok(None);
        }
        let len = self.set_going(tid, &batch.lay(at))?;
        self.flights.push(Flight {
            tid,
            at,
            len,
            state: FlightState::Under,
        });
        Ok(Some(FlightId(self.flights.len() - 1)))
    }

    /// What a launched batch brought; waits for its end. Once for each.
    pub(crate) fn land(&mut self, flight: &FlightId, batch: &Standing) -> io::Result<Outcome> {
        self.await_landing(flight.0)?;
        match std::mem::replace(&mut self.flights[flight.0].state, FlightState::Over) {
            FlightState::Landed(bytes) => Ok(batch.outcome(bytes)),
            FlightState::Under | FlightState::Over => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn await_landing(&mut self, index: usize) -> io::Result<()> {
        let flight = &mut self.flights[index];
        if !matches!(flight.state, FlightState::Under) {
            return Ok(());
        }
        let (tid, at, len) = (flight.tid, flight.at, flight.len);
        flight.state = FlightState::Over;
        self.finish(tid)?;
        let mut bytes = vec![0; len];
        process::read_memory(self.host, at, &mut bytes)?;
        self.flights[index].state = FlightState::Landed(bytes);
        Ok(())
    }

    /// Waits for all launched batches, and keeps what they brought.
    pub(crate) fn land_all(&mut self) -> io::Result<()> {
        (0..self.flights.len()).try_for_each(|index| self.await_landing(index))
    }

    /// Makes room for further launches. What was not taken by [`Remote::land`] is dropped.
    pub(crate) fn clear_flights(&mut self) -> io::Result<()> {
        let landed = self.land_all();
        self.flights.clear();
        landed
    }
}
