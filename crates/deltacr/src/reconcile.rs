//! Reconcile: makes one process what it was, changing only what differs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::attributes::{self, Attributes};
use crate::birth::spawn;
use crate::credentials::Credentials;
use crate::env::Environment;
use crate::error::{During, Result};
use crate::fd::Removed;
use crate::files::Place;
use crate::hold::HeldProcess;
use crate::ids::{HostPid, InnerPid};
use crate::image::ProcessImage;
use crate::interview;
use crate::limits::Room;
use crate::mem::{Holding, Layout, Memory, Scan, Tracker, Vma, layout};
use crate::numbers;
use crate::procfs::Procfs;
use crate::programs::{self, Programs};
use crate::remote::{Batch, Remote};
use crate::signals::{Queue, Scope};
use crate::threads;
use crate::timers;
use crate::waits::Wait;

/// What a process is before it is reconciled.
pub(crate) struct Now {
    pub(crate) attributes: Attributes,
    pub(crate) threads: BTreeMap<InnerPid, threads::Answers>,
    /// Taken when it is used.
    pub(crate) scan: Option<Scan>,
    /// Whether it runs the image's program.
    pub(crate) same_program: bool,
    /// Whether it has the image's root directory.
    pub(crate) same_root: bool,
    /// Whether it stands in the image's directory.
    pub(crate) same_directory: bool,
}

impl Now {
    /// What it has mapped.
    pub(crate) fn mapped(&self) -> &[Vma] {
        self.scan.as_ref().map_or(&[], |scan| &scan.vmas)
    }

    /// Makes the process let go of segments of System V.
    pub(crate) fn detach(&mut self, remote: &mut Remote, segments: &BTreeSet<i32>) -> Result<()> {
        match &mut self.scan {
            Some(scan) => scan.detach(remote, segments),
            None => Ok(()),
        }
    }
}

/// One process on its way back.
pub(crate) struct Reconcile<'a> {
    pub(crate) env: &'a dyn Environment,
    pub(crate) memory: Memory<'a>,
    pub(crate) procfs: &'a Procfs,
    pub(crate) process: &'a mut HeldProcess,
    pub(crate) tracker: &'a mut Option<Tracker>,
    pub(crate) image: &'a Arc<ProcessImage>,
    /// Where it finds its program.
    pub(crate) programs: Programs<'a>,
    /// The timed waits that threads are in.
    pub(crate) waits: &'a mut HashMap<HostPid, Option<Wait>>,
}

