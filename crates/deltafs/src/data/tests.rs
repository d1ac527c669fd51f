//! The store as a whole, and against a model of it.

use std::ops::Range;
use std::sync::mpsc::{Receiver, channel};

use proptest::prelude::*;

use super::*;

struct Place {
    _dir: tempfile::TempDir,
    store: Arc<DataStore>,
    calls: Receiver<Call>,
}

/// A store that may keep so many blocks in memory.
fn store(pages: usize) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let store = DataStore::with_pool(dir.path(), Pool::new(pages)).unwrap();
    let (reclaim, calls) = channel();
    store.reclaim_by(reclaim);
    Place {
        _dir: dir,
        store,
        calls,
    }
}

fn read(block: &Block) -> [u8; BLOCK_LEN] {
    let mut bytes = [0xEE; BLOCK_LEN];
    block.store.read(&mut bytes, block.position()).unwrap();
    bytes
}

impl Place {
    /// New blocks of ones, written one after another.
    fn written(&self, count: usize) -> Vec<Block> {
        let blocks = self.store.allocate(count, 1).unwrap();
        for block in &blocks {
            self.store.write(&[1; BLOCK_LEN], block.position()).unwrap();
        }
        blocks
    }

    fn in_memory(&self) -> u64 {
        self.store.buffered_bytes() / BLOCK
    }
}

#[test]
fn a_dropped_block_gives_its_place_back() {
    let place = store(16);
    let store = &place.store;
    let mut blocks = store.allocate(1000, 1).unwrap();
    assert_eq!(store.used_bytes(), 1000 * BLOCK);
    let kept = blocks.pop().unwrap();
    store.write(&[7; BLOCK_LEN], kept.position()).unwrap();
    drop(blocks);
    assert_eq!(store.used_bytes(), BLOCK);
    store.trim();
    let again = store.allocate(10, 2).unwrap();
    assert!(again.iter().all(|block| block.position() < 999 * BLOCK));
    assert_eq!(read(&kept), [7; BLOCK_LEN]);
}

/// Leaves the first thousand places of a store with space on the disk, and free.
fn write_and_free(store: &Arc<DataStore>) {
    let blocks = store.allocate(1000, 1).unwrap();
    let all = vec![7; 1000 * BLOCK_LEN];
    store.write(&all, blocks[0].position()).unwrap();
}

#[test]
fn what_is_not_given_back_for_want_of_time_is_used_again() {
    let place = store(16);
    let store = &place.store;
    write_and_free(store);
    let taken = store.disk_bytes().unwrap();
    store.trim_while(|| false);
    assert_eq!(store.disk_bytes().unwrap(), taken);
    let again = store.allocate(1000, 2).unwrap();
    assert!(again.iter().all(|block| block.position() < 1000 * BLOCK));
}

#[test]
fn what_was_given_back_to_the_disk_is_reserved_again() {
    let place = store(16);
    let store = &place.store;
    write_and_free(store);
    store.trim();
    for block in &store.reserve(900, 1).unwrap() {
        assert!(block.position() < 1000 * BLOCK);
        assert_eq!(read(block), [0; BLOCK_LEN]);
    }
}

#[test]
fn reserved_blocks_read_as_zeros() {
    let place = store(16);
    let blocks = place.store.reserve(3, 1).unwrap();
    assert_eq!(read(&blocks[2]), [0; BLOCK_LEN]);
}

#[test]
fn what_is_written_a_little_at_a_time_is_in_memory_until_it_is_written_back() {
    let place = store(16);
    let store = &place.store;
    let blocks = store.allocate(20, 1).unwrap();
    assert_eq!(place.in_memory(), 0);
    for block in &blocks {
        store.write(&[1; BLOCK_LEN], block.position()).unwrap();
    }
    assert_eq!(place.in_memory(), 16, "no more than there is room for");
    assert!(matches!(place.calls.try_recv(), Ok(Call::WriteSoon)));
    assert!(place.calls.try_recv().is_err(), "said once");
    assert!(!store.write_back());
    assert_eq!(place.in_memory(), 0);
    store.write(&[2; 10], blocks[3].position() + 7).unwrap();
    assert_eq!(place.in_memory(), 1);
    let mut expected = [1; BLOCK_LEN];
    expected[7..17].fill(2);
    assert_eq!(read(&blocks[3]), expected);
    assert!(matches!(place.calls.try_recv(), Ok(Call::WriteSoon)));
}

