//! Who reads a session's output, and how far behind: a command waits for its readers, as it would on a pipe.

use std::collections::BTreeMap;

use crate::log::CAPACITY;

/// How far a reader may lag behind before the command has to wait for it, in bytes. Well below what the log keeps, as
/// what is in the pipes already comes on top.
const LAG: u64 = CAPACITY / 2;

/// A reader, as [`Readers`] knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ReaderId(u64);

/// The readers of one session.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    last: u64,
    places: BTreeMap<ReaderId, Place>,
    /// The streams are not watched, for a reader lags behind.
    pub(crate) paused: bool,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    epoch: u64,
    offset: u64,
}

impl Readers {
    /// A reader that begins at `offset`, in a future of the session.
    pub(crate) fn add(&mut self, epoch: u64, offset: u64) -> ReaderId {
        self.last += 1;
        let id = ReaderId(self.last);
        self.places.insert(id, Place { epoch, offset });
        id
    }

    /// It has read up to `offset`.
    pub(crate) fn moved(&mut self, id: ReaderId, offset: u64) {
        if let Some(place) = self.places.get_mut(&id) {
            place.offset = offset;
        }
    }

    /// It does not read any more.
    pub(crate) fn remove(&mut self, id: ReaderId) {
        self.places.remove(&id);
    }

    /// Whether one lags too far behind `end`. Readers of another epoch are told that theirs is over, nothing else.
    pub(crate) fn lag(&self, epoch: u64, end: u64) -> bool {
        self.places
            .values()
            .any(|place| place.epoch == epoch && end.saturating_sub(place.offset) > LAG)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_waits_for_the_slowest_reader_of_its_epoch_alone() {
        let mut readers = Readers::default();
        let end = 2 * LAG;
        assert!(!readers.lag(0, end), "nobody reads");
        let slow = readers.add(0, 0);
        let fast = readers.add(0, end);
        assert!(readers.lag(0, end));
        assert!(!readers.lag(1, end), "rolled back since");
        readers.moved(slow, LAG);
        assert!(!readers.lag(0, end));
        readers.moved(fast, 0);
        readers.remove(fast);
        assert!(!readers.lag(0, end));
    }
}