impl Reconcile<'_> {
    /// Program and memory. `now` is what the process is, if it is not newly made; `template` of
    /// which it is a copy, if it is one. Returns how many pages had changed.
    pub(crate) fn memory(
        &mut self,
        now: Option<&mut Now>,
        template: Option<&Holding>,
    ) -> Result<u64> {
        let scan = match now {
            Some(now) if now.same_program => now.scan.take(),
            Some(_) => {
                self.start_program()?;
                None
            }
            None => None,
        };
        let stopped = &mut self.process.stopped;
        let remote = &mut stopped.remote;
        for thread in &stopped.threads {
            let wanted = self.image.threads.iter().find(|t| t.tid == thread.tid);
            threads::release_rseq(remote, thread.host, wanted)
                .during(remote.pid(), "ending a restartable sequence area")?;
        }
        let target = &self.image.memory;
        if let Some(template) = template {
            template.settle(remote, target)?;
        }
        let mut scan = match scan {
            Some(scan) => scan,
            None => {
                let layout = match template {
                    // Those of a copy do not matter.
                    Some(_) => Layout::default(),
                    None => Layout::of(remote)?,
                };
                self.memory.scan(remote, self.tracker.as_ref(), layout)?
            }
        };
        if let Some(template) = template {
            template.know(&mut scan, target, self.env);
        }
        let pages = scan.changed_pages();
        let hot: Vec<u64> = self.image.threads.iter().flat_map(|t| t.hot()).collect();
        self.memory
            .restore(remote, self.tracker, scan, target, &hot)?;
        if template.is_some() {
            self.link_program()?;
        }
        Ok(pages)
    }

    /// Gives a copy of the template its bounds and the link to its program.
    fn link_program(&mut self) -> Result<()> {
        let remote = &mut self.process.stopped.remote;
        let (pid, memory) = (remote.pid(), &self.image.memory);
        let link = |remote: &mut Remote, exe: i32| {
            layout::write_program(remote, &memory.layout, &memory.auxv, exe)
        };
        let by_itself = match programs::in_memory(self.image) {
            None => self.image.exe.open_inside(self.env, remote, OFlags::RDONLY),
            Some(_) => Err(io::ErrorKind::PermissionDenied.into()),
        };
        let linked = match by_itself.and_then(|exe| link(remote, exe)) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                self.programs.of(self.image, |exe| {
                    let exe = remote.give_fds(&[exe])?[0];
                    link(remote, exe)
                })
            }
            linked => linked,
        };
        remote.files().forget_program();
        linked.during(pid, "setting the link to its program")
    }

    /// The process has run another program since; makes it run this one again.
    fn start_program(&mut self) -> Result<()> {
        let remote = &mut self.process.stopped.remote;
        let pid = remote.pid();
        let root = Place::root(self.env, self.procfs, pid);
        let root = root.during(pid, "reading its root directory")?;
        let whole = root.map(|_| self.env.root());
        let programs = self.programs;
        let started = programs.of(self.image, |exe| spawn::execute(remote, exe, whole));
        started.during(pid, "starting the program again")?;
        *self.tracker = None;
        Ok(())
    }

    /// Loosens limits that are in the way.
    pub(crate) fn make_room(&self, room: &Room, now: &mut Now) -> Result<()> {
        let remote = &self.process.stopped.remote;
        let made = now
            .attributes
            .make_room(remote.host(), room, &self.image.attributes);
        made.during(remote.pid(), "loosening its limits")
    }

    /// The same for a process that was just born.
    pub(crate) fn make_room_for_new(&self, room: &Room) -> Result<()> {
        let remote = &self.process.stopped.remote;
        let made = self.image.attributes.make_room_for_new(remote.host(), room);
        made.during(remote.pid(), "loosening its limits")
    }

    /// Ends threads that are too many: one may have the number of somebody who is to be born.
    pub(crate) fn end_extra_threads(&mut self) -> Result<()> {
        let wanted: BTreeSet<InnerPid> = self.image.threads.iter().map(|t| t.tid).collect();
        let stopped = &mut self.process.stopped;
        let pid = stopped.remote.pid();
        let (stay, go) = std::mem::take(&mut stopped.threads)
            .into_iter()
            .partition(|t| wanted.contains(&t.tid));
        stopped.threads = stay;
        for thread in go {
            spawn::end_thread(&mut stopped.remote, thread.host).during(pid, "ending a thread")?;
        }
        Ok(())
    }

    /// The root and working directory, by which descriptors are then made that are named relative to it.
    pub(crate) fn directory(&mut self, now: Option<&Now>, removed: &mut Removed) -> Result<()> {
        let pid = self.process.stopped.remote.pid();
        let (same_root, same_directory) = match now {
            Some(now) => (now.same_root, now.same_directory),
            None => {
                let (env, procfs) = (self.env, self.procfs);
                let root = Place::is_root_of(self.image.root.as_ref(), env, procfs, pid);
                let cwd = self.image.cwd.is_of(env, procfs, pid, "cwd");
                (
                    root.during(pid, "reading its root directory")?,
                    cwd.during(pid, "reading its directory")?,
                )
            }
        };
        if !same_root {
            self.change_root(removed)?;
        } else if same_directory {
            return Ok(());
        }
        self.change_directory(removed)
    }

    /// Makes the threads that are missing and that must be there before descriptors and directories; see [`TreeImage::told_of`].
    pub(crate) fn threads_told_of(&mut self, told_of: &BTreeSet<InnerPid>) -> Result<()> {
        let present = self.present();
        let missing = |tid| told_of.contains(&tid) && !present.contains(&tid);
        if self.image.threads.iter().any(|t| missing(t.tid)) {
            let remote = &mut self.process.stopped.remote;
            // What a thread is given at birth and nobody gives it later.
            attributes::restore_personality(remote, &self.image.attributes)?;
            self.make_threads(missing)?;
        }
        Ok(())
    }

    fn present(&self) -> BTreeSet<InnerPid> {
        self.process.stopped.threads.iter().map(|t| t.tid).collect()
    }

    fn make_threads(&mut self, missing: impl Fn(InnerPid) -> bool) -> Result<()> {
        let stopped = &mut self.process.stopped;
        let remote = &mut stopped.remote;
        let doing = "making a thread again";
        for image in self.image.threads.iter().filter(|t| missing(t.tid)) {
            let thread = numbers::born_as(self.env, image.tid, || spawn::thread(remote, image.tid));
            let thread = thread.during(remote.pid(), doing)?;
            stopped.threads.push(thread);
        }
        Ok(())
    }

    /// Everything else but credentials; the descriptors are in place. Returns the attributes that the process had.
    pub(crate) fn state(&mut self, now: Option<Now>) -> Result<Attributes> {
        let remote = &mut self.process.stopped.remote;
        let pid = remote.pid();
        remote.forget_strays();
        let (mut attributes, answers) = match now {
            // A new program has reset some of them.
            Some(now) if now.same_program => (now.attributes, now.threads),
            _ => {
                let answers = interview::ask(&mut self.process.stopped)?;
                (answers.attributes, answers.threads)
            }
        };
        let remote = &mut self.process.stopped.remote;
        attributes::restore(remote, &attributes, &self.image.attributes)?;
        let timers = timers::stop(self.procfs, remote, &self.image.timers)?;
        let memory = &self.image.memory;
        memory.advised.restore(remote, &memory.vmas)?;
        let others = self.threads(answers, &attributes.credentials)?;
        let remote = &mut self.process.stopped.remote;
        let host = remote.host();
        let queue =
            Queue::capture(host, Scope::Process).during(pid, "reading the queued signals")?;
        queue
            .restore(&self.image.pending, remote, (pid, host), Scope::Process)
            .during(pid, "restoring the queued signals")?;
        self.wake()?;
        let remote = &mut self.process.stopped.remote;
        attributes::arm(remote, &attributes, &self.image.attributes)?;
        timers::restore(remote, &timers, &self.image.timers)?;
        attributes.others = others;
        Ok(attributes)
    }

    fn change_root(&mut self, removed: &mut Removed) -> Result<()> {
        let doing = "changing its root directory";
        let root = match &self.image.root {
            Some(root) => self.open_directory(root, removed)?,
            None => self.env.root().try_clone_to_owned().during_tree(doing)?,
        };
        self.enter(root.as_fd(), true, doing)
    }

    fn change_directory(&mut self, removed: &mut Removed) -> Result<()> {
        let cwd = self.open_directory(&self.image.cwd, removed)?;
        self.enter(cwd.as_fd(), false, "changing its directory")
    }

    fn open_directory(&self, place: &Place, removed: &mut Removed) -> Result<OwnedFd> {
        let pid = self.process.stopped.remote.pid();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        match (place.open(self.env, flags), place.removed()) {
            (Err(_), Some(path)) => {
                let flags = libc::O_PATH | libc::O_DIRECTORY;
                let made = removed.open(self.env, place.inode(), Some(path), flags);
                made.during(pid, "making its removed directory")
            }
            (opened, _) => opened.during(pid, "opening its directory"),
        }
    }

    /// Makes a directory the process' working directory, and its root if it is to be that.
    fn enter(&mut self, directory: BorrowedFd<'_>, as_root: bool, doing: &str) -> Result<()> {
        let remote = &mut self.process.stopped.remote;
        let pid = remote.pid();
        let given = remote.give_fds(&[directory]).during(pid, doing)?;
        let mut batch = Batch::new();
        let mut calls = vec![batch.call(libc::SYS_fchdir, &[given[0].into()])];
        if as_root {
            let here = batch.input(b".\0");
            calls.push(batch.call(libc::SYS_chroot, &[here.into()]));
        }
        batch.call(libc::SYS_close, &[given[0].into()]);
        let outcome = remote.run(&batch).during(pid, doing)?;
        calls
            .iter()
            .try_for_each(|call| outcome.result(*call).during(pid, doing).map(drop))
    }

    /// Returns the credentials of those that have others than the first.
    fn threads(
        &mut self,
        mut answers: BTreeMap<InnerPid, threads::Answers>,
        first: &Credentials,
    ) -> Result<BTreeMap<InnerPid, Credentials>> {
        let present = self.present();
        self.make_threads(|tid| !present.contains(&tid))?;
        let stopped = &mut self.process.stopped;
        let remote = &mut stopped.remote;
        let wanted: BTreeMap<InnerPid, _> = self.image.threads.iter().map(|t| (t.tid, t)).collect();
        let shared = Queue::default();
        let mut others = BTreeMap::new();
        let images = &self.image.threads;
        let together = images.iter().all(|t| t.has_filters_of(&images[0]));
        for thread in &mut stopped.threads {
            let answers = threads::known_or_asked(remote, thread, &mut answers)?;
            let answers = (answers, first);
            let (current, own) =
                threads::capture(self.env, remote, thread, answers, &shared, &mut None)?;
            others.extend(own.map(|own| (thread.tid, own)));
            let wait = self.waits.entry(thread.host).or_default();
            let target = (wanted[&thread.tid], together);
            threads::restore(remote, thread, &current, target, wait)?;
        }
        Ok(others)
    }

    /// Takes back a stop by job control that has come since.
    fn wake(&mut self) -> Result<()> {
        let remote = &mut self.process.stopped.remote;
        let pid = remote.pid();
        if self.process.user_stop.is_none() || self.image.user_stop.is_some() {
            return Ok(());
        }
        crate::sys::process::pidfd_signal(remote.pidfd(), libc::SIGCONT)
            .during(pid, "continuing it")?;
        let queue = Queue::capture(remote.host(), Scope::Process)
            .during(pid, "reading the queued signals")?;
        queue
            .restore(
                &self.image.pending,
                remote,
                (pid, remote.host()),
                Scope::Process,
            )
            .during(pid, "restoring the queued signals")
    }
}
