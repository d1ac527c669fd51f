//! Durable checkpoints over the end of a service: of its own will, and killed at every step of writing one.

use std::fs;
use std::path::PathBuf;

use rustix::process::{Signal, kill_process};

use crate::harness::{Home, gone, wait_for};

impl Home {
    fn durable(&self) -> String {
        let id = self.ok(&["checkpoint", "--durable", "box"]);
        id.trim_end().to_owned()
    }

    fn kill_service(&self) {
        let service = self.service();
        kill_process(service, Signal::KILL).unwrap();
        wait_for("the service is gone", || gone(service));
    }

    fn directory_of(&self, id: &str) -> PathBuf {
        self.path().join("checkpoints/box").join(id)
    }
}

#[test]
fn a_sandbox_is_listed_as_stopped_after_a_restart_and_a_rollback_brings_it_back() {
    let home = Home::with_box();
    home.sh("echo before > /f");
    let warm = home.checkpoint();
    let id = home.durable();
    home.sh("echo after > /f");
    home.ok(&["service", "stop"]);

    let started = home.run(&["ls", "--json"]);
    assert!(
        started
            .stderr
            .contains("durable checkpoint of sandbox \"box\""),
        "{started:?}"
    );
    let list = home.json(&["ls"]);
    assert_eq!(
        (&list[0]["name"], &list[0]["state"]),
        (&"box".into(), &"stopped".into())
    );
    assert_eq!(list[0]["checkpoints"], 1);
    let tree = home.json(&["tree", "box"]);
    assert_eq!(
        (&tree["nodes"][0]["id"], &tree["nodes"][0]["state"]),
        (&id.as_str().into(), &"durable".into())
    );
    assert!(home.ok(&["tree", "box"]).contains("durable"));
    assert!(home.ok(&["inspect", "box"]).contains("stopped"));
    let refused = home.run(&["exec", "box", "true"]);
    assert!(refused.stderr.contains("is stopped"), "{refused:?}");
    let refused = home.run(&["checkpoint", "box"]);
    assert!(refused.stderr.contains("is stopped"), "{refused:?}");
    let started = home.path().join("sandboxes/box");
    assert!(!started.exists(), "it is read from disk when it is needed");
    home.ok(&["rollback", "box", &id]);
    assert_eq!(home.sh("cat /f"), "before\n");
    let refused = home.run(&["rollback", "box", &warm]);
    assert!(refused.stderr.contains("no checkpoint"), "{refused:?}");
    let forks = home.ok(&["fork", &format!("box@{id}")]);
    assert_eq!(home.sh_in(forks.trim_end(), "cat /f"), "before\n");
    home.ok(&["rm", "box"]);
    assert!(!home.directory_of(&id).exists());
}

#[test]
fn layers_are_listed_and_damage_is_told() {
    let home = Home::with_box();
    let first = home.durable();
    home.sh("dd if=/dev/urandom of=/data bs=4096 count=20 2>/dev/null");
    let second = home.durable();
    let layers = home.json(&["layer", "ls"]);
    assert_eq!(layers[1]["id"], second.as_str());
    assert_eq!(layers[1]["parent"], first.as_str());
    assert_eq!(layers[1]["file_bytes"], 20 * 4096);
    assert!(home.ok(&["layer", "verify", "box"]).contains("good"));
    let path = home.directory_of(&second).join("files.data");
    let mut bytes = fs::read(&path).unwrap();
    bytes[5000] ^= 1;
    fs::write(&path, bytes).unwrap();
    let ran = home.run(&["layer", "verify"]);
    assert_eq!(ran.code, Some(1));
    assert!(
        ran.stdout.contains("files.data") && ran.stdout.contains("good"),
        "{ran:?}"
    );
    assert_eq!(home.run(&["layer", "ls", "nobox"]).code, Some(1));
}

