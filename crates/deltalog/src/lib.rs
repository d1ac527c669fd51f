//! Checksummed files for durable checkpoints. `docs/format.md` describes them byte by byte.
//!
//! - A *record log* is written once, from front to back, and ends with a record that says so: a log that was torn
//!   off is told from a whole one. See [`LogWriter`] and [`LogReader`].
//! - A *block file* holds blocks of 4 KiB and nothing else; their checksums are kept in a log beside it. See
//!   [`BlockWriter`] and [`BlockReader`].
//! - A directory of such files comes into being under its name at once, or not at all. See [`commit`].
//!
//! Whatever was damaged is an error that names the file. No byte is handed out that was not checked.

mod blocks;
mod directory;
mod error;
mod log;

pub use blocks::{BLOCK, BlockReader, BlockWriter};
pub use directory::{commit, sync_directory};
pub use error::{Error, Result};
pub use log::{Format, LogReader, LogWriter, Record};

use twox_hash::XxHash3_64;

/// The checksum of what lies at `place` (a byte offset or a block number), so that what is right but somewhere else is
/// damaged too.
fn checksum(place: u64, bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(place, bytes)
}
