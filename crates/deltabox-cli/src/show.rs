//! What commands print.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use comfy_table::{Table, presets};
use deltabox::{
    CheckpointInfo, CheckpointReport, CheckpointState, Difference, Feature, FileChange,
    LayerReport, RollbackReport, SandboxInfo, SandboxState, SessionInfo, Tree,
};
use deltaboxd::api::ReadyInfo;
use serde::Serialize;

use crate::terminal::colours;
use crate::tree;
use crate::units::{age, count, size, time, visible};

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// One JSON value on one line.
pub(crate) fn json(value: &impl Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    writeln!(out)
}

/// The JSON value, or the text in its place.
pub(crate) fn say<T: Serialize>(
    as_json: bool,
    value: &T,
    text: impl FnOnce() -> String,
) -> io::Result<()> {
    match as_json {
        true => json(value),
        false => writeln!(io::stdout(), "{}", text()),
    }
}

/// A note on standard error: something that the user should know, while the command succeeded.
pub(crate) fn note(text: &str) {
    eprintln!("deltabox: {}", visible(text));
}

#[derive(Clone, Copy)]
enum Colour {
    Red = 31,
    Green = 32,
    Yellow = 33,
}

fn paint(on: bool, colour: Colour, text: &str) -> String {
    match on {
        true => format!("\x1b[{}m{text}\x1b[0m", colour as u8),
        false => text.to_owned(),
    }
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

/// Prints a table without the spaces around it.
fn print(table: &Table) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for line in table.lines() {
        writeln!(
            out,
            "{}",
            line.strip_prefix(' ').unwrap_or(&line).trim_end()
        )?;
    }
    Ok(())
}

fn state(state: &SandboxState) -> &'static str {
    match state {
        SandboxState::Running => "running",
        SandboxState::Stopped => "stopped",
        SandboxState::Failed { .. } => "failed",
    }
}

fn current(sandbox: &SandboxInfo) -> String {
    sandbox.current.map_or("-".into(), |id| id.to_string())
}

pub(crate) fn sandboxes(list: &[SandboxInfo]) -> io::Result<()> {
    let mut table = table(&[
        "NAME",
        "STATE",
        "AT",
        "CHECKPOINTS",
        "PROCESSES",
        "FILES",
        "MEMORY",
        "CREATED",
        "BASE",
    ]);
    for sandbox in list {
        table.add_row([
            sandbox.name.clone(),
            state(&sandbox.state).into(),
            current(sandbox),
            sandbox.checkpoints.to_string(),
            sandbox.processes.to_string(),
            size(sandbox.file_bytes),
            size(sandbox.page_bytes),
            age(now(), sandbox.created),
            visible(&sandbox.base.to_string_lossy()).into(),
        ]);
    }
    print(&table)
}

pub(crate) fn inspect(
    sandbox: &SandboxInfo,
    sessions: &[SessionInfo],
    ready: &ReadyInfo,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let mut line = |key: &str, value: &str| writeln!(out, "{key:<12} {}", visible(value));
    line("name", &sandbox.name)?;
    match &sandbox.state {
        SandboxState::Failed { reason } => line("state", &format!("failed: {reason}"))?,
        other => line("state", state(other))?,
    }
    line("base", &sandbox.base.to_string_lossy())?;
    line("created", &age(now(), sandbox.created))?;
    line("at", &current(sandbox))?;
    line("epoch", &sandbox.epoch.to_string())?;
    let checkpoints = match sandbox.durable {
        0 => sandbox.checkpoints.to_string(),
        durable => format!("{}, {durable} durable", sandbox.checkpoints),
    };
    line("checkpoints", &checkpoints)?;
    line("processes", &sandbox.processes.to_string())?;
    line("files", &size(sandbox.file_bytes))?;
    line("memory", &size(sandbox.page_bytes))?;
    for warning in &sandbox.warnings {
        line("warning", warning)?;
    }
    // Of all sandboxes together.
    let t = &ready.templates;
    let templates = format!(
        "{} of {} ({}, {} pinned, the oldest {:.0} s old), {} hits, {} relatives, {} misses",
        t.number,
        t.limit,
        size(t.bytes),
        t.pinned,
        t.oldest,
        t.hits,
        t.relatives,
        t.misses
    );
    line("templates", &templates)?;
    let w = &ready.warm;
    let warm = format!(
        "{} of {}, {} hits, {} misses; born early {}, taken {}",
        w.ready, w.limit, w.hits, w.misses, w.early_births, w.early_taken
    );
    line("kept ready", &warm)?;
    drop(out);
    match sessions {
        [] => Ok(()),
        sessions => {
            writeln!(io::stdout())?;
            session_table(sessions)
        }
    }
}

fn session_table(sessions: &[SessionInfo]) -> io::Result<()> {
    let mut table = table(&["SESSION", "PID", "STATE", "OUTPUT", "COMMAND"]);
    for session in sessions {
        let command = session.argv.join(" ");
        table.add_row([
            session.id.to_string(),
            session.pid.to_string(),
            session
                .exit
                .map_or("running".into(), |status| format!("exit {status}")),
            size(session.output),
            visible(&command).into(),
        ]);
    }
    print(&table)
}

pub(crate) fn drawing(name: &str, tree: &Tree) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if tree.nodes.is_empty() {
        return writeln!(
            out,
            "no checkpoints yet; `deltabox checkpoint {name}` makes one"
        );
    }
    let (now, colour) = (now(), colours());
    for row in tree::rows(tree) {
        writeln!(out, "{}{}", row.lead, node(row.node, now, colour))?;
    }
    Ok(())
}

