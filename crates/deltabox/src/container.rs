//! The processes of a sandbox from outside: its init, its namespaces, its control groups.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use deltabox_init::wire::{self, MAX_MESSAGE};
use deltabox_init::{Event, Reply, Request, Setup, Spawn, Step};
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair, sockopt};
use rustix::process::{Pid, WaitOptions, waitpid};

use crate::cgroup::{self, Cgroup};
use crate::early::EarlyBirths;
use crate::error::{Doing, Error, Result};
use crate::spec::ClockOffsets;
use crate::{clocks, seccomp, sys};

/// The program that builds a sandbox and becomes its PID 1.
static INIT: &[u8] = include_bytes!(env!("DELTABOX_INIT"));

/// Its name, as `ps` shows it.
const INIT_NAME: &CStr = c"deltabox-init";

/// How long init may take for an answer. It waits for nothing but the kernel (and a program file to be read).
const PATIENCE: Duration = Duration::from_secs(60);

/// Ids that a sandbox has.
pub(crate) const IDS: u32 = 65536;

/// What a container is made of.
pub(crate) struct Parts<'a> {
    /// The sandbox's name, for messages.
    pub(crate) name: &'a str,
    /// The host name inside.
    pub(crate) hostname: &'a str,
    /// How far its clocks are ahead, if it has its own.
    pub(crate) clocks: Option<ClockOffsets>,
    /// The id outside that is 0 inside.
    pub(crate) first_id: u32,
    /// The root filesystem: a detached mount.
    pub(crate) root: BorrowedFd<'a>,
    /// Its control groups.
    pub(crate) cgroup: Cgroup,
}

/// A running init with its namespaces and control groups. Dropping it kills everything inside.
pub(crate) struct Container {
    control: Mutex<Control>,
    events: OwnedFd,
    init: Pid,
    /// The host's id of its root.
    first_id: u32,
    root: OwnedFd,
    cgroup: Cgroup,
    payload: PathBuf,
    early: EarlyBirths,
    reaped: AtomicBool,
}

/// The control socket. Requests and answers alternate.
pub(crate) struct Control {
    socket: OwnedFd,
    buffer: Vec<u8>,
    /// Whom the last answer was from: for a process that was made, its number outside.
    sender: Option<i32>,
    /// An answer was not waited for: what comes next belongs to another question.
    lost: bool,
}

/// The program as a sealed file in memory.
fn init_program() -> io::Result<BorrowedFd<'static>> {
    static PROGRAM: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(fd) = PROGRAM.get() {
        return Ok(fd.as_fd());
    }
    let fd = rustix::fs::memfd_create(INIT_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut rest = INIT;
    while !rest.is_empty() {
        rest = &rest[rustix::io::write(&fd, rest)?..];
    }
    rustix::fs::fcntl_add_seals(
        &fd,
        SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
    )?;
    Ok(PROGRAM.get_or_init(|| fd).as_fd())
}

pub(crate) fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let pair = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    for end in [&pair.0, &pair.1] {
        // Twice, since the kernel counts its own overhead.
        sockopt::set_socket_send_buffer_size_force(end, 2 * MAX_MESSAGE)?;
    }
    Ok(pair)
}