#[test]
fn killed_at_any_step_of_writing_the_service_loses_no_durable_checkpoint() {
    let steps = [
        "files.meta",
        "files.data",
        "processes",
        "pages.data",
        "sessions",
        "manifest",
    ];
    let home = Home::with_box();
    home.sh("seq 100000 > /data; echo 0 > /step");
    let mut durable = vec![home.durable()];
    for (step, file) in (1..).zip(steps) {
        home.sh(&format!(
            "echo {step} > /step; seq {step} 200000 > /data; seq {step} > /more{step}"
        ));
        let checkpoint = home
            .command(&["checkpoint", "--durable", "box"])
            .spawn()
            .unwrap();
        let box_dir = home.path().join("checkpoints/box");
        let reached = || {
            let dirs = fs::read_dir(&box_dir).unwrap().flatten();
            let mut new = dirs.filter(|d| d.path().extension().is_some());
            new.any(|d| d.path().join(file).exists())
        };
        let mut checkpoint = checkpoint;
        // It may be past the step between two looks.
        wait_for("the step", || {
            reached() || checkpoint.try_wait().unwrap().is_some()
        });
        home.kill_service();
        let told = checkpoint.wait_with_output().unwrap();

        let layers = home.json(&["layer", "verify", "box"]);
        let layers: Vec<String> = layers
            .as_array()
            .unwrap()
            .iter()
            .map(|layer| {
                assert!(layer["damage"].is_null(), "{layer}");
                layer["id"].as_str().unwrap().to_owned()
            })
            .collect();
        assert!(
            layers.starts_with(&durable),
            "{layers:?} instead of {durable:?}"
        );
        if told.status.success() {
            let id = String::from_utf8(told.stdout).unwrap();
            assert_eq!(
                layers.last().map(String::as_str),
                Some(id.trim_end()),
                "said to be durable"
            );
        }
        assert!(
            !home
                .directory_of(&durable[0])
                .with_extension("new")
                .exists()
        );
        let before = durable.last().unwrap().clone();
        let finished = layers.len() > durable.len();
        home.ok(&["rollback", "box", &before]);
        let known = home.sh("cat /step");
        assert_ne!(known, format!("{step}\n"));
        assert_eq!(
            home.sh("head -n1 /data; wc -l < /data"),
            expected(known.trim_end())
        );
        if finished {
            let last = layers.last().unwrap();
            home.ok(&["rollback", "box", last]);
            assert_eq!(home.sh("cat /step"), format!("{step}\n"));
            assert_eq!(
                home.sh("head -n1 /data; wc -l < /data"),
                expected(&step.to_string())
            );
            durable.push(last.clone());
        }
    }
}

