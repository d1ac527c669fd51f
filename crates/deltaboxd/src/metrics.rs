//! Counters and histograms of what the service did, in the text format of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use deltabox::{CompactionInfo, SandboxInfo, TemplatesInfo, WarmInfo};
use parking_lot::Mutex;

/// Upper bounds of the buckets, in microseconds: a checkpoint takes around a millisecond, a command minutes.
const BOUNDS_US: [u64; 14] = [
    250, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000, 256_000, 512_000,
    1_024_000, 4_096_000,
];

/// All metrics of a service.
#[derive(Debug, Default)]
pub(crate) struct Metrics(Mutex<Tables>);

#[derive(Debug, Default)]
struct Tables {
    operations: BTreeMap<&'static str, Operation>,
    stops: Histogram,
}

#[derive(Debug, Default)]
struct Operation {
    failed: u64,
    times: Histogram,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [u64; BOUNDS_US.len()],
    count: u64,
    sum: Duration,
}

impl Metrics {
    /// An operation of the library ended.
    pub(crate) fn operation(&self, name: &'static str, took: Duration, ok: bool) {
        let mut tables = self.0.lock();
        let operation = tables.operations.entry(name).or_default();
        operation.times.add(took);
        operation.failed += u64::from(!ok);
    }

    /// A checkpoint held the processes of its sandbox for this long.
    pub(crate) fn checkpoint_stop(&self, stop: Duration) {
        self.0.lock().stops.add(stop);
    }

    /// The text that a scrape gets.
    pub(crate) fn render(
        &self,
        sandboxes: &[SandboxInfo],
        warm: &WarmInfo,
        templates: &TemplatesInfo,
        compaction: &CompactionInfo,
    ) -> String {
        let tables = self.0.lock();
        let mut out = String::new();
        render_sandboxes(&mut out, sandboxes);
        render_warm(&mut out, warm);
        render_templates(&mut out, templates);
        render_compaction(&mut out, compaction);

        let failed = "deltabox_operations_failed_total";
        help(&mut out, failed, "counter", "Operations that failed.");
        for (name, operation) in &tables.operations {
            let label = format!("operation=\"{name}\"");
            line(&mut out, failed, &label, operation.failed);
        }

        let seconds = "deltabox_operation_seconds";
        help(&mut out, seconds, "histogram", "Time of operations.");
        for (name, operation) in &tables.operations {
            let label = format!("operation=\"{name}\"");
            operation.times.render(&mut out, seconds, &label);
        }

        let stop = "deltabox_checkpoint_stop_seconds";
        help(
            &mut out,
            stop,
            "histogram",
            "Time that checkpoints held the processes.",
        );
        tables.stops.render(&mut out, stop, "");
        out
    }
}

fn render_sandboxes(out: &mut String, sandboxes: &[SandboxInfo]) {
    help(out, "deltabox_sandboxes", "gauge", "Sandboxes.");
    line(out, "deltabox_sandboxes", "", sandboxes.len());
    let bytes = "deltabox_sandbox_file_bytes";
    help(
        out,
        bytes,
        "gauge",
        "Bytes of file data that a sandbox, its checkpoints and its forks hold on disk.",
    );
    for sandbox in sandboxes {
        // A name has no character that would have to be quoted.
        let label = format!("sandbox=\"{}\"", sandbox.name);
        line(out, bytes, &label, sandbox.file_bytes);
    }
}

fn render_compaction(out: &mut String, compaction: &CompactionInfo) {
    let mut row = |name: &str, kind: &str, text: &str, value: u64| {
        let name = format!("deltabox_compactor_{name}");
        help(out, &name, kind, text);
        line(out, &name, "", value);
    };
    let c = compaction;
    row(
        "waiting",
        "gauge",
        "Sandboxes whose deleted checkpoints are to be looked at.",
        c.waiting as u64,
    );
    row(
        "merges_total",
        "counter",
        "Checkpoints on disk that were merged with deleted ones.",
        c.merges,
    );
    row(
        "written_bytes_total",
        "counter",
        "Bytes written for that.",
        c.written_bytes,
    );
    row(
        "failures_total",
        "counter",
        "Attempts that failed.",
        c.failures,
    );
}

fn render_warm(out: &mut String, warm: &WarmInfo) {
    let ready = "deltabox_warm_sandboxes";
    help(out, ready, "gauge", "Blank sandboxes ready for forks.");
    line(out, ready, "", warm.ready);
    let forks = "deltabox_warm_forks_total";
    help(
        out,
        forks,
        "counter",
        "Forks that found a sandbox ready, or not.",
    );
    line(out, forks, "found=\"yes\"", warm.hits);
    line(out, forks, "found=\"no\"", warm.misses);
    for (name, text, value) in [
        (
            "deltabox_early_births_total",
            "Processes of forks that were born in advance.",
            warm.early_births,
        ),
        (
            "deltabox_early_births_taken_total",
            "Processes born in advance that forks took up.",
            warm.early_taken,
        ),
        (
            "deltabox_early_births_ended_total",
            "Processes born in advance that had to go.",
            warm.early_ended,
        ),
        (
            "deltabox_early_pages_total",
            "Pages that processes born in advance wrote to.",
            warm.early_pages,
        ),
        (
            "deltabox_warm_stood_back_total",
            "Times that nothing was born in advance, for want of processors.",
            warm.stood_back,
        ),
    ] {
        help(out, name, "counter", text);
        line(out, name, "", value);
    }
}

