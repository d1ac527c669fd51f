//! A python that does what the test says, and what the engine needs around it.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use deltacr::env::{Environment, ExternalId, Namespace};
use deltacr::fd::{self, Descriptors, Prepared, Procs};
use deltacr::ids::{HostPid, InnerPid};
use deltacr::mem::SharedObjects;
use deltacr::remote::{Batch, Remote};
use deltacr::stop::Stopped;
use deltacr::store::PageStore;
use rustix::fs::{Mode, OFlags};

const PROGRAM: &str = r#"
import ast, sys, os, socket, select, fcntl, signal, struct, termios, time, errno, mmap, ctypes
libc = ctypes.CDLL(None, use_errno=True)
names = dict(globals())
for line in sys.stdin.buffer:
    code = ast.literal_eval(line.decode())
    try:
        try:
            answer = eval(code, names)
        except SyntaxError:
            exec(code, names)
            answer = None
        text = repr(answer)
    except BaseException as e:
        text = 'failed: %r' % (e,)
    sys.stdout.write(text.replace('\n', ' ') + '\n')
    sys.stdout.flush()
"#;

/// The world of a test: a directory that plays the sandbox's filesystem.
pub(crate) struct World {
    dir: tempfile::TempDir,
    root: OwnedFd,
    /// The memfds.
    pub(crate) shared: SharedObjects,
    device: u64,
    known: Mutex<BTreeMap<u64, OwnedFd>>,
    externals: Mutex<BTreeMap<u64, OwnedFd>>,
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let device = std::fs::metadata(dir.path()).unwrap().dev();
        Self {
            dir,
            root,
            shared: SharedObjects::new(PageStore::new()).unwrap(),
            device,
            known: Mutex::default(),
            externals: Mutex::default(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Keeps a handle of every file there is now, as a filesystem keeps its inodes.
    pub(crate) fn remember(&self) {
        let mut known = self.known.lock().unwrap();
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        for path in paths.chain([self.dir.path().to_owned()]) {
            let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let handle = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
            let ino = rustix::fs::fstat(&handle).unwrap().st_ino;
            known.insert(ino, handle);
        }
    }
}

impl Environment for World {
    fn cgroup(&self) -> &Path {
        Path::new("/")
    }
    fn init_pid(&self) -> HostPid {
        HostPid(1)
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
        use std::os::fd::AsRawFd;
        let known = self.known.lock().unwrap();
        let handle = known.get(&ino).ok_or(io::ErrorKind::NotFound)?;
        let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
        let flags = OFlags::from_bits_retain(flags as u32) - OFlags::NOFOLLOW;
        Ok(rustix::fs::open(path, flags, Mode::empty())?)
    }
    fn external_pipe(&self, ino: u64) -> Option<ExternalId> {
        let externals = self.externals.lock().unwrap();
        externals.contains_key(&ino).then_some(ExternalId(ino))
    }
    fn open_external(&self, id: ExternalId, _write: bool) -> io::Result<OwnedFd> {
        self.externals.lock().unwrap()[&id.0].try_clone()
    }
    fn set_next_pid(&self, _pid: InnerPid) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn birth(&self, _pid: InnerPid) -> io::Result<HostPid> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn before_resume(&self, _: deltacr::Deaths) -> io::Result<()> {
        Ok(())
    }
    fn namespace(&self, kind: Namespace) -> io::Result<OwnedFd> {
        let name = match kind {
            Namespace::Net => "net",
            Namespace::Mount => "mnt",
            Namespace::Ipc => "ipc",
        };
        let path = format!("/proc/self/ns/{name}");
        Ok(rustix::fs::open(path, OFlags::CLOEXEC, Mode::empty())?)
    }
}

/// A python under the test's command.
pub(crate) struct Python {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Python {
    pub(crate) fn start(world: &World) -> Self {
        let mut child = Command::new("python3")
            .args(["-u", "-c", PROGRAM])
            .current_dir(world.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Not the test's own: others write there and move its position.
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut externals = world.externals.lock().unwrap();
        for fd in 0..2 {
            let path = format!("/proc/{}/fd/{fd}", child.id());
            let ino = std::fs::metadata(&path).unwrap().ino();
            // The same end as the python has, for open_external to give.
            let mode = if fd == 0 {
                OFlags::RDONLY
            } else {
                OFlags::WRONLY
            };
            let end = rustix::fs::open(&path, mode | OFlags::CLOEXEC, Mode::empty()).unwrap();
            externals.insert(ino, end);
        }
        drop(externals);
        let to = child.stdin.take().unwrap();
        let from = BufReader::new(child.stdout.take().unwrap());
        let mut python = Self { child, to, from };
        assert_eq!(python.eval("1 + 1"), "2");
        python
    }

    /// Runs statements.
    pub(crate) fn run(&mut self, code: &str) {
        let answer = self.eval(code);
        assert!(!answer.starts_with("failed"), "{code}: {answer}");
    }

    /// Evaluates an expression (or runs statements) and tells its repr.
    pub(crate) fn eval(&mut self, code: &str) -> String {
        self.send(code);
        let mut answer = String::new();
        self.from.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    /// Sends code without waiting for its answer.
    pub(crate) fn send(&mut self, code: &str) {
        writeln!(self.to, "{code:?}").unwrap();
    }

    #[track_caller]
    pub(crate) fn expect(&mut self, code: &str, answer: &str) {
        assert_eq!(self.eval(code), answer, "{code}");
    }

    pub(crate) fn host(&self) -> HostPid {
        HostPid(self.child.id() as i32)
    }

    /// The python and all its descendants.
    fn tree(&self) -> Vec<HostPid> {
        let mut tree = vec![self.host()];
        let mut next = 0;
        while let Some(pid) = tree.get(next) {
            let children = format!("/proc/{pid}/task/{pid}/children");
            let children = std::fs::read_to_string(children).unwrap();
            tree.extend(
                children
                    .split_whitespace()
                    .map(|n| HostPid(n.parse().unwrap())),
            );
            next += 1;
        }
        tree
    }

    /// Stops the tree, does something with it, and lets it go on.
    pub(crate) fn stopped<T>(&self, act: impl FnOnce(&mut Procs<'_>) -> T) -> T {
        let mut stopped: Vec<_> = self.tree().into_iter().map(seize).collect();
        let result = act(&mut procs(&mut stopped));
        for process in stopped {
            process.release().unwrap();
        }
        result
    }

    pub(crate) fn capture(&self, world: &World) -> Descriptors {
        world.remember();
        self.stopped(|procs| fd::capture(procs, world, &world.shared).unwrap())
    }

    /// The refusal of a capture.
    pub(crate) fn refusal(&self, world: &World) -> String {
        let refused = self.stopped(|procs| fd::capture(procs, world, &world.shared));
        refused.expect_err("the capture is refused").to_string()
    }

    /// Rolls the descriptors back in place, and looks whether that is what came of it.
    pub(crate) fn restore(&self, world: &World, target: &Descriptors) -> Vec<String> {
        self.stopped(|procs| {
            let current = fd::survey(procs, world, &world.shared).unwrap();
            fd::check(target).unwrap();
            let means = (&world.shared, &mut Prepared::default());
            fd::restore(&current, target, procs, world, means, &|_| Ok(())).unwrap()
        })
    }
}

impl Python {
    fn kill(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        for pid in self.tree() {
            let pid = rustix::process::Pid::from_raw(pid.0).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        self.kill();
    }
}

fn seize(pid: HostPid) -> Stopped {
    Stopped::seize(InnerPid(pid.0), pid).unwrap()
}

fn procs(stopped: &mut [Stopped]) -> Procs<'_> {
    let remotes = stopped.iter_mut().map(|s| &mut s.remote);
    remotes.map(|remote| (remote.pid(), remote)).collect()
}

/// Puts a process without descriptors in the place of one that has ended, rolls the tree back,
/// and looks whether it is as it was.
#[track_caller]
pub(crate) fn assert_rolls_back_with_a_new(
    world: &World,
    image: &Descriptors,
    python: &Python,
    dead: InnerPid,
) {
    let current = python.stopped(|procs| fd::survey(procs, world, &world.shared).unwrap());
    let blank = Blank::start(world);
    let mut stopped: Vec<_> = python.tree().into_iter().map(seize).collect();
    stopped.push(Stopped::seize(dead, blank.host()).unwrap());
    let mut procs = procs(&mut stopped);
    close_all(procs.get_mut(&dead).unwrap());
    fd::check(image).unwrap();
    let means = (&world.shared, &mut Prepared::default());
    fd::restore(&current, image, &mut procs, world, means, &|_| Ok(())).unwrap();
    let now = fd::capture(&procs, world, &world.shared).unwrap();
    drop(procs);
    for process in stopped {
        process.release().unwrap();
    }
    assert_alike(&now, image);
}

#[track_caller]
fn assert_alike(now: &Descriptors, image: &Descriptors) {
    let (now, image) = (shape(now), shape(image));
    let differing = image.lines().zip(now.lines()).find(|(a, b)| a != b);
    assert_eq!(differing, None, "{image}\n{now}");
}

/// Ends the process, and builds its descriptors anew in another one, which has none.
#[track_caller]
pub(crate) fn assert_rebuilds(world: &World, image: &Descriptors, of: &mut Python) {
    let pid = of.host();
    of.kill();
    let blank = Blank::start(world);
    let host = blank.host();
    let mut stopped = Stopped::seize(InnerPid(pid.0), host).unwrap();
    let remote = &mut stopped.remote;
    close_all(remote);
    let mut procs = Procs::from([(remote.pid(), remote)]);
    fd::restore(
        &Descriptors::default(),
        image,
        &mut procs,
        world,
        (&world.shared, &mut Prepared::default()),
        &|_| Ok(()),
    )
    .unwrap();
    let rebuilt = fd::capture(&procs, world, &world.shared).unwrap();
    stopped.release().unwrap();
    assert_alike(&rebuilt, image);
}

/// The image as text, but for the inode numbers that the kernel gives pipes and sockets.
pub(crate) fn shape(image: &Descriptors) -> String {
    let text = format!("{image:#?}");
    let lines = text
        .lines()
        .filter(|line| !line.trim().starts_with("inode: "));
    lines.collect::<Vec<_>>().join("\n")
}

fn close_all(remote: &mut Remote) {
    let mut batch = Batch::new();
    batch.call(
        libc::SYS_close_range,
        &[0.into(), u32::MAX.into(), 0.into()],
    );
    remote.run(&batch).unwrap();
}

struct Blank(Child);

impl Blank {
    fn start(world: &World) -> Self {
        let mut command = Command::new("sleep");
        let child = command.arg("1000").current_dir(world.dir.path());
        let child = child
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = child.spawn().unwrap();
        // Until it is in its sleep and its table does not change any more.
        std::thread::sleep(std::time::Duration::from_millis(50));
        Self(child)
    }

    fn host(&self) -> HostPid {
        HostPid(self.0.id() as i32)
    }
}

impl Drop for Blank {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
