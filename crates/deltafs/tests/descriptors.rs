//! A process that serves a volume and has no descriptor left.

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;

use common::fixture;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const FILES: usize = 30;

/// Takes all descriptors that this process can still have.
fn take_all(taken: &mut Vec<File>) {
    while let Ok(file) = File::open("/dev/null") {
        taken.push(file);
    }
}

/// The limit is the process's: this is the only test here.
#[test]
fn files_of_the_base_are_read_all_the_same_when_no_descriptor_is_left() {
    let fixture = fixture(|dir| {
        for n in 0..FILES {
            let deep = dir.join(format!("a{n}/b/c"));
            fs::create_dir_all(&deep).unwrap();
            fs::write(deep.join("file"), format!("content {n}")).unwrap();
        }
    });
    let volume = &fixture.volume;
    let files: Vec<File> = (0..FILES)
        .map(|n| File::open(volume.at(format!("a{n}/b/c/file"))).unwrap())
        .collect();
    let limit = getrlimit(Resource::Nofile);
    let low = Rlimit {
        current: Some(300),
        ..limit
    };
    setrlimit(Resource::Nofile, low).unwrap();
    let mut taken = Vec::new();
    take_all(&mut taken);
    assert!(!taken.is_empty(), "the limit has no effect");
    let mut read = Vec::new();
    for file in &files {
        let mut buf = [0; 64];
        read.push(file.read_at(&mut buf, 0).map(|len| buf[..len].to_vec()));
        // What the volume has let go of is gone, too.
        take_all(&mut taken);
    }
    drop(taken);
    setrlimit(Resource::Nofile, limit).unwrap();
    for (n, read) in read.into_iter().enumerate() {
        assert_eq!(read.unwrap(), format!("content {n}").into_bytes());
    }
    let mut again = String::new();
    let mut file = File::open(volume.at("a7/b/c/file")).unwrap();
    file.read_to_string(&mut again).unwrap();
    assert_eq!(again, "content 7");
}
