//! Captures and restores of real processes, whose memory is read back and compared.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{AddressSpace, Gears, Layout, Memory, Scan, SharedObjects, Tracker};
use crate::env::{Environment, ExternalId, Namespace};
use crate::ids::{HostPid, InnerPid};
use crate::orphan::Orphans;
use crate::remote::{Arg, Batch, Remote};
use crate::stop::Stopped;
use crate::store::PageStore;
use crate::sys::ptrace;

mod ahead;
mod lab;
mod second_gear;

use lab::{ANON, Bench, NO_FD, Process, RW, assert_same, await_in, call, dump, forget_rseq};

/// A number generator that gives the same row on every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// Pages of the playground that the random steps play in.
const PLAYGROUND: u64 = 600;

/// Changes something in the playground.
fn random_step(remote: &mut Remote, dice: &mut Dice, ground: u64, file: u64) {
    let page = dice.roll(PLAYGROUND - 50);
    let len = 1 + dice.roll(50);
    let (at, bytes) = (ground + page * 4096, len * 4096);
    let fixed = ANON | libc::MAP_FIXED as u64;
    let prots = [0, 1, RW, RW, RW, 5];
    let prot = prots[dice.roll(prots.len() as u64) as usize];
    // Many steps fail because something else is mapped there; that too is as in real life.
    let _ = match dice.roll(14) {
        0..=5 => {
            for _ in 0..dice.roll(30) {
                let page = ground + 4096 * dice.roll(PLAYGROUND);
                let byte = dice.roll(256) as u8;
                let _ = remote.write(page + dice.roll(4000), &[byte; 64]);
            }
            Ok(0)
        }
        6 => call(remote, libc::SYS_mmap, &[at, bytes, prot, fixed, NO_FD, 0]),
        7 => call(remote, libc::SYS_munmap, &[at, bytes / 2]),
        8 => call(remote, libc::SYS_mprotect, &[at, bytes, prot]),
        9 => call(
            remote,
            libc::SYS_madvise,
            &[at, bytes, libc::MADV_DONTNEED as u64],
        ),
        10 => {
            let to = ground + 4096 * dice.roll(PLAYGROUND - 50);
            let flags = (libc::MREMAP_FIXED | libc::MREMAP_MAYMOVE) as u64;
            call(
                remote,
                libc::SYS_mremap,
                &[at, 4096 * 3, 4096 * 5, flags, to],
            )
        }
        11 => {
            let flags = (libc::MAP_PRIVATE | libc::MAP_FIXED) as u64;
            let offset = 4096 * dice.roll(50);
            call(
                remote,
                libc::SYS_mmap,
                &[at, bytes, prot, flags, file, offset],
            )
        }
        12 => {
            let now = Layout::of(remote).unwrap().brk;
            let new = (now - dice.roll(9000)).max(now & !0xf_ffff) + dice.roll(20_000);
            let got = call(remote, libc::SYS_brk, &[new]);
            let _ = remote.write(new.saturating_sub(100), &[7; 50]);
            got
        }
        _ => call(remote, libc::SYS_madvise, &[at, 8192, 102 + dice.roll(2)]),
    };
}

#[test]
fn random_changes_are_undone_to_any_earlier_state() {
    undo_random_changes(&Bench::new(), false);
}

#[test]
fn random_changes_are_undone_to_any_earlier_state_read_from_snapshots() {
    undo_random_changes(&Bench::low(), false);
}

#[test]
fn random_changes_are_undone_to_any_earlier_state_that_was_looked_at_ahead() {
    undo_random_changes(&Bench::new(), true);
    undo_random_changes(&Bench::low(), true);
}

