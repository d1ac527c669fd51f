//! A template: this program outside every sandbox, holding the memory that the processes of a checkpoint are to have.
//!
//! The supervisor has it map ranges, fills them, and has it fork: the child is a process of a sandbox, as [`crate::serve`]
//! would make one, with a copy-on-write copy of all that the template holds. It takes three steps, each by a
//! process that shares the template's memory, so that its page tables are copied only once, in the last:
//!
//! 1. the *helper* is born in the sandbox's control group and enters all its namespaces, which lets its children be in its
//!    pid namespace, but not itself;
//! 2. the *mother* is the helper's child, so it is in there, and her orphans become init's children;
//! 3. the child is hers; she ends, and the helper after her.

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use deltabox_init::wire::{self, MAX_MESSAGE};
use deltabox_init::{FilePart, Reply, Request, Step};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::serve::parse_filters;
use crate::setup::report;
use crate::sys::{self, Fork, ForkOptions};
use crate::{At, Failure, child};

/// Becomes a template, and serves until the supervisor closes the control socket.
pub(crate) fn serve(mut control: OwnedFd, filters: &[Vec<u8>]) -> io::Result<()> {
    let ready = parse_filters(filters).and_then(|filters| begin(&control).map(|()| filters));
    let filters = match ready {
        Ok(filters) => filters,
        Err(failure) => return report(&control, Err(failure)),
    };
    loop {
        // What a copy does not serve it does not hold open, so that whoever waits for the original sees its end.
        control = match answer_all(&control, &filters) {
            Ok(Some(copys)) => copys,
            other => return report(&control, other.map(drop)),
        };
    }
}

fn begin(control: &OwnedFd) -> Result<(), Failure> {
    // Away from the terminal that the supervisor may have.
    rustix::process::setsid().at(Step::Setup, "making the template's session")?;
    rustix::process::chdir("/").at(Step::Setup, "leaving the directory")?;
    send(control, &Reply::Done)
}

fn send(control: &OwnedFd, reply: &Reply) -> Result<(), Failure> {
    wire::send(control, &reply.encode(), &[]).at(Step::Request, "answering")
}

/// Answers requests until the socket is closed; a copy that was made meanwhile returns the socket that it is to serve.
fn answer_all(
    control: &OwnedFd,
    filters: &[Vec<libc::sock_filter>],
) -> Result<Option<OwnedFd>, Failure> {
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let Some(got) = wire::receive(control, &mut buffer, RecvFlags::empty())
            .at(Step::Request, "waiting for a request")?
        else {
            return Ok(None);
        };
        let done = match Request::decode(&buffer[..got.len]) {
            Some(Request::Hold(ranges)) => {
                each(&ranges, sys::map_at, "mapping the memory to be held")
            }
            Some(Request::HoldFiles(parts)) => hold_files(&parts, &got.fds),
            Some(Request::Protect { prot, ranges }) => {
                each(&ranges, |r| sys::protect(r, prot), "protecting memory")
            }
            Some(Request::Unmap(ranges)) => each(&ranges, sys::unmap, "unmapping memory"),
            Some(Request::Empty(ranges)) => each(&ranges, sys::empty, "dropping memory"),
            Some(Request::Collapse(ranges)) => {
                // Where there is no room for large pages, small ones do.
                ranges.iter().for_each(|r| drop(sys::collapse(r.clone())));
                Ok(Reply::Done)
            }
            Some(Request::Fork { pid, mother, touch }) => {
                match give_birth(control, filters, ([pid, mother], &touch), got.fds) {
                    Ok(()) => continue,
                    Err(failure) => Err(failure),
                }
            }
            Some(Request::Derive) => match derive(got.fds) {
                Ok(Derivation::Copy(control)) => return Ok(Some(control)),
                Ok(Derivation::Original(pid)) => Ok(Reply::Pid(pid)),
                Err(failure) => Err(failure),
            },
            _ => Err(Errno::BADMSG).at(Step::Request, "reading the request"),
        };
        send(control, &done.unwrap_or_else(Reply::from))?;
    }
}

fn each(
    ranges: &[Range<u64>],
    change: impl Fn(Range<u64>) -> io::Result<()>,
    doing: &str,
) -> Result<Reply, Failure> {
    let all: io::Result<()> = ranges.iter().cloned().try_for_each(change);
    all.at(Step::Setup, doing).map(|()| Reply::Done)
}

