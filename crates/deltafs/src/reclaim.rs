//! Freeing what a switch leaves behind, while the sandbox runs again.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::view::View;

/// A thread that drops views and gives their blocks back to the disk. One for a tree of volumes.
#[derive(Debug)]
pub(crate) struct Reclaimer {
    /// None only while this is dropped.
    queue: Option<Sender<View>>,
    thread: Option<JoinHandle<()>>,
}

impl Reclaimer {
    /// Starts the thread.
    pub(crate) fn start() -> io::Result<Self> {
        let (queue, views) = channel::<View>();
        let work = move || {
            for view in views {
                let tree = view.tree().clone();
                drop(view);
                tree.data.trim();
            }
        };
        let thread = std::thread::Builder::new()
            .name("deltafs-reclaim".to_owned())
            .spawn(work)?;
        Ok(Self {
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// Has a view dropped.
    pub(crate) fn drop_later(&self, view: View) {
        if let Some(queue) = &self.queue {
            // The thread takes views for as long as the queue is there; if it were gone, the error
            // would hold the view, and drop it here.
            let _ = queue.send(view);
        }
    }
}

impl Drop for Reclaimer {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
