//! The one primitive by which the engine acts inside a process: a *remote batch* of system calls.
//!
//! The engine maps one *area* into every process of the sandbox, once. To act, it writes a small
//! stub and a list of calls into the area and makes a stopped thread run them. The stub is written
//! anew each time and all other threads of the sandbox stand still, so a program that tampers with
//! the area changes nothing: it cannot make the engine run other calls than the engine's own.

mod area;
mod batch;
mod descriptors;
mod flights;

use area::{AREA, vdso_of};
use batch::Laid;
pub(crate) use batch::Standing;
pub use batch::{Arg, Batch, CAPACITY, CallId, DataRef, Outcome};
use flights::Flight;
pub(crate) use flights::FlightId;

use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use crate::ids::{HostPid, InnerPid};
use crate::procfs::OpenFiles;
use crate::sys::process::{self, SYSCALL};
use crate::sys::ptrace::{self, RawSiginfo, Registers, Stop};

/// Bytes at the area's beginning that hold the stub.
const STUB_ROOM: u64 = 4096;
/// How often a batch's end is looked for before the caller goes to sleep: most batches take some microseconds, being woken
/// takes longer.
const GLANCES: usize = 40;
/// Every signal but the one that the stub ends with.
const ALL_BUT_TRAP: u64 = !(1 << (libc::SIGTRAP - 1));

/// A stopped process of the sandbox that can be made to run batches.
pub struct Remote {
    pid: InnerPid,
    host: HostPid,
    pidfd: Arc<fs::File>,
    /// Where the area begins, once it is mapped.
    area: Option<u64>,
    /// What the stub runs with: the registers of the first thread, which is known to be in user
    /// mode's care.
    base: Registers,
    /// `/proc/PID/mem`, from the first time that it was needed.
    memory: OnceLock<fs::File>,
    /// Whether the area holds the stub.
    stub_there: bool,
    flights: Vec<Flight>,
    /// Signals of the program's own that came while its threads ran for the engine.
    strays: Vec<Stray>,
    files: OpenFiles,
}

/// A signal that a thread took off its queue while it ran for the engine. No mask keeps these from it: `SIGSTOP`, and
/// `SIGTRAP`, with which the stub ends. The program gets it when it is let go.
struct Stray {
    tid: HostPid,
    info: RawSiginfo,
}

impl Remote {
    /// Takes up a process whose first thread is stopped, traced by the calling thread, and has
    /// all signals but `SIGTRAP` blocked ([`block_signals`]).
    /// `area` is where an earlier visit mapped the area, if it did.
    pub(crate) fn new(pid: InnerPid, host: HostPid, area: Option<u64>) -> io::Result<Self> {
        Self::again(pid, host, area, OpenFiles::default())
    }

    /// The same, with the files that an earlier visit opened.
    pub(crate) fn again(
        pid: InnerPid,
        host: HostPid,
        area: Option<u64>,
        files: OpenFiles,
    ) -> io::Result<Self> {
        let pidfd = files.get("pidfd", || process::pidfd_open(host).map(fs::File::from))?;
        let base = ptrace::registers(host)?;
        let mut remote = Self {
            pid,
            host,
            pidfd,
            area: None,
            base,
            memory: OnceLock::new(),
            stub_there: false,
            flights: Vec::new(),
            strays: Vec::new(),
            files,
        };
        remote.area = area.filter(|at| remote.holds_stub(*at));
        remote.stub_there = remote.area.is_some();
        if remote.area.is_none() {
            // It may have executed a program since.
            remote.files.forget_memory();
        }
        Ok(remote)
    }

    /// The process, as the sandbox counts.
    pub fn pid(&self) -> InnerPid {
        self.pid
    }

    /// Its files below `/proc` that are open.
    pub(crate) fn files(&self) -> &OpenFiles {
        &self.files
    }

    /// One of them, which shows the same to whoever opens it.
    pub(crate) fn proc_file(&self, name: &'static str) -> io::Result<Arc<fs::File>> {
        let path = || format!("/proc/{}/{name}", self.host);
        self.files.get(name, || fs::File::open(path()))
    }

    /// The process, as the supervisor counts.
    pub fn host(&self) -> HostPid {
        self.host
    }

