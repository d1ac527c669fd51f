//! What a checkpoint leaves to be done while the processes run again.

use std::collections::VecDeque;
use std::thread::JoinHandle;

use crate::error::{During, Result};
use crate::mem::{Gears, Work};

/// The work that is left, in the order in which it is to be done. Dropping it does what is quick of it, so that the next checkpoint
/// knows the pages of processes that this one did not fail for.
pub(crate) struct Left {
    work: VecDeque<Work>,
    gears: Gears,
}

impl Left {
    pub(crate) fn new(gears: Gears) -> Self {
        Self {
            work: VecDeque::new(),
            gears,
        }
    }

    pub(crate) fn push(&mut self, work: Work) {
        self.work.push_back(work);
    }

    /// Does what is quick, up to the first that is not.
    fn do_quick(&mut self) {
        while self.work.front().is_some_and(|w| w.is_quick(&self.gears)) {
            self.work.pop_front().into_iter().for_each(Work::run);
        }
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        self.do_quick();
    }
}

/// The thread that does it, if there is something to do. There is one at a time.
#[derive(Debug, Default)]
pub(crate) struct Background(Option<JoinHandle<()>>);

impl Background {
    /// Does what is quick, and begins with the rest. If that fails, what the rest was to tell is lost.
    pub(crate) fn begin(&mut self, mut left: Left) -> Result<()> {
        self.end();
        left.do_quick();
        let work = std::mem::take(&mut left.work);
        if work.is_empty() {
            return Ok(());
        }
        let thread = std::thread::Builder::new()
            .name("deltacr copy".to_owned())
            .spawn(move || work.into_iter().for_each(Work::run));
        self.0 = Some(thread.during_tree("starting a thread that copies memory")?);
        Ok(())
    }

    /// Waits until all is done.
    pub(crate) fn end(&mut self) {
        if let Some(thread) = self.0.take()
            && thread.join().is_err()
        {
            // The panic was reported when it happened; what was not done counts as lost.
            tracing::error!("copying memory failed");
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.end();
    }
}
