//! Checkpoints, rollbacks, forks, and how they are shown.

use std::io::{BufRead, BufReader};

use crate::harness::{Home, wait_for};

#[test]
fn files_and_processes_come_back() {
    let home = Home::with_box();
    home.sh("echo one > /root/f");
    let kept = home.ok(&["exec", "-d", "box", "--", "sleep", "1000"]);
    let first = home.checkpoint();
    home.sh("echo two > /root/f; mkdir /root/d; echo x > /root/d/g");
    home.ok(&["kill", "box", kept.trim_end()]);
    home.ok(&["exec", "-d", "box", "--", "sleep", "2000"]);
    let second = home.checkpoint();
    assert_ne!(first, second);

    let diff = home.ok(&["diff", "box", &first, &second]);
    for line in ["M /root/f\n", "A /root/d\n", "A /root/d/g\n"] {
        assert!(diff.contains(line), "{line:?} is not in {diff}");
    }
    let has = |sign, what| {
        diff.lines()
            .any(|l| l.starts_with(sign) && l.ends_with(what))
    };
    assert!(has("- process", "sleep 1000"), "{diff}");
    assert!(has("+ process", "sleep 2000"), "{diff}");

    let said = home.ok(&["rollback", "box", &first]);
    assert!(said.contains(&format!("box is at {first} again")), "{said}");
    assert_eq!(
        home.sh("cat /root/f; ls /root/d 2>/dev/null | wc -l"),
        "one\n0\n"
    );
    let info = home.json(&["inspect", "box"]);
    assert_eq!(info["sandbox"]["processes"], 1, "{info}");
    assert_eq!(info["sandbox"]["current"], first.as_str());

    home.ok(&["rollback", "box", &second]);
    assert_eq!(home.sh("cat /root/f /root/d/g"), "two\nx\n");
}

#[test]
fn the_tree_is_drawn_with_the_current_checkpoint_marked() {
    let home = Home::with_box();
    assert!(home.ok(&["tree", "box"]).contains("no checkpoints yet"));
    let root = home.ok(&["checkpoint", "box", "-m", "the root"]);
    let root = root.trim_end();
    let left = home.checkpoint();
    home.ok(&["rollback", "box", root]);
    let right = home.checkpoint();
    home.ok(&["rollback", "box", &left]);

    let drawing = home.ok(&["tree", "box"]);
    let lines: Vec<_> = drawing.lines().collect();
    assert!(
        lines[0].starts_with(&format!("○ {root}  the root")),
        "{drawing}"
    );
    assert!(lines[1].starts_with(&format!("├─◉ {left}")), "{drawing}");
    assert!(lines[1].ends_with("← current"), "{drawing}");
    assert!(lines[2].starts_with(&format!("└─○ {right}")), "{drawing}");
    assert!(!drawing.contains('\x1b'), "colours without a terminal");

    home.ok(&["delete", "box", &right]);
    let tree = home.json(&["tree", "box"]);
    assert_eq!(tree["nodes"].as_array().unwrap().len(), 2);
    assert_eq!(tree["nodes"][1]["parent"], root);
}

#[test]
fn forks_live_on_their_own() {
    let home = Home::with_box();
    home.sh("echo source > /root/f");
    let id = home.checkpoint();
    home.sh("echo later > /root/f");
    let names = home.ok(&["fork", &format!("box@{id}"), "-n", "2"]);
    let names: Vec<_> = names.lines().collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert_eq!(home.ok(&["fork", "box", "--name", "now"]), "now\n");
    home.ok(&["rm", "box"]);
    assert_eq!(home.sh_in(names[0], "cat /root/f"), "source\n");
    home.sh_in(names[0], "echo changed > /root/f");
    assert_eq!(home.sh_in(names[1], "cat /root/f"), "source\n");
    assert_eq!(home.sh_in("now", "cat /root/f"), "later\n");
    let list = home.ok(&["ls"]);
    assert_eq!(list.lines().count(), 4, "{list}");
}

#[test]
fn a_command_of_an_abandoned_future_says_so_and_fails() {
    let home = Home::with_box();
    let id = home.checkpoint();
    let args = ["exec", "box", "--", "sh", "-c", "echo ready; sleep 1000"];
    let mut child = home.command(&args).spawn().unwrap();
    let mut ready = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut ready).unwrap();
    let epoch = home.json(&["rollback", "box", &id])["epoch"].clone();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr, format!("deltabox: rolled back at epoch {epoch}\n"));
}

#[test]
fn a_stopped_sandbox_refuses_commands_until_it_is_rolled_back() {
    let home = Home::with_box();
    home.ok(&["exec", "-d", "box", "--", "sleep", "1000"]);
    let id = home.checkpoint();
    home.ok(&["stop", "box"]);
    let refused = home.run(&["exec", "box", "--", "true"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("stopped"), "{refused:?}");
    home.ok(&["rollback", "box", &id]);
    wait_for("the process of the checkpoint runs", || {
        home.json(&["inspect", "box"])["sandbox"]["processes"] == 1
    });
    home.sh("true");
}

#[test]
fn hints_make_what_forks_share_and_inspect_shows_it() {
    let home = Home::with_box();
    home.ok(&["exec", "-d", "box", "--", "sleep", "1000"]);
    let id = home.checkpoint();
    let hint = |more: &[&str]| home.ok(&[&["hint", "box", &id], more].concat());
    assert_eq!(hint(&[]), "its forks share no memory yet\n");
    assert_eq!(hint(&["--pin", "--forks", "2"]), "its forks share memory\n");
    assert!(home.ok(&["inspect", "box"]).contains("1 pinned"));
    hint(&["--unpin"]);
    let ready = &home.json(&["inspect", "box"])["ready"];
    assert_eq!(
        (&ready["templates"]["pinned"], &ready["templates"]["number"]),
        (&0.into(), &1.into())
    );
    assert_eq!(home.run(&["hint", "box", "c99", "--pin"]).code, Some(1));
}

#[test]
fn a_service_keeps_ready_what_it_was_told_to() {
    let home = Home::new();
    let mut first = home.command(&["create", "--name", "box"]);
    let first = first
        .env("DELTABOX_TEMPLATES", "0")
        .env("DELTABOX_WARM", "3");
    assert!(first.output().unwrap().status.success());
    home.ok(&["exec", "-d", "box", "--", "sleep", "1000"]);
    let id = home.checkpoint();
    assert_eq!(
        home.ok(&["hint", "box", &id, "--pin"]),
        "its forks share no memory yet\n"
    );
    let ready = &home.json(&["inspect", "box"])["ready"];
    assert_eq!(
        (&ready["templates"]["limit"], &ready["warm"]["limit"]),
        (&0.into(), &3.into())
    );
}
