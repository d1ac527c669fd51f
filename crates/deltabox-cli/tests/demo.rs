//! `deltabox demo` from beginning to end, on the standard library and without full copies.

use std::process::Command;

#[test]
fn every_rollback_and_fork_of_the_demo_is_verified() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let output = Command::new(env!("CARGO_BIN_EXE_deltabox"))
        .args(["demo", "--offline", "--no-copies", "--nodes", "6", "--json"])
        .arg("--state-dir")
        .arg(&state)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["nodes"], 6);
    assert_eq!(report["asked"], 5 + 8, "{report}");
    assert_eq!(report["right"], 5 + 8, "{report}");
    assert_eq!(report["wrong"], serde_json::json!([]));
    assert_eq!(report["rows"][2]["operation"], "rollback");
    assert_eq!(report["rows"][2]["deltabox"]["n"], 5);
    let left: Vec<_> = dir.path().read_dir().unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}
