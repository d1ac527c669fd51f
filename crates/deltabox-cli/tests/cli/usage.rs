//! Wrong usage, wrong names, and what is said about them.

use std::fs;

use crate::harness::Home;

#[test]
fn wrong_usage_exits_with_2_and_starts_no_service() {
    let home = Home::new();
    for args in [
        &["frobnicate"][..],
        &["exec", "box"],
        &["rollback", "box", "first"],
        &["create", "--memory", "lots"],
        &["fork", "box", "-n", "0"],
    ] {
        let ran = home.run(args);
        assert_eq!(ran.code, Some(2), "{args:?}: {ran:?}");
        assert!(ran.stdout.is_empty() && !ran.stderr.is_empty(), "{ran:?}");
    }
    assert_eq!(home.run(&["service", "status"]).code, Some(1));
    assert_eq!(home.ok(&["service", "stop"]), "no service runs\n");
}

#[test]
fn unknown_names_fail_in_one_line_that_says_what_to_do() {
    let home = Home::with_box();
    for (args, wanted) in [
        (&["rm", "nope"][..], "\"nope\""),
        (&["exec", "nope", "--", "true"], "\"nope\""),
        (&["tree", "nope"], "deltabox ls"),
        (&["rollback", "box", "c999"], "c999"),
        (&["diff", "box", "c998", "c999"], "c99"),
        (&["delete", "box", "c999"], "c999"),
        (&["fork", "box@c999"], "c999"),
        (&["logs", "box", "s999"], "s999"),
        (&["create", "--name", "box"], "exists already"),
        (&["create", "--name", "../x"], "../x"),
    ] {
        let ran = home.run(args);
        assert_eq!(ran.code, Some(1), "{args:?}: {ran:?}");
        assert!(ran.stderr.starts_with("deltabox: "), "{args:?}: {ran:?}");
        assert!(ran.stderr.contains(wanted), "{args:?}: {ran:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{args:?}: {ran:?}");
        assert_eq!(ran.stdout, "", "{args:?}");
    }
    assert_eq!(home.json(&["ls"]).as_array().unwrap().len(), 1);
}

#[test]
fn a_base_that_cannot_be_one_is_refused() {
    let home = Home::new();
    let file = home.path().join("file");
    fs::write(&file, "").unwrap();
    let nowhere = home.path().join("nowhere");
    for base in [&file, &nowhere, &home.path().to_owned()] {
        let ran = home.run(&["create", "--base", base.to_str().unwrap()]);
        assert_eq!(ran.code, Some(1), "{base:?}: {ran:?}");
        assert!(ran.stderr.contains(base.to_str().unwrap()), "{ran:?}");
    }
    assert_eq!(home.json(&["ls"]).as_array().unwrap().len(), 0);
}

#[test]
fn a_command_that_cannot_run_exits_like_in_a_shell() {
    let home = Home::with_box();
    let absent = home.run(&["exec", "box", "--", "/no/such/program"]);
    assert_eq!(absent.code, Some(127), "{absent:?}");
    assert!(absent.stderr.contains("/no/such/program"), "{absent:?}");
    let directory = home.run(&["exec", "box", "--", "/tmp"]);
    assert_eq!(directory.code, Some(126), "{directory:?}");
    let nobody = home.run(&["exec", "-u", "no-such-user", "box", "--", "true"]);
    assert_eq!(nobody.code, Some(1), "{nobody:?}");
    assert!(nobody.stderr.contains("no-such-user"), "{nobody:?}");
}

#[test]
fn errors_are_json_where_json_is_wanted() {
    let home = Home::new();
    let ran = home.run(&["tree", "nope", "--json"]);
    assert_eq!(ran.code, Some(1));
    let error: serde_json::Value = serde_json::from_str(&ran.stderr).expect(&ran.stderr);
    assert_eq!(error["error"]["code"], "no_sandbox");
}

#[test]
fn doctor_needs_no_service_and_names_every_feature() {
    let home = Home::new();
    let features = home.json(&["doctor"]);
    assert!(!features.as_array().unwrap().is_empty());
    let text = home.ok(&["doctor"]);
    for feature in features.as_array().unwrap() {
        let name = feature["name"].as_str().unwrap();
        assert!(text.contains(name), "{name} is not in {text}");
    }
    assert_eq!(home.run(&["service", "status"]).code, Some(1));
}
