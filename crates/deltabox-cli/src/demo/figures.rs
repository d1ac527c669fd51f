//! What the demo measured, and how it is shown.

use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::units::time;

/// The times that one kind of operation took.
#[derive(Default)]
pub(super) struct Times(Vec<Duration>);

impl Times {
    pub(super) fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    pub(super) fn total(&self) -> Duration {
        self.0.iter().sum()
    }

    pub(super) fn summary(&self) -> Option<Summary> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let last = sorted.len().checked_sub(1)?;
        let at = |q: f64| sorted[(last as f64 * q).round() as usize].as_secs_f64();
        Some(Summary {
            n: sorted.len(),
            p50: at(0.5),
            p95: at(0.95),
            max: at(1.0),
        })
    }
}

/// Quantiles in seconds.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Summary {
    n: usize,
    pub(super) p50: f64,
    p95: f64,
    max: f64,
}

/// One operation, with DeltaBox and with full copies.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    operation: &'static str,
    deltabox: Option<Summary>,
    copies: Option<Summary>,
    /// How many times longer the median takes with full copies.
    ratio: Option<f64>,
}

impl Row {
    pub(super) fn new(operation: &'static str, deltabox: &Times, copies: Option<&Times>) -> Self {
        let (deltabox, copies) = (deltabox.summary(), copies.and_then(Times::summary));
        let ratio = match (&deltabox, &copies) {
            (Some(d), Some(c)) if d.p50 > 0.0 => Some(c.p50 / d.p50),
            _ => None,
        };
        Self {
            operation,
            deltabox,
            copies,
            ratio,
        }
    }

    fn cells(&self) -> Vec<String> {
        let cell = |summary: &Option<Summary>, of: fn(&Summary) -> f64| match summary {
            Some(s) => time(Duration::from_secs_f64(of(s))),
            None => "-".into(),
        };
        let n = self.deltabox.as_ref().map_or(0, |s| s.n);
        vec![
            self.operation.into(),
            n.to_string(),
            cell(&self.deltabox, |s| s.p50),
            cell(&self.deltabox, |s| s.p95),
            cell(&self.deltabox, |s| s.max),
            cell(&self.copies, |s| s.p50),
            cell(&self.copies, |s| s.p95),
            self.ratio.map_or("-".into(), |r| format!("{r:.0}x")),
        ]
    }
}

/// The rows for people.
pub(super) fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    let header = [
        "",
        "n",
        "p50",
        "p95",
        "max",
        "copies p50",
        "copies p95",
        "ratio",
    ];
    table.set_header(header);
    table.add_rows(rows.iter().map(Row::cells));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(ms: &[u64]) -> Times {
        Times(ms.iter().map(|&ms| Duration::from_millis(ms)).collect())
    }

    #[test]
    fn the_ratio_compares_medians() {
        let row = Row::new(
            "rollback",
            &times(&[1, 3, 2]),
            Some(&times(&[200, 900, 400])),
        );
        assert_eq!(row.deltabox.as_ref().unwrap().p50, 0.002);
        assert_eq!(row.deltabox.as_ref().unwrap().max, 0.003);
        assert_eq!(row.ratio, Some(200.0));
        assert!(table(&[row]).contains("200x"));
    }

    #[test]
    fn without_measurements_there_are_no_figures() {
        let row = Row::new("fork", &times(&[]), None);
        assert!(row.deltabox.is_none() && row.ratio.is_none());
    }
}