#[test]
fn what_is_removed_is_not_written() {
    let place = store(16);
    let blocks = place.written(8);
    let first = blocks[0].position();
    drop(blocks);
    assert_eq!(place.in_memory(), 0);
    place.store.write_back();
    let mut bytes = [9; 8 * BLOCK_LEN];
    read_or_zeros(&place.store.file, &mut bytes, first).unwrap();
    assert_eq!(bytes, [0; 8 * BLOCK_LEN]);
}

#[test]
fn who_has_much_in_memory_is_asked_to_write_when_it_is_scarce() {
    let place = store(2048);
    let _blocks = place.written(1100);
    let calls: Vec<Call> = place.calls.try_iter().collect();
    assert!(
        matches!(calls[..], [Call::WriteSoon, Call::WriteNow]),
        "{calls:?}"
    );
}

/// Nobody may write to a file that cannot be changed, through a descriptor from before either (`FS_IMMUTABLE_FL`).
#[test]
fn what_cannot_be_written_back_stays_in_memory_until_it_can() {
    let place = store(16);
    let store = &place.store;
    let lock = |locked: bool| {
        let mut flags = rustix::fs::ioctl_getflags(&store.file)?;
        flags.set(rustix::fs::IFlags::IMMUTABLE, locked);
        rustix::fs::ioctl_setflags(&store.file, flags)
    };
    let blocks = store.allocate(4, 1).unwrap();
    let write = |n: usize, byte| store.write(&[byte; BLOCK_LEN], blocks[n].position());
    write(0, 1).unwrap();
    write(1, 1).unwrap();
    if let Err(error) = lock(true) {
        eprintln!("not tested: the temporary directory's filesystem has no such flag ({error})");
        return;
    }
    assert!(store.write_back());
    assert!(write(2, 2).is_err(), "nothing more is taken into memory");
    write(1, 3).unwrap();
    assert_eq!(place.in_memory(), 2);
    assert_eq!((read(&blocks[0])[0], read(&blocks[1])[0]), (1, 3));
    assert!(store.write_back());
    lock(false).unwrap();
    assert!(!store.write_back());
    assert_eq!(place.in_memory(), 0);
    assert_eq!((read(&blocks[0])[0], read(&blocks[1])[0]), (1, 3));
    write(2, 4).unwrap();
    assert_eq!((place.in_memory(), read(&blocks[2])[0]), (1, 4));
}

/// What a store is asked for.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// New blocks next to each other as far as may be, written a block or all at a time.
    New {
        count: usize,
        at_once: bool,
    },
    /// New blocks of zeros.
    Reserve(usize),
    /// Bytes of one of the blocks, and of the next ones if they lie next to it.
    Write {
        which: usize,
        within: usize,
        len: usize,
    },
    Drop {
        which: usize,
        count: usize,
    },
    /// Blocks are about to be written into the file from there on,
    TakeOff(u64),
    /// and have been,
    Land,
    /// or could not.
    Fail,
    WriteBack,
    Trim,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = prop_oneof![1..200_usize, 1..20_000_usize, 1..80_000_usize];
    let step = prop_oneof![
        4 => (1..40_usize, any::<bool>()).prop_map(|(count, at_once)| Step::New { count, at_once }),
        1 => (1..20_usize).prop_map(Step::Reserve),
        8 => (any::<usize>(), 0..BLOCK_LEN, len)
            .prop_map(|(which, within, len)| Step::Write { which, within, len }),
        3 => (any::<usize>(), 1..60_usize).prop_map(|(which, count)| Step::Drop { which, count }),
        4 => (0..200_u64).prop_map(Step::TakeOff),
        3 => Just(Step::Land),
        1 => Just(Step::Fail),
        1 => Just(Step::WriteBack),
        1 => Just(Step::Trim),
    ];
    prop::collection::vec(step, 1..120)
}

/// A store, and what is to be in it.
struct Model {
    place: Place,
    blocks: Vec<(Block, Vec<u8>)>,
    /// What is being written into the file.
    flight: Option<(Range<u64>, Vec<u8>)>,
    stamp: u8,
}

