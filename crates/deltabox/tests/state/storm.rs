//! A program in which threads and processes are born and die, and mappings come and go, while it is checkpointed over and over;
//! each checkpoint is of a whole program.

use crate::lab::{Lab, Outcome, Program, output, write_file};
use crate::walk::Dice;
use crate::work::number;

/// The most checkpoints that are kept at a time.
const KEPT: usize = 10;

#[test]
fn a_checkpoint_in_a_storm_of_births_and_mappings_is_of_a_whole_program() -> Outcome {
    let lab = Lab::new();
    let sandbox = lab.sandbox();
    write_file(&sandbox, "/storm.c", include_bytes!("../programs/storm.c"));
    output(&sandbox, "cc -O1 -o /storm /storm.c -lpthread");
    let mut dice = Dice::new(number("DELTABOX_SEED", 4711) as u64);
    for round in 1..=number("DELTABOX_ROUNDS", 1) {
        let mut program = Program::start(&sandbox, &["/storm", "10"])?;
        assert_eq!(program.hear()?, "begun");
        let mut kept = Vec::new();
        while program.session.info().exit.is_none() {
            let made = sandbox.checkpoint(None).map_err(|e| e.to_string())?;
            kept.push((made.id, program.mark()));
            if kept.len() > KEPT {
                let (old, _) = kept.remove(dice.roll(KEPT));
                sandbox.delete(old).map_err(|e| e.to_string())?;
            }
        }
        assert_eq!(program.hear()?, "ended", "round {round}");
        for back in 0..3 {
            let (id, mark) = kept[dice.roll(kept.len())];
            let report = sandbox.rollback(id).map_err(|e| e.to_string())?;
            assert_eq!(report.fallback, None);
            program.went_back(mark);
            let told = program.hear();
            assert_eq!(told.as_deref(), Ok("ended"), "round {round}.{back}");
        }
    }
    Ok(())
}
