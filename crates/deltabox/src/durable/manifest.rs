//! What a durable checkpoint is, apart from what it holds.

use std::path::Path;

use deltacr::ImageInfo;
use deltafs::LayerInfo;
use deltalog::{Format, LogReader, LogWriter};
use serde::{Deserialize, Serialize};

use super::MANIFEST;
use crate::clocks::Reading;
use crate::report::CheckpointId;
use crate::spec::SandboxSpec;

const FORMAT: Format = Format {
    kind: *b"MANI",
    version: 1,
};

/// The one record: a [`Manifest`] in JSON.
const WHOLE: u32 = 1;

/// See the module's description.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) id: CheckpointId,
    /// The checkpoint that it differs from.
    pub(crate) parent: Option<CheckpointId>,
    pub(crate) message: Option<String>,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) processes: usize,
    pub(crate) origin: Origin,
    /// The sandbox's restore epoch when it was written.
    pub(crate) epoch: u64,
    /// The kernel that its processes ran under.
    pub(crate) kernel: String,
    /// The host's clocks when it was written, if that was taken down.
    pub(crate) clocks: Option<Reading>,
    pub(crate) files: LayerInfo,
    pub(crate) image: ImageInfo,
}

/// The sandbox that a checkpoint is of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Origin {
    pub(crate) sandbox: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// The host's id of its root.
    pub(crate) first_id: u32,
    pub(crate) spec: SandboxSpec,
}

impl Manifest {
    /// What the checkpoint takes of the disk, but for what is small.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.data_bytes + self.image.page_bytes
    }

    /// Writes it into a checkpoint's directory.
    pub(crate) fn write(&self, dir: &Path) -> deltalog::Result<()> {
        let path = dir.join(MANIFEST);
        let mut log = LogWriter::create(&path, FORMAT)?;
        let json = serde_json::to_vec_pretty(self).map_err(|e| deltalog::Error::Encode {
            path,
            why: e.to_string(),
        })?;
        log.append(WHOLE, &json)?;
        log.finish()?;
        Ok(())
    }

    /// Reads that of a checkpoint's directory.
    pub(crate) fn read(dir: &Path) -> deltalog::Result<Self> {
        let path = dir.join(MANIFEST);
        let mut log = LogReader::open(&path, FORMAT)?;
        let record = log.next_record()?.filter(|record| record.tag == WHOLE);
        let Some(record) = record else {
            return Err(log.damaged("its record is missing"));
        };
        let manifest = serde_json::from_slice(&record.payload);
        let manifest = manifest.map_err(|e| record.damaged(e.to_string()))?;
        match log.next_record()? {
            None => Ok(manifest),
            Some(more) => Err(more.damaged("it has more than one record")),
        }
    }
}

/// The release of the kernel that runs.
pub(crate) fn kernel() -> String {
    let name = rustix::system::uname();
    name.release().to_string_lossy().into_owned()
}
