//! Checkpoints for which something was done before the process stood still.

use super::*;

/// 4 MiB of a process, each page of which holds a byte.
struct Field(u64);

impl Field {
    const PAGES: u64 = 1024;
    const LEN: u64 = Self::PAGES * 4096;

    fn new(remote: &mut Remote) -> Self {
        let field =
            Self(call(remote, libc::SYS_mmap, &[0, Self::LEN, RW, ANON, NO_FD, 0]).unwrap());
        field.fill(remote, 0..Self::PAGES, 1);
        field
    }

    fn at(&self, page: u64) -> u64 {
        self.0 + page * 4096
    }

    fn fill(&self, remote: &Remote, pages: Range<u64>, byte: u8) {
        let bytes = vec![byte; (pages.end - pages.start) as usize * 4096];
        remote.write(self.at(pages.start), &bytes).unwrap();
    }
}

/// The bench, and a stopped process whose field is known and was written again since.
fn with_a_field(bench: &Bench) -> (Process, Stopped, Field, Option<Tracker>) {
    let process = Process::sleeper();
    bench.host.learn(process.host());
    let mut stopped = process.seize();
    let remote = &mut stopped.remote;
    forget_rseq(remote);
    let field = Field::new(remote);
    let mut tracker = None;
    bench.capture(remote, &mut tracker);
    field.fill(remote, 0..Field::PAGES, 2);
    (process, stopped, field, tracker)
}

/// Captures, spoils the field, and takes the process back: it must be as it was.
fn is_captured_as_it_is(
    bench: &Bench,
    remote: &mut Remote,
    tracker: &mut Option<Tracker>,
    field: &Field,
) {
    let before = dump(remote);
    let state = bench.capture(remote, tracker);
    let args = [
        field.0,
        Field::LEN,
        RW,
        ANON | libc::MAP_FIXED as u64,
        NO_FD,
        0,
    ];
    call(remote, libc::SYS_mmap, &args).unwrap();
    field.fill(remote, 0..Field::PAGES, 99);
    bench.restore(remote, tracker, &state);
    assert_same(&before, &dump(remote));
}

#[test]
fn what_was_copied_ahead_is_not_read_in_the_stop() {
    let bench = Bench::low();
    let (_process, mut stopped, field, mut tracker) = with_a_field(&bench);
    let remote = &mut stopped.remote;
    bench.look_ahead(remote, &mut tracker);
    // Some of it is written once more.
    field.fill(remote, 100..110, 3);
    let scan = bench.scan(remote, &mut tracker);
    assert!(scan.changed_pages() >= Field::PAGES);
    let captured = bench.memory().capture(remote, &mut tracker, scan, None);
    let (state, work) = captured.unwrap();
    let pages = |runs: &[Range<u64>]| runs.iter().map(|run| run.end - run.start).sum::<u64>();
    let copied = pages(&work.copied.0);
    // The low gear leaves one page to the stop, and the process has written some others.
    assert!(
        (Field::PAGES - 11..Field::PAGES + 50).contains(&copied),
        "{copied}"
    );
    work.run();
    let held = state.pages.get().unwrap();
    for page in 0..Field::PAGES {
        let byte = if (100..110).contains(&page) { 3 } else { 2 };
        assert_eq!(
            held.get(field.at(page) / 4096),
            Some(&[byte; 4096]),
            "{page}"
        );
    }
    // And it is as if it had been captured without.
    let scan = bench.scan(remote, &mut tracker);
    assert_eq!(scan.changed_pages(), 0, "{:x?}", scan.changes);
    stopped.release().unwrap();
}

#[test]
fn whatever_becomes_of_memory_that_was_copied_ahead_it_is_captured_as_it_is() {
    let bench = Bench::low();
    let (process, mut stopped, field, mut tracker) = with_a_field(&bench);
    let host = process.host();
    for round in 0..4 {
        let remote = &mut stopped.remote;
        field.fill(remote, 0..Field::PAGES, 10 + round);
        bench.look_ahead(remote, &mut tracker);
        const PART: u64 = 40;
        let len = PART * 4096;
        let fixed = ANON | libc::MAP_FIXED as u64;
        let moving = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let mut then = |nr, args: &[u64]| call(remote, nr, args).unwrap();
        // Dropped; gone; new, untouched and touched; moved over others; moved away and back; readable by nobody.
        then(
            libc::SYS_madvise,
            &[field.at(0), len, libc::MADV_DONTNEED as u64],
        );
        then(libc::SYS_munmap, &[field.at(50), len]);
        then(libc::SYS_mmap, &[field.at(100), len, RW, fixed, NO_FD, 0]);
        then(libc::SYS_mmap, &[field.at(150), len, RW, fixed, NO_FD, 0]);
        then(
            libc::SYS_mremap,
            &[field.at(200), len, len, moving, field.at(250)],
        );
        then(
            libc::SYS_mremap,
            &[field.at(300), len, len, moving, field.at(200)],
        );
        then(
            libc::SYS_mremap,
            &[field.at(200), len, len, moving, field.at(300)],
        );
        then(libc::SYS_mprotect, &[field.at(350), len, 0]);
        then(libc::SYS_madvise, &[field.at(400), len, 102]);
        field.fill(remote, 160..170, 50 + round);
        // What was in one place is in the other, and the other way round.
        let aside = then_map(remote, len);
        for (from, to) in [(450, None), (500, Some(450)), (0, Some(500))] {
            let from = if from == 0 { aside } else { field.at(from) };
            let to = to.map_or(aside, |page| field.at(page));
            call(remote, libc::SYS_mremap, &[from, len, len, moving, to]).unwrap();
        }
        // Looked at once more, while parts are elsewhere.
        if round % 2 == 1 {
            bench.look_ahead(remote, &mut tracker);
            field.fill(remote, 600..620, 70 + round);
            let args = [field.at(650), len, libc::MADV_DONTNEED as u64];
            call(remote, libc::SYS_madvise, &args).unwrap();
        }
        is_captured_as_it_is(&bench, remote, &mut tracker, &field);
        let args = [field.0, Field::LEN, RW, fixed, NO_FD, 0];
        call(remote, libc::SYS_mmap, &args).unwrap();
    }
    assert!(fs::exists(format!("/proc/{host}")).unwrap());
    stopped.release().unwrap();
}

