//! What a program has asked of the kernel for parts of its memory (`madvise`, `mlock`), as far as the kernel keeps it.
//!
//! Only `/proc/PID/smaps` tells, which looks at all pages for it, and so is read of a process that is met for the first time, and
//! later of those that had something to tell.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::str;

use serde::{Deserialize, Serialize};

use crate::error::{During, Result};
use crate::mem::{Vma, overlap};
use crate::remote::{Arg, Batch, Remote};

/// One kind, what `smaps` calls it, and the calls that ask for it and take it back.
struct Kind {
    name: &'static str,
    ask: Call,
    take_back: Call,
}

#[derive(Clone, Copy)]
enum Call {
    Madvise(i32),
    /// `mlock2(2)`, with these flags.
    Lock(u32),
    Unlock,
    /// There is no such call: a mapping has it from its beginning, or keeps it.
    None,
}

/// Calls that a process makes in one stop.
const AT_ONCE: usize = 256;
/// `MLOCK_ONFAULT`.
const ON_FAULT: u32 = 1;

/// In the order of the bits of [`Advice`].
const KINDS: [Kind; 10] = [
    kind(
        "dc",
        Call::Madvise(libc::MADV_DONTFORK),
        Call::Madvise(libc::MADV_DOFORK),
    ),
    kind(
        "wf",
        Call::Madvise(libc::MADV_WIPEONFORK),
        Call::Madvise(libc::MADV_KEEPONFORK),
    ),
    kind(
        "dd",
        Call::Madvise(libc::MADV_DONTDUMP),
        Call::Madvise(libc::MADV_DODUMP),
    ),
    kind("hg", Call::Madvise(libc::MADV_HUGEPAGE), Call::None),
    kind("nh", Call::Madvise(libc::MADV_NOHUGEPAGE), Call::None),
    kind(
        "mg",
        Call::Madvise(libc::MADV_MERGEABLE),
        Call::Madvise(libc::MADV_UNMERGEABLE),
    ),
    kind("lo", Call::Lock(0), Call::Unlock),
    kind("lf", Call::Lock(ON_FAULT), Call::Unlock),
    kind(
        "sr",
        Call::Madvise(libc::MADV_SEQUENTIAL),
        Call::Madvise(libc::MADV_NORMAL),
    ),
    kind(
        "rr",
        Call::Madvise(libc::MADV_RANDOM),
        Call::Madvise(libc::MADV_NORMAL),
    ),
];
const LOCKED: u16 = 1 << 6;
const LOCKED_WHEN_TOUCHED: u16 = 1 << 7;
/// What changes nothing but how long things take.
const HINTS: u16 = 1 << 8 | 1 << 9;

const fn kind(name: &'static str, ask: Call, take_back: Call) -> Kind {
    Kind {
        name,
        ask,
        take_back,
    }
}

/// A set of [`KINDS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Advice(u16);

/// What holds for parts of a memory, ascending; nothing for the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Advised(Vec<(Range<u64>, Advice)>);

/// What `smaps` tells of a process.
pub(crate) struct Told {
    pub(crate) advised: Advised,
    /// Mappings that grow by themselves.
    pub(crate) grow: Vec<Range<u64>>,
    /// Mappings whose pages the kernel may drop.
    pub(crate) droppable: Vec<Range<u64>>,
}

impl Told {
    /// Reads it of a stopped process.
    pub(crate) fn by(remote: &Remote) -> Result<Self> {
        let file = File::open(format!("/proc/{}/smaps", remote.host()));
        let told = file.and_then(|file| Self::parse(BufReader::with_capacity(1 << 16, file)));
        told.during(remote.pid(), "reading what was asked for its memory")
    }

    fn parse(mut lines: impl BufRead) -> io::Result<Self> {
        let mut told = Self {
            advised: Advised::default(),
            grow: Vec::new(),
            droppable: Vec::new(),
        };
        let mut range = 0..0;
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            // Names, in which the kernel escapes ends of lines, are only in lines that begin with a range.
            if let Some(flags) = line.strip_prefix(b"VmFlags:") {
                told.add(&range, &String::from_utf8_lossy(flags));
            } else if let Some(found) = parse_range(&line) {
                range = found;
            }
            line.clear();
        }
        Ok(told)
    }

    fn add(&mut self, range: &Range<u64>, flags: &str) {
        let mut advice = Advice::default();
        for flag in flags.split_ascii_whitespace() {
            match flag {
                "gd" => self.grow.push(range.clone()),
                "dp" => self.droppable.push(range.clone()),
                _ => {}
            }
            for (bit, kind) in KINDS.iter().enumerate() {
                advice.0 |= u16::from(kind.name == flag) << bit;
            }
        }
        // The kernel shows it as locked, too.
        if advice.0 & LOCKED_WHEN_TOUCHED != 0 {
            advice.0 &= !LOCKED;
        }
        if advice != Advice::default() {
            self.advised.0.push((range.clone(), advice));
        }
    }
}

/// `7f00-7f10 rw-p …`
fn parse_range(line: &[u8]) -> Option<Range<u64>> {
    let (range, _) = str::from_utf8(line.get(..40.min(line.len()))?)
        .ok()?
        .split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
}

