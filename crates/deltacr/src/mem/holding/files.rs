//! Private mappings of files in a template: programs and libraries, with the pages that the program wrote there.
//!
//! The kernel shares copied pages of a file only between mappings that were inherited, and each sandbox has a mount of its own. So a
//! template maps such files from the base that all these mounts show, where a file is there as the checkpoint has it; and who is
//! forked of it keeps these mappings, which count as another file ([`BASE`]) from then on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;

use super::{Held, Piece};
use crate::env::Environment;
use crate::ids::HostPid;
use crate::mem::{AddressSpace, BASE, Backing, FileId, VERSIONED, Vma, overlap, pages_of};
use crate::store::PageMap;
use crate::sys::pagemap;

/// Where files are that nobody writes to in place: "shareable, read-only data", says the Filesystem Hierarchy Standard.
const READ_ONLY: &str = "/usr/";

/// Tells whether a file that an image has mapped can be mapped from the base instead.
pub type OfBase<'a> = dyn Fn(&FileId) -> bool + 'a;

/// A private mapping of a file of the base that a template is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileMapping {
    /// Where.
    pub range: Range<u64>,
    /// The file's inode number, in the base and for the sandbox.
    pub inode: u64,
    /// Where in the file it begins.
    pub offset: u64,
    /// `PROT_*` bits.
    pub prot: i32,
    /// Whether pages are to be written to it, whatever its bits.
    pub filled: bool,
}

impl FileMapping {
    /// Whether a process has it mapped so that `/proc/PID/maps` shows it as this inode of `device`, by which it is known again.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn shows_in(&self, process: HostPid, device: u64) -> io::Result<bool> {
        let maps = File::open(format!("/proc/{process}/maps"))?;
        let found = pagemap::mapping(&maps, self.range.start)?;
        Ok(found.is_some_and(|found| {
            let at = self.range.start.wrapping_sub(found.start);
            found.start <= self.range.start
                && (found.device, found.inode) == (device, self.inode)
                && found.offset + at == self.offset
        }))
    }
}

/// What lies behind a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FilePart {
    inode: u64,
    offset: u64,
    prot: i32,
}

impl FilePart {
    pub(super) fn later(&self, by: u64) -> Self {
        Self {
            offset: self.offset + by,
            ..self.clone()
        }
    }

    pub(super) fn is(&self, inode: u64) -> bool {
        self.inode == inode
    }

    pub(super) fn is_writable(&self) -> bool {
        self.prot & libc::PROT_WRITE != 0
    }

    pub(super) fn mapping(&self, range: Range<u64>, filled: bool) -> FileMapping {
        FileMapping {
            range,
            inode: self.inode,
            offset: self.offset,
            prot: self.prot,
            filled,
        }
    }
}

/// What of a process is to be held, without places yet: anonymous mappings that hold pages, and files that can be mapped from the
/// base and are programs (something of them is code, or was written to) or where read-only data is by convention. Other files
/// stay the sandbox's own, for a program may look at those for what others write there.
pub(super) fn wanted(memory: &AddressSpace, pages: &PageMap, of_base: &OfBase<'_>) -> Vec<Piece> {
    let holds = |vma: &Vma| pages.runs(pages_of(&vma.range())).next().is_some();
    let private = || memory.vmas.iter().filter(|vma| vma.is_private());
    let mut programs = BTreeMap::new();
    for vma in private() {
        if let Backing::File(file) = &vma.backing
            && (vma.prot & libc::PROT_EXEC != 0 || holds(vma) || file.path.starts_with(READ_ONLY))
        {
            let known = programs.entry((file.device, file.inode));
            known.or_insert_with(|| of_base(file));
        }
    }
    let piece = |vma: &Vma| match &vma.backing {
        Backing::Anonymous if !vma.grows_down && !vma.droppable && holds(vma) => {
            Some(Piece::unplaced(vma.range(), None))
        }
        Backing::File(file) if programs.get(&(file.device, file.inode)) == Some(&true) => {
            let part = FilePart {
                inode: file.inode,
                offset: vma.offset,
                prot: vma.prot,
            };
            Some(Piece::unplaced(vma.range(), Some(part)))
        }
        _ => None,
    };
    private().filter_map(piece).collect()
}

/// The file mappings among the pieces; pages are to be written where they hold some.
pub(super) fn mappings<'a>(
    pieces: impl Iterator<Item = (&'a PageMap, &'a Piece)>,
) -> Vec<FileMapping> {
    let mappings = pieces.filter_map(|(pages, piece)| {
        let filled = pages.runs(pages_of(&piece.to)).next().is_some();
        Some(piece.file.as_ref()?.mapping(piece.held(), filled))
    });
    mappings.collect()
}

impl Held {
    /// In a process that has taken over what is held, `vmas`: makes those mappings count as the files that `target` wants which show
    /// just the same, as long as the sandbox has not changed the file.
    pub(super) fn recognize(&self, vmas: &mut [Vma], target: &AddressSpace, env: &dyn Environment) {
        let mut unchanged = BTreeMap::new();
        for vma in vmas {
            let Backing::File(FileId {
                device: BASE,
                inode,
                ..
            }) = vma.backing
            else {
                continue;
            };
            let range = vma.range();
            let at = target.vmas.partition_point(|v| v.end <= range.start);
            let over = target
                .vmas
                .get(at)
                .filter(|v| overlap(&v.range(), &range).is_some());
            if let Some(Backing::File(file)) = over.map(|v| &v.backing)
                && (file.device, file.inode) == (VERSIONED, inode)
                && *(unchanged.entry(inode)).or_insert_with(|| env.shows_base(inode))
            {
                vma.backing = Backing::File(file.clone());
            }
        }
    }
}