#[test]
fn killed_at_any_step_of_merging_deleted_checkpoints_the_service_loses_no_other() {
    let steps = [
        ("deleted", ""),
        ("new", "files.meta"),
        ("new", "files.data"),
        ("new", "processes"),
        ("new", "pages.data"),
        ("new", "sessions"),
        ("new", "manifest"),
    ];
    let home = Home::with_box();
    let box_dir = home.path().join("checkpoints/box");
    for (step, (extension, file)) in (0..).zip(steps) {
        let write = |what: u32| {
            let gone = match what {
                1 => "/data*",
                2 => "/none",
                _ => "/data1",
            };
            home.sh(&format!(
                "rm -f {gone}; echo {step} {what} > /step; seq {what} 300000 > /data{what}"
            ));
            home.durable()
        };
        let [first, gone, last] = [1, 2, 3].map(write);
        let mut deletion = home.command(&["delete", "box", &gone]).spawn().unwrap();
        let reached = || {
            let dirs = fs::read_dir(&box_dir).unwrap().flatten();
            let mut at = dirs.filter(|d| d.path().extension().is_some_and(|e| e == extension));
            at.any(|d| d.path().join(file).exists())
        };
        // It may be past the step between two looks.
        let over = || home.directory_of(&gone).with_extension("deleted").exists();
        let mut begun = false;
        wait_for("the step", || {
            begun |= deletion.try_wait().unwrap().is_some();
            reached() || (begun && !over())
        });
        home.kill_service();
        deletion.wait_with_output().unwrap();

        let kept = [(&first, 1), (&last, 3)];
        let layers = home.json(&["layer", "verify", "box"]);
        let layers = layers.as_array().unwrap();
        for (id, _) in kept {
            let layer = layers.iter().find(|l| l["id"] == id.as_str()).unwrap();
            assert!(
                layer["damage"].is_null() && layer["deleted"] == false,
                "{layer}"
            );
        }
        for (id, what) in kept {
            home.ok(&["rollback", "box", id]);
            let seen = home.sh("cat /step; head -qn1 /data*");
            let data = if what == 1 { "1\n" } else { "2\n3\n" };
            assert_eq!(seen, format!("{step} {what}\n{data}"));
        }
        // Awake again, it has merged what the deletion left, if that was told to the disk.
        home.run(&["delete", "box", &gone]);
        wait_for("the merge", || {
            let layers = home.json(&["layer", "ls", "box"]);
            layers
                .as_array()
                .unwrap()
                .iter()
                .all(|l| l["id"] != gone.as_str())
        });
        home.ok(&["rollback", "box", &last]);
        assert_eq!(home.sh("cat /step"), format!("{step} 3\n"));
        assert!(
            !fs::read_dir(&box_dir)
                .unwrap()
                .flatten()
                .any(|d| d.path().extension().is_some())
        );
    }
}

/// The first line of `/data`, and how many there are, at a step.
fn expected(step: &str) -> String {
    match step.parse::<u32>().unwrap() {
        0 => "1\n100000\n".to_owned(),
        step => format!("{step}\n{}\n", 200_000 - step + 1),
    }
}

#[test]
fn a_full_disk_fails_the_durable_checkpoint_and_nothing_else() {
    let home = Home::with_small_disk(48 << 20);
    assert_eq!(home.ok(&["create", "--name", "box"]), "box\n");
    home.sh("echo one > /f");
    let good = home.durable();
    home.sh("echo two > /f; head -c 30M /dev/urandom > /big; sha256sum /big > /sum");
    let ran = home.run(&["checkpoint", "--durable", "box"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stderr.contains("kept in memory") && ran.stderr.contains("No space left"),
        "{ran:?}"
    );
    let tree = home.json(&["tree", "box"]);
    assert_eq!(tree["nodes"][1]["state"], "failed");
    assert!(
        tree["nodes"][1]["reason"]
            .as_str()
            .unwrap()
            .contains("No space left")
    );
    let failed = tree["nodes"][1]["id"].as_str().unwrap().to_owned();
    assert!(
        !home.directory_of(&failed).with_extension("new").exists(),
        "half of it is left"
    );
    // All goes on: the sandbox, what is in memory, and what is on disk.
    home.sh("sha256sum -c /sum > /dev/null && rm /big");
    home.ok(&["rollback", "box", &good]);
    assert_eq!(home.sh("cat /f"), "one\n");
    home.ok(&["rollback", "box", &failed]);
    assert_eq!(
        home.sh("cat /f; sha256sum -c /sum > /dev/null && echo same"),
        "two\nsame\n"
    );
    home.sh("rm /big");
    let still = home.run(&["persist", "box", &failed]);
    assert_eq!(still.code, Some(1), "{still:?}");
    home.ok(&["delete", "box", &failed]);
    let warm = home.checkpoint();
    home.ok(&["persist", "box", &warm]);
    assert!(home.ok(&["inspect", "box"]).contains("2, 2 durable"));
    let later = home.durable();
    home.kill_service();
    home.ok(&["rollback", "box", &later]);
    assert_eq!(home.sh("cat /f"), "two\n");
    assert!(home.ok(&["layer", "verify"]).contains("good"));
}