/// `ahead`: between the changes, something is done for the next capture, which may never come.
fn undo_random_changes(bench: &Bench, ahead: bool) {
    let process = Process::sleeper();
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mapped");
    let pattern: Vec<u8> = (0..100 * 4096_u32).map(|i| (i / 4096 + i) as u8).collect();
    fs::write(&path, pattern).unwrap();
    let file = File::open(&path).unwrap();
    let fd = remote.give_fds(&[file.as_fd()]).unwrap()[0] as u64;
    bench.host.learn(process.host());
    bench
        .host
        .paths
        .lock()
        .insert(file.metadata().unwrap().ino(), path.clone());

    let ground = call(
        remote,
        libc::SYS_mmap,
        &[0, PLAYGROUND * 4096, RW, ANON, NO_FD, 0],
    )
    .unwrap();
    let mut dice = Dice(0x1234_5678_9abc_def1);
    let mut tracker = None;
    let mut states = vec![(bench.capture(remote, &mut tracker), dump(remote))];
    for round in 0..120 {
        for _ in 0..dice.roll(12) {
            random_step(remote, &mut dice, ground, fd);
            if ahead && dice.roll(4) == 0 {
                bench.look_ahead(remote, &mut tracker);
            }
        }
        if dice.roll(3) == 0 {
            // What a fork's child or a new program starts with: nothing is known.
            tracker = if dice.roll(4) == 0 { None } else { tracker };
            let before = dump(remote);
            states.push((bench.capture(remote, &mut tracker), before));
        } else {
            let which = dice.roll(states.len() as u64) as usize;
            let (target, before) = &states[which];
            bench.restore(remote, &mut tracker, target);
            let after = dump(remote);
            println!("round {round}: state {which}");
            assert_same(before, &after);
        }
    }
    drop((states, tracker));
    assert_eq!(bench.store.pages(), 0);
    stopped.release().unwrap();
}

#[test]
fn a_new_process_of_the_same_program_becomes_the_old_one() {
    let bench = Bench::new();
    let (old, new) = (Process::sleeper(), Process::sleeper());
    bench.host.learn(old.host());
    let mut stopped = old.seize();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let ground = call(remote, libc::SYS_mmap, &[0, 1 << 20, RW, ANON, NO_FD, 0]).unwrap();
    remote.write(ground + 5000, b"hello").unwrap();
    let reserve = ANON | libc::MAP_NORESERVE as u64;
    call(remote, libc::SYS_mmap, &[0, 64 << 30, 0, reserve, NO_FD, 0]).unwrap();
    let (mut first, mut second) = (None, None);
    let target = bench.capture(remote, &mut first);
    let before = dump(remote);
    let mut reborn = new.seize();
    forget_rseq(&mut reborn.remote);
    bench.restore(&mut reborn.remote, &mut second, &target);
    assert_same(&before, &dump(&mut reborn.remote));
    // And it is tracked from then on.
    let layout = Layout::of(&mut reborn.remote).unwrap();
    let scan = bench
        .memory()
        .scan(&reborn.remote, second.as_ref(), layout)
        .unwrap();
    assert_eq!(scan.changed_pages(), 0, "{:x?}", scan.changes);
    stopped.release().unwrap();
    // The new one cannot run on: its registers are those of another place.
    drop((new, reborn));
}

#[test]
fn a_state_costs_what_was_written_since_the_one_before() {
    let bench = Bench::new();
    let process = Process::sleeper();
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let ground = call(remote, libc::SYS_mmap, &[0, 8 << 20, RW, ANON, NO_FD, 0]).unwrap();
    let pages = (0..2048_u32).flat_map(|page| page.to_le_bytes().repeat(1024));
    remote.write(ground, &pages.collect::<Vec<_>>()).unwrap();
    let mut tracker = None;
    let first = bench.capture(remote, &mut tracker);
    let full = bench.store.pages();
    assert!(full >= 2048);
    remote.write(ground + 4096 * 7, &[2; 10]).unwrap();
    remote
        .write(ground + 4096 * 9, &9_u32.to_le_bytes())
        .unwrap();
    let layout = Layout::of(remote).unwrap();
    let scan = bench
        .memory()
        .scan(remote, tracker.as_ref(), layout)
        .unwrap();
    let here = |r: &Range<u64>| (ground..ground + (8 << 20)).contains(&r.start);
    let changed = scan.changes.iter().filter(|(r, _)| here(r));
    assert_eq!(changed.count(), 2);
    let second = bench.capture_like(remote, &mut tracker, scan, None);
    assert_eq!(
        bench.store.pages(),
        full + 1,
        "a page with its old contents is not stored"
    );
    // Without a tracker all is read again, but nothing is stored twice.
    let scan = bench.memory().scan(remote, None, layout).unwrap();
    assert!(scan.changed_pages() >= 2048);
    let mut other = None;
    let third = bench.capture_like(remote, &mut other, scan, Some(&second));
    assert_eq!(bench.store.pages(), full + 1);
    let pages = |state: &AddressSpace| state.pages.get().unwrap().clone();
    assert_eq!(pages(&third), pages(&second));
    assert_ne!(pages(&first), pages(&second));
    stopped.release().unwrap();
}

