//! How long the parts of an operation take.

use std::time::{Duration, Instant};

/// How long the parts of an operation took, in order.
pub type Phases = Vec<(&'static str, Duration)>;

/// Measures one part after another.
#[derive(Debug)]
pub struct Stopwatch {
    last: Instant,
    /// The parts so far.
    pub phases: Phases,
}

impl Default for Stopwatch {
    fn default() -> Self {
        Self::start()
    }
}

impl Stopwatch {
    /// Begins with the first part.
    pub fn start() -> Self {
        Self {
            last: Instant::now(),
            phases: Vec::new(),
        }
    }

    /// Ends a part, and begins the next.
    pub fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.phases.push((name, now - self.last));
        self.last = now;
    }
}
