//! A random walk over a tree of checkpoints: every state that is gone back to must be the one that was recorded.
//!
//! `DELTABOX_ROUNDS=200` for a long walk, with other dice if `DELTABOX_SEED` is set.

use deltabox::{CheckpointId, Sandbox};

use crate::lab::{Lab, PYTHON, Program, write_file};
use crate::work::number;

/// A generator of the same numbers on every run (xorshift).
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    pub(crate) fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap_or(0) % sides
    }
}

/// What was seen at a checkpoint.
struct Node {
    id: CheckpointId,
    mark: u64,
    /// What the program tells of its memory, descriptors and children.
    memory: String,
    /// What another program tells of the files.
    files: String,
    processes: usize,
    /// A step that was made from here, and what the program told of itself after it.
    onward: Option<(usize, String)>,
}

struct Walk {
    sandbox: std::sync::Arc<Sandbox>,
    program: Program,
    nodes: Vec<Node>,
}

impl Walk {
    fn start(lab: &Lab) -> Self {
        let sandbox = lab.sandbox();
        write_file(
            &sandbox,
            "/walker.py",
            include_bytes!("../programs/walker.py"),
        );
        write_file(&sandbox, "/tree.py", include_bytes!("../programs/tree.py"));
        let run = "mkdir /walk && exec \"$0\" /walker.py";
        let program = Program::start(&sandbox, &["sh", "-c", run, PYTHON]).unwrap();
        Self {
            sandbox,
            program,
            nodes: Vec::new(),
        }
    }

    fn checkpoint(&mut self) {
        let memory = self.program.ask("digest").unwrap();
        let files = files(&self.sandbox);
        let processes = self.sandbox.info().processes;
        self.nodes.push(Node {
            id: self.sandbox.checkpoint(None).unwrap().id,
            mark: self.program.mark(),
            memory,
            files,
            processes,
            onward: None,
        });
    }

    fn step(&mut self, seed: usize) {
        assert_eq!(self.program.ask(&format!("step {seed}")).unwrap(), "done");
    }

    fn roll_back(&mut self, number: usize, what: &str) {
        let node = &self.nodes[number];
        let report = self.sandbox.rollback(node.id).unwrap();
        self.program.went_back(node.mark);
        assert_eq!(report.fallback, None, "{what}");
        assert_eq!(
            self.sandbox.info().processes,
            node.processes,
            "{what}: processes"
        );
        assert_eq!(files(&self.sandbox), node.files, "{what}: files");
        assert_eq!(
            self.program.ask("digest").unwrap(),
            node.memory,
            "{what}: memory"
        );
    }

    /// A step from a node has the same outcome every time: nothing that the digests do not show differs either.
    fn step_again(&mut self, number: usize, seed: usize, what: &str) {
        let (seed, known) = match &self.nodes[number].onward {
            Some((seed, digest)) => (*seed, Some(digest.clone())),
            None => (seed, None),
        };
        self.step(seed);
        let digest = self.program.ask("digest").unwrap();
        if let Some(known) = known {
            assert_eq!(digest, known, "{what}: after the step");
        }
        self.nodes[number].onward = Some((seed, digest));
    }
}

/// A digest of the files by a program that was not rolled back.
fn files(sandbox: &Sandbox) -> String {
    let output = sandbox.run(&[PYTHON, "/tree.py", "/walk"]).unwrap();
    assert_eq!(output.status, 0, "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn walk(seed: u64, rounds: usize) {
    let lab = Lab::new();
    let mut walk = Walk::start(&lab);
    let mut dice = Dice::new(seed);
    walk.checkpoint();
    for round in 0..rounds {
        let number = dice.roll(walk.nodes.len());
        let what = format!("seed {seed}, round {round}, back to node {number}");
        if dice.roll(5) == 0 {
            walk.program.kill().unwrap();
        }
        walk.roll_back(number, &what);
        walk.step_again(number, dice.roll(1 << 30), &what);
        for _ in 0..dice.roll(3) {
            walk.step(dice.roll(1 << 30));
        }
        walk.checkpoint();
    }
    let node = walk.nodes.last().unwrap();
    for fork in lab.fork(&walk.sandbox, node.id, 2).unwrap() {
        let mut program = walk.program.in_fork(&fork, node.mark).unwrap();
        assert_eq!(files(&fork), node.files, "files of the fork");
        assert_eq!(program.ask("digest").unwrap(), node.memory, "the fork");
    }
}

#[test]
fn every_node_of_a_random_walk_is_given_back_as_it_was() {
    let seed = number("DELTABOX_SEED", 20_260_522);
    walk(seed as u64, number("DELTABOX_ROUNDS", 25));
}

#[test]
fn every_node_of_another_random_walk_is_given_back_as_it_was() {
    walk(77, 25);
}

#[test]
fn nodes_whose_ancestors_were_deleted_are_given_back_as_they_were() {
    let lab = Lab::new();
    let mut walk = Walk::start(&lab);
    for seed in 0..8 {
        walk.step(seed);
        walk.checkpoint();
    }
    for number in [0, 1, 3, 4, 6] {
        walk.sandbox.delete(walk.nodes[number].id).unwrap();
    }
    for number in [2, 7, 5, 2] {
        walk.roll_back(number, &format!("back to node {number}"));
    }
}
