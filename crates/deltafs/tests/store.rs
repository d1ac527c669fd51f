//! What becomes of a volume whose data cannot be written or read any more.

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::thread::sleep;
use std::time::Duration;

use common::{Fixture, Mounted, fixture};
use deltafs::{IdMap, Options, Volume};
use rustix::fs::Advice;

/// A volume over the same base whose data lies on another volume.
fn over(store: &Fixture) -> Mounted {
    let options = Options {
        base: File::open(store.base.path()).unwrap().into(),
        hidden: Vec::new(),
        ids: IdMap::IDENTITY,
        data_dir: store.volume.at(""),
        threads: 2,
    };
    Mounted::new(Volume::create(options).unwrap())
}

/// Has the kernel forget what it has cached of the file without a name that is on the store.
fn forget_cached(store: &Fixture) {
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        let Ok(found) = fs::metadata(&path) else {
            continue;
        };
        if found.is_file() && (found.dev(), found.nlink()) == (store.volume.device(), 0) {
            let file = File::open(path).unwrap();
            rustix::fs::fadvise(file, 0, None, Advice::DontNeed).unwrap();
        }
    }
}

#[test]
fn a_store_that_fails_is_an_error_of_the_device_and_changes_nothing() {
    let store = fixture(|base| fs::write(base.join("base"), "base").unwrap());
    let volume = over(&store);
    volume.write("file", vec![1; 1 << 16]);
    let before = volume.checkpoint();
    let name = volume.at("file");
    let file = OpenOptions::new().read(true).write(true).open(&name);
    let file = file.unwrap();
    file.write_all_at(&[2; 100], 5000).unwrap();
    let look = |file: &File| {
        let found = file.metadata().unwrap();
        (found.len(), found.blocks())
    };
    let shape = look(&file);
    while volume.stats().buffered_bytes > 0 {
        sleep(Duration::from_millis(10));
    }
    forget_cached(&store);
    store.volume.shutdown();

    let failed = |what: std::io::Result<()>| what.unwrap_err().raw_os_error() == Some(libc::EIO);
    assert!(failed(file.write_all_at(&[3; 100], 5000)));
    assert_eq!(look(&file), shape);
    // What has its space already is taken until the store refuses it, and nothing of it is lost then.
    let mut end = 1 << 16;
    let refused = loop {
        match file.write_all_at(&[4; 4096], end) {
            Ok(()) => end += 4096,
            Err(error) => break Err(error),
        }
        sleep(Duration::from_millis(50));
    };
    assert!(failed(refused) && end > 1 << 16);
    let shape = look(&file);
    assert!(failed(file.write_all_at(&[3; 9000], end)));
    assert!(failed(fs::write(volume.at("new"), "x")));
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    assert!(failed(file.read_exact_at(&mut [0; 100], 5000)));
    let mut taken = vec![0; end as usize - (1 << 16)];
    file.read_exact_at(&mut taken, 1 << 16).unwrap();
    assert!(taken.iter().all(|byte| *byte == 4));
    assert_eq!(look(&file), shape);
    // What needs no data goes on.
    assert_eq!(volume.read("base"), "base");
    fs::rename(volume.at("file"), volume.at("moved")).unwrap();
    let layer = tempfile::tempdir().unwrap();
    let saved = before.save(layer.path(), None).unwrap_err();
    assert!(saved.to_string().contains("block"), "{saved}");
    volume.rollback(&before).unwrap();
    assert_eq!(fs::metadata(&name).unwrap().len(), 1 << 16);
    assert!(!volume.at("moved").exists() && !volume.at("new").exists());
}
