//! POSIX timers (`timer_create(2)`).

use std::collections::BTreeSet;
use std::io;

use serde::{Deserialize, Serialize};

use crate::error::{During, Error, Result};
use crate::procfs::{self, Procfs};
use crate::remote::{Batch, CallId, Remote, longs};

/// `prctl`: a new timer gets the id that is asked for (Linux 6.15).
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
/// More than a program has; each takes two calls of a batch.
const TIMERS_MAX: usize = 256;
/// What making and setting one takes of a batch's heap: `struct sigevent`, its id and `struct itimerspec`.
const TIMER_BYTES: usize = 64 + 8 + 32;

/// One timer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Timer {
    id: i32,
    clock: i32,
    signal: i32,
    value: u64,
    /// `SIGEV_*`, and the thread for `SIGEV_THREAD_ID`.
    notify: i32,
    target: i32,
    /// `struct itimerspec`: interval, and what is left.
    setting: Vec<u8>,
}

impl Timer {
    /// Whether both are the same but for their setting.
    fn is_like(&self, other: &Self) -> bool {
        let setting = Vec::new();
        Self {
            setting: setting.clone(),
            ..self.clone()
        } == Self {
            setting,
            ..other.clone()
        }
    }

    /// Whether it has time left.
    fn is_armed(&self) -> bool {
        let left = self.setting.get(16..).unwrap_or_default();
        left.iter().any(|byte| *byte != 0)
    }

    /// The same without a thread to signal, or one whose time it counts: what a timer is when that has ended.
    fn idle(self) -> Self {
        let clock = match self.clock {
            ..0 => libc::CLOCK_MONOTONIC,
            clock => clock,
        };
        let (notify, target) = (libc::SIGEV_NONE, 0);
        Self {
            clock,
            notify,
            target,
            ..self
        }
    }

    /// `struct sigevent`
    fn event(&self) -> Vec<u8> {
        let mut event = longs(&[self.value]);
        event.extend(self.signal.to_le_bytes());
        event.extend(self.notify.to_le_bytes());
        event.extend(self.target.to_le_bytes());
        event.resize(64, 0);
        event
    }
}

/// The timers of a stopped process.
pub(crate) fn capture(procfs: &Procfs, remote: &mut Remote) -> Result<Vec<Timer>> {
    let pid = remote.pid();
    let doing = "reading the POSIX timers";
    let files = remote.files();
    let file = files.get("timers", || procfs.open_file(&format!("{pid}/timers")));
    let text = file.and_then(|file| procfs::read_all(&file));
    let text = text.during(pid, doing)?;
    let mut timers = parse(&text)
        .ok_or(io::ErrorKind::InvalidData)
        .during(pid, doing)?;
    if timers.is_empty() {
        return Ok(timers);
    }
    if timers.len() > TIMERS_MAX {
        let what = format!("it has more than {TIMERS_MAX} POSIX timers");
        return Err(Error::Unsupported {
            pid,
            name: String::new(),
            what,
        });
    }
    let mut batch = Batch::new();
    let settings: Vec<_> = timers
        .iter()
        .map(|timer| {
            let setting = batch.output(32);
            batch.call(libc::SYS_timer_gettime, &[timer.id.into(), setting.into()]);
            setting
        })
        .collect();
    let outcome = remote.run(&batch).during(pid, doing)?;
    for (timer, setting) in timers.iter_mut().zip(settings) {
        timer.setting = outcome.bytes(setting).to_vec();
    }
    Ok(timers)
}

/// The timers of a stopped process as they fit to the signals that are queued: `before` are those of before the queues were read, and
/// `ticked` those that have a signal in them. One that has ended meanwhile must not tick twice, nor get lost.
pub(crate) fn fitting(
    procfs: &Procfs,
    remote: &mut Remote,
    mut before: Vec<Timer>,
    ticked: &BTreeSet<i32>,
) -> Result<Vec<Timer>> {
    if before.iter().all(|timer| !ticked.contains(&timer.id)) {
        return Ok(before);
    }
    for now in capture(procfs, remote)? {
        let known = before.iter_mut().find(|timer| timer.id == now.id);
        if let Some(timer) = known.filter(|timer| ticked.contains(&timer.id)) {
            *timer = now;
        }
    }
    Ok(before)
}

/// Reads `/proc/PID/timers` (`Documentation/filesystems/proc.rst`).
fn parse(text: &[u8]) -> Option<Vec<Timer>> {
    let text = std::str::from_utf8(text).ok()?;
    let mut timers: Vec<Timer> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once(':')?;
        let value = value.trim();
        if key == "ID" {
            let id = value.parse().ok()?;
            let (notify, setting) = (libc::SIGEV_NONE, Vec::new());
            timers.push(Timer {
                id,
                clock: 0,
                signal: 0,
                value: 0,
                notify,
                target: 0,
                setting,
            });
            continue;
        }
        let timer = timers.last_mut()?;
        match key {
            "signal" => {
                let (signal, value) = value.split_once('/')?;
                timer.signal = signal.parse().ok()?;
                timer.value = u64::from_str_radix(value.trim_start_matches("0x"), 16).ok()?;
            }
            "notify" => {
                let (how, whom) = value.split_once('/')?;
                let (kind, number) = whom.split_once('.')?;
                timer.notify = match (how, kind) {
                    (_, "tid") => libc::SIGEV_THREAD_ID,
                    ("signal", _) => libc::SIGEV_SIGNAL,
                    ("thread", _) => libc::SIGEV_THREAD,
                    _ => libc::SIGEV_NONE,
                };
                if timer.notify == libc::SIGEV_THREAD_ID {
                    timer.target = number.parse().ok()?;
                }
            }
            "ClockID" => timer.clock = value.parse().ok()?,
            _ => {}
        }
    }
    Some(timers)
}

