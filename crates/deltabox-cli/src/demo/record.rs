//! The independent record of a state: what programs inside see, without DeltaBox's bookkeeping.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::project::Project;
use super::world::World;
use crate::units::visible;

/// The most differences of one comparison that are told.
const MOST_TOLD: usize = 8;

/// Facts by name: each file, process and answer, the REPL's memory, the shell's state.
pub(super) struct Record(BTreeMap<String, String>);

impl Record {
    /// Writes down the state that the world has now.
    pub(super) fn take(world: &World, project: &Project) -> Result<Self> {
        let port = world.place.port;
        let urls = ["notes", project.target].map(|page| format!("http://127.0.0.1:{port}/{page}"));
        let told = world.tool("witness.py", &[&world.place.work, &urls[0], &urls[1]])?;
        let mut facts = BTreeMap::new();
        for line in told.lines() {
            let (name, value) = line
                .rsplit_once('\t')
                .with_context(|| format!("the witness wrote {line:?}"))?;
            facts.insert(name.replace('\t', " "), value.to_owned());
        }
        let shell = "declare -p ${!DEMO_@}; declare -f; pwd; umask; jobs -l";
        facts.insert("shell".into(), world.shell(shell)?);
        facts.insert("REPL memory".into(), world.repl("digest()")?);
        Ok(Self(facts))
    }

    /// How many paths it holds.
    pub(super) fn files(&self) -> usize {
        let files = self.0.keys().filter(|name| name.starts_with("file "));
        files.count()
    }

    /// What differs in a later record, in words.
    pub(super) fn differences(&self, later: &Self) -> Vec<String> {
        let changed = self.0.iter().filter_map(|(name, was)| {
            let is = later.0.get(name);
            match is {
                Some(is) if is == was => None,
                Some(is) => Some(format!("{name} was {was:?} and is {is:?}")),
                None => Some(format!("{name} ({was:?}) is gone")),
            }
        });
        let added = later
            .0
            .iter()
            .filter(|(name, _)| !self.0.contains_key(*name));
        let added = added.map(|(name, is)| format!("{name} ({is:?}) was not there"));
        let mut all: Vec<_> = changed
            .chain(added)
            .map(|text| visible(&text).into_owned())
            .collect();
        if all.len() > MOST_TOLD {
            let more = all.len() - MOST_TOLD;
            all.truncate(MOST_TOLD);
            all.push(format!("and {more} more"));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(facts: &[(&str, &str)]) -> Record {
        Record(facts.iter().map(|&(k, v)| (k.into(), v.into())).collect())
    }

    #[test]
    fn every_kind_of_difference_is_told() {
        let was = record(&[("file a", "1"), ("process 7", "x"), ("shell", "v=1")]);
        assert!(was.differences(&was).is_empty());
        let told = was.differences(&record(&[
            ("file a", "2"),
            ("shell", "v=1"),
            ("file b", "3"),
        ]));
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(told[0].contains("file a was"));
        assert!(told[1].contains("process 7") && told[1].contains("gone"));
        assert!(told[2].contains("file b") && told[2].contains("not there"));
    }
}
