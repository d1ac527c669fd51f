//! A volume that may take only so much.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;

use common::{Mounted, fixture};
use deltafs::{IdMap, Quota};

const MIB: u64 = 1 << 20;

fn quota(bytes: u64) -> Quota {
    Quota {
        bytes: Some(bytes),
        inodes: None,
    }
}

fn is_full(result: std::io::Result<()>) -> bool {
    result.is_err_and(|e| e.kind() == ErrorKind::StorageFull)
}

/// Total, free, in bytes.
fn space(volume: &Mounted) -> (u64, u64) {
    let found = rustix::fs::statvfs(volume.at("")).unwrap();
    (
        found.f_blocks * found.f_frsize,
        found.f_bavail * found.f_frsize,
    )
}

#[test]
fn a_full_quota_refuses_more_and_takes_it_again_when_space_is_freed() {
    let fixture = fixture(|dir| fs::write(dir.join("base"), vec![1; 3 << 20]).unwrap());
    let volume = &fixture.volume;
    volume.set_quota(quota(2 * MIB));
    assert_eq!(space(volume), (2 * MIB, 2 * MIB));
    volume.write("a", vec![1; MIB as usize]);
    assert_eq!(space(volume), (2 * MIB, MIB));
    // What a checkpoint holds does not count, and what it holds stays.
    let checkpoint = volume.checkpoint();
    volume.write("a", vec![2; MIB as usize]);
    assert_eq!(space(volume).1, MIB);
    assert!(is_full(fs::write(
        volume.at("b"),
        vec![3; 2 * MIB as usize]
    )));
    let written = fs::metadata(volume.at("b")).unwrap().len();
    assert!(written <= MIB, "{written}");
    fs::remove_file(volume.at("b")).unwrap();
    // An overwritten block of the base is one of the volume's own.
    let base = OpenOptions::new()
        .write(true)
        .open(volume.at("base"))
        .unwrap();
    base.write_all_at(&vec![9; MIB as usize], 0).unwrap();
    assert!(is_full(base.write_all_at(&[9; 4096], 2 * MIB)));
    assert_eq!(space(volume).1, 0);
    // In place it may always be written.
    base.write_all_at(&[8; 4096], 0).unwrap();
    fs::remove_file(volume.at("a")).unwrap();
    base.write_all_at(&[9; 4096], 2 * MIB).unwrap();
    volume.rollback(&checkpoint).unwrap();
    assert_eq!(space(volume), (2 * MIB, MIB));
    assert!(fs::read(volume.at("a")).unwrap() == vec![1; MIB as usize]);
    assert!(fs::read(volume.at("base")).unwrap() == vec![1; 3 << 20]);
    volume.write("more", vec![1; MIB as usize / 2]);
    let fork = Mounted::new(volume.fork(&checkpoint, IdMap::IDENTITY).unwrap());
    assert_eq!(space(&fork), (2 * MIB, MIB));
    assert!(is_full(fs::write(fork.at("b"), vec![3; 2 * MIB as usize])));
}

#[test]
fn reserving_counts_and_what_is_too_much_is_refused_at_once() {
    let fixture = fixture(|_| {});
    let volume = &fixture.volume;
    volume.set_quota(quota(2 * MIB));
    let file = File::create(volume.at("file")).unwrap();
    let flags = rustix::fs::FallocateFlags::empty();
    let huge = rustix::fs::fallocate(&file, flags, 0, 1 << 50);
    assert_eq!(huge, Err(rustix::io::Errno::NOSPC));
    rustix::fs::fallocate(&file, flags, 0, MIB + MIB / 2).unwrap();
    assert_eq!(space(volume).1, MIB / 2);
    // What is reserved can be written.
    file.write_all_at(&vec![1; (MIB + MIB / 2) as usize], 0)
        .unwrap();
    rustix::fs::fallocate(&file, flags, 0, 2 * MIB).unwrap();
    assert!(is_full(fs::write(volume.at("x"), "x")));
    file.set_len(0).unwrap();
    assert_eq!(space(volume).1, 2 * MIB);
}

