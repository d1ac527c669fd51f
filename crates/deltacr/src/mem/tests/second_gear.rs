//! Checkpoints that are copied, and rollbacks that are given back, while the process runs.

use super::*;
use crate::mem::harvest::Written;
use crate::orphan::{Orphan, Purpose};
use crate::sys::pagemap::{Pagemap, category};

#[test]
fn a_checkpoint_in_second_gear_holds_what_was_when_it_was_taken() {
    let bench = Bench::low();
    let process = Process::sleeper();
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    let mut map = |bytes: u64| call(remote, libc::SYS_mmap, &[0, bytes, RW, ANON, NO_FD, 0]);
    let (plain, own, wiped) = (map(8 << 20), map(1 << 20), map(1 << 20));
    let (plain, own, wiped) = (plain.unwrap(), own.unwrap(), wiped.unwrap());
    let keep = |remote: &mut Remote, at, advice: i32| {
        call(remote, libc::SYS_madvise, &[at, 1 << 20, advice as u64]).unwrap();
    };
    keep(remote, own, libc::MADV_DONTFORK);
    keep(remote, wiped, libc::MADV_WIPEONFORK);
    let fill = |remote: &Remote, byte: u8| {
        let pages: Vec<u8> = (0..2048_u64)
            .flat_map(|page| [(page % 100) as u8 + byte; 4096])
            .collect();
        remote.write(plain, &pages).unwrap();
        remote.write(own, &vec![byte; 1 << 20]).unwrap();
        remote.write(wiped, &vec![byte + 1; 1 << 20]).unwrap();
    };
    fill(remote, 1);
    let layout = Layout::of(remote).unwrap();
    let scan = bench.memory().scan(remote, None, layout).unwrap();
    let mut tracker = None;
    let captured = bench.memory().capture(remote, &mut tracker, scan, None);
    let (state, work) = captured.unwrap();
    assert!(work.unread.is_some());
    let inside = |runs: &[Written], at: u64| runs.iter().any(|r| r.pages.contains(&(at / 4096)));
    assert!(inside(&work.read.0, own) && inside(&work.read.0, wiped));
    assert!(!inside(&work.read.0, plain));
    fill(remote, 77);
    work.run();
    let pages = state.pages.get().unwrap();
    for page in 0..2048 {
        let expected = [(page % 100) as u8 + 1; 4096];
        assert_eq!(pages.get(plain / 4096 + page), Some(&expected), "{page}");
    }
    assert_eq!(pages.get(own / 4096 + 3), Some(&[1; 4096]));
    assert_eq!(pages.get(wiped / 4096 + 3), Some(&[2; 4096]));
    let kept = state.pages.kept().unwrap();
    // A hundred contents are there, the first two of them in what is kept from children as well.
    assert!(kept.repeated >= 2048 - 100 + 512, "{kept:?}");
    let scan = bench
        .memory()
        .scan(remote, tracker.as_ref(), layout)
        .unwrap();
    assert!(scan.changed_pages() >= 2048 + 512);
    stopped.release().unwrap();
}

#[test]
fn what_a_snapshot_spares_is_forked_to_children_as_before() {
    let bench = Bench::low();
    let process = Process::sleeper();
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    const LEN: u64 = 16 << 20;
    let mut map = || call(remote, libc::SYS_mmap, &[0, LEN, RW, ANON, NO_FD, 0]).unwrap();
    let grounds = [map(), map(), map()];
    // The last is the program's own secret.
    let args = [grounds[2], LEN, libc::MADV_DONTFORK as u64];
    call(remote, libc::SYS_madvise, &args).unwrap();
    for ground in grounds {
        remote.write(ground, &vec![3; LEN as usize]).unwrap();
    }
    let mut tracker = None;
    bench.capture(remote, &mut tracker);
    // A page in the middle of the first.
    remote.write(grounds[0] + LEN / 2, &[4]).unwrap();
    let maps = || fs::read_to_string(format!("/proc/{}/smaps", process.host())).unwrap();
    let before = kept_from_children(&maps());
    assert!(
        before.len() == 1 && before[0].start == grounds[2],
        "{before:x?}"
    );
    let lines = maps().lines().count();

    let layout = Layout::of(remote).unwrap();
    let scan = bench
        .memory()
        .scan(remote, tracker.as_ref(), layout)
        .unwrap();
    let captured = bench.memory().capture(remote, &mut tracker, scan, None);
    let (_, mut work) = captured.unwrap();
    let (_, snapshot) = work.unread.as_mut().unwrap();
    let mut shared = Vec::new();
    let scanned = snapshot
        .maps()
        .1
        .scan(0..(1 << 47) - 4096, category::PRESENT, 0, &mut shared);
    scanned.unwrap();
    let shared: u64 = shared.iter().map(|run| run.end - run.start).sum();
    assert!(shared < 4 << 20, "{shared} bytes are in the snapshot");
    work.run();
    assert_eq!(kept_from_children(&maps()), before);
    assert_eq!(maps().lines().count(), lines, "mappings stay cut");
    stopped.release().unwrap();
}

