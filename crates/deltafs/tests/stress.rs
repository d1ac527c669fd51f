//! Many threads at work on one volume, stopped for a checkpoint or a rollback as a sandbox's processes are.

mod common;
#[path = "model/dump.rs"]
#[allow(dead_code, reason = "the model test uses the rest")]
mod dump;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Barrier;

use common::{Mounted, Random, fixture};
use deltafs::IdMap;
use dump::Dump;

const THREADS: u64 = 4;
const ROUNDS: u64 = 12;
const STEPS: u64 = 150;

#[test]
fn threads_at_work_leave_every_checkpoint_as_it_was() {
    let f = fixture(|base| {
        fs::create_dir_all(base.join("shared/sub")).unwrap();
        for index in 0..20 {
            fs::write(base.join(format!("shared/{index}")), vec![b'b'; 6000]).unwrap();
        }
    });
    let v = &f.volume;
    let (start, stop) = (
        Barrier::new(THREADS as usize + 1),
        Barrier::new(THREADS as usize + 1),
    );
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (start, stop) = (&start, &stop);
            scope.spawn(move || {
                let mut random = Random(thread + 1);
                for _ in 0..ROUNDS {
                    start.wait();
                    for _ in 0..STEPS {
                        step(&v.at("shared"), &mut random);
                    }
                    stop.wait();
                }
            });
        }
        let mut saved = Vec::new();
        let mut random = Random(99);
        for _ in 0..ROUNDS {
            start.wait();
            // Checkpoints need nobody to stop; what they hold is some state in between.
            let passing = v.checkpoint();
            stop.wait();
            drop(passing);
            saved.push((v.checkpoint(), Dump::of(&v.at(""))));
            let (snapshot, tree) = &saved[random.below(saved.len() as u64) as usize];
            // Nothing is open between the rounds.
            let few = if random.below(2) == 0 { 0 } else { usize::MAX };
            let held = deltafs::InUse::default;
            v.rollback_sparing(snapshot, few, held).unwrap();
            tree.compare(&Dump::of(&v.at("")));
        }
        for (snapshot, tree) in &saved {
            let fork = Mounted::new(v.fork(snapshot, IdMap::IDENTITY).unwrap());
            tree.compare(&Dump::of(&fork.at("")));
        }
    });
}

/// One operation; that others were faster is no failure.
fn step(dir: &Path, random: &mut Random) {
    let name = |random: &mut Random| {
        let sub = if random.below(3) == 0 { "sub/" } else { "" };
        dir.join(format!("{sub}{}", random.below(25)))
    };
    let path = name(random);
    let _ = match random.below(6) {
        0 => fs::remove_file(&path),
        1 => fs::rename(&path, name(random)),
        2 => fs::hard_link(&path, name(random)),
        3 => fs::read_dir(dir).map(|entries| drop(entries.collect::<Vec<_>>())),
        _ => OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .and_then(|file| {
                file.write_all_at(&vec![b'w'; random.below(9000) as usize], random.below(9000))?;
                file.set_len(random.below(12_000))
            }),
    };
}
