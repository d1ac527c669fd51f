//! The pages of an address space, which may become known a little later than the rest of it.

use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result};
use crate::ids::InnerPid;
use crate::mem::Kept;
use crate::mem::touched::Touched;
use crate::store::PageMap;

/// The pages of an address space. While they are still being copied, whoever wants them waits. Clones share the outcome.
#[derive(Clone, Debug)]
pub struct Pages(Arc<Cell>);

#[derive(Debug)]
struct Cell {
    pid: InnerPid,
    outcome: OnceLock<Result<(PageMap, Kept), String>>,
    touched: Touched,
}

impl Pages {
    /// Pages of process `pid` that will be known when the promise is kept.
    pub(crate) fn to_come(pid: InnerPid) -> (Self, Promise) {
        let outcome = OnceLock::new();
        let touched = Touched::default();
        let cell = Arc::new(Cell {
            pid,
            outcome,
            touched,
        });
        (Self(Arc::clone(&cell)), Promise(cell))
    }

    /// The pages; waits until they are known.
    ///
    /// # Errors
    /// They could not be copied, and are lost.
    pub fn get(&self) -> Result<&PageMap> {
        self.outcome().map(|(pages, _)| pages)
    }

    /// What became of the pages that were read for them; waits until that is known.
    ///
    /// # Errors
    /// As above.
    pub fn kept(&self) -> Result<Kept> {
        self.outcome().map(|(_, kept)| *kept)
    }

    /// Whether nobody has to wait for them.
    pub(crate) fn are_known(&self) -> bool {
        self.0.outcome.get().is_some()
    }

    /// In which order processes that went back to this state touched pages that were not there yet.
    pub(crate) fn touched(&self) -> Touched {
        self.0.touched.clone()
    }

    fn outcome(&self) -> Result<&(PageMap, Kept)> {
        self.0.outcome.wait().as_ref().map_err(|what| Error::Lost {
            pid: self.0.pid,
            what: what.clone(),
        })
    }
}

impl From<PageMap> for Pages {
    fn from(pages: PageMap) -> Self {
        let (known, promise) = Self::to_come(InnerPid::default());
        promise.keep((pages, Kept::default()));
        known
    }
}

impl Default for Pages {
    fn default() -> Self {
        PageMap::new().into()
    }
}

/// The duty to tell the pages of an address space. If it is dropped, they are lost.
#[derive(Debug)]
pub(crate) struct Promise(Arc<Cell>);

impl Promise {
    /// Tells the pages.
    pub(crate) fn keep(self, pages: (PageMap, Kept)) {
        self.settle(Ok(pages));
    }

    /// Tells why they will never be known.
    pub(crate) fn fail(self, why: String) {
        self.settle(Err(why));
    }

    fn settle(&self, outcome: Result<(PageMap, Kept), String>) {
        // Only the first outcome counts: dropping a promise that was kept breaks nothing.
        let _ = self.0.outcome.set(outcome);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.settle(Err("copying it was given up".to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_wants_pages_waits_until_they_are_known() {
        let (pages, promise) = Pages::to_come(InnerPid(7));
        let copy = pages.clone();
        let waiter = std::thread::spawn(move || copy.get().map(PageMap::len));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waiter.is_finished());
        promise.keep((PageMap::new(), Kept::default()));
        assert_eq!(waiter.join().unwrap().unwrap(), 0);
        assert!(pages.get().unwrap().is_empty());
    }

    #[test]
    fn pages_whose_promise_is_not_kept_are_lost_and_not_empty() {
        let (pages, promise) = Pages::to_come(InnerPid(7));
        drop(promise);
        let told = pages.get().unwrap_err().to_string();
        assert!(told.contains("process 7"), "{told}");
        let (pages, promise) = Pages::to_come(InnerPid(8));
        promise.fail("its copy was killed".to_owned());
        let told = pages.get().unwrap_err().to_string();
        assert!(told.contains("its copy was killed"), "{told}");
    }
}