/// 16 MiB of a process, each page of which holds its number and the number of a content.
struct Ground {
    start: u64,
    contents: [Vec<u8>; 2],
}

impl Ground {
    const PAGES: u64 = 4096;

    fn new(remote: &mut Remote) -> Self {
        let args = [0, Self::PAGES * 4096, RW, ANON, NO_FD, 0];
        let start = call(remote, libc::SYS_mmap, &args).unwrap();
        let contents = [1, 2].map(|number: u64| {
            let mut bytes = vec![0; Self::PAGES as usize * 4096];
            for (page, bytes) in bytes.chunks_mut(4096).enumerate() {
                bytes[..8].copy_from_slice(&(page as u64).to_le_bytes());
                bytes[8..16].copy_from_slice(&number.to_le_bytes());
                bytes[16..].fill(page as u8);
            }
            bytes
        });
        Self { start, contents }
    }

    fn at(&self, page: u64) -> u64 {
        self.start + page * 4096
    }

    fn fill(&self, remote: &Remote, number: usize) {
        remote
            .write(self.start, &self.contents[number - 1])
            .unwrap();
    }

    /// Whether all of it has a content.
    fn is(&self, host: HostPid, number: usize) -> bool {
        let mut bytes = vec![0; Self::PAGES as usize * 4096];
        crate::sys::process::read_memory(host, self.start, &mut bytes).unwrap();
        bytes == self.contents[number - 1]
    }
}

/// A stopped process with a ground that has the first content.
fn with_a_ground() -> (Process, Stopped, Ground) {
    let process = Process::sleeper();
    let mut stopped = process.seize();
    let ground = Ground::new(&mut stopped.remote);
    ground.fill(&stopped.remote, 1);
    (process, stopped, ground)
}

/// The first numbers of a page. Read by a system call on the process, which waits for pages as any of its own would.
fn page_of(host: HostPid, at: u64) -> [u64; 2] {
    let mut bytes = [0; 16];
    crate::sys::process::read_memory(host, at, &mut bytes).unwrap();
    [0, 8].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()))
}

#[test]
fn memory_that_is_given_back_later_is_right_whatever_touches_it_first() {
    let bench = Bench::low();
    let (process, mut stopped, ground) = with_a_ground();
    let host = process.host();
    let remote = &mut stopped.remote;
    let mut tracker = None;
    let first = bench.capture(remote, &mut tracker);
    let maps = || fs::read_to_string(format!("/proc/{host}/maps")).unwrap();
    let before = maps();
    for round in 0..8_u64 {
        ground.fill(remote, 2);
        bench.begin_restore(remote, &mut tracker, &first);
        assert!(tracker.as_ref().unwrap().is_lazy());
        let some = |n: u64| (round * 911 + n * 1237) % Ground::PAGES;
        // The kernel reads it for the program,
        let mut batch = Batch::new();
        let pipe = batch.output(8);
        batch.must(libc::SYS_pipe2, &[pipe.into(), 0.into()]);
        let (out, into) = (Arg::Int(pipe.at(0, 4)), Arg::Int(pipe.at(4, 4)));
        let from = ground.at(some(0)).into();
        let wrote = batch.must(libc::SYS_write, &[into, from, 16.into()]);
        // writes to it,
        let to = ground.at(some(1)) + 16;
        let read = batch.must(libc::SYS_read, &[out, to.into(), 16.into()]);
        // and looks for who waits there.
        let wake = [ground.at(some(2)).into(), 1.into(), 1.into()];
        let woken = batch.must(libc::SYS_futex, &wake);
        batch.call(libc::SYS_close, &[out]);
        batch.call(libc::SYS_close, &[into]);
        let outcome = remote.run(&batch).unwrap();
        assert_eq!(outcome.result(wrote).unwrap(), 16);
        assert_eq!(outcome.result(read).unwrap(), 16);
        assert_eq!(outcome.result(woken).unwrap(), 0);
        assert_eq!(page_of(host, to), [some(0), 1]);
        for n in 3..40 {
            assert_eq!(page_of(host, ground.at(some(n))), [some(n), 1]);
        }
        bench.restore(remote, &mut tracker, &first);
        assert!(ground.is(host, 1));
        assert_eq!(maps(), before, "no mapping of the engine's is left");
    }
    stopped.release().unwrap();
}