/// Keeps timers that are not as in `target` from ticking: what they would tell of belongs to the state that is given up.
/// Returns those that are there then.
pub(crate) fn stop(procfs: &Procfs, remote: &mut Remote, target: &[Timer]) -> Result<Vec<Timer>> {
    let mut current = capture(procfs, remote)?;
    if current == target {
        return Ok(current);
    }
    let mut batch = Batch::new();
    let still = batch.input(&[0; 32]);
    current.retain_mut(|timer| {
        let stays = target.iter().any(|t| t.is_like(timer));
        match stays {
            true if !timer.is_armed() => {}
            true => {
                let args = [timer.id.into(), 0.into(), still.into(), 0.into()];
                batch.call(libc::SYS_timer_settime, &args);
                timer.setting = vec![0; 32];
            }
            false => {
                batch.call(libc::SYS_timer_delete, &[timer.id.into()]);
            }
        }
        stays
    });
    if !batch.is_empty() {
        let ran = remote.run(&batch).map(drop);
        ran.during(remote.pid(), "stopping the POSIX timers")?;
    }
    Ok(current)
}

/// Makes the timers those of `target`. Comes when threads and queued signals are back, for one may tick at once.
pub(crate) fn restore(remote: &mut Remote, current: &[Timer], target: &[Timer]) -> Result<()> {
    if current == target {
        return Ok(());
    }
    let pid = remote.pid();
    let doing = "restoring the POSIX timers";
    let is_there = |timer: &Timer| current.iter().any(|t| t.is_like(timer));
    let idle: Vec<Timer> = set(remote, target, is_there)
        .during(pid, doing)?
        .into_iter()
        .map(Timer::idle)
        .collect();
    match set(remote, &idle, |_| false).during(pid, doing)?.first() {
        None => Ok(()),
        Some(timer) => {
            let what = format!("timer {} cannot be made", timer.id);
            Err(io::Error::other(what)).during(pid, doing)
        }
    }
}

/// Makes timers, but those that are there, and sets them. Returns those that cannot be made, since the thread that they signal or whose
/// time they count has ended.
fn set(
    remote: &mut Remote,
    timers: &[Timer],
    is_there: impl Fn(&Timer) -> bool,
) -> io::Result<Vec<Timer>> {
    let mode = |on: i32| {
        [
            PR_TIMER_CREATE_RESTORE_IDS.into(),
            on.into(),
            0.into(),
            0.into(),
            0.into(),
        ]
    };
    let mut impossible = Vec::new();
    let mut left = timers;
    while !left.is_empty() {
        let mut batch = Batch::new();
        let mut calls = Vec::new();
        let ids = batch.call(libc::SYS_prctl, &mode(1));
        while let Some((timer, rest)) = left.split_first().filter(|_| batch.fits(3, TIMER_BYTES)) {
            let made = (!is_there(timer)).then(|| {
                let event = batch.input(&timer.event());
                let id = batch.input(&timer.id.to_le_bytes());
                let args = [timer.clock.into(), event.into(), id.into()];
                batch.call(libc::SYS_timer_create, &args)
            });
            let set = timer.is_armed().then(|| {
                let setting = batch.input(&timer.setting);
                let args = [timer.id.into(), 0.into(), setting.into(), 0.into()];
                batch.call(libc::SYS_timer_settime, &args)
            });
            calls.push((timer, made, set));
            left = rest;
        }
        batch.call(libc::SYS_prctl, &mode(0));
        let outcome = remote.run(&batch)?;
        outcome.result(ids)?;
        for (timer, made, set) in calls {
            let done = |call: Option<CallId>| call.map_or(Ok(0), |call| outcome.result(call));
            match done(made) {
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => impossible.push(timer.clone()),
                made => made.and_then(|_| done(set)).map(drop)?,
            }
        }
    }
    Ok(impossible)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_kernels_text_is_understood() {
        let text = b"ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
            ID: 0\nsignal: 34/0\nnotify: signal/tid.2640\nClockID: 1\n";
        let timers = parse(text).unwrap();
        assert_eq!(timers.len(), 2);
        assert_eq!(
            (timers[0].id, timers[0].signal, timers[0].value),
            (1, 60, 0x7fff_86e4_52a8)
        );
        assert_eq!(timers[0].notify, libc::SIGEV_SIGNAL);
        assert_eq!(
            (timers[1].clock, timers[1].notify),
            (1, libc::SIGEV_THREAD_ID)
        );
        assert_eq!(timers[1].target, 2640);
        assert_eq!(parse(b"").unwrap(), []);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "(ID|signal|notify|ClockID|x)?:? ?[0-9a-z/.:\n -]{0,60}") {
            let _ = parse(text.as_bytes());
        }
    }
}