    /// A handle of the process.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Runs the calls in the process, one after another, in one stop.
    ///
    /// # Errors
    /// The outer error says that the process died or could not be driven. That a call failed is told by
    /// [`Outcome::result`].
    pub fn run(&mut self, batch: &Batch) -> io::Result<Outcome> {
        self.run_in(self.host, batch)
    }

    /// The same in a chosen thread of the process; it must be stopped like the first.
    pub(crate) fn run_in(&mut self, tid: HostPid, batch: &Batch) -> io::Result<Outcome> {
        let bytes = self.start(tid, batch)?;
        self.finish(tid)?;
        self.outcome(batch, bytes)
    }

    /// Sets a thread going on a batch; [`Remote::finish`] waits for its end.
    pub(crate) fn start(&mut self, tid: HostPid, batch: &Batch) -> io::Result<usize> {
        self.land_all()?;
        let area = self.map_area()?;
        self.set_going(tid, &batch.lay(area + STUB_ROOM))
    }

    /// Makes a thread run a batch as soon as it runs on. The batch is laid out at `place` if that is told: memory that has
    /// room for it, and is the engine's alone.
    pub(crate) fn aim(
        &mut self,
        tid: HostPid,
        batch: &Batch,
        place: Option<u64>,
    ) -> io::Result<()> {
        let area = self.map_area()?;
        let at = place.unwrap_or(area + STUB_ROOM);
        self.aim_at(tid, &batch.lay(at))
    }

    fn set_going(&mut self, tid: HostPid, laid: &Laid) -> io::Result<usize> {
        let area = self.map_area()?;
        if laid.at + laid.bytes.len() as u64 > area + STUB_ROOM + CAPACITY as u64 {
            return Err(io::Error::new(
                io::ErrorKind::ArgumentListTooLong,
                "batch too long",
            ));
        }
        self.aim_at(tid, laid)?;
        ptrace::resume(tid)?;
        Ok(laid.bytes.len())
    }

    fn aim_at(&mut self, tid: HostPid, laid: &Laid) -> io::Result<()> {
        let area = self.map_area()?;
        self.load(area, laid)?;
        let mut regs = self.base;
        regs.rip = area;
        regs.rbx = laid.at;
        regs.r12 = laid.calls as u64;
        // Not in a system call, so the kernel has none to restart.
        regs.orig_rax = u64::MAX;
        // Nothing of the program's own: the calls must not find the thread on its signal stack.
        regs.rsp = area + AREA;
        (regs.fs_base, regs.gs_base) = match tid == self.host {
            true => (self.base.fs_base, self.base.gs_base),
            false => ptrace::registers(tid).map(|own| (own.fs_base, own.gs_base))?,
        };
        ptrace::set_registers(tid, &regs)
    }

    fn load(&mut self, area: u64, laid: &Laid) -> io::Result<()> {
        if !self.stub_there {
            process::write_memory(self.host, area, &[IoSlice::new(process::stub())])?;
            self.stub_there = true;
        }
        process::write_memory(self.host, laid.at, &[IoSlice::new(&laid.bytes)])
    }

    pub(crate) fn outcome(&self, batch: &Batch, len: usize) -> io::Result<Outcome> {
        let mut bytes = vec![0; len];
        let area = self.area.unwrap_or_default();
        process::read_memory(self.host, area + STUB_ROOM, &mut bytes)?;
        Ok(batch.outcome(bytes))
    }

    /// Waits until a thread has come to the stub's end.
    pub(crate) fn finish(&mut self, tid: HostPid) -> io::Result<()> {
        loop {
            match await_stop(tid)? {
                Stop::Signal(libc::SIGTRAP) if self.is_at_end(tid)? => return Ok(()),
                Stop::Signal(libc::SIGTRAP | libc::SIGSTOP) => {
                    self.put_aside(tid)?;
                    ptrace::resume(tid)?;
                }
                Stop::Interrupted | Stop::GroupStopped(_) | Stop::Born => ptrace::resume(tid)?,
                other => return Err(lost(other)),
            }
        }
    }

    /// Whether a thread stands behind the `int3` that ends the stub.
    pub(crate) fn is_at_end(&self, tid: HostPid) -> io::Result<bool> {
        let end = self.area.map(|at| at + process::stub().len() as u64);
        Ok(Some(ptrace::registers(tid)?.rip) == end)
    }