impl Container {
    /// Builds the sandbox around `parts` and starts its init.
    pub(crate) fn start(parts: Parts<'_>) -> Result<Self> {
        let doing = |what: &str| format!("{what} of sandbox {:?}", parts.name);
        let program = init_program().doing("unpacking deltabox-init")?;
        let (control, inits) = socket_pair().doing(doing("making the control sockets"))?;
        let (events, inits_events) = socket_pair().doing(doing("making the control sockets"))?;
        let mut control = Control::new(control).doing(doing("setting up the control socket"))?;
        let last_pid = rustix::fs::open(
            "/proc/sys/kernel/ns_last_pid",
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .doing("opening /proc/sys/kernel/ns_last_pid")?;
        let [own, init_group, payload_group] = parts.cgroup.open()?;
        let v1 = parts.cgroup.open_v1()?;
        let setup = Request::Setup(Setup {
            first_id: parts.first_id,
            ids: IDS,
            hostname: parts.hostname.into(),
            clock_offsets: parts.clocks.map(clocks::offsets_text).unwrap_or_default(),
            filters: seccomp::filters().doing("building the seccomp filter")?,
        });
        let mut fds = vec![
            inits_events.as_fd(),
            parts.root,
            init_group.as_fd(),
            payload_group.as_fd(),
            last_pid.as_fd(),
        ];
        fds.extend(v1.iter().map(AsFd::as_fd));

        let helper = sys::start_program(program, INIT_NAME, inits.as_fd(), own.as_fd())
            .doing(doing("starting the builder"))?;
        // From here on, the other ends are the builder's and init's only: their death is seen as end of file.
        drop(inits);
        let created = control.ask(&setup, &fds);
        reap(helper);
        let init = match created.doing(doing("starting the builder"))? {
            Reply::Created(pid) => Pid::from_raw(pid),
            Reply::Failed { errno, what, .. } => {
                return Err(failed(&doing("building"), errno, &what));
            }
            _ => None,
        }
        .ok_or(Errno::BADMSG)
        .doing(doing("understanding the builder"))?;
        let ready = control.answer();
        let root = match ready {
            Ok(Reply::Done) => open_root(init),
            Ok(Reply::Failed { errno, what, .. }) => {
                reap(init.as_raw_nonzero().get());
                return Err(failed(&doing("starting init"), errno, &what));
            }
            Ok(_) => Err(Errno::BADMSG.into()),
            Err(e) => Err(e),
        };
        let root = root.or_else(|e| {
            parts.cgroup.remove()?;
            reap(init.as_raw_nonzero().get());
            Err(e).doing(doing("starting init"))
        })?;
        let mut started = Self {
            control: Mutex::new(control),
            events,
            init,
            first_id: parts.first_id,
            root,
            payload: parts.cgroup.payload(),
            cgroup: parts.cgroup,
            early: EarlyBirths::default(),
            reaped: AtomicBool::new(false),
        };
        started.cgroup.apply()?;
        Ok(started)
    }

    /// The version 2 group of all processes but init.
    pub(crate) fn payload(&self) -> &Path {
        &self.payload
    }

    /// Processes that wait in here to be taken up by a fork.
    pub(crate) fn early(&self) -> &EarlyBirths {
        &self.early
    }

    /// What the sandbox does without.
    pub(crate) fn warnings(&self) -> &[String] {
        &self.cgroup.warnings
    }

    /// The host's id for one inside.
    pub(crate) fn outside(&self, id: u32) -> u32 {
        self.first_id.saturating_add(id)
    }

    /// PID 1, as this process sees it.
    pub(crate) fn init(&self) -> i32 {
        self.init.as_raw_nonzero().get()
    }

    /// The root directory (`O_PATH`), in the sandbox's mount namespace.
    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Where init reports the dead; see [`Container::event`].
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// The next report, if there is one. `ConnectionReset` when init has ended.
    pub(crate) fn event(&self) -> io::Result<Option<Event>> {
        let mut buffer = [0; 64];
        match wire::receive(&self.events, &mut buffer, RecvFlags::DONTWAIT) {
            // What cannot be understood is as good as an init that has gone.
            Ok(Some(got)) => Event::decode(&buffer[..got.len])
                .map(Some)
                .ok_or_else(|| io::ErrorKind::ConnectionReset.into()),
            Ok(None) => Err(io::ErrorKind::ConnectionReset.into()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> io::Result<Reply> {
        self.control.lock().ask(request, fds)
    }

    /// Runs a command; `fds` are its three streams or its terminal. Returns its pid inside.
    pub(crate) fn spawn(&self, spawn: Spawn, fds: &[BorrowedFd<'_>]) -> Result<i32> {
        let program = spawn.argv.first().cloned().unwrap_or_default();
        let program = String::from_utf8_lossy(&program).into_owned();
        let cwd = String::from_utf8_lossy(&spawn.cwd).into_owned();
        let reply = self.ask(&Request::Spawn(spawn), fds).map_err(|source| {
            if source.raw_os_error() == Some(libc::EMSGSIZE) {
                Error::Invalid("command line and environment are longer than 256 KiB".to_owned())
            } else {
                Error::Spawn {
                    program: program.clone(),
                    source,
                }
            }
        })?;
        let (step, errno) = match reply {
            Reply::Pid(pid) if pid > 1 => return Ok(pid),
            Reply::Failed { step, errno, .. } => (step, errno),
            _ => (Step::Request, libc::EBADMSG),
        };
        let source = io::Error::from_raw_os_error(errno);
        Err(match step {
            Step::Exec => Error::Spawn { program, source },
            Step::Cwd => Error::System {
                doing: format!("changing to the working directory {cwd:?} in the sandbox"),
                source,
            },
            Step::User => Error::System {
                doing: "taking on the user's identity in the sandbox".to_owned(),
                source,
            },
            Step::Clone if errno == libc::EAGAIN => Error::System {
                doing: format!("starting {program:?}: the sandbox has as many processes as it may"),
                source,
            },
            _ => Error::System {
                doing: format!("preparing a process for {program:?} in the sandbox"),
                source,
            },
        })
    }

    /// Makes the next process or thread born inside get this number.
    pub(crate) fn set_next_pid(&self, pid: i32) -> io::Result<()> {
        done(self.ask(&Request::SetNextPid(pid), &[])?)
    }

    /// Makes init give birth to a waiting process with this number inside; returns its number outside.
    pub(crate) fn birth(&self, pid: i32) -> io::Result<i32> {
        let mut control = self.control.lock();
        match control.ask(&Request::Birth(pid), &[])? {
            Reply::Pid(got) if got == pid => control.sender.ok_or_else(|| Errno::BADMSG.into()),
            Reply::Failed { errno, .. } => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(Errno::BADMSG.into()),
        }
    }

    /// What another process needs to give birth in here: init's pidfd, the payload's group, and those of version 1 to join.
    pub(crate) fn for_births(&self) -> io::Result<Vec<OwnedFd>> {
        let flags = rustix::process::PidfdFlags::empty();
        let init = rustix::process::pidfd_open(self.init, flags)?;
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let payload = rustix::fs::open(&self.payload, flags, Mode::empty())?;
        let v1 = self.cgroup.open_v1().map_err(io::Error::other)?;
        Ok([init, payload].into_iter().chain(v1).collect())
    }

    /// Sends a signal to a process group (its number inside). One that is gone is as good as signalled.
    pub(crate) fn signal_group(&self, group: i32, signal: i32) -> io::Result<()> {
        match done(self.ask(&Request::Signal { group, signal }, &[])?) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    /// Makes init report every death that has happened.
    pub(crate) fn sync(&self) -> io::Result<()> {
        done(self.ask(&Request::Sync, &[])?)
    }

    /// A namespace of the sandbox: `net`, `mnt`, `pid`, `user`, `ipc`, `uts`, `cgroup`.
    pub(crate) fn namespace(&self, kind: &str) -> io::Result<OwnedFd> {
        // Init is this process's child and not reaped before `Container` is dropped: the number is still its own.
        let path = format!("/proc/{}/ns/{kind}", self.init());
        Ok(rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }

    /// Enforces the limit of processes, or lets there be any number of them.
    pub(crate) fn limit_processes(&self, whether: bool) -> io::Result<()> {
        self.cgroup.limit_processes(whether)
    }

    /// How many bytes of memory may still be charged to the sandbox; `None` if there is no limit.
    pub(crate) fn memory_left(&self) -> Option<u64> {
        self.cgroup.memory_left()
    }

    /// How many processes there are beside init.
    pub(crate) fn processes(&self) -> usize {
        cgroup::processes(&self.payload).map_or(0, |p| p.len())
    }

    /// Kills everything inside, init included.
    pub(crate) fn kill(&self) -> Result<()> {
        self.cgroup.kill()
    }

    /// Kills everything inside, init included, and removes the control groups.
    pub(crate) fn close(&self) -> Result<()> {
        let removed = self.cgroup.remove();
        // Only once: afterwards the number may be another process's.
        if removed.is_ok() && !self.reaped.swap(true, Ordering::AcqRel) {
            reap(self.init());
        }
        removed
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Err(e) = self.close() {
            tracing::warn!("{e}");
        }
    }
}

impl Control {
    /// The supervisor's end of a socket pair.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
        sockopt::set_socket_passcred(&socket, true)?;
        Ok(Self {
            socket,
            buffer: vec![0; MAX_MESSAGE],
            sender: None,
            lost: false,
        })
    }

    /// Whom the last answer was from, as this process sees it.
    pub(crate) fn sender(&self) -> Option<i32> {
        self.sender
    }

    pub(crate) fn ask(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> io::Result<Reply> {
        if self.lost {
            return Err(io::Error::other(
                "init did not answer an earlier request in time",
            ));
        }
        wire::send(&self.socket, &request.encode(), fds)?;
        self.answer()
    }

    fn answer(&mut self) -> io::Result<Reply> {
        match wire::receive(&self.socket, &mut self.buffer, RecvFlags::empty()) {
            Ok(Some(got)) => {
                self.sender = got.sender;
                Reply::decode(&self.buffer[..got.len]).ok_or_else(|| Errno::BADMSG.into())
            }
            Ok(None) => Err(io::Error::other("init of the sandbox has ended")),
            Err(e) => {
                self.lost = true;
                Err(match e.kind() {
                    io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
                    _ => e,
                })
            }
        }
    }
}

/// An answer that only says whether something was done.
pub(crate) fn done(reply: Reply) -> io::Result<()> {
    match reply {
        Reply::Done => Ok(()),
        Reply::Failed { errno, .. } => Err(io::Error::from_raw_os_error(errno)),
        _ => Err(Errno::BADMSG.into()),
    }
}

fn failed(doing: &str, errno: i32, what: &[u8]) -> Error {
    Error::System {
        doing: format!("{doing}: {}", String::from_utf8_lossy(what)),
        source: io::Error::from_raw_os_error(errno),
    }
}

fn open_root(init: Pid) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        format!("/proc/{}/root", init.as_raw_nonzero()),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Waits for the end of a child of this process.
pub(crate) fn reap(pid: i32) {
    while let Err(Errno::INTR) = waitpid(Pid::from_raw(pid), WaitOptions::empty()) {}
}

/// Starts the builder in a control group and leaves it waiting for its first message, for as long as the returned
/// socket is open. Returns its pid.
pub(crate) fn start_idle(cgroup: BorrowedFd<'_>) -> io::Result<(i32, OwnedFd)> {
    let (control, inits) = socket_pair()?;
    let pid = sys::start_program(init_program()?, INIT_NAME, inits.as_fd(), cgroup)?;
    Ok((pid, control))
}

/// Reads a small regular file of the sandbox, following links inside it only.
pub(crate) fn read_file(root: BorrowedFd<'_>, path: &str, limit: usize) -> io::Result<Vec<u8>> {
    use rustix::fs::{FileType, ResolveFlags};
    use std::io::Read;
    let fd = rustix::fs::openat2(
        root,
        path,
        // A fifo must not block, a device not be opened in earnest.
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )?;
    if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL.into());
    }
    let mut bytes = Vec::new();
    fs::File::from(fd)
        .take(limit as u64 + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        return Err(Errno::FBIG.into());
    }
    Ok(bytes)
}
