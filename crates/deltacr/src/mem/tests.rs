//! Captures and restores of real processes, whose memory is read back and compared.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{AddressSpace, Gears, Layout, Memory, Scan, SharedObjects, Tracker, Work};
use crate::env::{Environment, ExternalId, Namespace};
use crate::ids::{HostPid, InnerPid};
use crate::orphan::Orphans;
use crate::remote::{Arg, Batch, Remote};
use crate::stop::Stopped;
use crate::store::PageStore;
use crate::sys::ptrace;

mod second_gear;

/// The host's own root directory as the sandbox's filesystem.
struct Host {
    root: File,
    device: u64,
    paths: Mutex<HashMap<u64, PathBuf>>,
}

impl Host {
    fn new() -> Self {
        let root = File::open("/").unwrap();
        let exe = fs::metadata("/proc/self/exe").unwrap();
        Self {
            root,
            device: exe.dev(),
            paths: Mutex::default(),
        }
    }

    /// Knows the files that a process has mapped from now on.
    fn learn(&self, pid: HostPid) {
        for line in fs::read_to_string(format!("/proc/{pid}/maps"))
            .unwrap()
            .lines()
        {
            let Some(path) = line.split_whitespace().nth(5) else {
                continue;
            };
            if let Ok(meta) = fs::metadata(path) {
                self.paths.lock().insert(meta.ino(), path.into());
            }
        }
    }
}

impl Environment for Host {
    fn cgroup(&self) -> &Path {
        unreachable!("memory needs no cgroup")
    }
    fn init_pid(&self) -> HostPid {
        unreachable!("memory needs no init")
    }
    fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
    fn fs_device(&self) -> u64 {
        self.device
    }
    fn seccomp_filters(&self) -> usize {
        0
    }
    fn open_inode(&self, ino: u64, flags: i32) -> io::Result<OwnedFd> {
        let paths = self.paths.lock();
        let path = paths.get(&ino).ok_or(io::ErrorKind::NotFound)?;
        let write = flags & libc::O_ACCMODE == libc::O_RDWR;
        let options = File::options()
            .read(true)
            .write(write)
            .custom_flags(flags)
            .open(path)?;
        Ok(options.into())
    }
    fn external_pipe(&self, _ino: u64) -> Option<ExternalId> {
        None
    }
    fn open_external(&self, _id: ExternalId, _write: bool) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn set_next_pid(&self, _pid: InnerPid) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn birth(&self, _pid: InnerPid) -> io::Result<HostPid> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn before_resume(&self, _: crate::Deaths) -> io::Result<()> {
        Ok(())
    }
    fn namespace(&self, _kind: Namespace) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

struct Bench {
    gears: Gears,
    orphans: Orphans,
    store: Arc<PageStore>,
    shared: SharedObjects,
    host: Host,
}

impl Bench {
    fn new() -> Self {
        let store = PageStore::new();
        Self {
            gears: Gears::default(),
            orphans: Orphans::default(),
            shared: SharedObjects::new(Arc::clone(&store)).unwrap(),
            store,
            host: Host::new(),
        }
    }

    fn memory(&self) -> Memory<'_> {
        Memory {
            store: &self.store,
            shared: &self.shared,
            env: &self.host,
            orphans: &self.orphans,
            gears: self.gears,
        }
    }

    fn scan(&self, remote: &mut Remote, tracker: &mut Option<Tracker>) -> Scan {
        if let Some(tracker) = tracker {
            tracker.end_lazy(remote).unwrap();
        }
        let layout = Layout::of(remote).unwrap();
        let scan = self.memory().scan(remote, tracker.as_ref(), layout);
        scan.unwrap()
    }

    fn capture(&self, remote: &mut Remote, tracker: &mut Option<Tracker>) -> Arc<AddressSpace> {
        let scan = self.scan(remote, tracker);
        self.capture_like(remote, tracker, scan, None)
    }

    /// Captures, and does what is left to be done at once.
    fn capture_like(
        &self,
        remote: &mut Remote,
        tracker: &mut Option<Tracker>,
        scan: Scan,
        like: Option<&AddressSpace>,
    ) -> Arc<AddressSpace> {
        let captured = self.memory().capture(remote, tracker, scan, like);
        let (state, work) = captured.unwrap();
        work.into_iter().for_each(Work::run);
        state
    }

