//! Stopping a process with all its threads, and letting it go again.

use std::io;

use crate::ids::{HostPid, InnerPid};
use crate::procfs::OpenFiles;
use crate::remote::{Remote, await_stop, block_signals};
use crate::resume;
use crate::signals::{Queue, Scope};
use crate::sys::ptrace::{self, Registers, Stop};
use crate::threads;
use crate::waits::{self, Waits};

/// A thread that stands still, with what it is to go on with.
pub(crate) struct StoppedThread {
    /// Its number inside.
    pub(crate) tid: InnerPid,
    /// Its number outside.
    pub(crate) host: HostPid,
    /// The registers that it was stopped with.
    pub(crate) regs: Registers,
    /// The signal mask that it was stopped with.
    pub(crate) mask: u64,
    /// Whether the call that it was stopped in was looked after: the registers are those that it is to go on with.
    pub(crate) settled: bool,
}

/// A process all of whose threads stand still, traced by the calling thread.
pub struct Stopped {
    /// To make the process run system calls.
    pub remote: Remote,
    pub(crate) threads: Vec<StoppedThread>,
}

impl Stopped {
    /// Stops a process that was not frozen before. Its threads must not come and go meanwhile.
    ///
    /// # Errors
    /// The process is gone, is traced by another, or the caller may not trace it.
    pub fn seize(pid: InnerPid, host: HostPid) -> io::Result<Self> {
        let mut threads = task_ids(host)?;
        threads.sort_by_key(|t| *t != host);
        for tid in &threads {
            ptrace::seize(*tid)?;
            ptrace::interrupt(*tid)?;
        }
        for tid in &threads {
            await_interruption(*tid)?;
        }
        let inner = |tid: &HostPid| if *tid == host { pid } else { InnerPid(tid.0) };
        let threads: Vec<_> = threads.iter().map(|tid| (*tid, inner(tid))).collect();
        Self::hold(pid, host, &threads, None, OpenFiles::default())
    }

    /// Takes up a process whose threads are all stopped; the first one is its leader. If that fails, those that were taken
    /// up are let go.
    pub(crate) fn hold(
        pid: InnerPid,
        host: HostPid,
        threads: &[(HostPid, InnerPid)],
        area: Option<u64>,
        files: OpenFiles,
    ) -> io::Result<Self> {
        let remote = Remote::again(pid, host, area, files)?;
        let mut held = Self::take(remote, Vec::with_capacity(threads.len()));
        for (host, tid) in threads {
            match hold_thread(*tid, *host) {
                Ok(thread) => held.threads.push(thread),
                Err(e) => {
                    held.release()?;
                    return Err(e);
                }
            }
        }
        Ok(held)
    }

    /// The same for one that was driven before.
    pub(crate) fn take(remote: Remote, threads: Vec<StoppedThread>) -> Self {
        Self { remote, threads }
    }

    /// Lets the process run on from where its threads are set to.
    ///
    /// # Errors
    /// A thread could not be let go; all others are, nonetheless.
    pub fn release(mut self) -> io::Result<()> {
        let mut result = self.remote.clear_flights().or_else(unless_gone);
        result = result.and(self.remote.send_strays().or_else(unless_gone));
        for thread in &self.threads {
            let released = thread.release();
            result = result.and(released.or_else(unless_gone));
        }
        result
    }
}

/// A thread that was killed meanwhile needs no letting go.
fn unless_gone(e: io::Error) -> io::Result<()> {
    match e.raw_os_error() {
        Some(libc::ESRCH) => Ok(()),
        _ => Err(e),
    }
}

impl StoppedThread {
    pub(crate) fn release(&self) -> io::Result<()> {
        let regs = undisturbed(self.host, &self.regs, self.mask, self.settled)?;
        ptrace::set_registers(self.host, &regs)?;
        ptrace::set_signal_mask(self.host, self.mask)?;
        ptrace::detach(self.host)
    }
}

/// The numbers of the threads of a process.
pub(crate) fn task_ids(host: HostPid) -> io::Result<Vec<HostPid>> {
    let number = |entry: io::Result<std::fs::DirEntry>| {
        let name = entry?.file_name();
        let tid = name.to_str().and_then(|n| n.parse().ok());
        tid.map(HostPid)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    };
    std::fs::read_dir(format!("/proc/{host}/task"))?
        .map(number)
        .collect()
}

/// Lets a thread go that stands still and was not taken up.
pub(crate) fn let_run(host: HostPid, waits: &mut Waits) -> io::Result<()> {
    let regs = ptrace::registers(host)?;
    waits::note(host, &regs, waits);
    let calm = undisturbed(host, &regs, ptrace::signal_mask(host)?, false)?;
    if calm.rip != regs.rip {
        ptrace::set_registers(host, &calm)?;
    }
    ptrace::detach(host)
}