impl Advised {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether there is nothing that a program would miss.
    pub(crate) fn is_idle(&self) -> bool {
        self.0.iter().all(|(_, advice)| advice.0 & !HINTS == 0)
    }

    /// Only what is asked for these mappings, but those that the kernel makes.
    pub(crate) fn within(mut self, vmas: &[Vma]) -> Self {
        let own = vmas.iter().filter(|vma| !vma.is_special());
        let parts = own.flat_map(|vma| {
            let parts = self.0.iter();
            parts.filter_map(|(range, advice)| Some((overlap(range, &vma.range())?, *advice)))
        });
        self.0 = parts.collect();
        self
    }

    /// What is locked.
    pub(crate) fn locked(&self) -> impl Iterator<Item = Range<u64>> {
        let locked = self
            .0
            .iter()
            .filter(|(_, advice)| advice.0 & (LOCKED | LOCKED_WHEN_TOUCHED) != 0);
        locked.map(|(range, _)| range.clone())
    }

    fn at(&self, address: u64) -> Advice {
        let at = self.0.partition_point(|(range, _)| range.end <= address);
        let found = self.0.get(at).filter(|(range, _)| range.start <= address);
        found.map_or(Advice::default(), |(_, advice)| *advice)
    }

    /// Makes this hold for a stopped process that has these mappings. Costs nothing where nothing was asked for.
    ///
    /// # Errors
    /// The process cannot be told. What the kernel refuses (there is a limit to what may be locked) it goes without.
    pub(crate) fn restore(&self, remote: &mut Remote, vmas: &[Vma]) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let now = Told::by(remote)?.advised.within(vmas);
        let both = self.0.iter().chain(&now.0);
        let mut cuts: Vec<u64> = both
            .flat_map(|(range, _)| [range.start, range.end])
            .collect();
        cuts.sort_unstable();
        cuts.dedup();
        let calls: Vec<_> = cuts
            .windows(2)
            .flat_map(|part| {
                let changes = self.at(part[0]).changes(now.at(part[0]));
                changes.filter_map(|call| call.on(part[0], part[1] - part[0]))
            })
            .collect();
        for some in calls.chunks(AT_ONCE) {
            let mut batch = Batch::new();
            for (nr, args) in some {
                batch.call(*nr, args);
            }
            let ran = remote.run(&batch).map(drop);
            ran.during(
                remote.pid(),
                "asking again what it had asked for its memory",
            )?;
        }
        Ok(())
    }
}

impl Advice {
    /// The calls that make of memory with the advice `now` such with this.
    fn changes(self, now: Self) -> impl Iterator<Item = Call> {
        let of = |advice: u16| {
            let kinds = KINDS.iter().enumerate();
            kinds.filter_map(move |(bit, kind)| (advice & 1 << bit != 0).then_some(kind))
        };
        let take_back = of(now.0 & !self.0).map(|kind| kind.take_back);
        take_back.chain(of(self.0 & !now.0).map(|kind| kind.ask))
    }
}

impl Call {
    fn on(self, at: u64, len: u64) -> Option<(i64, [Arg; 3])> {
        let (at, len) = (Arg::from(at), Arg::from(len));
        match self {
            Self::Madvise(advice) => Some((libc::SYS_madvise, [at, len, advice.into()])),
            Self::Lock(flags) => Some((libc::SYS_mlock2, [at, len, flags.into()])),
            Self::Unlock => Some((libc::SYS_munlock, [at, len, 0.into()])),
            Self::None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_belong_to_the_range_above_them_and_names_are_no_lines() {
        let text = b"1000-3000 rw-p 00000000 00:00 0   /a\\012VmFlags: lo\n\
            Rss:  8 kB\nVmFlags: rd wr mr mw me dc dd ac \n\
            3000-4000 rw-p 00000000 00:00 0\nVmFlags: rd gd lo lf\n\
            5000-6000 r--p 00000000 00:00 0\nVmFlags: rd\n\
            7000-8000 rw-p 00000000 00:00 0\nVmFlags: gd\n\
            9000-a000 rw-p 00000000 00:00 0\nVmFlags: rd dp\n";
        let told = Told::parse(&text[..]).unwrap();
        assert_eq!(told.grow, [0x3000..0x4000, 0x7000..0x8000]);
        assert!(told.droppable.iter().eq(std::iter::once(&(0x9000..0xa000))));
        let parts = [
            (0x1000..0x3000, Advice(0b101)),
            (0x3000..0x4000, Advice(0b1000_0000)),
        ];
        assert_eq!(told.advised.0, parts);
        assert!(told.advised.locked().eq(std::iter::once(0x3000..0x4000)));
        assert_eq!(told.advised.at(0x2fff), Advice(0b101));
        assert_eq!(told.advised.at(0x4000), Advice::default());
        assert!(
            Told::parse(&b"VmFlags\nxyz-12 \n-\n\xff-1 "[..])
                .unwrap()
                .advised
                .is_empty()
        );
    }
}