fn hold_files(parts: &[FilePart], files: &[OwnedFd]) -> Result<Reply, Failure> {
    let map = |part: &FilePart| {
        let file = files.get(part.file as usize).ok_or(Errno::BADF)?;
        sys::map_file_at(part.range.clone(), (file.as_fd(), part.offset), part.prot)
    };
    let all: io::Result<()> = parts.iter().try_for_each(map);
    all.at(Step::Setup, "mapping a file to be held")
        .map(|()| Reply::Done)
}

/// Who returns from making a copy of the template.
enum Derivation {
    /// The template, with the copy's pid.
    Original(i32),
    /// The copy, with the socket that it is to serve.
    Copy(OwnedFd),
}

/// Makes a copy of this process, a child of the supervisor too.
fn derive(fds: Vec<OwnedFd>) -> Result<Derivation, Failure> {
    let Ok([control]) = <[OwnedFd; 1]>::try_from(fds) else {
        return Err(Errno::BADF).at(Step::Request, "counting descriptors");
    };
    let options = ForkOptions {
        flags: libc::CLONE_PARENT,
        ..ForkOptions::default()
    };
    match sys::fork(&options).at(Step::Clone, "making another template")? {
        Fork::Parent(pid) => Ok(Derivation::Original(pid)),
        Fork::Child => Ok(Derivation::Copy(control)),
    }
}

/// All that helper and mother need. They run one after another while the template waits.
struct Birth<'a> {
    control: &'a OwnedFd,
    filters: &'a [Vec<libc::sock_filter>],
    pid: i32,
    mother: i32,
    touch: &'a [Range<u64>],
    /// Init, by a pidfd.
    init: OwnedFd,
    payload: OwnedFd,
    v1: Vec<OwnedFd>,
    failure: Cell<Option<Failure>>,
}

/// The child itself answers, so that its number outside is told; a failure before it is there is told by the caller.
fn give_birth(
    control: &OwnedFd,
    filters: &[Vec<libc::sock_filter>],
    ([pid, mother], touch): ([i32; 2], &[Range<u64>]),
    fds: Vec<OwnedFd>,
) -> Result<(), Failure> {
    let mut fds = fds.into_iter();
    let (Some(init), Some(payload)) = (fds.next(), fds.next()) else {
        return Err(Errno::BADF).at(Step::Request, "counting descriptors");
    };
    let birth = Birth {
        control,
        filters,
        pid,
        mother,
        touch,
        init,
        payload,
        v1: fds.collect(),
        failure: Cell::new(None),
    };
    let options = ForkOptions {
        cgroup: Some(birth.payload.as_fd()),
        ..ForkOptions::default()
    };
    sys::run_beside(&options, &birth, |birth| birth.note(help(birth)))
        .at(Step::Clone, "making a helper")?;
    match birth.failure.take() {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

impl Birth<'_> {
    fn note(&self, result: Result<(), Failure>) {
        if let Err(failure) = result {
            self.failure.set(Some(failure));
        }
    }
}

fn help(birth: &Birth<'_>) -> Result<(), Failure> {
    for procs in &birth.v1 {
        rustix::io::write(procs, b"0").at(Step::Clone, "joining a version 1 cgroup")?;
    }
    sys::enter_namespaces(birth.init.as_fd()).at(Step::Clone, "entering the sandbox")?;
    sys::become_user(0, 0, &[]).at(Step::Clone, "becoming root of the sandbox")?;
    let options = ForkOptions {
        pid: Some(birth.mother),
        ..ForkOptions::default()
    };
    sys::run_beside(&options, birth, |birth| birth.note(bear(birth)))
        .at(Step::Clone, "making a mother")
}

fn bear(birth: &Birth<'_>) -> Result<(), Failure> {
    let options = ForkOptions {
        pid: Some(birth.pid),
        ..ForkOptions::default()
    };
    match sys::fork(&options).at(Step::Clone, "making a process with a chosen pid")? {
        Fork::Parent(_) => Ok(()),
        Fork::Child => {
            // Where there is no memory for it, it is done when it is needed.
            let mut touch = birth.touch.iter().cloned();
            let _ = touch.try_for_each(sys::populate);
            let confined = child::confine(birth.filters).and_then(|()| sys::set_dumpable(true));
            let reply = match confined.at(Step::Prepare, "confining a new process") {
                Ok(()) => Reply::Pid(birth.pid),
                Err(failure) => failure.into(),
            };
            match wire::send_as(birth.control, &reply.encode(), birth.pid) {
                Ok(()) if matches!(reply, Reply::Pid(_)) => {
                    // One that is born early and waits must not keep the supervisor from seeing the template's end.
                    let _ = sys::close_from(0, false);
                    sys::pause_for_ever()
                }
                _ => sys::exit(127),
            }
        }
    }
}
