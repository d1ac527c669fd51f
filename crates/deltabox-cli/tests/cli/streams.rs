//! Input, output, status and signals of commands.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use rustix::process::Signal;

use crate::harness::{Home, kill, wait_for};

#[test]
fn a_commands_streams_and_status_are_passed_through() {
    let home = Home::with_box();
    let script = "cat; echo wrong >&2; exit 7";
    let input = vec![b'x'; 1 << 20];
    let ran = home.run_with(&["exec", "-i", "box", "--", "sh", "-c", script], &input);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(7), "wrong\n"));
    assert!(ran.stdout.as_bytes() == input, "{} bytes", ran.stdout.len());

    let without = home.run_with(&["exec", "box", "--", "cat"], b"not sent");
    assert_eq!((without.code, without.stdout.as_str()), (Some(0), ""));
    let killed = home.run(&["exec", "box", "--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(killed.code, Some(137));
}

#[test]
fn surroundings_are_as_asked_for() {
    let home = Home::with_box();
    let script = "echo $K $HERE; pwd; id -u";
    let args = "exec -e K=v=1 -e HERE -w /usr/bin -u nobody box -- sh -c";
    let mut args: Vec<_> = args.split(' ').collect();
    args.push(script);
    let output = home.command(&args).env("HERE", "passed").output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(stdout, "v=1 passed\n/usr/bin\n65534\n");
}

#[test]
fn a_command_whose_time_runs_out_exits_with_124_and_leaves_nothing() {
    let home = Home::with_box();
    let script = "sleep 1001 & sleep 1002";
    let ran = home.run(&["exec", "--timeout", "0.5", "box", "--", "sh", "-c", script]);
    assert_eq!(ran.code, Some(124), "{ran:?}");
    assert!(ran.stderr.contains("time ran out"), "{ran:?}");
    wait_for("the command and its descendants are gone", || {
        home.json(&["inspect", "box"])["sandbox"]["processes"] == 0
    });
}

#[test]
fn a_detached_command_runs_on_and_can_be_read_followed_and_killed() {
    let home = Home::with_box();
    let script = "echo begun; read x; exit 3";
    let id = home.ok(&[
        "exec",
        "-d",
        "box",
        "--",
        "sh",
        "-c",
        "echo begun; exec sleep 1000",
    ]);
    let id = id.trim_end();
    wait_for("the command writes", || {
        home.ok(&["logs", "box", id]) == "begun\n"
    });
    let attached = home.command(&["attach", "box", id]).spawn().unwrap();
    home.ok(&["kill", "box", id, "-s", "15"]);
    let output = attached.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143));
    assert_eq!(output.stdout, b"begun\n");
    assert!(home.ok(&["inspect", "box"]).contains("exit 143"));

    let text = home.ok(&["--json", "exec", "-d", "box", "--", "sh", "-c", script]);
    let session: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(session["argv"][2], script);
}

#[test]
fn an_interrupt_goes_to_the_command() {
    let home = Home::with_box();
    let script = "trap 'echo caught; exit 42' INT; echo ready; while :; do sleep 0.05; done";
    let args = ["exec", "box", "--", "sh", "-c", script];
    let mut child = home.command(&args).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    kill(&child, Signal::INT);
    assert_eq!(lines.next().unwrap().unwrap(), "caught");
    assert_eq!(child.wait().unwrap().code(), Some(42));
}

#[test]
fn a_command_whose_output_nobody_reads_ends_quietly() {
    let home = Home::with_box();
    let mut child = home.command(&["exec", "box", "--", "yes"]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 100]).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), output.stderr.as_slice()),
        (Some(141), &b""[..])
    );
    wait_for("yes is gone", || {
        home.json(&["inspect", "box"])["sandbox"]["processes"] == 0
    });
}

#[test]
fn much_output_arrives_whole() {
    let home = Home::with_box();
    let args = ["exec", "box", "--", "head", "-c", "150000000", "/dev/zero"];
    let mut child = home.command(&args).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let count = std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (count, output.status.code()),
        (150_000_000, Some(0)),
        "{output:?}"
    );
}

#[test]
fn output_as_json_is_one_object_a_line() {
    let home = Home::with_box();
    let script = "printf 'é'; exit 5";
    let ran = home.run(&["--json", "exec", "box", "--", "sh", "-c", script]);
    let lines: Vec<serde_json::Value> = ran
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    assert_eq!(lines[0]["stream"], "stdout");
    assert_eq!(lines[0]["text"], "é");
    assert_eq!(lines.last().unwrap()["end"], "exit");
    assert_eq!(lines.last().unwrap()["status"], 5);
    assert_eq!(ran.code, Some(5));
}

#[test]
fn a_shell_on_a_pipe_runs_a_script() {
    let home = Home::with_box();
    let ran = home.run_with(&["shell", "box"], b"cd /usr\npwd\nexit 4\n");
    assert_eq!(
        (ran.code, ran.stdout.as_str()),
        (Some(4), "/usr\n"),
        "{ran:?}"
    );
}

#[test]
fn a_list_that_nobody_reads_is_no_failure() {
    let home = Home::with_box();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = home.command(&["ls"]).stdout(Stdio::from(writer)).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}
