//! What the search may do at a node, and how it is scored.

use anyhow::{Context, Result, bail};

use super::project::Project;
use super::uct::Search;
use super::world::{World, sh};

/// Defects that are put into the target module.
const DEFECTS: usize = 5;
/// Places that are tried until the tests notice as many.
const TRIES: usize = 40;
/// How many recorded commands an action may go forward.
const REACH: usize = 3;

/// One action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Replaces a token of the target module.
    Edit {
        line: u32,
        column: u32,
        old: String,
        new: String,
    },
    /// Runs the recorded command of this number.
    Recorded(usize),
}

impl Action {
    /// In words, for a checkpoint's message.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Edit { line, old, new, .. } => format!("line {line}: {old} becomes {new}"),
            Self::Recorded(step) => format!("recorded command {step}"),
        }
    }
}

/// The task: what was broken, what can be done, and what the tests say of it.
pub(super) struct Task<'a> {
    pub(super) project: &'a Project,
    /// Tests that run when nothing is broken.
    total: u32,
    defects: Vec<Action>,
    edits: Vec<Action>,
}

impl<'a> Task<'a> {
    /// Breaks the freshly unpacked project, so that there is something to search for.
    pub(super) fn prepare(world: &World, project: &'a Project, seed: u64) -> Result<Self> {
        let mut task = Self {
            project,
            total: 0,
            defects: Vec::new(),
            edits: Vec::new(),
        };
        if project.instance.is_none() {
            task.find_defects(world, seed)?;
        }
        task.spoil(world)?;
        if project.instance.is_some() {
            task.total = task.test(world)?.ran;
        }
        match task.total {
            0 => bail!("no test ran; they said: {}", world.test(project)?),
            _ => Ok(task),
        }
    }

    /// Breaks a freshly unpacked project as [`Task::prepare`] did.
    pub(super) fn spoil(&self, world: &World) -> Result<()> {
        if let Some(instance) = &self.project.instance {
            let undo = "cd $0 && patch -s -p1 -R";
            let mut patch = instance.golden_patch.as_bytes();
            sh(&world.sandbox, &[undo, &world.place.work], Some(&mut patch))?;
            let commit = "cd $0 && if command -v git > /dev/null; then git init -q . && \
                git config gc.auto 0 && git config maintenance.auto false && git add -A && \
                git -c user.name=demo -c user.email=demo@localhost commit -q -m base; fi";
            // git's own housekeeping would go on in the background while the state is written down.
            sh(&world.sandbox, &[commit, &world.place.work], None)?;
        }
        let mut defects = self.defects.iter();
        defects.try_for_each(|defect| self.edit(world, defect))
    }

    /// Tries possible defects one by one and keeps those that some tests notice, but not most.
    fn find_defects(&mut self, world: &World, seed: u64) -> Result<()> {
        let whole = self.test(world)?;
        if whole.failed > 0 {
            bail!("the project's tests fail before anything was changed: {whole:?}");
        }
        self.total = whole.ran;
        let file = self.target(world);
        let told = world.tool("edit.py", &["sites", &file, &seed.to_string()])?;
        sh(&world.sandbox, &["cp -p $0 /tmp/whole", &file], None)?;
        for text in told.lines().take(TRIES) {
            let site = Site::read(text)?;
            self.edit(world, &site.defect)?;
            let score = self.score(world)?;
            sh(&world.sandbox, &["cp -p /tmp/whole $0", &file], None)?;
            if (0.5..1.0).contains(&score) {
                self.defects.push(site.defect);
                self.edits.extend(site.repairs);
            }
            if self.defects.len() == DEFECTS {
                break;
            }
        }
        match self.defects.len() {
            0 => bail!("no defect that the tests notice was found in {file}"),
            _ => Ok(()),
        }
    }

    fn target(&self, world: &World) -> String {
        format!("{}/{}", world.place.work, self.project.target)
    }

    /// Replaces a token of the target module; other actions do nothing here.
    fn edit(&self, world: &World, action: &Action) -> Result<()> {
        let Action::Edit {
            line,
            column,
            old,
            new,
        } = action
        else {
            return Ok(());
        };
        let (line, column) = (line.to_string(), column.to_string());
        let args = ["apply", &self.target(world), &line, &column, old, new];
        world.tool("edit.py", &args).map(|_| ())
    }

