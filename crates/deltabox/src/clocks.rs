//! Monotonic clocks of a sandbox with a time namespace: they go on through a reboot.

use std::fs;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::spec::ClockOffsets;

const SECOND: i64 = 1_000_000_000;

/// What the host's clocks showed at a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reading {
    /// Tells one run of the machine from another.
    boot: String,
    monotonic: i64,
    boottime: i64,
}

impl Reading {
    pub(crate) fn now() -> Self {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let read = |clock| {
            let time = clock_gettime(clock);
            time.tv_sec
                .saturating_mul(SECOND)
                .saturating_add(time.tv_nsec)
        };
        Self {
            boot: boot.unwrap_or_default().trim().to_owned(),
            monotonic: read(ClockId::Monotonic),
            boottime: read(ClockId::Boottime),
        }
    }

    /// The offsets with which clocks go on at `now` that were ahead by `then` when this was read. In one run of the machine
    /// they have gone on by themselves.
    pub(crate) fn continued(&self, then: ClockOffsets, now: &Self) -> ClockOffsets {
        if self.boot == now.boot {
            return then;
        }
        let on = |then: i64, before: i64, now: i64| then.saturating_add(before).saturating_sub(now);
        ClockOffsets {
            monotonic: on(then.monotonic, self.monotonic, now.monotonic),
            boottime: on(then.boottime, self.boottime, now.boottime),
        }
    }
}

/// As `/proc/PID/timens_offsets` takes them (time_namespaces(7)).
pub(crate) fn offsets_text(offsets: ClockOffsets) -> Vec<u8> {
    let line = |name: &str, offset: i64| {
        let (seconds, nanoseconds) = (offset.div_euclid(SECOND), offset.rem_euclid(SECOND));
        format!("{name} {seconds} {nanoseconds}\n")
    };
    let [a, b] = [
        line("monotonic", offsets.monotonic),
        line("boottime", offsets.boottime),
    ];
    (a + &b).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(boot: &str, monotonic: i64) -> Reading {
        Reading {
            boot: boot.to_owned(),
            monotonic,
            boottime: monotonic + 5,
        }
    }

    #[test]
    fn clocks_go_on_through_a_reboot_and_by_themselves_otherwise() {
        let then = ClockOffsets {
            monotonic: 100,
            boottime: 200,
        };
        let before = reading("a", 7000);
        assert_eq!(before.continued(then, &reading("a", 9000)), then);
        let after = before.continued(then, &reading("b", 30));
        // What they showed then is what they show now.
        assert_eq!(after.monotonic + 30, 7100);
        assert_eq!(after.boottime + 35, 7205);
    }

    #[test]
    fn offsets_are_written_as_the_kernel_reads_them() {
        let offsets = ClockOffsets {
            monotonic: -1,
            boottime: 2 * SECOND + 3,
        };
        assert_eq!(
            offsets_text(offsets),
            b"monotonic -1 999999999\nboottime 2 3\n"
        );
    }
}
