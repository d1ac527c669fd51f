//! What a checkpoint leaves to be done while the processes run again.

use std::thread::JoinHandle;

use crate::error::{During, Result};
use crate::mem::Work;

/// The thread that does it, if there is something to do. There is one at a time.
#[derive(Debug, Default)]
pub(crate) struct Background(Option<JoinHandle<()>>);

impl Background {
    /// Begins with these pieces of work, which are done in order. If that fails, what they were to tell is lost.
    pub(crate) fn begin(&mut self, work: Vec<Work>) -> Result<()> {
        self.end();
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