fn then_map(remote: &mut Remote, len: u64) -> u64 {
    call(remote, libc::SYS_mmap, &[0, len, RW, ANON, NO_FD, 0]).unwrap()
}

#[test]
fn what_was_taken_for_a_checkpoint_that_failed_is_not_forgotten() {
    for gears in [
        Bench::low().gears,
        Gears {
            ahead: u64::MAX,
            ..Bench::low().gears
        },
    ] {
        let bench = Bench {
            gears,
            ..Bench::new()
        };
        let (_process, mut stopped, field, mut tracker) = with_a_field(&bench);
        let remote = &mut stopped.remote;
        let first = bench.capture(remote, &mut tracker);
        let before = dump(remote);
        // A rollback comes instead,
        field.fill(remote, 0..Field::PAGES, 3);
        bench.look_ahead(remote, &mut tracker);
        field.fill(remote, 10..20, 4);
        bench.look_ahead(remote, &mut tracker);
        bench.restore(remote, &mut tracker, &first);
        assert_same(&before, &dump(remote));
        // or a checkpoint for which nothing is done ahead, or again.
        for again in [false, true] {
            field.fill(remote, 0..Field::PAGES, 5);
            bench.look_ahead(remote, &mut tracker);
            field.fill(remote, 10..20, 6);
            if again {
                bench.look_ahead(remote, &mut tracker);
                field.fill(remote, 15..30, 7);
            }
            is_captured_as_it_is(&bench, remote, &mut tracker, &field);
        }
        // The copies are gone with a capture that fails after it has taken them: the pages are not.
        field.fill(remote, 0..Field::PAGES, 8);
        bench.look_ahead(remote, &mut tracker);
        drop(tracker.as_mut().unwrap().ahead_mut().take_copies());
        is_captured_as_it_is(&bench, remote, &mut tracker, &field);
        stopped.release().unwrap();
    }
}

#[test]
fn a_process_that_is_gone_or_runs_another_program_is_not_looked_at() {
    let bench = Bench::low();
    let (process, mut stopped, _, mut tracker) = with_a_field(&bench);
    let remote = &mut stopped.remote;
    let program = File::open("/usr/bin/sleep").unwrap();
    crate::birth::spawn::execute(remote, program.as_fd(), None).unwrap();
    bench.look_ahead(remote, &mut tracker);
    bench.host.learn(process.host());
    let mut reborn =
        Remote::again(remote.pid(), remote.host(), None, remote.files().clone()).unwrap();
    let before = dump(&mut reborn);
    let state = bench.capture(&mut reborn, &mut tracker);
    bench.restore(&mut reborn, &mut tracker, &state);
    assert_same(&before, &dump(&mut reborn));
    drop((reborn, stopped, process));

    let (process, stopped, _, mut tracker) = with_a_field(&bench);
    let files = stopped.remote.files().clone();
    let host = process.host();
    drop((stopped, process));
    let mut room = 1;
    bench
        .memory()
        .look_ahead(host, &files, tracker.as_mut().unwrap(), &mut room);
}

/// Tells where its 8 MiB are, and writes the number of its round to all their pages, again and again.
const WRITER: &str = r"
import ctypes, mmap
M = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(ctypes.addressof(ctypes.c_char.from_buffer(M)), flush=True)
n = 0
while True:
    n += 1
    M[0:8 << 20:4096] = bytes([n % 251]) * 2048
";

#[test]
fn a_program_that_writes_all_the_time_is_captured_in_one_piece() {
    let bench = Bench::low();
    let mut command = Command::new("python3");
    command.args(["-c", WRITER]).stdout(Stdio::piped());
    let mut process = Process(command.spawn().expect("python3 runs"));
    let mut line = String::new();
    let out = process.0.stdout.take().unwrap();
    BufReader::new(out).read_line(&mut line).unwrap();
    let at: u64 = line.trim().parse().unwrap();
    bench.host.learn(process.host());
    let mut tracker = None;
    let mut files = None;
    let mut used = 0;
    for _ in 0..12 {
        if let (Some(files), Some(tracker)) = (&files, &mut tracker) {
            let mut room = bench.gears.ahead;
            bench
                .memory()
                .look_ahead(process.host(), files, tracker, &mut room);
        }
        let mut stopped = process.seize();
        let remote = &mut stopped.remote;
        let mut bytes = vec![0; 8 << 20];
        crate::sys::process::read_memory(process.host(), at, &mut bytes).unwrap();
        let scan = bench.scan(remote, &mut tracker);
        let captured = bench.memory().capture(remote, &mut tracker, scan, None);
        let (state, work) = captured.unwrap();
        used += work.copied.0.len();
        work.run();
        files = Some(remote.files().clone());
        // No page of the state is of another moment.
        let pages = state.pages.get().unwrap();
        for (page, bytes) in (at / 4096..).zip(bytes.chunks(4096)) {
            let held = pages.get(page).map_or(&[0; 4096][..], |page| &page[..]);
            assert!(held == bytes, "{page:x}");
        }
        stopped.release().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(used > 0, "nothing that was copied ahead was of use");
}
