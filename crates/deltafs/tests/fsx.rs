//! Many threads, each at work on a file of its own whose content it knows, in the manner of `fsx`: all ways to change a
//! file, through a descriptor and a mapping that stay, with checkpoints, rollbacks and forks in between.

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use common::mapper::{self, Mapper};
use common::{Mounted, Random, fixture};
use deltafs::{IdMap, InUse, Snapshot};
use rustix::fs::FallocateFlags;

const THREADS: usize = 4;
const ROUNDS: u64 = 10;
const STEPS: u64 = 60;
/// Files grow up to this.
const ROOM: u64 = 160 << 10;

impl Random {
    /// A place in the file, often at the beginning of a block.
    fn place(&mut self, limit: u64) -> u64 {
        let at = self.below(limit);
        if self.below(3) == 0 {
            at / 4096 * 4096
        } else {
            at
        }
    }
}

/// What a file holds and where it is.
#[derive(Clone)]
struct Known {
    content: Vec<u8>,
    path: PathBuf,
}

/// A file, open and mapped all the time, and what it must hold.
struct Player {
    file: File,
    ino: u64,
    mapper: Mapper,
    mapping: usize,
    known: Known,
    random: Random,
}

impl Player {
    fn new(v: &Mounted, number: usize) -> Self {
        let path = PathBuf::from(format!("base{number}"));
        let at = v.at(&path);
        let file = OpenOptions::new().read(true).write(true).open(at).unwrap();
        let mut mapper = Mapper::start("mapping_process");
        Self {
            ino: file.metadata().unwrap().ino(),
            mapping: mapper.map(&file, ROOM as usize, true),
            mapper,
            known: Known {
                content: fs::read(v.at(&path)).unwrap(),
                path,
            },
            file,
            random: Random(number as u64 + 1),
        }
    }

    fn play(&mut self, v: &Mounted) {
        for step in 0..STEPS {
            let byte = (step + 1) as u8;
            let (at, len) = (self.random.place(ROOM / 2), self.random.below(20_000) + 1);
            match self.random.below(9) {
                0 | 1 => self.write(at, &vec![byte; len as usize]),
                2 => self.write(self.known.content.len() as u64 / 2, &[byte; 100]),
                3 => self.resize(),
                4 => self.hole(
                    at,
                    len,
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                ),
                5 => self.hole(at, len, FallocateFlags::ZERO_RANGE),
                6 => self.copy(at, len),
                7 => self.write_mapped(byte),
                _ => self.rename(v),
            }
            let read = self.random.place(ROOM);
            let mut found = vec![0; 5000];
            let got = self.file.read_at(&mut found, read).unwrap();
            let from = (read as usize).min(self.known.content.len());
            let wanted = &self.known.content[from..(from + 5000).min(self.known.content.len())];
            assert!(
                found[..got] == *wanted,
                "{}: read at {read}",
                self.known.path.display()
            );
        }
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
        let end = at as usize + bytes.len();
        let len = self.known.content.len().max(end);
        self.known.content.resize(len, 0);
        self.known.content[at as usize..end].copy_from_slice(bytes);
    }

    fn resize(&mut self) {
        let size = self.random.place(ROOM);
        self.file.set_len(size).unwrap();
        self.known.content.resize(size as usize, 0);
    }

    fn hole(&mut self, at: u64, len: u64, how: FallocateFlags) {
        rustix::fs::fallocate(&self.file, how, at, len).unwrap();
        let (at, mut end) = (at as usize, (at + len) as usize);
        if how.contains(FallocateFlags::KEEP_SIZE) {
            end = end.min(self.known.content.len());
        } else {
            let len = self.known.content.len().max(end);
            self.known.content.resize(len, 0);
        }
        if at < end {
            self.known.content[at..end].fill(0);
        }
    }

