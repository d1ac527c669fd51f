//! Taking down everything of a stopped process but its memory and descriptors.

use std::sync::Arc;

use crate::env::Environment;
use crate::error::{During, Result};
use crate::files::Place;
use crate::hold::HeldProcess;
use crate::image::ProcessImage;
use crate::interview::Answers;
use crate::mem::Layout;
use crate::procfs::Procfs;
use crate::signals::{Queue, Scope};
use crate::threads::{self, ThreadImage};
use crate::timers;
use crate::waits::Waits;

/// Everything of a process, which gave these answers, but its memory; and the bounds of that.
pub(crate) fn describe(
    env: &dyn Environment,
    procfs: &Procfs,
    process: &mut HeldProcess,
    answers: Answers,
    waits: &mut Waits,
) -> Result<(ProcessImage, Layout)> {
    let remote = &mut process.stopped.remote;
    let pid = remote.pid();
    let Answers {
        mut attributes,
        program_break: brk,
        threads: mut answers,
        system_v: _,
        whereabouts,
    } = answers;
    if process.ignores_trap {
        attributes.ignore_trap();
    }
    let timers = timers::capture(procfs, remote)?;
    let mut pending =
        Queue::capture(remote.host(), Scope::Process).during(pid, "reading the queued signals")?;
    let mut threads = Vec::with_capacity(process.stopped.threads.len());
    for thread in &mut process.stopped.threads {
        let wait = waits.entry(thread.host).or_default();
        let answers = threads::known_or_asked(remote, thread, &mut answers)?;
        let answers = (answers, &attributes.credentials);
        let (image, own) = threads::capture(env, remote, thread, answers, &pending, wait)?;
        attributes.others.extend(own.map(|own| (image.tid, own)));
        threads.push(image);
    }
    let looked = attributes.look_again(remote, &pending);
    looked.during(pid, "reading the interval timers")?;
    let queues = threads.iter().map(ThreadImage::pending).chain([&pending]);
    let ticked = queues.flat_map(Queue::timers).collect();
    let timers = timers::fitting(procfs, remote, timers, &ticked)?;
    pending.extend(remote.strays());
    let exe = Place::program(env, procfs, pid, remote.files());
    let cwd = whereabouts.directory(env, procfs, pid);
    let root = whereabouts.root(env, procfs, pid);
    let image = ProcessImage {
        stat: process.stat.clone(),
        birth: process.birth,
        command: procfs.command(pid, remote.files()),
        user_stop: process.user_stop,
        exe: exe.during(pid, "reading its program")?,
        cwd: cwd.during(pid, "reading its directory")?,
        root: root.during(pid, "reading its root directory")?,
        attributes,
        timers,
        pending,
        threads,
        memory: Arc::default(),
    };
    Ok((
        image,
        Layout {
            brk,
            ..process.bounds
        },
    ))
}
