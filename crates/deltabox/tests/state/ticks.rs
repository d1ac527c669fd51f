//! A timer that ends while a checkpoint is taken: its signal is in the image, or its time is, and never both or none.

use crate::lab::{Lab, PYTHON, Program, write_file};

const DRIVER: &str = include_str!("../programs/driver.py");
const TICKS: &str = include_str!("../programs/ticks.py");

#[test]
fn one_shot_timers_tick_exactly_once_through_checkpoints_and_rollbacks() {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    let text = format!("{DRIVER}\n\n{TICKS}\n\nmain()\n");
    write_file(&sandbox, "/case.py", text.as_bytes());
    let mut program = Program::start(&sandbox, &[PYTHON, "/case.py", "ticking"]).unwrap();
    assert_eq!(program.hear().unwrap(), "ready");
    for round in 0..20 {
        let mark = program.mark();
        let id = sandbox.checkpoint(None).unwrap().id;
        if round % 4 == 0 {
            program.kill().unwrap();
        }
        sandbox.rollback(id).unwrap();
        program.went_back(mark);
        program.pass("check").unwrap();
    }
}
