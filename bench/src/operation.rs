//! What checkpoints or rollbacks took, by their parts.

use std::time::Duration;

use deltabox::Phases;

use crate::rows::{Rows, Samples};

/// What one operation took.
#[derive(Default)]
pub(crate) struct Operation {
    pub(crate) total: Samples,
    phases: Vec<(String, Samples)>,
    pages: Samples,
}

impl Operation {
    /// Adds one that was done.
    pub(crate) fn add(&mut self, total: Duration, phases: &Phases, pages: u64) {
        self.total.time(total);
        self.pages.count(pages);
        for (name, time) in &phases.0 {
            let at = self.phases.iter().position(|(known, _)| known == name);
            let at = at.unwrap_or_else(|| {
                self.phases.push((name.clone(), Samples::default()));
                self.phases.len() - 1
            });
            self.phases[at].1.time(*time);
        }
    }

    /// Adds rows of its parts and of the pages it copied.
    pub(crate) fn tell(&self, suite: &'static str, case: &str, name: &str, rows: &mut Rows) {
        for (phase, samples) in &self.phases {
            let metric = format!("{name}: {phase}");
            rows.add(suite, case, &metric, "ms", samples, None);
        }
        let metric = format!("{name} pages");
        rows.add(suite, case, &metric, "pages", &self.pages, None);
    }
}