    /// Keeps the signal that a thread has stopped for.
    pub(crate) fn put_aside(&mut self, tid: HostPid) -> io::Result<()> {
        let info = ptrace::siginfo(tid)?;
        self.strays.push(Stray { tid, info });
        Ok(())
    }

    /// The signals that were put aside, as they were queued.
    pub(crate) fn strays(&self) -> impl Iterator<Item = &RawSiginfo> {
        self.strays.iter().map(|stray| &stray.info)
    }

    /// The signals that were put aside belong to a state that is given up.
    pub(crate) fn forget_strays(&mut self) {
        self.strays.clear();
    }

    /// Sends the signals that were put aside once more. The sender that the program sees is the kernel.
    pub(crate) fn send_strays(&mut self) -> io::Result<()> {
        for Stray { tid, info } in self.strays.drain(..) {
            let [signal, _, code] = [0, 4, 8].map(|at| signed(&info, at));
            match code {
                libc::SI_TKILL => process::thread_signal(self.host, tid, signal)?,
                _ => process::pidfd_signal(self.pidfd.as_fd(), signal)?,
            }
        }
        Ok(())
    }

    /// One system call without an area: the thread runs a `syscall` instruction that is there
    /// already, the one it waits in or the vDSO's.
    fn step_syscall(&mut self, nr: i64, args: [u64; 6]) -> io::Result<u64> {
        let mut regs = self.base;
        regs.rip = self.syscall_instruction()?;
        regs.orig_rax = u64::MAX;
        regs.rax = nr as u64;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        ptrace::set_registers(self.host, &regs)?;
        let after = loop {
            ptrace::step(self.host)?;
            match await_stop(self.host)? {
                Stop::Signal(libc::SIGTRAP) => {
                    let now = ptrace::registers(self.host)?;
                    // On the way out of a system call the kernel reports a step that was none.
                    if now.rip != regs.rip {
                        break now;
                    }
                    if signed(&ptrace::siginfo(self.host)?, 8) <= 0 {
                        self.put_aside(self.host)?;
                    }
                }
                Stop::Signal(libc::SIGSTOP) => self.put_aside(self.host)?,
                Stop::Interrupted | Stop::GroupStopped(_) => {
                    ptrace::set_registers(self.host, &regs)?;
                }
                other => return Err(lost(other)),
            }
        };
        let got = after.rax as i64;
        if (-4095..0).contains(&got) {
            return Err(io::Error::from_raw_os_error(-got as i32));
        }
        Ok(got as u64)
    }

    /// Makes the process ignore `SIGTRAP`. The kernel ends that when it has to force the signal on the process, as it does
    /// at the end of every batch; so this call is made without one.
    pub(crate) fn ignore_trap(&mut self) -> io::Result<()> {
        let Some(area) = self.area else {
            return Ok(());
        };
        let action = area + STUB_ROOM;
        let bytes = longs(&[libc::SIG_IGN as u64, 0, 0, 0]);
        process::write_memory(self.host, action, &[IoSlice::new(&bytes)])?;
        let mut regs = self.base;
        regs.rip = self.syscall_instruction()?;
        regs.orig_rax = u64::MAX;
        regs.rax = libc::SYS_rt_sigaction as u64;
        (regs.rdi, regs.rsi, regs.rdx, regs.r10) = (libc::SIGTRAP as u64, action, 0, 8);
        ptrace::set_registers(self.host, &regs)?;
        // Into the call, and out of it.
        for _ in 0..2 {
            ptrace::to_system_call(self.host)?;
            match await_stop(self.host)? {
                Stop::SystemCall => {}
                other => return Err(lost(other)),
            }
        }
        // A thread that is let go from here would not restart the call that it was stopped in.
        ptrace::interrupt(self.host)?;
        ptrace::resume(self.host)?;
        match await_stop(self.host)? {
            Stop::Interrupted | Stop::GroupStopped(_) => Ok(()),
            other => Err(lost(other)),
        }
    }