    /// Copies a range of the file behind itself.
    fn copy(&mut self, at: u64, len: u64) {
        let (mut from, mut to) = (at, self.random.place(ROOM / 4) + at + len);
        let (offset, place) = (at as usize, to as usize);
        let done = rustix::fs::copy_file_range(
            &self.file,
            Some(&mut from),
            &self.file,
            Some(&mut to),
            len as usize,
        );
        let copied = done.unwrap();
        let content = &mut self.known.content;
        assert_eq!(
            copied,
            content.len().saturating_sub(offset).min(len as usize)
        );
        if copied > 0 {
            content.resize(content.len().max(place + copied), 0);
            content.copy_within(offset..offset + copied, place);
        }
    }

    fn write_mapped(&mut self, byte: u8) {
        let len = self.known.content.len().min(ROOM as usize);
        if len > 0 {
            let at = self.random.below(len as u64) as usize;
            self.mapper.set(self.mapping, at, byte);
            self.known.content[at] = byte;
        }
    }

    fn rename(&mut self, v: &Mounted) {
        let name = self.random.below(1000);
        let to = PathBuf::from(format!("dir{}/{}-{name}", name % 3, self.ino));
        fs::rename(v.at(&self.known.path), v.at(&to)).unwrap();
        self.known.path = to;
    }

    /// Everything is as it has to be: by name, through the old descriptor, and in the old mapping.
    fn verify(&mut self, v: &Mounted) {
        let wanted = &self.known.content;
        let name = self.known.path.display();
        assert!(
            fs::read(v.at(&self.known.path)).unwrap() == *wanted,
            "{name} by its name"
        );
        let mut found = vec![0; wanted.len() + 1];
        let got = self.file.read_at(&mut found, 0).unwrap();
        assert!(
            found[..got] == **wanted,
            "{name} through the old descriptor"
        );
        assert_eq!(self.file.metadata().unwrap().len(), wanted.len() as u64);
        for at in (0..wanted.len().min(ROOM as usize)).step_by(1500) {
            assert_eq!(
                self.mapper.get(self.mapping, at),
                wanted[at],
                "{name} mapped, at {at}"
            );
        }
    }
}

#[test]
fn mapping_process() {
    mapper::serve();
}

#[test]
fn files_hold_what_was_written_whatever_is_rolled_back_under_them() {
    let f = fixture(|base| {
        for number in 0..THREADS {
            let content: Vec<u8> = (0..50_000).map(|at| (at % 253) as u8).collect();
            fs::write(base.join(format!("base{number}")), content).unwrap();
        }
        (0..3).for_each(|dir| fs::create_dir(base.join(format!("dir{dir}"))).unwrap());
    });
    let v = &f.volume;
    let mut players: Vec<Player> = (0..THREADS).map(|number| Player::new(v, number)).collect();
    let held = InUse {
        files: players.iter().map(|player| player.ino).collect(),
        ..InUse::default()
    };
    let mut saved: Vec<(Snapshot, Vec<Known>)> = Vec::new();
    let mut random = Random(77);
    for round in 0..ROUNDS {
        std::thread::scope(|scope| {
            for player in &mut players {
                scope.spawn(|| player.play(v));
            }
        });
        v.sync().unwrap();
        let known = players.iter().map(|player| player.known.clone());
        saved.push((v.checkpoint(), known.collect()));
        let (snapshot, known) = &saved[random.below(saved.len() as u64) as usize];
        let few = if round % 2 == 0 { 0 } else { usize::MAX };
        v.rollback_sparing(snapshot, few, || held.clone()).unwrap();
        for (player, known) in players.iter_mut().zip(known) {
            player.known = known.clone();
            player.verify(v);
        }
    }
    for (snapshot, known) in &saved {
        let fork = Mounted::new(v.fork(snapshot, IdMap::IDENTITY).unwrap());
        for known in known {
            let found = fs::read(fork.at(&known.path)).unwrap();
            assert!(found == known.content, "{} in a fork", known.path.display());
        }
    }
}
