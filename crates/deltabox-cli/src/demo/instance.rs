//! A recorded SWE-bench instance: one JSON object a line.

use std::fs;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// One instance, with what an agent did about it.
#[derive(Debug, Deserialize)]
pub(super) struct Instance {
    pub(super) instance_id: String,
    /// The source release that holds the fix, as `Django==4.2`.
    pub(super) sdist: String,
    /// The fix, a patch; undone before the search begins.
    pub(super) golden_patch: String,
    /// Arguments for Django's `tests/runtests.py`.
    pub(super) test_modules: Vec<String>,
    /// The recorded actions in order.
    pub(super) steps: Vec<Step>,
}

/// A recorded action.
#[derive(Debug, Deserialize)]
pub(super) struct Step {
    /// A bash command line.
    pub(super) cmd: String,
}

impl Instance {
    /// Reads `FILE`, `FILE:INDEX` (from 0 on) or `FILE:ID`.
    pub(super) fn read(text: &str) -> Result<Self> {
        let (path, which) = match text.rsplit_once(':') {
            Some((path, which)) if !fs::exists(text).unwrap_or(false) => (path, which),
            _ => (text, "0"),
        };
        let lines = fs::read_to_string(path).with_context(|| format!("reading {path:?}"))?;
        let instances: Vec<Self> = lines
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()
            .with_context(|| format!("{path:?} does not hold one instance a line"))?;
        let index = match which.parse() {
            Ok(index) => Some(index),
            Err(_) => instances.iter().position(|i| i.instance_id == which),
        };
        let count = instances.len();
        let instance = index.and_then(|index: usize| instances.into_iter().nth(index));
        let instance = instance.with_context(|| {
            format!("{path:?} has no instance {which:?}; it holds {count}, numbered from 0 on")
        })?;
        instance.check()?;
        Ok(instance)
    }

    /// The modules become words of a shell command.
    fn check(&self) -> Result<()> {
        let plain = |m: &String| {
            m.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._".contains(&b))
        };
        match self.test_modules.iter().all(plain) && !self.test_modules.is_empty() {
            true => Ok(()),
            false => bail!("{:?} are not test modules", self.test_modules),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LINES: &str = r#"{"instance_id":"a","sdist":"D==1","golden_patch":"","test_modules":["x.y"],"steps":[{"cmd":"ls","t":0}]}
{"instance_id":"b","sdist":"D==1","golden_patch":"","test_modules":["x; rm"],"steps":[]}
"#;

    #[test]
    fn an_instance_is_named_by_index_or_id_and_checked() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(LINES.as_bytes()).unwrap();
        let path = file.path().to_str().unwrap();
        for which in ["", ":0", ":a"] {
            let instance = Instance::read(&format!("{path}{which}")).unwrap();
            assert_eq!(
                (instance.instance_id.as_str(), instance.steps.len()),
                ("a", 1)
            );
        }
        let told = |which: &str| {
            Instance::read(&format!("{path}{which}"))
                .unwrap_err()
                .to_string()
        };
        assert!(told(":2").contains("no instance"));
        assert!(told(":b").contains("not test modules"));
    }
}
