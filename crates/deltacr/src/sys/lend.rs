//! Work that borrows, done by a thread that outlives what is borrowed.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Work for another thread.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// What became of the work: its result, or what it panicked with.
pub(crate) type Outcome<R> = Result<R, Box<dyn Any + Send>>;

/// Gives `work` to `hand_over` as a job, and waits until the job was run or dropped. `None` if it was dropped.
pub(crate) fn lend<R: Send>(
    work: impl FnOnce() -> R + Send,
    hand_over: impl FnOnce(Job),
) -> Option<Outcome<R>> {
    let outcome = Mutex::new(None);
    let over = Arc::new(Over::default());
    {
        // Waits at the end of this block, also if `hand_over` panics.
        let _wait = Wait(&over);
        let lent = Lent {
            work,
            outcome: &outcome,
            over: Announce(Arc::clone(&over)),
        };
        let job: Box<dyn FnOnce() + Send + '_> = Box::new(move || lent.run());
        // SAFETY: only the lifetime changes. What the job borrows lives until `_wait` is dropped, which waits for
        // `Announce`; that is dropped last of all that the job holds, so the job touches nothing borrowed after it.
        let job = unsafe { std::mem::transmute::<Box<dyn FnOnce() + Send + '_>, Job>(job) };
        hand_over(job);
    }
    outcome.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// The fields are dropped in this order.
struct Lent<'a, W, R> {
    work: W,
    outcome: &'a Mutex<Option<Outcome<R>>>,
    over: Announce,
}

impl<W: FnOnce() -> R, R> Lent<'_, W, R> {
    fn run(self) {
        let Self {
            work,
            outcome,
            over,
        } = self;
        let result = catch_unwind(AssertUnwindSafe(work));
        *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        drop(over);
    }
}

#[derive(Default)]
struct Over {
    is_over: Mutex<bool>,
    changed: Condvar,
}

struct Announce(Arc<Over>);

impl Drop for Announce {
    fn drop(&mut self) {
        let mut is_over = self
            .0
            .is_over
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *is_over = true;
        self.0.changed.notify_one();
    }
}

struct Wait<'a>(&'a Over);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut is_over = self
            .0
            .is_over
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while !*is_over {
            let waited = self.0.changed.wait(is_over);
            is_over = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_may_borrow_and_its_result_and_panics_come_back() {
        let words = ["a".to_owned(), "b".to_owned()];
        let joined = lend(
            || words.concat(),
            |job| {
                std::thread::spawn(job);
            },
        );
        assert_eq!(joined.unwrap().unwrap(), "ab");
        let panicked = lend(
            || -> usize { panic!("of {}", words.len()) },
            |job| {
                std::thread::spawn(job);
            },
        );
        let message = panicked.unwrap().unwrap_err();
        assert_eq!(message.downcast_ref::<String>().unwrap(), "of 2");
    }

    #[test]
    fn work_that_nobody_did_is_told() {
        let dropped = Arc::new(());
        let held = Arc::clone(&dropped);
        assert!(lend(move || drop(held), drop).is_none());
        assert_eq!(Arc::strong_count(&dropped), 1);
    }
}
