//! A process that waits in the kernel for a disk that does not answer cannot be stopped. Needs root, for a filesystem on a
//! loop device that is frozen and thawed.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{PATIENCE, output, sh, wait};
use deltabox::{Host, HostConfig, SandboxSpec};

/// A small disk; thawed and unmounted when dropped.
struct Disk {
    mount: PathBuf,
}

fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().unwrap();
    assert!(status.success(), "{program} {args:?}: {status}");
}

impl Disk {
    fn new(dir: &Path) -> Self {
        let image = dir.join("disk");
        let mount = dir.join("mount");
        std::fs::create_dir(&mount).unwrap();
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(64 << 20).unwrap();
        run("mkfs.ext4", &["-q", image.to_str().unwrap()]);
        let (from, to) = (image.to_str().unwrap(), mount.to_str().unwrap());
        run("mount", &["-o", "loop", from, to]);
        Self { mount }
    }

    fn freeze(&self) -> Frozen<'_> {
        run("fsfreeze", &["-f", self.mount.to_str().unwrap()]);
        Frozen(self)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.mount).status();
    }
}

/// Whoever writes to the disk waits until this is dropped.
struct Frozen<'a>(&'a Disk);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze")
            .arg("-u")
            .arg(&self.0.mount)
            .status();
    }
}

/// Where in the kernel a process or thread waits.
fn wait_of(process: &Path) -> String {
    std::fs::read_to_string(process.join("wchan")).unwrap_or_default()
}

fn entries(dir: &str) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    entries.map(|entry| entry.path())
}

/// Waits until a process of this name waits for an answer about files, and who is to give it waits for the frozen disk.
fn await_waiting(name: &str) {
    let begun = Instant::now();
    let asks = |process: &PathBuf| {
        let comm = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
        comm.trim() == name && wait_of(process).contains("request_wait_answer")
    };
    let waits = |thread: PathBuf| wait_of(&thread).contains("percpu_rwsem_wait");
    while begun.elapsed() < PATIENCE {
        if entries("/proc/self/task").any(waits) && entries("/proc").any(|p| asks(&p)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{name} does not wait for the disk");
}

#[test]
fn a_process_that_waits_for_its_disk_is_named_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::new(dir.path());
    let host = Host::open(HostConfig {
        state_dir: disk.mount.join("state"),
        ..HostConfig::default()
    })
    .unwrap();
    let sandbox = host.create(SandboxSpec::default()).unwrap();
    let before = sandbox.checkpoint(None).unwrap().id;
    // A name that no other process on the machine has.
    output(&sandbox, "cp /bin/dd /tmp/waits4disk");
    let frozen = disk.freeze();
    let writer = "exec /tmp/waits4disk if=/dev/zero of=/tmp/written4disk bs=1M count=8";
    let session = sandbox.spawn(sh(writer)).unwrap();
    await_waiting("waits4disk");
    let error = sandbox.checkpoint(None).unwrap_err().to_string();
    assert!(error.contains("waits4disk"), "{error}");
    assert_eq!(sandbox.tree().nodes.len(), 1, "a half checkpoint is shown");
    drop(frozen);
    assert_eq!(wait(&session).status, 0);
    assert_eq!(output(&sandbox, "stat -c %s /tmp/written4disk"), "8388608");
    sandbox.checkpoint(None).unwrap();
    sandbox.rollback(before).unwrap();
    assert_eq!(
        output(&sandbox, "ls /tmp | grep -cx written4disk || true"),
        "0"
    );
}
