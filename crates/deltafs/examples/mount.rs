//! Mounts a volume at a path until standard input ends, to run conformance suites and benchmarks against it:
//!
//! ```text
//! mount BASE DATA_DIR MOUNT_POINT
//! ```
//!
//! Every line on standard input is a command: `checkpoint`, `rollback N` (the N-th checkpoint, from
//! 0), `fork N` (and end it), `place PATH` (mount it there too), `stats`. Each answers with one line that tells how long it took.

use std::error::Error;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use deltafs::{IdMap, Options, Snapshot, Volume};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(base), Some(data_dir), Some(place)) = (args.next(), args.next(), args.next()) else {
        return Err("usage: mount BASE DATA_DIR MOUNT_POINT".into());
    };
    let volume = Volume::create(Options {
        base: File::open(base)?.into(),
        hidden: vec![data_dir.clone()],
        ids: IdMap::IDENTITY,
        data_dir,
        threads: 2,
    })?;
    mount(&volume, &place)?;
    let served = serve(&volume);
    rustix::mount::unmount(&place, UnmountFlags::DETACH)?;
    served
}

fn mount(volume: &Volume, place: &Path) -> Result<(), Box<dyn Error>> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = rustix::mount::open_tree(volume.mount(), "", flags)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&mount, "", rustix::fs::CWD, place, flags)?;
    Ok(())
}

fn serve(volume: &Volume) -> Result<(), Box<dyn Error>> {
    let mut snapshots: Vec<Snapshot> = Vec::new();
    println!("mounted");
    for line in std::io::stdin().lines() {
        let line = line?;
        let start = Instant::now();
        let answer = match line.split_once(' ').unwrap_or((&line, "")) {
            ("checkpoint", _) => {
                volume.sync()?;
                snapshots.push(volume.checkpoint());
                format!("checkpoint {}", snapshots.len() - 1)
            }
            ("rollback", which) => {
                let to = snapshots
                    .get(which.parse::<usize>()?)
                    .ok_or("no such checkpoint")?;
                let told = volume.rollback(to)?.told;
                format!("rollback, the kernel was told {told} things")
            }
            ("fork", which) => {
                let from = snapshots
                    .get(which.parse::<usize>()?)
                    .ok_or("no such checkpoint")?;
                let fork = volume.fork(from, IdMap::IDENTITY)?;
                let made = start.elapsed();
                drop(fork);
                format!("fork {:.3} ms", made.as_secs_f64() * 1e3)
            }
            ("place", place) => {
                mount(volume, Path::new(place))?;
                format!("placed at {place}")
            }
            ("stats", _) => format!("{:?}", volume.stats()),
            _ => return Err(format!("no such command: {line}").into()),
        };
        println!("{:.3} ms: {answer}", start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(())
}