    /// Makes a thread begin a call, and interrupts it at once: it comes back as soon as it would have to wait. The call is the
    /// one that `regs` are in; `point` changes what it is to differ in, and is told where `data` is. Returns the
    /// registers after it, of which the result says what the call left.
    pub(crate) fn begin_call(
        &mut self,
        tid: HostPid,
        regs: &Registers,
        data: &[u8],
        point: impl FnOnce(&mut Registers, u64),
    ) -> io::Result<Registers> {
        self.land_all()?;
        let at = self.map_area()? + STUB_ROOM;
        process::write_memory(self.host, at, &[IoSlice::new(data)])?;
        let mut call = *regs;
        point(&mut call, at);
        call.rip = self.syscall_instruction()?;
        call.rax = regs.orig_rax;
        call.orig_rax = u64::MAX;
        ptrace::set_registers(tid, &call)?;
        ptrace::to_system_call(tid)?;
        loop {
            match await_stop(tid)? {
                Stop::SystemCall => break,
                Stop::Signal(libc::SIGTRAP | libc::SIGSTOP) => self.put_aside(tid)?,
                Stop::Interrupted | Stop::GroupStopped(_) => {}
                other => return Err(lost(other)),
            }
            ptrace::to_system_call(tid)?;
        }
        // At the call's door: what would wait finds that it is wanted elsewhere.
        ptrace::interrupt(tid)?;
        ptrace::resume(tid)?;
        loop {
            match await_stop(tid)? {
                Stop::Interrupted | Stop::GroupStopped(_) => return ptrace::registers(tid),
                Stop::Signal(libc::SIGTRAP | libc::SIGSTOP) => self.put_aside(tid)?,
                other => return Err(lost(other)),
            }
            ptrace::resume(tid)?;
        }
    }

    fn syscall_instruction(&self) -> io::Result<u64> {
        let is_syscall = |at: u64| {
            let mut found = [0; 2];
            process::read_memory(self.host, at, &mut found).is_ok() && found == SYSCALL
        };
        let waits_in = self.base.rip.wrapping_sub(2);
        if is_syscall(waits_in) {
            return Ok(waits_in);
        }
        let vdso = || Some(vdso_of(self.host)? + process::vdso_syscall_offset()?);
        vdso().filter(|at| is_syscall(*at)).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                "the process has no vDSO to make calls from",
            )
        })
    }

    /// Reads memory of the process (`process_vm_readv(2)`).
    pub fn read(&self, address: u64, into: &mut [u8]) -> io::Result<()> {
        process::read_memory(self.host, address, into)
    }

    /// Writes memory of the process, whatever its protection (`/proc/PID/mem`).
    pub fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory()?.write_all_at(bytes, address)
    }

    fn memory(&self) -> io::Result<&fs::File> {
        if let Some(file) = self.memory.get() {
            return Ok(file);
        }
        let path = format!("/proc/{}/mem", self.host);
        let file = fs::File::options().write(true).open(path)?;
        Ok(self.memory.get_or_init(|| file))
    }
}

/// Keeps signals from a stopped thread while it runs batches. The caller keeps the mask that it had.
pub(crate) fn block_signals(tid: HostPid) -> io::Result<()> {
    ptrace::set_signal_mask(tid, ALL_BUT_TRAP)
}

/// Waits for the next stop, whatever it is.
pub(crate) fn await_stop(tid: HostPid) -> io::Result<Stop> {
    for _ in 0..GLANCES {
        if let Some(stop) = ptrace::wait(tid, false)? {
            return Ok(stop);
        }
        std::thread::yield_now();
    }
    ptrace::wait(tid, true)?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
}

/// What an unexpected stop means.
pub(crate) fn lost(stop: Stop) -> io::Error {
    match stop {
        Stop::Gone(_) => io::Error::from_raw_os_error(libc::ESRCH),
        other => io::Error::other(format!("it stopped unexpectedly ({other:?})")),
    }
}

/// A 32-bit field of a `siginfo_t`: signal, error and code are at 0, 4 and 8.
fn signed(info: &RawSiginfo, at: usize) -> i32 {
    i32::from_le_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]])
}

/// The bytes of a structure of 64-bit fields.
pub(crate) fn longs(fields: &[u64]) -> Vec<u8> {
    fields.iter().flat_map(|f| f.to_le_bytes()).collect()
}