#[test]
fn before_a_process_runs_on_it_is_given_only_what_is_waited_for() {
    let bench = Bench::low();
    let (process, mut stopped, ground) = with_a_ground();
    let host = process.host();
    let remote = &mut stopped.remote;
    let mut tracker = None;
    let first = bench.capture(remote, &mut tracker);
    ground.fill(remote, 2);
    let scan = bench.scan(remote, &mut tracker);
    let memory = bench.memory();
    let begun = memory.restore(remote, &mut tracker, scan, &first, &[]);
    begun.unwrap();
    let tracker = tracker.as_mut().unwrap();
    assert!(tracker.is_lazy());
    let mut pagemap = Pagemap::open(host).unwrap();
    let mut there = || {
        let mut found = Vec::new();
        let range = ground.start..ground.at(Ground::PAGES);
        let scanned = pagemap.scan(range, category::PRESENT, 0, &mut found);
        scanned.unwrap();
        let lengths = found.iter().map(|run| run.end - run.start);
        lengths.sum::<u64>() / 4096
    };
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(there(), 0);
    assert_eq!(page_of(host, ground.at(1000)), [1000, 1]);
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert!((1..=64).contains(&there()), "{} pages", there());
    // The old pages are there still: who drops them waits as well.
    assert_eq!(bench.orphans.count(), 1);
    tracker.run_on();
    while there() < Ground::PAGES {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    tracker.finish();
    assert_eq!(bench.orphans.count(), 0);
    tracker.end_lazy(remote).unwrap();
    assert!(ground.is(host, 1));
    stopped.release().unwrap();
}

#[test]
fn what_is_touched_after_a_rollback_is_noted_for_the_next_one() {
    let bench = Bench::low();
    let (process, mut stopped, ground) = with_a_ground();
    let host = process.host();
    let remote = &mut stopped.remote;
    let mut tracker = None;
    let first = bench.capture(remote, &mut tracker);
    assert!(first.pages.touched().order().is_empty());
    let last = ground.start / 4096 + Ground::PAGES - 1;
    // It may have been given back before it was touched, though what is last comes last.
    let noted = (0..50).any(|_| {
        ground.fill(remote, 2);
        bench.begin_restore(remote, &mut tracker, &first);
        assert_eq!(page_of(host, ground.at(Ground::PAGES - 1))[1], 1);
        bench.restore(remote, &mut tracker, &first);
        assert!(ground.is(host, 1));
        let order = first.pages.touched().order();
        order.iter().any(|page| page / 64 == last / 64)
    });
    assert!(noted);
    stopped.release().unwrap();
}

#[test]
fn a_process_that_is_made_anew_gets_its_memory_while_it_runs() {
    let bench = Bench::low();
    let (old, new) = (Process::sleeper(), Process::sleeper());
    bench.host.learn(old.host());
    let mut stopped = old.seize();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let ground = Ground::new(remote);
    ground.fill(remote, 1);
    let target = bench.capture(remote, &mut None);
    let before = dump(remote);
    let (mut reborn, mut tracker) = (new.seize(), None);
    let remote = &mut reborn.remote;
    forget_rseq(remote);
    bench.begin_restore(remote, &mut tracker, &target);
    assert!(tracker.as_ref().unwrap().is_lazy());
    assert_eq!(bench.orphans.count(), 0, "there is nothing to be swept");
    for page in (0..Ground::PAGES).step_by(731) {
        assert_eq!(page_of(new.host(), ground.at(page)), [page, 1]);
    }
    tracker.as_mut().unwrap().finish();
    tracker.as_mut().unwrap().end_lazy(remote).unwrap();
    assert_same(&before, &dump(remote));
    // Pages that were given back count as written, and are as they were.
    let again = bench.capture(remote, &mut tracker);
    assert_eq!(again.pages.kept().unwrap().stored, 0);
    let scan = bench.scan(remote, &mut tracker);
    assert_eq!(scan.changed_pages(), 0, "{:x?}", scan.changes);
    stopped.release().unwrap();
    // The new one cannot run on: its registers are those of another place.
    drop((new, reborn));
}

#[test]
fn a_process_may_move_drop_and_unmap_memory_that_is_still_to_come_back() {
    let bench = Bench::low();
    let (process, mut stopped, ground) = with_a_ground();
    let host = process.host();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let mut tracker = None;
    let first = bench.capture(remote, &mut tracker);
    let before = dump(remote);
    const PART: u64 = 500;
    for round in 0..8 {
        ground.fill(remote, 2);
        bench.begin_restore(remote, &mut tracker, &first);
        // Not the first ones, which are given back first.
        let [moved, dropped, gone, mapped] = [3400, 2000, 2600, 1400];
        let len = PART * 4096;
        let elsewhere = call(remote, libc::SYS_mmap, &[0, len, RW, ANON, NO_FD, 0]).unwrap();
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let args = [ground.at(moved), len, len, flags, elsewhere];
        call(remote, libc::SYS_mremap, &args).unwrap();
        let args = [ground.at(dropped), len, libc::MADV_DONTNEED as u64];
        call(remote, libc::SYS_madvise, &args).unwrap();
        call(remote, libc::SYS_munmap, &[ground.at(gone), len]).unwrap();
        let fixed = ANON | libc::MAP_FIXED as u64;
        let args = [ground.at(mapped), len, RW, fixed, NO_FD, 0];
        call(remote, libc::SYS_mmap, &args).unwrap();
        // A child has all that its parent has, and what is still to come.
        let mut wait = Batch::new();
        wait.call(libc::SYS_pause, &[]);
        let purpose = Purpose {
            share: 0,
            calls: &wait,
            place: None,
        };
        let child = Orphan::make(remote, &bench.host, &bench.orphans, &purpose).unwrap();
        for host in [host, child.host()] {
            for page in (0..PART).step_by(7 + round) {
                let zero = [0, 0];
                let at = |first| page_of(host, ground.at(first + page));
                assert_eq!(page_of(host, elsewhere + page * 4096), [moved + page, 1]);
                assert_eq!(at(dropped), zero);
                assert_eq!(at(mapped), zero);
                assert_eq!(at(900), [900 + page, 1]);
            }
        }
        drop(child);
        if round % 2 == 0 {
            let now = bench.capture(remote, &mut tracker);
            let pages = now.pages.get().unwrap();
            let held = |at: u64| pages.get(at / 4096).map(|bytes| bytes[..4].to_vec());
            for page in 0..PART {
                let number = |n: u64| Some((n as u32).to_le_bytes().to_vec());
                assert_eq!(held(elsewhere + page * 4096), number(moved + page));
                assert_eq!(held(ground.at(dropped + page)), None);
                assert_eq!(held(ground.at(gone + page)), None);
                assert_eq!(held(ground.at(900 + page)), number(900 + page));
            }
        }
        bench.restore(remote, &mut tracker, &first);
        assert_same(&before, &dump(remote));
    }
    stopped.release().unwrap();
}

#[test]
fn a_process_that_ends_or_runs_another_program_needs_no_memory_back() {
    let bench = Bench::low();
    let (process, mut stopped, ground) = with_a_ground();
    let remote = &mut stopped.remote;
    let mut tracker = None;
    let first = bench.capture(remote, &mut tracker);
    ground.fill(remote, 2);
    bench.begin_restore(remote, &mut tracker, &first);
    let program = File::open("/usr/bin/sleep").unwrap();
    crate::birth::spawn::execute(remote, program.as_fd(), None).unwrap();
    // Its old memory is gone, and with it all that was to be given back to it.
    let mut tracker = tracker.unwrap();
    tracker.finish();
    let before = fs::read_to_string(format!("/proc/{}/maps", process.host())).unwrap();
    tracker.end_lazy(remote).unwrap();
    let after = fs::read_to_string(format!("/proc/{}/maps", process.host())).unwrap();
    assert_eq!(before, after);
    drop((stopped, process));

    let (process, mut stopped, ground) = with_a_ground();
    let remote = &mut stopped.remote;
    let mut tracker = None;
    let first = bench.capture(remote, &mut tracker);
    ground.fill(remote, 2);
    bench.begin_restore(remote, &mut tracker, &first);
    drop((stopped, process));
    tracker.unwrap().finish();
}

/// The writable mappings with `MADV_DONTFORK`.
fn kept_from_children(smaps: &str) -> Vec<Range<u64>> {
    let mut found = Vec::new();
    let mut mapping = 0..0;
    for line in smaps.lines() {
        let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
        let address = |text| u64::from_str_radix(text, 16);
        if let Some((start, end)) = first.split_once('-') {
            mapping = address(start).unwrap()..address(end).unwrap();
        } else if first == "VmFlags:" && ["dc", "wr"].iter().all(|flag| rest.contains(flag)) {
            found.push(mapping.clone());
        }
    }
    found
}

#[test]
fn no_process_is_left_of_a_snapshot_that_is_being_read() {
    let bench = Bench::low();
    let (process, mut stopped, ground) = with_a_ground();
    let remote = &mut stopped.remote;
    let layout = Layout::of(remote).unwrap();
    let scan = bench.memory().scan(remote, None, layout).unwrap();
    let mut tracker = None;
    let (state, work) = bench
        .memory()
        .capture(remote, &mut tracker, scan, None)
        .unwrap();
    assert!(work.unread.is_some());
    assert_eq!(process.children(), "");
    assert_eq!(bench.orphans.count(), 0);
    ground.fill(remote, 2);
    // The end of the original is not that of its snapshot.
    drop((stopped, process));
    work.run();
    let pages = state.pages.get().unwrap();
    for (page, bytes) in ground.contents[0].chunks(4096).enumerate() {
        let got = pages.get(ground.start / 4096 + page as u64);
        assert_eq!(got.map(|page| &page[..]), Some(bytes), "{page}");
    }
}
