//! Reader of `/proc/PID/fdinfo/N`. What it does not know it skips; nothing makes it panic.

use super::model::Lease;

/// One registration of an epoll, as `fdinfo` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EpollItem {
    /// The descriptor number at the time of registration.
    pub(crate) fd: i32,
    pub(crate) events: u32,
    pub(crate) data: u64,
    /// Inode number of the file registered, which need not be behind `fd` any more.
    pub(crate) ino: u64,
}

/// One watch of an inotify instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WatchLine {
    pub(crate) wd: i32,
    pub(crate) ino: u64,
    /// In the kernel's internal encoding: major above 20 bits of minor.
    pub(crate) dev: u32,
    pub(crate) mask: u32,
}

/// A timerfd's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TimerLine {
    pub(crate) clock: i32,
    pub(crate) ticks: u64,
    /// Remaining, as seconds and nanoseconds.
    pub(crate) value: (u64, u64),
    pub(crate) interval: (u64, u64),
}

/// Which kind of file lock a line tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockClass {
    Flock,
    Posix,
    OpenFile,
}

/// A file lock that is held through the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LockLine {
    pub(crate) class: LockClass,
    pub(crate) write: bool,
    pub(crate) start: u64,
    /// The last byte, `None` for the end of the file however it grows.
    pub(crate) end: Option<u64>,
}

/// All that one `fdinfo` file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FdInfo {
    pub(crate) pos: u64,
    /// `open(2)` flags, close-on-exec included.
    pub(crate) flags: i32,
    /// Which mount it was opened in, and its inode number.
    pub(crate) file: (i64, u64),
    pub(crate) event_count: Option<u64>,
    pub(crate) event_semaphore: bool,
    pub(crate) timer: Option<TimerLine>,
    pub(crate) signal_mask: Option<u64>,
    pub(crate) epoll: Vec<EpollItem>,
    pub(crate) watches: Vec<WatchLine>,
    pub(crate) tty_index: Option<u32>,
    /// Descriptors in flight in a unix socket; of one that listens, in the connections that wait at it.
    pub(crate) rights: usize,
    /// A pidfd's process, in the reader's pid namespace; -1 when it is gone.
    pub(crate) pid: Option<i32>,
    pub(crate) locks: Vec<LockLine>,
    pub(crate) lease: Option<Lease>,
    /// Lines that tell of a lock in words this reader does not know.
    pub(crate) odd_locks: usize,
}

impl FdInfo {
    /// Reads the whole of one file; `None` if it lacks position or flags.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut info = Self::default();
        let (mut pos, mut flags) = (None, None);
        for line in bytes.split(|&b| b == b'\n') {
            let Ok(line) = std::str::from_utf8(line) else {
                continue;
            };
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            match key.trim() {
                "pos" => pos = value.parse::<i64>().ok().map(|v| v as u64),
                "flags" => flags = i32::from_str_radix(value, 8).ok(),
                _ => info.line(key.trim(), value, line),
            }
        }
        (info.pos, info.flags) = (pos?, flags?);
        Some(info)
    }

    fn line(&mut self, key: &str, value: &str, line: &str) {
        match key {
            "mnt_id" => self.file.0 = value.parse().unwrap_or(-1),
            "ino" => self.file.1 = value.parse().unwrap_or(0),
            "eventfd-count" => self.event_count = hex(value),
            "eventfd-semaphore" => self.event_semaphore = value == "1",
            "sigmask" => self.signal_mask = hex(value),
            "tty-index" => self.tty_index = value.parse().ok(),
            "scm_fds" => self.rights = value.parse().unwrap_or(0),
            "Pid" => self.pid = value.parse().ok(),
            "tfd" => self.epoll.extend(epoll_item(line)),
            "inotify wd" => self.watches.extend(watch(line)),
            "lock" => match (lock(value), lease(value)) {
                (Some(lock), _) => self.locks.push(lock),
                (None, Some(lease)) => self.lease = Some(lease),
                (None, None) => self.odd_locks += 1,
            },
            "clockid" => self.timer.get_or_insert_default().clock = value.parse().unwrap_or(-1),
            _ => self.timer_line(key, value),
        }
    }

    fn timer_line(&mut self, key: &str, value: &str) {
        let Some(timer) = &mut self.timer else {
            return;
        };
        match key {
            "ticks" => timer.ticks = value.parse().unwrap_or(0),
            "it_value" => timer.value = pair(value).unwrap_or_default(),
            "it_interval" => timer.interval = pair(value).unwrap_or_default(),
            _ => {}
        }
    }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim(), 16).ok()
}

/// `(12, 345)`
fn pair(text: &str) -> Option<(u64, u64)> {
    let inner = text.trim().strip_prefix('(')?.strip_suffix(')')?;
    let (a, b) = inner.split_once(',')?;
    let nanos = b.trim().parse().ok().filter(|&n| n < 1_000_000_000)?;
    Some((a.trim().parse().ok()?, nanos))
}