#[test]
fn what_is_written_after_a_moved_mapping_joined_another_is_noticed() {
    let bench = Bench::new();
    let process = Process::sleeper();
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    const PAGES: u64 = 100;
    let map = |remote: &mut Remote| {
        let args = [0, PAGES * 4096, RW, ANON, NO_FD, 0];
        call(remote, libc::SYS_mmap, &args).unwrap()
    };
    let (ground, elsewhere) = (map(remote), map(remote));
    remote
        .write(ground, &vec![1; PAGES as usize * 4096])
        .unwrap();
    let mut tracker = None;
    bench.capture(remote, &mut tracker);
    let part = ground + 40 * 4096;
    for ahead in [false, true] {
        // A part goes away, is tracked where it is, and comes back: then the whole is one mapping again.
        for (from, to) in [(part, elsewhere), (elsewhere, part)] {
            let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
            let args = [from, 20 * 4096, 20 * 4096, flags, to];
            call(remote, libc::SYS_mremap, &args).unwrap();
            if from == part {
                bench.capture(remote, &mut tracker);
            }
        }
        for byte in 2..6 {
            remote.write(ground, &[byte; 50]).unwrap();
            if ahead {
                bench.look_ahead(remote, &mut tracker);
            }
            let state = bench.capture(remote, &mut tracker);
            let held = state.pages.get().unwrap().get(ground / 4096).unwrap();
            assert_eq!(held[..50], [byte; 50], "{ahead}");
        }
    }
    stopped.release().unwrap();
}

#[test]
fn guard_pages_in_a_mapping_of_a_file_are_given_back() {
    let mut bench = Bench::new();
    bench.gears.protect = 1;
    let process = Process::sleeper();
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let file = tempfile::NamedTempFile::new_in("/tmp").unwrap();
    fs::write(&file, [7; 8 * 4096]).unwrap();
    let fd = remote.give_fds(&[file.as_file().as_fd()]).unwrap()[0] as u64;
    let paths = [(file.as_file().metadata().unwrap().ino(), file.path().into())];
    bench.host.paths.lock().extend(paths);
    bench.host.learn(process.host());
    for flags in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
        let args = [0, 8 * 4096, RW, flags as u64, fd, 0];
        let ground = call(remote, libc::SYS_mmap, &args).unwrap();
        let guards = |remote: &mut Remote, advice: u64| {
            call(remote, libc::SYS_madvise, &[ground, 2 * 4096, advice])
        };
        if guards(remote, 102).is_err() {
            // Before Linux 6.15.
            break;
        }
        let mut tracker = None;
        let [(with, before), again] =
            [(); 2].map(|()| (bench.capture(remote, &mut tracker), dump(remote)));
        assert_eq!(with.guards, again.0.guards, "looked at once more");
        guards(remote, 103).unwrap();
        // Reads them all, and marks what it has read.
        assert!(dump(remote) != before);
        remote.write(ground, &[8; 4096]).unwrap();
        let without = (bench.capture(remote, &mut tracker), dump(remote));
        for (state, before) in [&(with, before), &without, &again] {
            bench.restore(remote, &mut tracker, state);
            assert_same(before, &dump(remote));
        }
        call(remote, libc::SYS_munmap, &[ground, 8 * 4096]).unwrap();
    }
    stopped.release().unwrap();
}

