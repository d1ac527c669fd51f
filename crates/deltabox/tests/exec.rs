//! Commands in a sandbox: streams, exit statuses, users, time limits.

mod common;

use common::*;

#[test]
fn output_errors_and_status_of_a_command_come_out() {
    let f = Fixture::new();
    let sandbox = f.sandbox();
    let got = sandbox
        .run(&["sh", "-c", "echo out; echo err >&2; exit 7"])
        .unwrap();
    assert_eq!(
        (got.status, text(&got.stdout), text(&got.stderr)),
        (7, "out\n".into(), "err\n".into())
    );
}