fn render_templates(out: &mut String, templates: &TemplatesInfo) {
    let mut row = |name: &str, kind: &str, text: &str, value: &dyn std::fmt::Display| {
        let name = format!("deltabox_templates{name}");
        help(out, &name, kind, text);
        line(out, &name, "", value);
    };
    let t = templates;
    row("", "gauge", "Templates.", &t.number);
    row("_bytes", "gauge", "Bytes that templates hold.", &t.bytes);
    row("_pinned", "gauge", "Templates that stay.", &t.pinned);
    row(
        "_oldest_seconds",
        "gauge",
        "Age of the oldest template.",
        &t.oldest,
    );
    row(
        "_made_total",
        "counter",
        "Templates that were made.",
        &t.made,
    );
    row(
        "_derived_total",
        "counter",
        "Templates that were made as copies of others.",
        &t.derived,
    );
    row(
        "_relatives_total",
        "counter",
        "Forks and rollbacks for which a relative's template served.",
        &t.relatives,
    );
    row(
        "_evicted_total",
        "counter",
        "Templates that had to go.",
        &t.evicted,
    );
    row(
        "_births_total",
        "counter",
        "Processes forked from templates.",
        &t.births,
    );
    let forks = "deltabox_templates_forks_total";
    help(
        out,
        forks,
        "counter",
        "Forks whose checkpoint had a template, or not.",
    );
    line(out, forks, "found=\"yes\"", t.hits);
    line(out, forks, "found=\"no\"", t.misses);
}

impl Histogram {
    fn add(&mut self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if let Some(bucket) = BOUNDS_US.iter().position(|&bound| us <= bound) {
            self.buckets[bucket] += 1;
        }
        self.count += 1;
        self.sum += took;
    }

    fn render(&self, out: &mut String, name: &str, label: &str) {
        let comma = if label.is_empty() { "" } else { "," };
        let mut below = 0;
        for (bound, bucket) in BOUNDS_US.iter().zip(self.buckets) {
            below += bucket;
            let seconds = Duration::from_micros(*bound).as_secs_f64();
            let labels = format!("{label}{comma}le=\"{seconds}\"");
            line(out, &format!("{name}_bucket"), &labels, below);
        }
        let labels = format!("{label}{comma}le=\"+Inf\"");
        line(out, &format!("{name}_bucket"), &labels, self.count);
        line(out, &format!("{name}_sum"), label, self.sum.as_secs_f64());
        line(out, &format!("{name}_count"), label, self.count);
    }
}

fn help(out: &mut String, name: &str, kind: &str, text: &str) {
    out.push_str(&format!("# HELP {name} {text}\n# TYPE {name} {kind}\n"));
}

fn line(out: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    let written = match labels {
        "" => writeln!(out, "{name} {value}"),
        labels => writeln!(out, "{name}{{{labels}}} {value}"),
    };
    written.expect("writing to a string does not fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(name: &str, file_bytes: u64) -> SandboxInfo {
        SandboxInfo {
            name: name.to_owned(),
            state: deltabox::SandboxState::Running,
            base: "/".into(),
            current: None,
            epoch: 0,
            created: 0,
            checkpoints: 0,
            durable: 0,
            processes: 0,
            file_bytes,
            page_bytes: 0,
            warnings: Vec::new(),
        }
    }

    #[test]
    fn buckets_are_cumulative_and_the_longest_times_are_counted() {
        let metrics = Metrics::default();
        metrics.operation("rollback", Duration::from_micros(900), true);
        metrics.operation("rollback", Duration::from_secs(60), false);
        metrics.checkpoint_stop(Duration::from_micros(300));
        let warm = WarmInfo {
            ready: 3,
            hits: 4,
            ..WarmInfo::default()
        };
        let templates = TemplatesInfo {
            bytes: 4096,
            misses: 5,
            ..TemplatesInfo::default()
        };
        let compaction = CompactionInfo {
            merges: 6,
            ..CompactionInfo::default()
        };
        let text = metrics.render(&[sandbox("a", 8192)], &warm, &templates, &compaction);
        for expected in [
            "deltabox_sandboxes 1\n",
            "deltabox_sandbox_file_bytes{sandbox=\"a\"} 8192\n",
            "deltabox_compactor_merges_total 6\n",
            "deltabox_warm_sandboxes 3\n",
            "deltabox_templates_bytes 4096\n",
            "deltabox_templates_forks_total{found=\"no\"} 5\n",
            "deltabox_warm_forks_total{found=\"yes\"} 4\n",
            "deltabox_operations_failed_total{operation=\"rollback\"} 1\n",
            "deltabox_operation_seconds_bucket{operation=\"rollback\",le=\"0.0005\"} 0\n",
            "deltabox_operation_seconds_bucket{operation=\"rollback\",le=\"0.001\"} 1\n",
            "deltabox_operation_seconds_bucket{operation=\"rollback\",le=\"4.096\"} 1\n",
            "deltabox_operation_seconds_bucket{operation=\"rollback\",le=\"+Inf\"} 2\n",
            "deltabox_operation_seconds_count{operation=\"rollback\"} 2\n",
            "deltabox_checkpoint_stop_seconds_count 1\n",
        ] {
            assert!(text.contains(expected), "{expected} is not in:\n{text}");
        }
    }
}
