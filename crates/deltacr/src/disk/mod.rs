//! Images on disk: the processes of a tree, and what of their memory differs from the image before.
//!
//! `docs/format.md` describes the files.

mod load;
mod records;
mod save;
pub(crate) mod stored;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use load::verify as verify_image;

/// The log of the processes.
const PROCESSES: &str = "processes";
/// The log of page maps.
const MAPS: &str = "pages.meta";
/// The file of pages.
const PAGES: &str = "pages.data";

/// What an image on disk holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Living processes.
    pub processes: u64,
    /// Bytes of memory that the image before does not hold.
    pub page_bytes: u64,
}
