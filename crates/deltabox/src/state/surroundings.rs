//! The sandbox around its processes, as the process engine sees it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use deltacr::Deaths;
use deltacr::env::{Environment, ExternalId, Namespace};
use deltacr::ids::{HostPid, InnerPid};
use deltacr::mem::Holding;
use deltafs::Volume;

use crate::seccomp;
use crate::sessions::Shared;
use crate::sessions_image::SessionsImage;
use crate::templates::Template;

/// See the module's description.
pub(crate) struct Surroundings<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) volume: &'a Volume,
    /// The sessions of the state that is being given back, if one is.
    pub(crate) restoring: Option<&'a SessionsImage>,
    /// What holds the memory of the state that is being given back, if something does.
    pub(crate) template: Option<&'a Template>,
}

impl Environment for Surroundings<'_> {
    fn cgroup(&self) -> &Path {
        self.shared.container.payload()
    }

    fn init_pid(&self) -> HostPid {
        HostPid(self.shared.container.init())
    }

    fn root(&self) -> BorrowedFd<'_> {
        self.shared.container.root()
    }

    fn as_root(&self, open: &mut dyn FnMut()) {
        self.volume.as_root(open);
    }

    fn fs_device(&self) -> u64 {
        self.volume.device()
    }

    fn seccomp_filters(&self) -> usize {
        seccomp::FILTERS
    }

    fn bounding_set(&self) -> u64 {
        let bits = deltabox_init::CAPABILITIES.iter();
        bits.fold(0, |set, capability| set | 1 << capability)
    }

    fn open_inode(&self, ino: u64, flags: i32) -> io::Result<OwnedFd> {
        self.volume.open_inode_in(self.root(), ino, flags)
    }

    fn path_in_base(&self, device: u64, ino: u64) -> Option<Vec<u8>> {
        self.volume.original_path(device, ino)
    }

    fn open_base(&self, ino: u64, path: &[u8]) -> io::Result<OwnedFd> {
        let file = self.volume.open_original(ino, path)?;
        Ok(file.try_clone()?.into())
    }

    fn shows_base(&self, ino: u64) -> bool {
        self.volume.shows_original(ino)
    }

    fn external_pipe(&self, ino: u64) -> Option<ExternalId> {
        self.shared.external_pipe(ino)
    }

    fn open_external(&self, id: ExternalId, write: bool) -> io::Result<OwnedFd> {
        self.shared.open_external(id, write)
    }

    fn set_next_pid(&self, pid: InnerPid) -> io::Result<()> {
        self.shared.container.set_next_pid(pid.0)
    }

    fn birth(&self, pid: InnerPid) -> io::Result<HostPid> {
        self.shared.container.birth(pid.0).map(HostPid)
    }

    fn template(&self) -> Option<&Holding> {
        self.template.map(Template::holding)
    }

    fn birth_from_template(&self, pid: InnerPid, spare: InnerPid) -> io::Result<HostPid> {
        let template = self.template.ok_or(io::ErrorKind::NotFound)?;
        let born = template.fork(&self.shared.container, pid.0, spare.0);
        born.map(HostPid)
    }

    fn before_resume(&self, deaths: Deaths) -> io::Result<()> {
        self.restoring
            .map_or(Ok(()), |image| self.shared.finish_restore(image, deaths))
    }

    fn limit_processes(&self, whether: bool) -> io::Result<()> {
        self.shared.container.limit_processes(whether)
    }

    fn memory_left(&self) -> Option<u64> {
        self.shared.container.memory_left()
    }

    fn namespace(&self, kind: Namespace) -> io::Result<OwnedFd> {
        self.shared.container.namespace(match kind {
            Namespace::Net => "net",
            Namespace::Mount => "mnt",
            Namespace::Ipc => "ipc",
        })
    }
}
