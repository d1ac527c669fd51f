//! What the tests of memory are made in: a process, the means to take it down with, and all that it holds to compare.

use super::*;

/// The host's own root directory as the sandbox's filesystem.
pub(super) struct Host {
    root: File,
    device: u64,
    pub(super) paths: Mutex<HashMap<u64, PathBuf>>,
}

impl Host {
    pub(super) fn new() -> Self {
        let root = File::open("/").unwrap();
        let exe = fs::metadata("/proc/self/exe").unwrap();
        Self {
            root,
            device: exe.dev(),
            paths: Mutex::default(),
        }
    }

    /// Knows the files that a process has mapped from now on.
    pub(super) fn learn(&self, pid: HostPid) {
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

pub(super) struct Bench {
    pub(super) gears: Gears,
    pub(super) orphans: Orphans,
    pub(super) store: Arc<PageStore>,
    pub(super) shared: SharedObjects,
    pub(super) host: Host,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::with(Gears::default())
    }

    /// One that does everything in the second gear.
    pub(super) fn low() -> Self {
        Self::with(Gears {
            protect: 1,
            sort_later: 1,
            snapshot: 1,
            ahead: 1,
            lazy: 1,
        })
    }

    fn with(gears: Gears) -> Self {
        let store = PageStore::new();
        Self {
            gears,
            orphans: Orphans::default(),
            shared: SharedObjects::new(Arc::clone(&store)).unwrap(),
            store,
            host: Host::new(),
        }
    }

    pub(super) fn memory(&self) -> Memory<'_> {
        Memory {
            store: &self.store,
            shared: &self.shared,
            env: &self.host,
            orphans: &self.orphans,
            gears: self.gears,
        }
    }

    pub(super) fn scan(&self, remote: &mut Remote, tracker: &mut Option<Tracker>) -> Scan {
        if let Some(tracker) = tracker {
            tracker.end_lazy(remote).unwrap();
        }
        let layout = Layout::of(remote).unwrap();
        let scan = self.memory().scan(remote, tracker.as_ref(), layout);
        scan.unwrap()
    }

    /// Does for the next capture what can be done while the process runs.
    pub(super) fn look_ahead(&self, remote: &Remote, tracker: &mut Option<Tracker>) {
        if let Some(tracker) = tracker {
            let mut room = self.gears.ahead;
            self.memory()
                .look_ahead(remote.host(), remote.files(), tracker, &mut room);
        }
    }

    pub(super) fn capture(
        &self,
        remote: &mut Remote,
        tracker: &mut Option<Tracker>,
    ) -> Arc<AddressSpace> {
        let scan = self.scan(remote, tracker);
        self.capture_like(remote, tracker, scan, None)
    }

    /// Captures, and does what is left to be done at once.
    pub(super) fn capture_like(
        &self,
        remote: &mut Remote,
        tracker: &mut Option<Tracker>,
        scan: Scan,
        like: Option<&AddressSpace>,
    ) -> Arc<AddressSpace> {
        let captured = self.memory().capture(remote, tracker, scan, like);
        let (state, work) = captured.unwrap();
        work.run();
        state
    }

    /// Restores; part of it may be left for later.
    pub(super) fn begin_restore(
        &self,
        remote: &mut Remote,
        tracker: &mut Option<Tracker>,
        target: &Arc<AddressSpace>,
    ) {
        let scan = self.scan(remote, tracker);
        let begun = self.memory().restore(remote, tracker, scan, target, &[]);
        begun.unwrap();
        tracker.as_mut().unwrap().run_on();
    }

    pub(super) fn restore(
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

pub(super) struct Process(pub(super) Child);

impl Process {
    pub(super) fn sleeper() -> Self {
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

    pub(super) fn host(&self) -> HostPid {
        HostPid(self.0.id() as i32)
    }

    pub(super) fn children(&self) -> String {
        let host = self.host();
        fs::read_to_string(format!("/proc/{host}/task/{host}/children")).unwrap()
    }

    pub(super) fn seize(&self) -> Stopped {
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
pub(super) struct Dump {
    lines: Vec<(Range<u64>, String)>,
    contents: Vec<Vec<u8>>,
    layout: String,
}

pub(super) fn dump(remote: &mut Remote) -> Dump {
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
    let auxv = crate::mem::layout::auxv(remote).unwrap();
    let layout = format!("{layout:?} {auxv:?}");
    Dump {
        lines,
        contents,
        layout,
    }
}

#[track_caller]
pub(super) fn assert_same(before: &Dump, after: &Dump) {
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
pub(super) fn call(remote: &mut Remote, nr: i64, args: &[u64]) -> io::Result<u64> {
    let mut batch = Batch::new();
    let args: Vec<Arg> = args.iter().map(|a| Arg::Value(*a)).collect();
    let call = batch.call(nr, &args);
    remote.run(&batch).unwrap().result(call)
}

pub(super) const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
pub(super) const ANON: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
pub(super) const NO_FD: u64 = u64::MAX;

/// The C library registers memory which the kernel writes to whenever it switches threads, so that
/// it does not stay as it was. A process that has just been started has none.
pub(super) fn forget_rseq(remote: &mut Remote) {
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
pub(super) fn await_in(host: HostPid, function: &str) {
    let wchan = format!("/proc/{host}/wchan");
    while !fs::read_to_string(&wchan).unwrap().contains(function) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}
