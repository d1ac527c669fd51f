//! The area that the engine has mapped in a process.

use std::fs;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use super::{Batch, Remote};
use crate::ids::HostPid;
use crate::limits::Widened;
use crate::sys::{process, ptrace};

/// Size of the area.
pub(super) const AREA: u64 = 64 * 1024;
/// How far it is below the code that the first thread was stopped in.
const AWAY: u64 = 16 << 30;
/// Where else the area is tried: at multiples of this distance,
const PLACES_APART: u64 = 64 << 30;
/// of which there are so many below the end of the address space.
const PLACES: u64 = (1 << 47) / PLACES_APART;

impl Remote {
    /// The range of addresses that the engine itself occupies in the process; no part of a
    /// checkpoint, and never to be unmapped. Empty while there is none.
    pub fn area(&self) -> Range<u64> {
        self.area.map_or(0..0, |at| at..at + AREA)
    }

    /// Where the area begins, as a later [`Remote::new`] wants to know.
    pub(crate) fn area_address(&self) -> Option<u64> {
        self.area
    }

    /// The process has a new address space, so the area is gone.
    pub(crate) fn forget_area(&mut self) -> io::Result<()> {
        self.area = None;
        self.files.forget_memory();
        self.stub_there = false;
        self.base = ptrace::registers(self.host)?;
        self.memory = OnceLock::new();
        Ok(())
    }

    pub(super) fn map_area(&mut self) -> io::Result<u64> {
        match self.area {
            Some(at) => Ok(at),
            None => self.map_first_area(),
        }
    }

    /// Maps the area far below what the program has mapped last: a mapping that grows down (`MAP_GROWSDOWN`) needs room
    /// there, and the kernel's own choice would be right below it.
    fn map_first_area(&mut self) -> io::Result<u64> {
        let code = self.base.rip & !(AREA - 1);
        if let Some(at) = code.checked_sub(AWAY).filter(|at| *at > AWAY)
            && let Ok(at) = self.map_new_area(at, libc::MAP_FIXED_NOREPLACE)
        {
            return Ok(at);
        }
        self.map_new_area(0, 0)
    }

    /// Maps another area, where the kernel likes unless `flags` say otherwise.
    fn map_new_area(&mut self, at: u64, flags: i32) -> io::Result<u64> {
        let args = [
            at,
            AREA,
            (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64,
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags) as u64,
            u64::MAX,
            0,
        ];
        let at = match self.step_syscall(libc::SYS_mmap, args) {
            Err(e) if e.raw_os_error() == Some(libc::ENOMEM) => {
                let kinds = [libc::RLIMIT_AS, libc::RLIMIT_DATA];
                let _more = kinds.map(|kind| Widened::of(self.host, kind));
                self.step_syscall(libc::SYS_mmap, args)?
            }
            mapped => mapped?,
        };
        self.area = Some(at);
        self.stub_there = false;
        Ok(at)
    }

    /// Moves the area out of what is `taken`: addresses that the process needs for itself.
    ///
    /// The kernel's choice is tried once, for what is next to a taken place is likely to be taken as well; then places
    /// far apart from each other.
    pub(crate) fn clear_of(&mut self, taken: impl Fn(&Range<u64>) -> bool) -> io::Result<()> {
        let mut rejected = Vec::new();
        if self.area.is_none() || taken(&self.area()) {
            rejected.extend(self.area);
            self.map_new_area(0, 0)?;
        }
        if taken(&self.area()) {
            rejected.extend(self.area);
            let place = (1..PLACES)
                .map(|n| n * PLACES_APART)
                .filter(|at| !taken(&(*at..at + AREA)))
                .find_map(|at| self.map_new_area(at, libc::MAP_FIXED_NOREPLACE).ok());
            place.ok_or(io::ErrorKind::OutOfMemory)?;
        }
        let mut batch = Batch::new();
        for at in rejected {
            batch.call(libc::SYS_munmap, &[at.into(), AREA.into()]);
        }
        if batch.is_empty() {
            Ok(())
        } else {
            self.run(&batch).map(drop)
        }
    }

    pub(super) fn holds_stub(&self, at: u64) -> bool {
        let mut found = vec![0; process::stub().len()];
        process::read_memory(self.host, at, &mut found).is_ok() && found == process::stub()
    }
}

/// Where the vDSO is, code that every process has.
pub(super) fn vdso_of(pid: HostPid) -> Option<u64> {
    let maps = fs::read(format!("/proc/{pid}/maps")).ok()?;
    let line = maps
        .split(|b| *b == b'\n')
        .find(|l| l.ends_with(b" [vdso]"))?;
    let start = line.split(|b| *b == b'-').next()?;
    u64::from_str_radix(std::str::from_utf8(start).ok()?, 16).ok()
}