#[test]
fn shared_memory_goes_back_with_the_processes_that_map_it() {
    let bench = Bench::new();
    let process = Process::sleeper();
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
    let ground = call(remote, libc::SYS_mmap, &[0, 1 << 20, RW, flags, NO_FD, 0]).unwrap();
    remote.write(ground + 5000, b"hello").unwrap();
    let mut tracker = None;
    let target = bench.capture(remote, &mut tracker);
    let shared = bench.shared.take();
    assert_eq!(shared.objects.len(), 1);
    let before = dump(remote);

    remote.write(ground + 5000, b"later").unwrap();
    bench.shared.restore(&shared).unwrap();
    bench.restore(remote, &mut tracker, &target);
    assert_same(&before, &dump(remote));

    call(remote, libc::SYS_munmap, &[ground, 1 << 20]).unwrap();
    bench.shared.restore(&shared).unwrap();
    bench.restore(remote, &mut tracker, &target);
    assert_same(&before, &dump(remote));
    stopped.release().unwrap();
}

const PYTHON: &str = r#"
import sys, hashlib
state = {i: [str(i) * 20, {'n': i}] for i in range(20000)}
print(hashlib.md5(repr(state).encode()).hexdigest(), flush=True)
for line in sys.stdin:
    command = line.strip()
    if command == 'mutate':
        for i in range(0, 20000, 7):
            state[i] = [bytes(1000), i]
        for i in range(1, 20000, 3):
            state.pop(i, None)
        nested = []
        for i in range(900):
            nested = [nested]
        repr(nested)  # grows the stack
    print(hashlib.md5(repr(state).encode()).hexdigest(), flush=True)
"#;

#[test]
fn a_python_interpreter_finds_its_objects_as_they_were() {
    let bench = Bench::new();
    let mut process = Process(
        Command::new("python3")
            .args(["-c", PYTHON])
            .env("PYTHONHASHSEED", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 runs"),
    );
    let mut input = process.0.stdin.take().unwrap();
    let mut output = BufReader::new(process.0.stdout.take().unwrap());
    let mut answer = || {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        line
    };
    let first = answer();
    bench.host.learn(process.host());
    let mut ask = |command: &str| {
        writeln!(input, "{command}").unwrap();
        answer()
    };
    assert_eq!(ask("check"), first);
    await_in(process.host(), "pipe_read");
    let mut stopped = process.seize();
    let mut tracker = None;
    let target = bench.capture(&mut stopped.remote, &mut tracker);
    let regs = stopped.threads[0].regs;
    stopped.release().unwrap();
    for _ in 0..3 {
        assert_eq!(ask("check"), first);
        assert_ne!(ask("mutate"), first);
        await_in(process.host(), "pipe_read");
        let mut stopped = process.seize();
        bench.restore(&mut stopped.remote, &mut tracker, &target);
        stopped.threads[0].regs = regs;
        stopped.release().unwrap();
    }
    assert_eq!(ask("check"), first);
}

#[test]
fn a_process_that_ran_another_program_is_captured_whole_and_tracked_again() {
    let bench = Bench::new();
    let mut process = Process(
        Command::new("bash")
            .args(["-c", "read x; exec sleep 1000"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    await_in(process.host(), "pipe_read");
    bench.host.learn(process.host());
    let mut tracker = None;
    let mut stopped = process.seize();
    bench.capture(&mut stopped.remote, &mut tracker);
    stopped.release().unwrap();
    writeln!(process.0.stdin.take().unwrap(), "go").unwrap();
    await_in(process.host(), "nanosleep");
    bench.host.learn(process.host());
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    let state = bench.capture(remote, &mut tracker);
    let program = state.executable().unwrap();
    assert!(program.path.ends_with("/sleep"), "{program:?}");
    let layout = Layout::of(remote).unwrap();
    let scan = bench
        .memory()
        .scan(remote, tracker.as_ref(), layout)
        .unwrap();
    assert!(scan.changed_pages() < 5, "{:x?}", scan.changes);
    stopped.release().unwrap();
}
