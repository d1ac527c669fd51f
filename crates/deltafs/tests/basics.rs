//! What any filesystem must do, over a base and with checkpoints in between.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use common::{fixture, names};

fn small_base(base: &std::path::Path) {
    fs::create_dir_all(base.join("etc/deep")).unwrap();
    fs::write(base.join("etc/hosts"), "localhost\n").unwrap();
    fs::write(base.join("etc/deep/file"), "deep\n").unwrap();
    std::os::unix::fs::symlink("hosts", base.join("etc/link")).unwrap();
    fs::hard_link(base.join("etc/hosts"), base.join("etc/hosts2")).unwrap();
}

#[test]
fn large_files_are_read_ahead_by_whole_requests() {
    let f = fixture(|_| {});
    let device = f.volume.device();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    assert_eq!(std::fs::read_to_string(path).unwrap().trim(), "256");
}

#[test]
fn the_base_shows_through_and_stays_untouched() {
    let f = fixture(small_base);
    let v = &f.volume;
    assert_eq!(names(v.at("etc")), ["deep", "hosts", "hosts2", "link"]);
    assert_eq!(v.read("etc/link"), "localhost\n");
    v.write("etc/hosts", "changed\n");
    assert_eq!(
        v.read("etc/hosts2"),
        "changed\n",
        "a hard link of the base is one file"
    );
    fs::remove_file(v.at("etc/deep/file")).unwrap();
    fs::remove_dir(v.at("etc/deep")).unwrap();
    v.write("etc/new", "new\n");
    assert_eq!(names(v.at("etc")), ["hosts", "hosts2", "link", "new"]);
    assert_eq!(
        fs::read_to_string(f.base.path().join("etc/hosts")).unwrap(),
        "localhost\n"
    );
    assert!(f.base.path().join("etc/deep/file").exists());
}

#[test]
fn rollback_brings_back_names_content_and_attributes() {
    let f = fixture(small_base);
    let v = &f.volume;
    v.write("work", "one");
    let one = v.checkpoint();
    v.write("work", "two, which is longer");
    fs::set_permissions(v.at("etc/hosts"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(v.at("etc/deep"), v.at("moved")).unwrap();
    fs::create_dir(v.at("etc/deep")).unwrap();
    let two = v.checkpoint();
    v.rollback(&one).unwrap();
    assert_eq!(v.read("work"), "one");
    assert_eq!(fs::metadata(v.at("work")).unwrap().len(), 3);
    assert_eq!(
        fs::metadata(v.at("etc/hosts")).unwrap().mode() & 0o777,
        0o644
    );
    assert_eq!(v.read("etc/deep/file"), "deep\n");
    assert!(!v.at("moved").exists());
    v.rollback(&two).unwrap();
    assert_eq!(v.read("work"), "two, which is longer");
    assert_eq!(v.read("moved/file"), "deep\n");
    assert_eq!(names(v.at("etc/deep")), [""; 0]);
}

#[test]
fn a_fork_goes_its_own_way() {
    let f = fixture(small_base);
    let v = &f.volume;
    v.write("work", "shared");
    let snapshot = v.checkpoint();
    let fork = common::Mounted::new(v.fork(&snapshot, deltafs::IdMap::IDENTITY).unwrap());
    fork.write("work", "fork");
    v.write("other", "original");
    assert_eq!(v.read("work"), "shared");
    assert_eq!(fork.read("work"), "fork");
    assert!(!fork.at("other").exists());
    assert_ne!(fork.device(), v.device());
}

#[test]
fn a_block_of_a_large_base_file_costs_a_block() {
    let f = fixture(|base| {
        fs::write(base.join("large"), vec![7; 64 << 20]).unwrap();
    });
    let v = &f.volume;
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(v.at("large"))
        .unwrap();
    file.write_all_at(b"x", 12_345_678).unwrap();
    assert_eq!(v.stats().data_bytes, 4096);
    let mut buf = [0; 3];
    file.read_exact_at(&mut buf, 12_345_677).unwrap();
    assert_eq!(&buf, &[7, b'x', 7]);
    assert_eq!(file.metadata().unwrap().len(), 64 << 20);
}
