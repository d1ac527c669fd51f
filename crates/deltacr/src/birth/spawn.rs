//! Making one process or thread, as the child of a stopped process.
//!
//! A process is made by `vfork` + `execveat` of the program that it is to be: exec gives it an
//! empty address space and the right `/proc/PID/exe`, and needs no privilege.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::ids::{HostPid, InnerPid};
use crate::numbers;
use crate::remote::{Batch, Remote, await_stop, block_signals, longs, lost};
use crate::stop::{StoppedThread, await_interruption, hold_thread};
use crate::sys::process;
use crate::sys::ptrace::{self, Stop};

const THREAD_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

/// Makes a child of `parent`, which will have the number `pid` (the caller has seen to it), running
/// a fresh image of `exe`. It stands still before its first instruction and has no descriptors. For `root` see [`execute`].
pub(crate) fn child(
    parent: &mut Remote,
    pid: InnerPid,
    exit_signal: i32,
    exe: BorrowedFd<'_>,
    root: Option<BorrowedFd<'_>>,
) -> io::Result<Remote> {
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | (exit_signal & 0xff);
    let host = clone(parent, flags)?;
    // From here on the parent waits in the kernel until its child has a program of its own.
    ptrace::resume(parent.host())?;
    let number = host.inner();
    let made = become_program(pid, host, parent.area_address(), exe, root);
    if made.is_err() {
        let _ =
            process::pidfd_open(host).and_then(|p| process::pidfd_signal(p.as_fd(), libc::SIGKILL));
        let _ = await_end(host);
    }
    parent.finish(parent.host())?;
    if made.is_err() {
        reap(parent, &[number?])?;
    }
    made
}

fn become_program(
    pid: InnerPid,
    host: HostPid,
    area: Option<u64>,
    exe: BorrowedFd<'_>,
    root: Option<BorrowedFd<'_>>,
) -> io::Result<Remote> {
    await_interruption(host)?;
    block_signals(host)?;
    let found = host.inner()?;
    if found != pid {
        return Err(numbers::taken(pid, found));
    }
    let mut child = Remote::new(pid, host, area)?;
    execute(&mut child, exe, root)?;
    Ok(child)
}

/// Takes up init's new-born child, which waits in `pause(2)`.
pub(crate) fn adopt(pid: InnerPid, host: HostPid) -> io::Result<Remote> {
    ptrace::seize(host)?;
    ptrace::interrupt(host)?;
    await_interruption(host)?;
    block_signals(host)?;
    Remote::new(pid, host, None)
}

/// Makes a child of `parent` that is a copy of it. The caller has seen to its number.
pub(crate) fn twin(parent: &mut Remote, pid: InnerPid, exit_signal: i32) -> io::Result<Remote> {
    let child = copy(parent, pid, exit_signal & 0xff)?;
    let found = child.host().inner()?;
    if found != pid {
        kill(&child, &[child.host()])?;
        reap(parent, &[found])?;
        return Err(numbers::taken(pid, found));
    }
    Ok(child)
}

fn close_all(remote: &mut Remote) -> io::Result<()> {
    let mut close = Batch::new();
    close.call(
        libc::SYS_close_range,
        &[0.into(), u32::MAX.into(), 0.into()],
    );
    remote.run(&close).map(drop)
}

/// Makes a process, whose only thread is stopped, run a fresh image of `exe`. `root` becomes its root directory, if it is
/// in one of its own, where the kernel would look for the program's loader.
pub(crate) fn execute(
    remote: &mut Remote,
    exe: BorrowedFd<'_>,
    root: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let files: Vec<_> = [exe].into_iter().chain(root).collect();
    let given = remote.give_fds(&files)?;
    let fd = given[0];
    let mut exec = Batch::new();
    if let Some(root) = given.get(1) {
        let here = exec.input(b".\0");
        exec.call(libc::SYS_fchdir, &[(*root).into()]);
        exec.call(libc::SYS_chroot, &[here.into()]);
    }
    let empty = exec.input(&[0]);
    // One argument, for programs exist that do not bear none; it is overwritten with the rest.
    let argv = exec.input(&longs(&[0, 0]));
    exec.link(argv, &[(0, empty)]);
    let envp = exec.input(&longs(&[0]));
    let args = [
        fd.into(),
        empty.into(),
        argv.into(),
        envp.into(),
        libc::AT_EMPTY_PATH.into(),
    ];
    let call = exec.call(libc::SYS_execveat, &args);
    let len = remote.start(remote.host(), &exec)?;
    loop {
        match await_stop(remote.host())? {
            Stop::Executed => break,
            Stop::Interrupted | Stop::GroupStopped(_) => ptrace::resume(remote.host())?,
            Stop::Signal(libc::SIGTRAP | libc::SIGSTOP) if !remote.is_at_end(remote.host())? => {
                remote.put_aside(remote.host())?;
                ptrace::resume(remote.host())?;
            }
            Stop::Signal(libc::SIGTRAP) => {
                remote.outcome(&exec, len)?.result(call)?;
                return Err(io::Error::other("exec came back"));
            }
            other => return Err(lost(other)),
        }
    }
    // The kernel is still on its way out of execve, and will set the result register; one step takes the process
    // out of it, to before its first instruction.
    ptrace::step(remote.host())?;
    match await_stop(remote.host())? {
        Stop::Signal(libc::SIGTRAP) => remote.forget_area()?,
        other => return Err(lost(other)),
    }
    close_all(remote)
}