/// The registers that a thread goes on with so that it cannot tell that it was stopped: a call that nothing but the stop has
/// interrupted begins again, and one that the kernel would go on with by a call that the thread's filters do not know. Of one that
/// is `settled` that was seen to already; not so where a checkpoint failed before.
fn undisturbed(host: HostPid, regs: &Registers, mask: u64, settled: bool) -> io::Result<Registers> {
    let stuck = || !settled && resume::has_note(regs) && !threads::may_go_on_by_note(host, regs);
    if resume::is_interrupted(regs, false) || stuck() {
        let own = Queue::capture(host, Scope::Thread)?;
        let shared = Queue::capture(host, Scope::Process)?;
        if (own.set() | shared.set()) & !mask == 0 {
            let mut regs = *regs;
            resume::restart(&mut regs);
            return Ok(regs);
        }
    }
    Ok(*regs)
}

/// Waits until a thread that was interrupted stands still.
pub(crate) fn await_interruption(tid: HostPid) -> io::Result<()> {
    match await_stop(tid)? {
        Stop::Gone(_) => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        _ => Ok(()),
    }
}

/// Takes down what a stopped thread is to go on with, and keeps signals from it.
pub(crate) fn hold_thread(tid: InnerPid, host: HostPid) -> io::Result<StoppedThread> {
    let regs = ptrace::registers(host)?;
    let mask = ptrace::signal_mask(host)?;
    block_signals(host)?;
    Ok(StoppedThread {
        tid,
        host,
        regs,
        mask,
        settled: false,
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::remote::Batch;

    struct Sleeper(Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn sleeper() -> (Sleeper, HostPid) {
        let child = Command::new("sleep")
            .arg("1000")
            .spawn()
            .expect("sleep runs");
        let host = HostPid(child.id() as i32);
        std::thread::sleep(std::time::Duration::from_millis(50));
        (Sleeper(child), host)
    }

    #[test]
    fn a_batch_runs_in_the_process_and_passes_results_on() {
        let (_child, host) = sleeper();
        let mut stopped = Stopped::seize(InnerPid(host.0), host).unwrap();
        let mut batch = Batch::new();
        let pid = batch.call(libc::SYS_getpid, &[]);
        let pipe = batch.output(8);
        batch.call(libc::SYS_pipe2, &[pipe.into(), 0.into()]);
        let text = batch.input(b"hello");
        let end = crate::remote::Arg::Int(pipe.at(4, 4));
        let wrote = batch.call(libc::SYS_write, &[end, text.into(), 5.into()]);
        let begin = crate::remote::Arg::Int(pipe.at(0, 4));
        let copy = batch.output(5);
        let read = batch.call(libc::SYS_read, &[begin, copy.into(), wrote.into()]);
        let bad = batch.call(libc::SYS_close, &[999.into()]);
        let outcome = stopped.remote.run(&batch).unwrap();
        assert_eq!(outcome.result(pid).unwrap(), host.0 as u64);
        assert_eq!(outcome.result(read).unwrap(), 5);
        assert_eq!(outcome.bytes(copy), b"hello");
        assert_eq!(
            outcome.result(bad).unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
        stopped.release().unwrap();
    }

    #[test]
    fn a_failed_must_ends_the_batch() {
        let (_child, host) = sleeper();
        let mut stopped = Stopped::seize(InnerPid(host.0), host).unwrap();
        let mut batch = Batch::new();
        batch.must(libc::SYS_close, &[999.into()]);
        let after = batch.call(libc::SYS_getpid, &[]);
        let outcome = stopped.remote.run(&batch).unwrap();
        assert_eq!(
            outcome.result(after).unwrap_err().raw_os_error(),
            Some(libc::ENOSYS)
        );
        stopped.release().unwrap();
    }

    #[test]
    fn descriptors_can_be_given_and_taken() {
        use std::io::Read as _;
        use std::os::fd::AsFd as _;
        let (_child, host) = sleeper();
        let mut stopped = Stopped::seize(InnerPid(host.0), host).unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let given = stopped
            .remote
            .give_fds(&[writer.as_fd(), writer.as_fd()])
            .unwrap();
        assert_eq!(given.len(), 2);
        drop(writer);
        let mut batch = Batch::new();
        let text = batch.input(b"over there");
        batch.call(libc::SYS_write, &[given[1].into(), text.into(), 10.into()]);
        batch.call(libc::SYS_close, &[given[0].into()]);
        batch.call(libc::SYS_close, &[given[1].into()]);
        stopped.remote.run(&batch).unwrap();
        let mut got = String::new();
        reader.read_to_string(&mut got).unwrap();
        assert_eq!(got, "over there");
        stopped.release().unwrap();
    }

    #[test]
    fn a_sleep_that_was_stopped_goes_on_unnoticed() {
        let mut child = Command::new("bash")
            .args(["-c", "sleep 0.3; echo $?"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let host = HostPid(child.id() as i32);
        std::thread::sleep(std::time::Duration::from_millis(100));
        let mut stopped = Stopped::seize(InnerPid(host.0), host).unwrap();
        let mut batch = Batch::new();
        batch.call(libc::SYS_getpid, &[]);
        stopped.remote.run(&batch).unwrap();
        stopped.release().unwrap();
        let mut out = String::new();
        io::Read::read_to_string(child.stdout.as_mut().unwrap(), &mut out).unwrap();
        assert_eq!(out, "0\n");
        child.wait().unwrap();
    }
}