    /// Restores; part of it may be left for later.
    fn begin_restore(
        &self,
        remote: &mut Remote,
        tracker: &mut Option<Tracker>,
        target: &Arc<AddressSpace>,
    ) {
        let scan = self.scan(remote, tracker);
        let begun = self.memory().restore(remote, tracker, scan, target, &[]);
        begun.unwrap();
    }

    fn restore(
        &self,
        remote: &mut Remote,
        tracker: &mut Option<Tracker>,
        target: &Arc<AddressSpace>,
    ) {
        self.begin_restore(remote, tracker, target);
        let tracker = tracker.as_mut().unwrap();
        tracker.finish();
        tracker.end_lazy(remote).unwrap();
    }
}

struct Process(Child);

impl Process {
    fn sleeper() -> Self {
        let child = Command::new("sleep")
            .arg("1000")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let process = Self(child);
        // Until it waits, it goes on mapping files.
        await_in(process.host(), "nanosleep");
        process
    }

    fn host(&self) -> HostPid {
        HostPid(self.0.id() as i32)
    }

    fn children(&self) -> String {
        let host = self.host();
        fs::read_to_string(format!("/proc/{host}/task/{host}/children")).unwrap()
    }

    fn seize(&self) -> Stopped {
        Stopped::seize(InnerPid(self.host().0), self.host()).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Everything that a process has mapped, as the kernel shows it, and its contents.
#[derive(PartialEq, Eq)]
struct Dump {
    lines: Vec<(Range<u64>, String)>,
    contents: Vec<Vec<u8>>,
    layout: String,
}

fn dump(remote: &mut Remote) -> Dump {
    let host = remote.host();
    let area = remote.area();
    let mut lines: Vec<(Range<u64>, String)> = Vec::new();
    for line in fs::read_to_string(format!("/proc/{host}/maps"))
        .unwrap()
        .lines()
    {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let address = |s| u64::from_str_radix(s, 16).unwrap();
        let (start, end) = (address(start), address(end));
        let offset = rest.split_whitespace().nth(1).map(address).unwrap();
        // Where the file begins, so that what continues a mapping looks the same.
        let origin = if rest.contains(" 00:00 0") {
            0
        } else {
            start.wrapping_sub(offset)
        };
        let rest = rest.replacen(&format!(" {offset:08x} "), &format!(" {origin:x} "), 1);
        if rest.contains("[vsyscall]") || (start..end) == area {
            continue;
        }
        match lines.last_mut() {
            // Neighbours that the kernel keeps apart for its own reasons.
            Some((last, name)) if last.end == start && *name == rest => {
                last.end = end;
            }
            _ => lines.push((start..end, rest)),
        }
    }
    let memory = File::open(format!("/proc/{host}/mem")).unwrap();
    let contents = lines
        .iter()
        .map(|(range, line)| {
            // Reservations hold nothing.
            if line.contains("[vvar") || range.end - range.start > 1 << 30 {
                return Vec::new();
            }
            let mut bytes = vec![0; (range.end - range.start) as usize];
            for (i, page) in bytes.chunks_mut(4096).enumerate() {
                // Pages that nobody can read (behind the end of a file, guards) stay zero.
                let _ = memory.read_exact_at(page, range.start + 4096 * i as u64);
            }
            bytes
        })
        .collect();
    let layout = Layout::of(remote).unwrap();
    let auxv = super::layout::auxv(remote).unwrap();
    let layout = format!("{layout:?} {auxv:?}");
    Dump {
        lines,
        contents,
        layout,
    }
}

#[track_caller]
fn assert_same(before: &Dump, after: &Dump) {
    assert_eq!(before.layout, after.layout);
    let differing = |a: &Dump, b: &Dump| {
        let lines = a.lines.iter().filter(|l| !b.lines.contains(l));
        lines
            .map(|(r, l)| format!("{r:x?} {l}"))
            .collect::<Vec<_>>()
    };
    assert_eq!(differing(before, after), differing(after, before));
    for (i, (a, b)) in before.contents.iter().zip(&after.contents).enumerate() {
        if a != b {
            let at = a.iter().zip(b).position(|(a, b)| a != b);
            panic!("{:x?} differs at {at:x?}", before.lines[i]);
        }
    }
}

#[track_caller]
fn call(remote: &mut Remote, nr: i64, args: &[u64]) -> io::Result<u64> {
    let mut batch = Batch::new();
    let args: Vec<Arg> = args.iter().map(|a| Arg::Value(*a)).collect();
    let call = batch.call(nr, &args);
    remote.run(&batch).unwrap().result(call)
}

const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
const ANON: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
const NO_FD: u64 = u64::MAX;

/// A number generator that gives the same row on every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// Pages of the playground that the random steps play in.
const PLAYGROUND: u64 = 600;

/// Changes something in the playground.
fn random_step(remote: &mut Remote, dice: &mut Dice, ground: u64, file: u64) {
    let page = dice.roll(PLAYGROUND - 50);
    let len = 1 + dice.roll(50);
    let (at, bytes) = (ground + page * 4096, len * 4096);
    let fixed = ANON | libc::MAP_FIXED as u64;
    let prots = [0, 1, RW, RW, RW, 5];
    let prot = prots[dice.roll(prots.len() as u64) as usize];
    // Many steps fail because something else is mapped there; that too is as in real life.
    let _ = match dice.roll(14) {
        0..=5 => {
            for _ in 0..dice.roll(30) {
                let page = ground + 4096 * dice.roll(PLAYGROUND);
                let byte = dice.roll(256) as u8;
                let _ = remote.write(page + dice.roll(4000), &[byte; 64]);
            }
            Ok(0)
        }
        6 => call(remote, libc::SYS_mmap, &[at, bytes, prot, fixed, NO_FD, 0]),
        7 => call(remote, libc::SYS_munmap, &[at, bytes / 2]),
        8 => call(remote, libc::SYS_mprotect, &[at, bytes, prot]),
        9 => call(
            remote,
            libc::SYS_madvise,
            &[at, bytes, libc::MADV_DONTNEED as u64],
        ),
        10 => {
            let to = ground + 4096 * dice.roll(PLAYGROUND - 50);
            let flags = (libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE) as u64;
            call(
                remote,
                libc::SYS_mremap,
                &[at, 4096 * 3, 4096 * 5, flags, to],
            )
        }
        11 => {
            let flags = (libc::MAP_PRIVATE | libc::MAP_FIXED) as u64;
            let offset = 4096 * dice.roll(50);
            call(
                remote,
                libc::SYS_mmap,
                &[at, bytes, prot, flags, file, offset],
            )
        }
        12 => {
            let now = Layout::of(remote).unwrap().brk;
            let new = (now - dice.roll(9000)).max(now & !0xf_ffff) + dice.roll(20_000);
            let got = call(remote, libc::SYS_brk, &[new]);
            let _ = remote.write(new.saturating_sub(100), &[7; 50]);
            got
        }
        _ => call(remote, libc::SYS_madvise, &[at, 8192, 102 + dice.roll(2)]),
    };
}

#[test]
fn random_changes_are_undone_to_any_earlier_state() {
    undo_random_changes(Gears::default());
}

#[test]
fn random_changes_are_undone_to_any_earlier_state_read_from_snapshots() {
    undo_random_changes(LOW);
}

/// Everything is done in the second gear.
const LOW: Gears = Gears {
    protect: 1,
    sort_later: 1,
    snapshot: 1,
    lazy: 1,
};

fn undo_random_changes(gears: Gears) {
    let bench = Bench {
        gears,
        ..Bench::new()
    };
    let process = Process::sleeper();
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mapped");
    let pattern: Vec<u8> = (0..100 * 4096_u32).map(|i| (i / 4096 + i) as u8).collect();
    fs::write(&path, pattern).unwrap();
    let file = File::open(&path).unwrap();
    let fd = remote.give_fds(&[file.as_fd()]).unwrap()[0] as u64;
    bench.host.learn(process.host());
    bench
        .host
        .paths
        .lock()
        .insert(file.metadata().unwrap().ino(), path.clone());

    let ground = call(
        remote,
        libc::SYS_mmap,
        &[0, PLAYGROUND * 4096, RW, ANON, NO_FD, 0],
    )
    .unwrap();
    let mut dice = Dice(0x1234_5678_9abc_def1);
    let mut tracker = None;
    let mut states = vec![(bench.capture(remote, &mut tracker), dump(remote))];
    for round in 0..120 {
        for _ in 0..dice.roll(12) {
            random_step(remote, &mut dice, ground, fd);
        }
        if dice.roll(3) == 0 {
            // What a fork's child or a new program starts with: nothing is known.
            tracker = if dice.roll(4) == 0 { None } else { tracker };
            let before = dump(remote);
            states.push((bench.capture(remote, &mut tracker), before));
        } else {
            let which = dice.roll(states.len() as u64) as usize;
            let (target, before) = &states[which];
            bench.restore(remote, &mut tracker, target);
            let after = dump(remote);
            println!("round {round}: state {which}");
            assert_same(before, &after);
        }
    }
    drop((states, tracker));
    assert_eq!(bench.store.pages(), 0);
    stopped.release().unwrap();
}

#[test]
fn a_new_process_of_the_same_program_becomes_the_old_one() {
    let bench = Bench::new();
    let (old, new) = (Process::sleeper(), Process::sleeper());
    bench.host.learn(old.host());
    let mut stopped = old.seize();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let ground = call(remote, libc::SYS_mmap, &[0, 1 << 20, RW, ANON, NO_FD, 0]).unwrap();
    remote.write(ground + 5000, b"hello").unwrap();
    let reserve = ANON | libc::MAP_NORESERVE as u64;
    call(remote, libc::SYS_mmap, &[0, 64 << 30, 0, reserve, NO_FD, 0]).unwrap();
    let (mut first, mut second) = (None, None);
    let target = bench.capture(remote, &mut first);
    let before = dump(remote);
    let mut reborn = new.seize();
    forget_rseq(&mut reborn.remote);
    bench.restore(&mut reborn.remote, &mut second, &target);
    assert_same(&before, &dump(&mut reborn.remote));
    // And it is tracked from then on.
    let layout = Layout::of(&mut reborn.remote).unwrap();
    let scan = bench
        .memory()
        .scan(&reborn.remote, second.as_ref(), layout)
        .unwrap();
    assert_eq!(scan.changed_pages(), 0, "{:x?}", scan.changes);
    stopped.release().unwrap();
    // The new one cannot run on: its registers are those of another place.
    drop((new, reborn));
}

#[test]
fn a_state_costs_what_was_written_since_the_one_before() {
    let bench = Bench::new();
    let process = Process::sleeper();
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let ground = call(remote, libc::SYS_mmap, &[0, 8 << 20, RW, ANON, NO_FD, 0]).unwrap();
    let pages = (0..2048_u32).flat_map(|page| page.to_le_bytes().repeat(1024));
    remote.write(ground, &pages.collect::<Vec<_>>()).unwrap();
    let mut tracker = None;
    let first = bench.capture(remote, &mut tracker);
    let full = bench.store.pages();
    assert!(full >= 2048);
    remote.write(ground + 4096 * 7, &[2; 10]).unwrap();
    remote
        .write(ground + 4096 * 9, &9_u32.to_le_bytes())
        .unwrap();
    let layout = Layout::of(remote).unwrap();
    let scan = bench
        .memory()
        .scan(remote, tracker.as_ref(), layout)
        .unwrap();
    let here = |r: &Range<u64>| (ground..ground + (8 << 20)).contains(&r.start);
    let changed = scan.changes.iter().filter(|(r, _)| here(r));
    assert_eq!(changed.count(), 2);
    let second = bench.capture_like(remote, &mut tracker, scan, None);
    assert_eq!(
        bench.store.pages(),
        full + 1,
        "a page with its old contents is not stored"
    );
    // Without a tracker all is read again, but nothing is stored twice.
    let scan = bench.memory().scan(remote, None, layout).unwrap();
    assert!(scan.changed_pages() >= 2048);
    let mut other = None;
    let third = bench.capture_like(remote, &mut other, scan, Some(&second));
    assert_eq!(bench.store.pages(), full + 1);
    let pages = |state: &AddressSpace| state.pages.get().unwrap().clone();
    assert_eq!(pages(&third), pages(&second));
    assert_ne!(pages(&first), pages(&second));
    stopped.release().unwrap();
}

#[test]
fn shared_memory_goes_back_with_the_processes_that_map_it() {
    let bench = Bench::new();
    let process = Process::sleeper();
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
    let ground = call(remote, libc::SYS_mmap, &[0, 1 << 20, RW, flags, NO_FD, 0]).unwrap();
    remote.write(ground + 5000, b"hello").unwrap();
    let mut tracker = None;
    let target = bench.capture(remote, &mut tracker);
    let shared = bench.shared.take();
    assert_eq!(shared.objects.len(), 1);
    let before = dump(remote);

    remote.write(ground + 5000, b"later").unwrap();
    bench.shared.restore(&shared).unwrap();
    bench.restore(remote, &mut tracker, &target);
    assert_same(&before, &dump(remote));

    call(remote, libc::SYS_munmap, &[ground, 1 << 20]).unwrap();
    bench.shared.restore(&shared).unwrap();
    bench.restore(remote, &mut tracker, &target);
    assert_same(&before, &dump(remote));
    stopped.release().unwrap();
}

const PYTHON: &str = r#"
import sys, hashlib
state = {i: [str(i) * 20, {'n': i}] for i in range(20000)}
print(hashlib.md5(repr(state).encode()).hexdigest(), flush=True)
for line in sys.stdin:
    command = line.strip()
    if command == 'mutate':
        for i in range(0, 20000, 7):
            state[i] = [bytes(1000), i]
        for i in range(1, 20000, 3):
            state.pop(i, None)
        nested = []
        for i in range(900):
            nested = [nested]
        repr(nested)  # grows the stack
    print(hashlib.md5(repr(state).encode()).hexdigest(), flush=True)
"#;

#[test]
fn a_python_interpreter_finds_its_objects_as_they_were() {
    let bench = Bench::new();
    let mut process = Process(
        Command::new("python3")
            .args(["-c", PYTHON])
            .env("PYTHONHASHSEED", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 runs"),
    );
    let mut input = process.0.stdin.take().unwrap();
    let mut output = BufReader::new(process.0.stdout.take().unwrap());
    let mut answer = || {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        line
    };
    let first = answer();
    bench.host.learn(process.host());
    let mut ask = |command: &str| {
        writeln!(input, "{command}").unwrap();
        answer()
    };
    assert_eq!(ask("check"), first);
    await_in(process.host(), "pipe_read");
    let mut stopped = process.seize();
    let mut tracker = None;
    let target = bench.capture(&mut stopped.remote, &mut tracker);
    let regs = stopped.threads[0].regs;
    stopped.release().unwrap();
    for _ in 0..3 {
        assert_eq!(ask("check"), first);
        assert_ne!(ask("mutate"), first);
        await_in(process.host(), "pipe_read");
        let mut stopped = process.seize();
        bench.restore(&mut stopped.remote, &mut tracker, &target);
        stopped.threads[0].regs = regs;
        stopped.release().unwrap();
    }
    assert_eq!(ask("check"), first);
}

#[test]
fn a_process_that_ran_another_program_is_captured_whole_and_tracked_again() {
    let bench = Bench::new();
    let mut process = Process(
        Command::new("bash")
            .args(["-c", "read x; exec sleep 1000"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    await_in(process.host(), "pipe_read");
    bench.host.learn(process.host());
    let mut tracker = None;
    let mut stopped = process.seize();
    bench.capture(&mut stopped.remote, &mut tracker);
    stopped.release().unwrap();
    writeln!(process.0.stdin.take().unwrap(), "go").unwrap();
    await_in(process.host(), "nanosleep");
    bench.host.learn(process.host());
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    let state = bench.capture(remote, &mut tracker);
    let program = state.executable().unwrap();
    assert!(program.path.ends_with("/sleep"), "{program:?}");
    let layout = Layout::of(remote).unwrap();
    let scan = bench
        .memory()
        .scan(remote, tracker.as_ref(), layout)
        .unwrap();
    assert!(scan.changed_pages() < 5, "{:x?}", scan.changes);
    stopped.release().unwrap();
}

/// The C library registers memory which the kernel writes to whenever it switches threads, so that
/// it does not stay as it was. A process that has just been started has none.
fn forget_rseq(remote: &mut Remote) {
    let rseq = ptrace::rseq(remote.host()).unwrap();
    let args = [
        rseq.address,
        u64::from(rseq.size),
        1,
        u64::from(rseq.signature),
    ];
    call(remote, libc::SYS_rseq, &args).unwrap();
}

/// Waits until a process waits in this function of the kernel's.
fn await_in(host: HostPid, function: &str) {
    let wchan = format!("/proc/{host}/wchan");
    while !fs::read_to_string(&wchan).unwrap().contains(function) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}