/// A process that only exists to have a number, and to have children in its session or group.
/// It is a copy of `parent`, waiting to be told what to do.
pub(crate) fn copy(parent: &mut Remote, pid: InnerPid, flags: i32) -> io::Result<Remote> {
    let host = clone_through(parent, flags)?;
    block_signals(host)?;
    Remote::new(pid, host, parent.area_address())
}

/// Adds a thread to a process. The caller has seen to its number.
pub(crate) fn thread(remote: &mut Remote, tid: InnerPid) -> io::Result<StoppedThread> {
    let thread = any_thread(remote)?;
    if thread.tid != tid {
        end_thread(remote, thread.host)?;
        return Err(numbers::taken(tid, thread.tid));
    }
    Ok(thread)
}

/// Adds a thread to a process, with the next number that is free.
pub(crate) fn any_thread(remote: &mut Remote) -> io::Result<StoppedThread> {
    let host = clone_through(remote, THREAD_FLAGS)?;
    hold_thread(host.inner()?, host)
}

/// Ends one thread of a process, without a trace in the process' memory.
pub(crate) fn end_thread(remote: &mut Remote, host: HostPid) -> io::Result<()> {
    let mut exit = Batch::new();
    exit.call(libc::SYS_set_robust_list, &[0.into(), 24.into()]);
    exit.call(libc::SYS_set_tid_address, &[0.into()]);
    exit.call(libc::SYS_exit, &[0.into()]);
    remote.start(host, &exit)?;
    await_end(host)
}

/// Ends a process for good; its parent is left with a zombie.
pub(crate) fn kill(remote: &Remote, threads: &[HostPid]) -> io::Result<()> {
    process::pidfd_signal(remote.pidfd(), libc::SIGKILL)?;
    // A process is dead when its first thread is, which the kernel reports last.
    for host in threads.iter().filter(|host| **host != remote.host()) {
        await_end(*host)?;
    }
    await_end(remote.host())
}

pub(crate) fn await_end(host: HostPid) -> io::Result<()> {
    loop {
        match await_stop(host) {
            Ok(Stop::Gone(_)) => return Ok(()),
            Ok(_) => ptrace::resume(host)?,
            // Nothing left to wait for.
            Err(e) if e.raw_os_error() == Some(libc::ECHILD) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

/// Makes a process with one thread die of a signal, for which it has no handler.
pub(crate) fn die(remote: &Remote, signal: i32) -> io::Result<()> {
    process::pidfd_signal(remote.pidfd(), signal)?;
    if signal == libc::SIGKILL {
        // Nothing stops it any more.
        return await_end(remote.host());
    }
    ptrace::resume(remote.host())?;
    match await_stop(remote.host())? {
        Stop::Signal(got) => ptrace::resume_with(remote.host(), got)?,
        Stop::Gone(_) => return Ok(()),
        other => return Err(lost(other)),
    }
    await_end(remote.host())
}

/// Begins a `clone` in a stopped process, which is left where it reports the birth. Returns the new-born, which is about to stop.
pub(crate) fn clone(parent: &mut Remote, flags: i32) -> io::Result<HostPid> {
    let mut clone = Batch::new();
    clone.call(
        libc::SYS_clone,
        &[flags.into(), 0.into(), 0.into(), 0.into(), 0.into()],
    );
    parent.start(parent.host(), &clone)?;
    await_birth(parent.host())
}

/// The whole of a `clone` that does not keep the parent waiting; both stand still.
pub(crate) fn clone_through(parent: &mut Remote, flags: i32) -> io::Result<HostPid> {
    let host = clone(parent, flags)?;
    ptrace::resume(parent.host())?;
    parent.finish(parent.host())?;
    await_interruption(host)?;
    Ok(host)
}

/// Waits for a thread's report that it has a child. If the call failed there is none.
fn await_birth(host: HostPid) -> io::Result<HostPid> {
    loop {
        match await_stop(host)? {
            Stop::Born => return Ok(HostPid(ptrace::event_message(host)? as i32)),
            Stop::Interrupted | Stop::GroupStopped(_) => ptrace::resume(host)?,
            Stop::Signal(libc::SIGTRAP) => {
                let limits = "no more processes can be made in the sandbox";
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, limits));
            }
            other => return Err(lost(other)),
        }
    }
}

/// Takes dead children off a process' hands.
pub(crate) fn reap(parent: &mut Remote, children: &[InnerPid]) -> io::Result<()> {
    let mut batch = Batch::new();
    for child in children {
        let flags = libc::WNOHANG | libc::__WALL;
        batch.call(
            libc::SYS_wait4,
            &[child.0.into(), 0.into(), flags.into(), 0.into()],
        );
    }
    if batch.is_empty() {
        Ok(())
    } else {
        parent.run(&batch).map(drop)
    }
}