    /// What can be tried after the actions on the way to a node.
    pub(super) fn untried(
        &self,
        search: &Search<Action>,
        parent: usize,
        last: &Action,
    ) -> Vec<Action> {
        match (last, &self.project.instance) {
            (Action::Recorded(step), Some(instance)) => {
                let next = step + 1..(step + 1 + REACH).min(instance.steps.len());
                next.map(Action::Recorded).collect()
            }
            _ => {
                let path = search.path(parent);
                let mut done: Vec<_> = path
                    .iter()
                    .filter_map(|&n| search.nodes[n].action.as_ref())
                    .collect();
                done.push(last);
                let open = |edit: &&Action| !done.iter().any(|d| line(d) == line(edit));
                self.edits.iter().filter(open).cloned().collect()
            }
        }
    }

    /// What can be tried first.
    pub(super) fn first(&self) -> Vec<Action> {
        match &self.project.instance {
            Some(instance) => (0..instance.steps.len().min(REACH))
                .map(Action::Recorded)
                .collect(),
            None => self.edits.clone(),
        }
    }

    /// Does an action, with what else happens in a step: other files, memory, processes.
    pub(super) fn act(&self, world: &World, action: &Action, step: u64) -> Result<()> {
        let work = &world.place.work;
        match action {
            Action::Edit { .. } => {
                self.edit(world, action)?;
                let spare = format!("{work}/{}", self.project.spare);
                world.tool("edit.py", &["churn", &spare, &step.to_string()])?;
            }
            Action::Recorded(number) => {
                let instance = self.project.instance.as_ref();
                let recorded = instance.and_then(|i| i.steps.get(*number));
                let recorded = recorded.context("no such recorded command")?;
                // Models try things that fail: the state that a failure leaves is a state like others.
                world.recorded(&recorded.cmd)?;
            }
        }
        world.live(step)
    }

    /// The share of the tests that pass.
    pub(super) fn score(&self, world: &World) -> Result<f64> {
        let outcome = self.test(world)?;
        let passed = outcome.ran.saturating_sub(outcome.failed);
        Ok((f64::from(passed) / f64::from(self.total.max(1))).min(1.0))
    }

    fn test(&self, world: &World) -> Result<Outcome> {
        Ok(Outcome::read(&world.test(self.project)?))
    }
}

fn line(action: &Action) -> Option<u32> {
    match action {
        Action::Edit { line, .. } => Some(*line),
        Action::Recorded(_) => None,
    }
}

/// A place where a defect can be put.
struct Site {
    defect: Action,
    repairs: Vec<Action>,
}

impl Site {
    /// Reads a line that `edit.py sites` prints.
    fn read(text: &str) -> Result<Self> {
        let words: Vec<_> = text.split(' ').collect();
        let [line, column, right, wrong, options] = words[..] else {
            bail!("edit.py printed {text:?}")
        };
        let (line, column) = (line.parse()?, column.parse()?);
        let edit = |old: &str, new: &str| Action::Edit {
            line,
            column,
            old: old.to_owned(),
            new: new.to_owned(),
        };
        Ok(Self {
            defect: edit(right, wrong),
            repairs: options.split(',').map(|new| edit(wrong, new)).collect(),
        })
    }
}

/// unittest's summary. Nothing ran if there is none: the module could not be loaded, or did not end.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    ran: u32,
    failed: u32,
}

impl Outcome {
    fn read(text: &str) -> Self {
        let number = |after: &str| {
            let (_, rest) = text.rsplit_once(after)?;
            let digits = rest
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(rest.len());
            rest[..digits].parse::<u32>().ok()
        };
        let failures = number("failures=").unwrap_or(0);
        Self {
            ran: number("Ran ").unwrap_or(0),
            failed: failures.saturating_add(number("errors=").unwrap_or(0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_unittest_is_read() {
        let read = |text| {
            let outcome = Outcome::read(text);
            (outcome.ran, outcome.failed)
        };
        assert_eq!(read("Ran 26 tests in 0.0s\n\nOK\n"), (26, 0));
        assert_eq!(read("Ran 1 test in 0.0s\n\nFAILED (errors=1)\n"), (1, 1));
        assert_eq!(
            read("Ran 9 tests in 1s\n\nFAILED (failures=2, errors=3)\n"),
            (9, 5)
        );
        assert_eq!(read("Traceback"), (0, 0));
    }

    #[test]
    fn each_repair_of_a_defect_is_an_action() {
        let site = Site::read("12 4 < <= <,>").unwrap();
        assert_eq!(site.defect.describe(), "line 12: < becomes <=");
        assert_eq!(site.repairs[1].describe(), "line 12: <= becomes >");
        assert!(Site::read("12 4 <=").is_err());
    }
}
