//! Building the sandbox: the helper's half, and init's first steps.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use deltabox_init::wire::{self, MAX_MESSAGE};
use deltabox_init::{Reply, Request, Setup, Step};
use rustix::fs::{Mode, OFlags};
use rustix::net::RecvFlags;

use crate::serve::{Init, parse_filters};
use crate::sys::{self, Fork, ForkOptions};
use crate::{At, Failure, mounts, template};

/// Where the supervisor leaves the control socket.
const CONTROL: i32 = 3;

/// Namespaces of init, beside the mount namespace, which the helper makes and which stays the real root's own: nothing
/// inside can change it, whatever capabilities it gets hold of.
const NAMESPACES: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP;

/// The descriptors of [`Setup`].
struct Descriptors {
    events: OwnedFd,
    root: OwnedFd,
    init_cgroup: OwnedFd,
    payload: OwnedFd,
    last_pid: OwnedFd,
    v1: Vec<OwnedFd>,
}

impl Descriptors {
    fn from(fds: Vec<OwnedFd>) -> Option<Self> {
        let mut fds = fds.into_iter();
        Some(Self {
            events: fds.next()?,
            root: fds.next()?,
            init_cgroup: fds.next()?,
            payload: fds.next()?,
            last_pid: fds.next()?,
            v1: fds.collect(),
        })
    }
}

/// The whole life of this program, as the helper or as init.
pub(crate) fn run() -> io::Result<()> {
    let control = sys::inherited(CONTROL)?;
    sys::reset_signals();
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    for at in 0..3 {
        sys::place(null.as_fd(), at)?;
    }
    drop(null);
    let mut buffer = vec![0; MAX_MESSAGE];
    let Some(got) = wire::receive(&control, &mut buffer, RecvFlags::empty())? else {
        return Ok(());
    };
    match (
        Request::decode(&buffer[..got.len]),
        Descriptors::from(got.fds),
    ) {
        (Some(Request::Setup(setup)), Some(fds)) => {
            let result = build(&control, &setup, fds);
            report(&control, result)
        }
        (Some(Request::Template { filters }), None) => {
            drop(buffer);
            template::serve(control, &filters)
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

pub(crate) fn report(control: &OwnedFd, result: Result<(), Failure>) -> io::Result<()> {
    let Err(failure) = result else {
        return Ok(());
    };
    let errno = failure.errno;
    wire::send(control, &Reply::from(failure).encode(), &[])?;
    Err(io::Error::from_raw_os_error(errno))
}

fn build(control: &OwnedFd, setup: &Setup, fds: Descriptors) -> Result<(), Failure> {
    for procs in &fds.v1 {
        rustix::io::write(procs, b"0").at(Step::Setup, "joining a version 1 cgroup")?;
    }
    let host_proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .at(Step::Setup, "opening /proc")?;
    if !setup.clock_offsets.is_empty() {
        make_time_namespace(&host_proc, &setup.clock_offsets)?;
    }
    let devices = mounts::enter_root(&fds.root)?;
    let (go, start) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .at(Step::Setup, "making a pipe")?;
    let options = ForkOptions {
        flags: NAMESPACES | libc::CLONE_PARENT,
        cgroup: Some(fds.init_cgroup.as_fd()),
        pid: None,
    };
    match sys::fork(&options).at(Step::Setup, "making the sandbox's namespaces")? {
        Fork::Parent(pid) => {
            // First of all, for it is the supervisor's child, who waits for it also if the rest fails.
            wire::send(control, &Reply::Created(pid).encode(), &[])
                .at(Step::Setup, "reporting init's pid")?;
            map_ids(&host_proc, pid, setup)?;
            mounts::furnish(&host_proc, pid, setup.first_id, &devices)?;
            std::fs::File::from(start)
                .write_all(b"g")
                .at(Step::Setup, "starting init")
        }
        Fork::Child => {
            drop((start, host_proc, devices));
            let mut word = [0];
            if !matches!(std::fs::File::from(go).read(&mut word), Ok(1)) {
                sys::exit(1);
            }
            become_init(control, setup, fds)
        }
    }
}

/// Makes the time namespace that init is going to be born in: its clocks can only be set before anybody is in it.
fn make_time_namespace(host_proc: &OwnedFd, offsets: &[u8]) -> Result<(), Failure> {
    sys::unshare_time().at(Step::Setup, "making a time namespace")?;
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(host_proc, "self/timens_offsets", flags, Mode::empty())
        .at(Step::Setup, "opening the clock offsets")?;
    rustix::io::write(file, offsets)
        .at(Step::Setup, "setting the clock offsets")
        .map(drop)
}

/// Maps the ids of the user namespace that `pid` is in.
fn map_ids(host_proc: &OwnedFd, pid: i32, setup: &Setup) -> Result<(), Failure> {
    let map = format!("0 {} {}\n", setup.first_id, setup.ids);
    for name in ["uid_map", "gid_map"] {
        let path = format!("{pid}/{name}");
        let file = rustix::fs::openat(
            host_proc,
            path.as_str(),
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .at(Step::Setup, "opening the id map of init")?;
        rustix::io::write(file, map.as_bytes()).at(Step::Setup, "mapping ids")?;
    }
    Ok(())
}

fn become_init(control: &OwnedFd, setup: &Setup, fds: Descriptors) -> Result<(), Failure> {
    // Not to be traced or looked into by anything inside, whatever its user id.
    sys::set_dumpable(false).at(Step::Setup, "protecting init")?;
    rustix::thread::set_name(c"deltabox-init").at(Step::Setup, "naming init")?;
    sys::become_user(0, 0, &[]).at(Step::Setup, "becoming root of the sandbox")?;
    rustix::process::setsid().at(Step::Setup, "making init's session")?;
    rustix::system::sethostname(&setup.hostname).at(Step::Setup, "setting the host name")?;
    sys::loopback_up().at(Step::Setup, "bringing loopback up")?;
    let init = Init {
        control: control
            .try_clone()
            .at(Step::Setup, "keeping the control socket")?,
        events: fds.events,
        payload: fds.payload,
        last_pid: fds.last_pid,
        filters: parse_filters(&setup.filters)?,
        children: sys::child_signals().at(Step::Setup, "watching children")?,
    };
    drop((fds.root, fds.init_cgroup, fds.v1));
    wire::send(control, &Reply::Done.encode(), &[])
        .at(Step::Setup, "reporting to the supervisor")?;
    init.serve().at(Step::Setup, "serving the supervisor")
}
