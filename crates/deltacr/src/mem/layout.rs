//! The bounds that the kernel keeps of an address space: `prctl(PR_SET_MM_MAP)`.

use std::io;

use rustix::fs::CWD;
use serde::{Deserialize, Serialize};

use crate::error::{During, Error, Result};
use crate::procfs::{self, StatText};
use crate::remote::{Batch, CallId, Remote};

/// Bounds of a process' address space, as `/proc/PID/stat` shows and `prctl(PR_SET_MM_MAP)` sets
/// them. All are addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The program's code.
    pub start_code: u64,
    /// Its end.
    pub end_code: u64,
    /// The program's data.
    pub start_data: u64,
    /// Its end.
    pub end_data: u64,
    /// Where the heap begins.
    pub start_brk: u64,
    /// The program break, where the heap ends.
    pub brk: u64,
    /// Where the stack began.
    pub start_stack: u64,
    /// The argument strings, shown as the command line.
    pub arg_start: u64,
    /// Their end.
    pub arg_end: u64,
    /// The environment strings.
    pub env_start: u64,
    /// Their end.
    pub env_end: u64,
}

impl Layout {
    /// The bounds that a `/proc/PID/stat` shows: all but the program break. `None` if it is not what the kernel writes.
    pub(crate) fn parse(stat: &StatText<'_>) -> Option<Self> {
        let field = |n| stat.number::<u64>(n);
        Some(Self {
            start_code: field(26)?,
            end_code: field(27)?,
            start_stack: field(28)?,
            start_data: field(45)?,
            end_data: field(46)?,
            start_brk: field(47)?,
            arg_start: field(48)?,
            arg_end: field(49)?,
            env_start: field(50)?,
            env_end: field(51)?,
            brk: 0,
        })
    }

    /// The bounds of a stopped process (`brk(2)` for the one that the kernel shows nowhere).
    ///
    /// # Errors
    /// The process could not be driven, or `/proc` not be read.
    pub fn of(remote: &mut Remote) -> Result<Self> {
        let (pid, host) = (remote.pid(), remote.host());
        let mut batch = Batch::new();
        let brk = batch.call(libc::SYS_brk, &[0.into()]);
        let outcome = remote.run(&batch);
        let brk = outcome
            .and_then(|o| o.result(brk))
            .during(pid, "reading the program break")?;
        let stat = procfs::read_file(CWD, &format!("/proc/{host}/stat"));
        let stat = stat.during(pid, "reading the stat file")?;
        let bounds = StatText::split(&stat).and_then(|stat| Self::parse(&stat));
        let bounds = bounds.ok_or_else(|| Error::Corrupt {
            pid,
            what: "its stat file has not the fields that the kernel documents".to_owned(),
        })?;
        Ok(Self { brk, ..bounds })
    }
}

/// Reads the auxiliary vector.
pub(crate) fn auxv(remote: &Remote) -> Result<Vec<u8>> {
    let vector = remote.proc_file("auxv");
    vector
        .and_then(|file| procfs::read_all(&file))
        .during(remote.pid(), "reading the auxiliary vector")
}

/// Sets the bounds and the auxiliary vector, and makes `program`, a descriptor of the process', which is closed, what
/// `/proc/PID/exe` leads to. Takes `CAP_CHECKPOINT_RESTORE` in the process' user namespace, and that nothing of the program that
/// it was is mapped any more.
pub(crate) fn write_program(
    remote: &mut Remote,
    layout: &Layout,
    auxv: &[u8],
    program: i32,
) -> io::Result<()> {
    let mut batch = Batch::new();
    let set = add_map(&mut batch, layout, Some(auxv), program as u32);
    batch.call(libc::SYS_close, &[program.into()]);
    remote.run(&batch)?.result(set).map(drop)
}

/// Sets the bounds; `auxv` too, if it is given.
pub(crate) fn write(remote: &mut Remote, layout: &Layout, auxv: Option<&[u8]>) -> Result<()> {
    let pid = remote.pid();
    // No change of the link to the executable, which would need a capability.
    let mut batch = Batch::new();
    let set = add_map(&mut batch, layout, auxv, u32::MAX);
    let set = remote
        .run(&batch)
        .and_then(|outcome| outcome.result(set).map(drop));
    set.during(pid, "setting the bounds of the address space")
}

/// `PR_SET_MM_MAP`; `exe` is a descriptor of the process', or `u32::MAX`.
fn add_map(batch: &mut Batch, layout: &Layout, auxv: Option<&[u8]>, exe: u32) -> CallId {
    let vector = batch.input(auxv.unwrap_or_default());
    let l = layout;
    let mut map: Vec<u8> = [
        l.start_code,
        l.end_code,
        l.start_data,
        l.end_data,
        l.start_brk,
        l.brk,
        l.start_stack,
        l.arg_start,
        l.arg_end,
        l.env_start,
        l.env_end,
        0,
    ]
    .iter()
    .flat_map(|field| field.to_le_bytes())
    .collect();
    map.extend((auxv.map_or(0, <[u8]>::len) as u32).to_le_bytes());
    map.extend(exe.to_le_bytes());
    let map = batch.input(&map);
    if auxv.is_some() {
        batch.link(map, &[(11 * 8, vector)]);
    }
    batch.call(
        libc::SYS_prctl,
        &[
            libc::PR_SET_MM.into(),
            libc::PR_SET_MM_MAP.into(),
            map.into(),
            map.len().into(),
            0.into(),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_process_name_does_not_shift_the_fields() {
        let mut stat = b"7 (a) R 1) S".to_vec();
        for n in 4..=52 {
            stat.extend(format!(" {n}").bytes());
        }
        let parse = |text: &[u8]| Layout::parse(&StatText::split(text)?);
        let layout = parse(&stat).unwrap();
        assert_eq!(layout.start_code, 26);
        assert_eq!(layout.env_end, 51);
        assert!(parse(b"7 (x) S 1 2").is_none());
        assert!(parse(b"").is_none());
    }
}
