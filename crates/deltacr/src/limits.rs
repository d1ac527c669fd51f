//! Limits of resources (`getrlimit(2)`) that would keep a process from getting back what it had before it was limited: threads,
//! children, descriptors, memory, queued signals. So they are loosened first, and given back last.

use std::fs;
use std::io;
use std::sync::OnceLock;

use crate::ids::HostPid;
use crate::sys::process;

/// Soft and hard limit.
pub(crate) type Limit = [u64; 2];

/// What the engine runs into.
const HINDERING: [u32; 7] = [
    libc::RLIMIT_DATA,
    libc::RLIMIT_STACK,
    libc::RLIMIT_NPROC,
    libc::RLIMIT_NOFILE,
    libc::RLIMIT_MEMLOCK,
    libc::RLIMIT_AS,
    libc::RLIMIT_SIGPENDING,
];

/// So many descriptors are room enough: what processes mostly may have.
const DESCRIPTORS: u64 = 1024;

/// Soft limits by which nobody is hindered.
pub(crate) struct Room(Vec<(u32, u64)>);

impl Room {
    /// Those that processes of a sandbox are born with.
    pub(crate) fn of(init: HostPid) -> io::Result<Self> {
        let soft = |resource| {
            let [soft, _] = process::limit(init, resource)?;
            let enough = match resource {
                libc::RLIMIT_NOFILE => soft.min(DESCRIPTORS),
                _ => soft,
            };
            Ok((resource, enough))
        };
        let all: io::Result<_> = HINDERING.into_iter().map(soft).collect();
        all.map(Self)
    }

    /// Gives a process that has these limits, and is to have those `wanted`, as much room as it needs to get there.
    pub(crate) fn make(
        &self,
        host: HostPid,
        limits: &mut [Limit],
        wanted: &[Limit],
    ) -> io::Result<()> {
        for (resource, room) in &self.0 {
            let at = *resource as usize;
            if let (Some(limit), Some(wanted)) = (limits.get_mut(at), wanted.get(at))
                && limit[0] < wanted[0].max(*room)
            {
                *limit = widen(host, *resource, *limit)?;
            }
        }
        Ok(())
    }

    /// Gives a process that was just born as much room as it needs to get what it is to have.
    pub(crate) fn make_for_new(&self, host: HostPid, wanted: &[Limit]) -> io::Result<()> {
        for (resource, room) in &self.0 {
            if let Some(wanted) = wanted.get(*resource as usize)
                && wanted[0] > *room
            {
                let limit = process::limit(host, *resource)?;
                widen(host, *resource, limit)?;
            }
        }
        Ok(())
    }
}

/// Sets a limit as high as it can be. Who may not raise hard limits (`CAP_SYS_RESOURCE`) raises the soft one.
fn widen(host: HostPid, resource: u32, limit: Limit) -> io::Result<Limit> {
    let [_, hard] = limit;
    let most = widest(resource);
    for wider in [[most, hard.max(most)], [hard.min(most), hard]] {
        match process::set_limit(host, resource, wider) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
            set => return set.map(|()| wider),
        }
    }
    Ok(limit)
}

/// Gives a process its limits.
pub(crate) fn restore(host: HostPid, current: &[Limit], target: &[Limit]) -> io::Result<()> {
    for (resource, (have, want)) in (0..).zip(current.iter().zip(target)) {
        if have != want {
            process::set_limit(host, resource, *want)?;
        }
    }
    Ok(())
}

/// The highest limit that the kernel accepts.
fn widest(resource: u32) -> u64 {
    /// As the kernel is built.
    const OPEN: u64 = 1 << 20;
    static MOST: OnceLock<u64> = OnceLock::new();
    match resource {
        libc::RLIMIT_NOFILE => *MOST.get_or_init(|| {
            let told = fs::read_to_string("/proc/sys/fs/nr_open").ok();
            let told = told.and_then(|text| text.trim().parse().ok());
            told.unwrap_or(OPEN)
        }),
        // Whoever may have an endless stack has its memory laid out in another order by the next `execve`.
        libc::RLIMIT_STACK => u64::MAX >> 1,
        _ => u64::MAX,
    }
}

/// A process that may have more of something for a moment.
pub(crate) struct Widened {
    host: HostPid,
    resource: u32,
    before: Limit,
}

impl Widened {
    pub(crate) fn of(host: HostPid, resource: u32) -> io::Result<Self> {
        let before = process::limit(host, resource)?;
        widen(host, resource, before)?;
        Ok(Self {
            host,
            resource,
            before,
        })
    }
}

impl Drop for Widened {
    fn drop(&mut self) {
        // One that was killed needs none.
        let _ = process::set_limit(self.host, self.resource, self.before);
    }
}
