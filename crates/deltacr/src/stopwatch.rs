//! How long the parts of an operation take.

use std::time::{Duration, Instant};

/// How long the parts of an operation took, in order.
pub type Phases = Vec<(&'static str, Duration)>;

/// Measures one part after another.
pub(crate) struct Stopwatch {
    last: Instant,
    pub(crate) phases: Phases,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self {
            last: Instant::now(),
            phases: Vec::new(),
        }
    }

    pub(crate) fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.phases.push((name, now - self.last));
        self.last = now;
    }
}
