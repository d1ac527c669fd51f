//! One template's process, driven by messages.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use deltabox_init::wire::MAX_FDS;
use deltabox_init::{FilePart, Reply, Request};
use deltacr::mem::FileMapping;
use parking_lot::Mutex;

use super::MOST_RANGES;
use super::files::BaseFiles;
use crate::container::{Container, Control, done, reap, socket_pair, start_idle};
use crate::error::{Doing, Result};
use crate::seccomp;

/// See the module's description. Dropping it ends the process.
pub(super) struct Process {
    host: i32,
    control: Mutex<Control>,
}

impl Process {
    /// Starts one in the control group of a version 2 directory.
    pub(super) fn start(group: &OwnedFd) -> Result<Self> {
        let doing = "starting a template";
        let (host, socket) = start_idle(group.as_fd()).doing(doing)?;
        // From here on it is ended when it is dropped.
        let process = Self {
            host,
            control: Mutex::new(Control::new(socket).doing(doing)?),
        };
        let filters = seccomp::filters().doing("building the seccomp filter")?;
        process.order(&Request::Template { filters }).doing(doing)?;
        Ok(process)
    }

    /// Makes another one that holds what this one holds.
    pub(super) fn derive(&self) -> io::Result<Self> {
        let (ours, copys) = socket_pair()?;
        let control = Mutex::new(Control::new(ours)?);
        let reply = self
            .control
            .lock()
            .ask(&Request::Derive, &[copys.as_fd()])?;
        match reply {
            Reply::Pid(host) => Ok(Self { host, control }),
            reply => done(reply).and(Err(io::ErrorKind::InvalidData.into())),
        }
    }

    /// Whether it has not ended.
    pub(super) fn is_alive(&self) -> bool {
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        let flags = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let pid = rustix::process::Pid::from_raw(self.host);
        pid.is_some_and(|pid| matches!(waitid(WaitId::Pid(pid), flags), Ok(None)))
    }

    /// Its pid, as this process sees it.
    pub(super) fn host(&self) -> i32 {
        self.host
    }

    fn order(&self, request: &Request) -> io::Result<()> {
        done(self.control.lock().ask(request, &[])?)
    }

    fn order_parts(
        &self,
        ranges: &[Range<u64>],
        order: impl Fn(Vec<Range<u64>>) -> Request,
    ) -> io::Result<()> {
        let mut parts = ranges.chunks(MOST_RANGES);
        parts.try_for_each(|part| self.order(&order(part.to_vec())))
    }

    /// Has it map memory.
    pub(super) fn hold(&self, ranges: &[Range<u64>]) -> io::Result<()> {
        self.order_parts(ranges, Request::Hold)
    }

    /// Has it map files. Those which pages are to be written to can be written to until they are [sealed](Self::seal).
    pub(super) fn hold_files(
        &self,
        mappings: &[FileMapping],
        files: &BaseFiles<'_>,
    ) -> io::Result<()> {
        let mut by_file: BTreeMap<u64, Vec<&FileMapping>> = BTreeMap::new();
        for mapping in mappings {
            by_file.entry(mapping.inode).or_default().push(mapping);
        }
        let by_file: Vec<_> = by_file.into_iter().collect();
        for some in by_file.chunks(MAX_FDS) {
            let opened = some.iter().map(|(inode, _)| files.opened(*inode));
            let opened = opened.collect::<io::Result<Vec<_>>>()?;
            let fds: Vec<_> = opened.iter().map(AsFd::as_fd).collect();
            let parts = some.iter().zip(0..).flat_map(|((_, mappings), file)| {
                mappings.iter().map(move |mapping| FilePart {
                    range: mapping.range.clone(),
                    offset: mapping.offset,
                    prot: match mapping.filled {
                        true => mapping.prot | libc::PROT_READ | libc::PROT_WRITE,
                        false => mapping.prot,
                    },
                    file,
                })
            });
            let parts: Vec<_> = parts.collect();
            for part in parts.chunks(MOST_RANGES) {
                let request = Request::HoldFiles(part.to_vec());
                done(self.control.lock().ask(&request, &fds)?)?;
            }
        }
        Ok(())
    }

    /// Has it give mapped files that pages were written to the protection that they are to have.
    pub(super) fn seal(&self, mappings: &[FileMapping]) -> io::Result<()> {
        let mut by_bits: BTreeMap<i32, Vec<Range<u64>>> = BTreeMap::new();
        for mapping in mappings.iter().filter(|mapping| mapping.filled) {
            let ranges = by_bits.entry(mapping.prot).or_default();
            ranges.push(mapping.range.clone());
        }
        let mut by_bits = by_bits.into_iter();
        by_bits.try_for_each(|(prot, ranges)| {
            self.order_parts(&ranges, |ranges| Request::Protect { prot, ranges })
        })
    }

    /// Has it undo mappings.
    pub(super) fn unmap(&self, ranges: &[Range<u64>]) -> io::Result<()> {
        self.order_parts(ranges, Request::Unmap)
    }

    /// Has it make memory zeros.
    pub(super) fn empty(&self, ranges: &[Range<u64>]) -> io::Result<()> {
        self.order_parts(ranges, Request::Empty)
    }

    /// Has it make large pages, where that can be.
    pub(super) fn collapse(&self, ranges: &[Range<u64>]) -> io::Result<()> {
        self.order_parts(ranges, Request::Collapse)
    }

    /// Has it give birth in a sandbox, to a process with the number `pid` by way of another with the number `spare`, which is to
    /// have the memory `touch` for itself; its pid as this process sees it.
    pub(super) fn fork(
        &self,
        container: &Container,
        [pid, spare]: [i32; 2],
        touch: Vec<Range<u64>>,
    ) -> io::Result<i32> {
        let request = Request::Fork {
            pid,
            mother: spare,
            touch,
        };
        let fds = container.for_births()?;
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut control = self.control.lock();
        match control.ask(&request, &fds)? {
            Reply::Pid(got) if got == pid => {
                control.sender().ok_or(io::ErrorKind::InvalidData.into())
            }
            reply => done(reply).and(Err(io::ErrorKind::InvalidData.into())),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Not reaped yet, so the number is still its own.
        if let Some(pid) = rustix::process::Pid::from_raw(self.host) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        reap(self.host);
    }
}