#[test]
fn the_number_of_files_is_bounded_and_those_of_the_base_do_not_count() {
    let fixture = fixture(|dir| {
        for n in 0..20 {
            fs::write(dir.join(format!("base{n}")), "").unwrap();
        }
    });
    let volume = &fixture.volume;
    volume.set_quota(Quota {
        bytes: None,
        inodes: Some(10),
    });
    for n in 0..20 {
        fs::set_permissions(
            volume.at(format!("base{n}")),
            std::os::unix::fs::PermissionsExt::from_mode(0o600),
        )
        .unwrap();
    }
    fs::create_dir(volume.at("dir")).unwrap();
    for n in 1..10 {
        volume.write(&format!("dir/{n}"), "");
    }
    let found = rustix::fs::statvfs(volume.at("")).unwrap();
    assert_eq!((found.f_files, found.f_ffree), (10, 0));
    for more in ["x", "dir/x"] {
        assert!(is_full(File::create(volume.at(more)).map(drop)));
    }
    assert!(is_full(fs::create_dir(volume.at("y"))));
    for n in 0..20 {
        fs::remove_file(volume.at(format!("base{n}"))).unwrap();
    }
    assert!(is_full(File::create(volume.at("x")).map(drop)));
    fs::hard_link(volume.at("dir/1"), volume.at("link")).unwrap();
    fs::remove_file(volume.at("dir/2")).unwrap();
    File::create(volume.at("x"))
        .unwrap()
        .write_all(b"x")
        .unwrap();
}

#[test]
fn what_is_kept_in_memory_is_bounded_too() {
    let fixture = fixture(|_| {});
    let volume = &fixture.volume;
    volume.set_quota(quota(MIB));
    let checkpoint = volume.checkpoint();
    volume.write("file", "");
    let file = File::open(volume.at("file")).unwrap();
    let set = |n: u32, len: usize| {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::fsetxattr(&file, format!("user.{n}"), &vec![1; len], flags)
    };
    set(0, 100).unwrap();
    assert_eq!(space(volume).1, MIB, "a little counts nothing");
    set(1, 60_000).unwrap();
    assert_eq!(space(volume).1, MIB - 15 * 4096);
    rustix::fs::fremovexattr(&file, "user.1").unwrap();
    assert_eq!(space(volume).1, MIB);
    set(1, 60_000).unwrap();
    // Names, which take no inode: 32 in a block.
    for n in 0..7_712 {
        fs::hard_link(volume.at("file"), volume.at(n.to_string())).unwrap();
    }
    assert_eq!(space(volume).1, 0);
    assert_eq!(set(2, 5_000), Err(rustix::io::Errno::NOSPC));
    let refused = (0..40).find(|n| {
        let link = fs::hard_link(volume.at("file"), volume.at(format!("x{n}")));
        is_full(link)
    });
    assert!(refused.is_some_and(|n| n < 32), "{refused:?}");
    let long = "x".repeat(100);
    assert!(is_full(std::os::unix::fs::symlink(
        &long,
        volume.at("link")
    )));
    assert!(is_full(fs::write(volume.at("other"), "x")));
    for n in 0..7_712 {
        fs::remove_file(volume.at(n.to_string())).unwrap();
    }
    std::os::unix::fs::symlink(&long, volume.at("link")).unwrap();
    drop(file);
    let later = volume.checkpoint();
    let free = space(volume).1;
    volume.rollback(&checkpoint).unwrap();
    assert_eq!(space(volume).1, MIB);
    volume.rollback(&later).unwrap();
    assert_eq!(space(volume).1, free);
}

#[test]
fn a_file_has_as_many_names_as_on_ext4() {
    let fixture = fixture(|dir| fs::write(dir.join("file"), "").unwrap());
    let volume = &fixture.volume;
    let mut refused = None;
    for n in 0..=65_000 {
        if let Err(error) = fs::hard_link(volume.at("file"), volume.at(n.to_string())) {
            refused = Some((n, error.kind()));
            break;
        }
    }
    assert_eq!(refused, Some((64_999, ErrorKind::TooManyLinks)));
}
