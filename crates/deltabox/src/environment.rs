//! The sandbox as the process engine sees it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use deltacr::env::{Environment, ExternalId, Namespace};
use deltacr::ids::{HostPid, InnerPid};

use crate::sandbox::Sandbox;

impl Environment for Sandbox {
    fn cgroup(&self) -> &Path {
        self.container().payload()
    }

    fn init_pid(&self) -> HostPid {
        HostPid(self.container().init())
    }

    fn root(&self) -> BorrowedFd<'_> {
        self.container().root()
    }

    fn fs_device(&self) -> u64 {
        self.volume().device()
    }

    fn open_inode(&self, ino: u64, flags: i32) -> io::Result<OwnedFd> {
        self.volume()
            .open_inode_in(self.container().root(), ino, flags)
    }

    fn external_pipe(&self, ino: u64) -> Option<ExternalId> {
        self.shared().external_pipe(ino)
    }

    fn open_external(&self, id: ExternalId, write: bool) -> io::Result<OwnedFd> {
        self.shared().open_external(id, write)
    }

    fn set_next_pid(&self, pid: InnerPid) -> io::Result<()> {
        self.container().set_next_pid(pid.0)
    }

    fn birth(&self, pid: InnerPid) -> io::Result<HostPid> {
        self.container().birth(pid.0).map(HostPid)
    }

    fn namespace(&self, kind: Namespace) -> io::Result<OwnedFd> {
        self.container().namespace(match kind {
            Namespace::Net => "net",
            Namespace::Mount => "mnt",
        })
    }
}
