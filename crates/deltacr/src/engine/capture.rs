//! Taking down a tree that stands still.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Engine, interview_all, member, remotes};
use crate::background::Left;
use crate::describe::describe;
use crate::env::Environment;
use crate::error::Result;
use crate::fd;
use crate::hold::Held;
use crate::ids::InnerPid;
use crate::image::{ProcessImage, TreeImage};
use crate::interview::Questionnaire;
use crate::stopwatch::Stopwatch;
use crate::sysv::{self, Attached, SystemV};
use crate::twins;

/// What was captured of a tree that stands still, and what is left to be done when it runs again.
pub(super) struct Captured {
    pub(super) image: TreeImage,
    pub(super) pages: u64,
    pub(super) left: Left,
}

impl Engine {
    pub(super) fn capture(
        &mut self,
        env: &dyn Environment,
        held: &mut Held,
        watch: &mut Stopwatch,
    ) -> Result<Captured> {
        self.forget_the_dead(held);
        self.end_lazy(held)?;
        held.refuse_32_bit()?;
        // Two of them could not be asked at once, either.
        twins::refuse(held, |host| {
            self.trackers.get(&host).is_none_or(Option::is_none)
        })?;
        // While the processes answer, it is looked what can be seen without them.
        let questionnaire = Questionnaire::of(env.bounding_set());
        let interviews = interview_all(held, &questionnaire, |_| true)?;
        held.find_dead()?;
        let descriptors = fd::capture(&remotes(held), env, &self.means.shared)?;
        watch.lap("descriptors");
        let mut answering = Vec::new();
        for (pid, interview) in interviews {
            answering.push((pid, interview, self.scan(env, held, pid)?));
        }
        watch.lap("mappings");
        let mut described = BTreeMap::new();
        // Without a process there is nobody to ask.
        let mut has_system_v = answering.is_empty();
        for (pid, interview, mut scan) in answering {
            let process = member(&mut held.processes, pid)?;
            let answers = interview.end(&mut process.stopped.remote)?;
            has_system_v |= answers.system_v;
            let (state, layout) = describe(env, &held.procfs, process, answers, &mut self.waits)?;
            scan.layout = layout;
            described.insert(pid, (state, scan));
        }
        // The processes answer no more, and can be told to do something.
        let descriptors =
            fd::look_inside(descriptors, &mut remotes(held), env, &self.means.shared)?;
        let mut attached = Attached::default();
        for (pid, (_, scan)) in &described {
            let host = member(&mut held.processes, *pid)?.stopped.remote.host();
            attached.note(host, &scan.vmas);
        }
        let system_v = match has_system_v {
            true => sysv::capture(env, &self.means.shared, &attached)?,
            false => SystemV::default(),
        };
        watch.lap("processes");
        let memory = self.means.memory(env);
        let mut pages = 0;
        let mut left = Left::new(self.means.gears);
        let mut processes: BTreeMap<InnerPid, Arc<ProcessImage>> = BTreeMap::new();
        for (pid, (mut state, scan)) in described {
            let process = member(&mut held.processes, pid)?;
            let remote = &mut process.stopped.remote;
            let tracker = self.trackers.entry(remote.host()).or_default();
            pages += scan.changed_pages();
            // A new process is like its parent, of which it is a fork.
            let parent = processes
                .get(&state.stat.parent)
                .filter(|_| tracker.is_none());
            let like = parent.map(|p| p.memory.clone());
            let (captured, work) = memory.capture(remote, tracker, scan, like.as_deref())?;
            state.memory = captured;
            left.push(work);
            processes.insert(pid, Arc::new(state));
        }
        watch.lap("memory");
        let image = TreeImage {
            processes,
            zombies: held.zombies.clone(),
            descriptors: Arc::new(descriptors),
            shared: Arc::default(),
            system_v,
        };
        Ok(Captured { image, pages, left })
    }
}
