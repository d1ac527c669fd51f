//! The rows that every suite writes.

use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// Measurements of one quantity, in its unit.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// Adds a time, in milliseconds.
    pub(crate) fn time(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1e3);
    }

    /// Adds a count.
    pub(crate) fn count(&mut self, count: u64) {
        self.0.push(count as f64);
    }

    /// Adds a value of any unit.
    pub(crate) fn value(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds an amount of memory, in MiB.
    pub(crate) fn mib(&mut self, bytes: u64) {
        self.0.push(bytes as f64 / f64::from(1 << 20));
    }

    /// Whether nothing was measured.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One sample: by how many microseconds the median is above that of `few`, which is of `items` items fewer, for each.
    pub(crate) fn slope(&self, few: &Self, items: f64) -> Self {
        let medians = self.quantile(0.5).zip(few.quantile(0.5));
        let each = medians.map(|(more, few)| (more - few) * 1e3 / items);
        Self(each.into_iter().collect())
    }

    /// The value that the share `q` of the samples does not exceed; `None` without samples.
    fn quantile(&self, q: f64) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        Some(sorted[(last as f64 * q).round() as usize])
    }
}

/// One measured quantity.
#[derive(Debug, Serialize)]
struct Row {
    suite: &'static str,
    case: String,
    metric: String,
    unit: &'static str,
    n: usize,
    p50: f64,
    p95: f64,
    max: f64,
    floor_p50: Option<f64>,
    ratio: Option<f64>,
}

/// All rows of a run.
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub(crate) struct Rows(Vec<Row>);

impl Rows {
    /// Adds a quantity, with the floor measured beside it if there is one. Without samples there is no row.
    pub(crate) fn add(
        &mut self,
        suite: &'static str,
        case: &str,
        metric: &str,
        unit: &'static str,
        samples: &Samples,
        floor: Option<&Samples>,
    ) {
        let quantiles = [0.5, 0.95, 1.0].map(|q| samples.quantile(q));
        let [Some(p50), Some(p95), Some(max)] = quantiles else {
            return;
        };
        let floor_p50 = floor.and_then(|f| f.quantile(0.5)).filter(|&f| f > 0.0);
        self.0.push(Row {
            suite,
            case: case.to_owned(),
            metric: metric.to_owned(),
            unit,
            n: samples.0.len(),
            p50,
            p95,
            max,
            floor_p50,
            ratio: floor_p50.map(|floor| p50 / floor),
        });
    }

    /// The rows for people.
    pub(crate) fn table(&self) -> String {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header([
            "case", "metric", "unit", "n", "p50", "p95", "max", "floor", "ratio",
        ]);
        let number = |value: f64| format!("{value:.3}");
        for row in &self.0 {
            table.add_row([
                row.case.clone(),
                row.metric.clone(),
                row.unit.to_owned(),
                row.n.to_string(),
                number(row.p50),
                number(row.p95),
                number(row.max),
                row.floor_p50.map(number).unwrap_or_default(),
                row.ratio.map(|r| format!("{r:.1}x")).unwrap_or_default(),
            ]);
        }
        for column in table.column_iter_mut().skip(3) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_compares_medians_and_says_null_without_a_floor() {
        let samples = |ms: &[u64]| {
            let mut samples = Samples::default();
            ms.iter()
                .for_each(|&ms| samples.time(Duration::from_millis(ms)));
            samples
        };
        let mut rows = Rows::default();
        rows.add(
            "cr",
            "a",
            "stop",
            "ms",
            &samples(&[4, 6, 9]),
            Some(&samples(&[2, 3, 4])),
        );
        rows.add("cr", "a", "pages", "pages", &samples(&[1]), None);
        rows.add("cr", "a", "nothing", "ms", &samples(&[]), None);
        let json = serde_json::to_value(&rows).unwrap();
        assert_eq!(json.as_array().unwrap().len(), 2);
        assert_eq!(
            (&json[0]["p50"], &json[0]["max"]),
            (&6.0.into(), &9.0.into())
        );
        assert_eq!(json[0]["ratio"], 2.0);
        assert!(json[1]["floor_p50"].is_null() && json[1]["ratio"].is_null());
        assert!(rows.table().contains("2.0x"));
    }
}
