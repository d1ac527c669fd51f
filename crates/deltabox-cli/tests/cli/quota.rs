//! Sandboxes that may take only so much of the disk.

use crate::harness::Home;

#[test]
fn a_quota_fills_up_like_a_disk_over_checkpoints_forks_and_restarts() {
    let home = Home::new();
    home.ok(&["create", "--name", "box", "--disk", "8M", "--inodes", "50"]);
    let size = "df --output=size,iavail -B1M / | tail -n1 | tr -s ' '";
    // The places that the sandbox's own mounts needed count.
    let free = home.sh(size);
    let free = free.trim().split_once(' ').expect(&free);
    let inodes: u64 = free.1.parse().unwrap();
    assert!(free.0 == "8" && (30..=50).contains(&inodes), "{free:?}");
    home.sh("head -c 6M /dev/zero | tr '\\0' a > /six; sha256sum /six > /sum");
    let fill = "head -c 4M /dev/zero | tr '\\0' b > /more";
    let refused = |name: &str| {
        let ran = home.run(&["exec", name, "--", "sh", "-c", fill]);
        assert!(ran.stderr.contains("No space left on device"), "{ran:?}");
    };
    refused("box");
    let full = home.ok(&["checkpoint", "--durable", "box"]);
    let full = full.trim_end();
    home.sh("rm /more /six; head -c 7M /dev/zero | tr '\\0' c > /seven");
    home.sh("mkdir /q; for n in $(seq 20); do echo > /q/$n || exit 1; done");
    let files = home.run(&[
        "exec",
        "box",
        "--",
        "sh",
        "-c",
        "for n in $(seq 60); do echo > /q/more$n; done",
    ]);
    assert!(
        files.stderr.contains("No space left on device"),
        "{files:?}"
    );
    home.sh("rm -r /q");
    home.ok(&["rollback", "box", full]);
    home.sh("sha256sum -c /sum > /dev/null && rm /more");
    refused("box");
    let fork = home.ok(&["fork", &format!("box@{full}")]);
    refused(fork.trim_end());
    home.ok(&["service", "stop"]);
    home.ok(&["rollback", "box", full]);
    home.sh("sha256sum -c /sum > /dev/null && rm /more");
    refused("box");
    home.sh("rm /more /six");
    home.sh(fill);
    assert_eq!(home.sh(size).trim().split(' ').next(), Some("8"));
    let wrong = home.run(&["create", "--disk", "1000"]);
    assert!(wrong.stderr.contains("1 MiB"), "{wrong:?}");
}