/// The value after `key:`, which blanks may follow.
fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let at = line.find(key)? + key.len();
    let rest = line[at..].strip_prefix(':')?.trim_start();
    Some(rest.split_whitespace().next().unwrap_or(""))
}

/// `tfd:        5 events:       19 data:                5  pos:0 ino:61 sdev:7`
fn epoll_item(line: &str) -> Option<EpollItem> {
    Some(EpollItem {
        fd: field(line, "tfd")?.parse().ok()?,
        events: u32::from_str_radix(field(line, "events")?, 16).ok()?,
        data: hex(field(line, "data")?)?,
        ino: hex(field(line, "ino")?)?,
    })
}

/// `inotify wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-…`
fn watch(line: &str) -> Option<WatchLine> {
    let number = |key| u32::from_str_radix(field(line, key)?, 16).ok();
    Some(WatchLine {
        wd: i32::try_from(number("wd")?).ok()?,
        ino: hex(field(line, " ino")?)?,
        dev: number("sdev")?,
        mask: number(" mask")?,
    })
}

/// `1: POSIX  ADVISORY  WRITE 3567 fe:00:23 0 EOF`
fn lock(text: &str) -> Option<LockLine> {
    let mut words = text.split_whitespace().skip(1);
    let class = match words.next()? {
        "FLOCK" => LockClass::Flock,
        "POSIX" => LockClass::Posix,
        "OFDLCK" => LockClass::OpenFile,
        _ => return None,
    };
    let write = match words.nth(1)? {
        "WRITE" => true,
        "READ" => false,
        _ => return None,
    };
    let (start, end) = (words.nth(2)?, words.next()?);
    Some(LockLine {
        class,
        write,
        start: start.parse().ok()?,
        end: match end {
            "EOF" => None,
            number => Some(number.parse().ok()?),
        },
    })
}

/// `1: LEASE  BREAKING  UNLCK 3567 fe:00:23 0 EOF`
fn lease(text: &str) -> Option<Lease> {
    let mut words = text.split_whitespace().skip(1);
    if words.next()? != "LEASE" {
        return None;
    }
    match (words.next()?, words.next()?) {
        ("ACTIVE", "READ") => Some(Lease::Read),
        ("ACTIVE", "WRITE") => Some(Lease::Write),
        ("BREAKING", kind) => Some(Lease::Broken {
            to_read: kind == "READ",
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn epoll_registrations_are_read() {
        let text = b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t1066\n\
            tfd:        5 events:     2019 data:         deadbeef  pos:0 ino:3d sdev:7\n";
        let info = FdInfo::parse(text).unwrap();
        assert_eq!((info.flags, info.file), (0o2000002, (15, 1066)));
        let item = EpollItem {
            fd: 5,
            events: 0x2019,
            data: 0xdead_beef,
            ino: 0x3d,
        };
        assert_eq!(info.epoll, [item]);
    }

    #[test]
    fn a_watch_and_its_mask_are_not_mixed_up_with_the_ignored_mask() {
        let text = b"pos:\t0\nflags:\t00\n\
            inotify wd:1f ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8\n";
        let info = FdInfo::parse(text).unwrap();
        let watch = WatchLine {
            wd: 0x1f,
            ino: 0x9e7e,
            dev: 0x80_0013,
            mask: 0x800_afce,
        };
        assert_eq!(info.watches, [watch]);
    }

    #[test]
    fn locks_and_timers_are_read() {
        let text = b"pos:\t7\nflags:\t02\nlock:\t1: POSIX  ADVISORY  WRITE 35 fe:00:23 5 9\n\
            lock:\t2: FLOCK  ADVISORY  READ 35 fe:00:23 0 EOF\nlock:\t3: X\n\
            lock:\t4: LEASE  BREAKING  UNLCK 35 fe:00:23 0 EOF\n\
            clockid: 1\nticks: 3\nsettime flags: 01\nit_value: (0, 49406829)\nit_interval: (1, 0)\n";
        let info = FdInfo::parse(text).unwrap();
        assert_eq!(info.locks.len(), 2);
        assert_eq!(info.odd_locks, 1);
        assert_eq!((info.locks[0].start, info.locks[0].end), (5, Some(9)));
        assert!(!info.locks[1].write);
        assert_eq!(info.lease, Some(Lease::Broken { to_read: false }));
        let timer = info.timer.unwrap();
        assert_eq!((timer.clock, timer.ticks), (1, 3));
        assert_eq!((timer.value, timer.interval), ((0, 49_406_829), (1, 0)));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "(pos|flags|tfd|inotify wd|lock|clockid|it_value|ino|[ :\t\n(,)0-9a-fé-]){0,80}") {
            let _ = FdInfo::parse(text.as_bytes());
            let _ = FdInfo::parse(&[b"pos:\t0\nflags:\t00\n", text.as_bytes()].concat());
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = FdInfo::parse(&bytes);
        }
    }
}