fn node(node: &CheckpointInfo, now: u64, colour: bool) -> String {
    let mark = if node.current { "◉" } else { "○" };
    let head = format!("{mark} {}", node.id);
    let mut line = match node.current {
        true => paint(colour, Colour::Green, &head),
        false => head,
    };
    if let Some(message) = &node.message {
        line.push_str("  ");
        line.push_str(&visible(message));
    }
    // Of one whose manifest cannot be read nothing is known.
    if node.created > 0 {
        let processes = count(node.processes, "process", "processes");
        line.push_str(&format!("  ({processes}, {})", age(now, node.created)));
    }
    match &node.state {
        CheckpointState::Warm => {}
        CheckpointState::Durable => line.push_str("  durable"),
        CheckpointState::Failed { reason } => {
            line.push_str("  failed: ");
            line.push_str(&visible(reason));
        }
    }
    if node.current {
        line.push_str("  ← current");
    }
    line
}

pub(crate) fn layers(layers: &[LayerReport]) -> io::Result<()> {
    let mut table = table(&[
        "SANDBOX",
        "ID",
        "ON",
        "INODES",
        "FILES",
        "PROCESSES",
        "MEMORY",
        "CREATED",
        "STATE",
    ]);
    for layer in layers {
        let state = match (&layer.damage, layer.verified) {
            (Some(damage), _) => format!("damaged: {}", visible(damage)),
            (None, true) => "good".to_owned(),
            (None, false) => "durable".to_owned(),
        };
        let state = match layer.deleted {
            true => format!("{state}, deleted (others build on it)"),
            false => state,
        };
        table.add_row([
            layer.sandbox.clone(),
            layer.id.to_string(),
            layer.parent.map_or("-".into(), |id| id.to_string()),
            layer.inodes.to_string(),
            size(layer.file_bytes),
            layer.processes.to_string(),
            size(layer.page_bytes),
            match layer.created {
                0 => "-".to_owned(),
                created => age(now(), created),
            },
            state,
        ]);
    }
    print(&table)
}

pub(crate) fn difference(difference: &Difference) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let colour = colours();
    for change in &difference.files {
        let (letter, hue, text) = match change {
            FileChange::Added { path } => ("A", Colour::Green, path.to_string_lossy().into()),
            FileChange::Modified { path } => ("M", Colour::Yellow, path.to_string_lossy().into()),
            FileChange::Deleted { path } => ("D", Colour::Red, path.to_string_lossy().into()),
            FileChange::Renamed { from, to } => (
                "R",
                Colour::Yellow,
                format!("{} → {}", from.display(), to.display()),
            ),
        };
        writeln!(out, "{} {}", paint(colour, hue, letter), visible(&text))?;
    }
    let processes = [
        ("+", Colour::Green, &difference.came),
        ("-", Colour::Red, &difference.went),
    ];
    for (sign, hue, list) in processes {
        for process in list {
            let sign = paint(colour, hue, sign);
            let command = visible(&process.command);
            writeln!(out, "{sign} process {} {command}", process.pid)?;
        }
    }
    Ok(())
}

pub(crate) fn checkpoint(report: &CheckpointReport, people: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if !people {
        return writeln!(out, "{}", report.id);
    }
    writeln!(
        out,
        "{}  (stood still for {}; {}, {})",
        report.id,
        time(report.stop),
        count(report.processes, "process", "processes"),
        count(report.pages as usize, "page", "pages"),
    )
}

pub(crate) fn rollback(name: &str, report: &RollbackReport) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{name} is at {} again, epoch {}  ({}; processes: {} undone, {} rebuilt, {} killed; {})",
        report.id,
        report.epoch,
        time(report.total),
        report.kept,
        report.rebuilt,
        report.killed,
        count(report.pages as usize, "page", "pages"),
    )?;
    if let Some(why) = &report.fallback {
        note(&format!(
            "all processes were built anew, as undoing in place failed: {why}"
        ));
    }
    for line in &report.notes {
        note(line);
    }
    Ok(())
}

pub(crate) fn features(features: &[Feature]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let colour = colours();
    for feature in features {
        let mark = match (feature.present, feature.required) {
            (true, _) => paint(colour, Colour::Green, "ok      "),
            (false, true) => paint(colour, Colour::Red, "missing "),
            (false, false) => paint(colour, Colour::Yellow, "without "),
        };
        writeln!(out, "{mark} {}: {}", feature.name, visible(&feature.detail))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use deltabox::CheckpointId;

    #[test]
    fn the_current_checkpoint_is_marked_in_words() {
        let mut info = CheckpointInfo {
            id: CheckpointId(4),
            parent: None,
            message: Some("before\x1b[31m".into()),
            created: 40,
            processes: 1,
            current: true,
            state: CheckpointState::Warm,
        };
        let line = node(&info, 100, false);
        assert_eq!(
            line,
            "◉ c4  before\\u{1b}[31m  (1 process, 1m ago)  ← current"
        );
        info.current = false;
        assert!(node(&info, 100, false).starts_with("○ c4"));
        assert!(!node(&info, 100, false).contains("current"));
        info.state = CheckpointState::Durable;
        assert!(node(&info, 100, false).ends_with("  durable"));
    }
}