impl Model {
    fn take(&mut self, step: Step) {
        let store = Arc::clone(&self.place.store);
        self.stamp = self.stamp.wrapping_add(1).max(1);
        match step {
            Step::New { count, at_once } => {
                let new = store.allocate(count, 1).unwrap();
                let content = vec![self.stamp; BLOCK_LEN];
                for run in new.chunk_by(|a, b| a.index + 1 == b.index) {
                    let at_a_time = if at_once { run.len() } else { 1 };
                    for some in run.chunks(at_a_time) {
                        store
                            .write(&content.repeat(some.len()), some[0].position())
                            .unwrap();
                    }
                }
                self.blocks
                    .extend(new.into_iter().map(|block| (block, content.clone())));
            }
            Step::Reserve(count) => {
                let new = store.reserve(count, 1).unwrap();
                let zeros = |block| (block, vec![0; BLOCK_LEN]);
                self.blocks.extend(new.into_iter().map(zeros));
            }
            Step::Write { which, within, len } => self.write(which, within, len),
            Step::Drop { which, count } => {
                if let Some(which) = which.checked_rem(self.blocks.len()) {
                    let end = (which + count).min(self.blocks.len());
                    self.blocks.drain(which..end);
                }
            }
            Step::TakeOff(from) => {
                if self.flight.is_none() {
                    let mut bytes = Vec::new();
                    let run = store.state.lock().buffer.take_off(from, &mut bytes);
                    self.flight = run.map(|run| (run, bytes));
                }
            }
            Step::Land => self.land(true),
            Step::Fail => self.land(false),
            Step::WriteBack => {
                self.land(true);
                assert!(!store.write_back());
                assert_eq!(self.place.in_memory(), 0);
            }
            Step::Trim => store.trim(),
        }
    }

    fn write(&mut self, which: usize, within: usize, len: usize) {
        let Some(which) = which.checked_rem(self.blocks.len()) else {
            return;
        };
        let first = self.blocks[which].0.index;
        let beside = self.blocks[which..].iter().zip(first..);
        let run = beside
            .take_while(|((block, _), next)| block.index == *next)
            .count();
        let len = len.min(run * BLOCK_LEN - within);
        let bytes = vec![self.stamp; len];
        let at = first * BLOCK + within as u64;
        self.place.store.write(&bytes, at).unwrap();
        for at in within..within + len {
            self.blocks[which + at / BLOCK_LEN].1[at % BLOCK_LEN] = self.stamp;
        }
    }

    fn land(&mut self, written: bool) {
        let Some((run, bytes)) = self.flight.take() else {
            return;
        };
        let store = &self.place.store;
        if written {
            store.file.write_all_at(&bytes, run.start * BLOCK).unwrap();
        }
        let mut state = store.state.lock();
        let freed = state.buffer.land(written);
        state.places.free(freed);
    }

    fn check(&self) {
        for (block, content) in &self.blocks {
            assert!(read(block)[..] == content[..], "{block:?}");
        }
        let used = self.blocks.len() as u64 * BLOCK;
        assert_eq!(self.place.store.used_bytes(), used);
        let mut places: Vec<u64> = self.blocks.iter().map(|(block, _)| block.index).collect();
        places.sort_unstable();
        assert!(
            places.is_sorted_by(|a, b| a < b),
            "a place is given out once"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("DELTAFS_MODEL_CASES").map_or(64, |n| n.parse().unwrap())
    ))]

    #[test]
    fn blocks_hold_what_was_written(steps in steps(), pages in 0..200_usize) {
        let mut model = Model {
            place: store(pages),
            blocks: Vec::new(),
            flight: None,
            stamp: 0,
        };
        for step in steps {
            model.take(step);
            model.check();
        }
    }
}

#[test]
fn blocks_are_written_and_read_and_dropped_while_they_are_written_back() {
    let place = store(300);
    let store = &place.store;
    let ended = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                store.write_back();
                store.trim();
            }
        });
        let work = |seed: u64| {
            let mut blocks: Vec<(Block, u8)> = Vec::new();
            let mut random = seed;
            for step in 0..20_000_usize {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let stamp = step as u8;
                let which = (random >> 33) as usize % (blocks.len() + 1);
                if which == blocks.len() {
                    blocks.extend(
                        store
                            .allocate(1, 1)
                            .unwrap()
                            .into_iter()
                            .map(|b| (b, stamp)),
                    );
                }
                let (block, content) = &mut blocks[which];
                if *content != stamp {
                    assert_eq!(read(block), [*content; BLOCK_LEN]);
                }
                store.write(&[stamp; BLOCK_LEN], block.position()).unwrap();
                *content = stamp;
                assert_eq!(read(block), [stamp; BLOCK_LEN]);
                if blocks.len() > 400 || random >> 62 == 0 {
                    blocks.swap_remove(which);
                }
            }
        };
        let workers = [1, 2].map(|seed| scope.spawn(move || work(seed)));
        for worker in workers {
            worker.join().unwrap();
        }
        ended.store(true, Ordering::Relaxed);
    });
}
