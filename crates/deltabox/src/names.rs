//! Names of sandboxes, and what their spec may say.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::spec::SandboxSpec;

/// Checks a name: it becomes a file name, a cgroup's and a host name.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let good = (1..=64).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if good {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{name:?} cannot be a sandbox's name: it must be 1 to 64 of a-z A-Z 0-9 _ . - and begin with a letter or digit"
    )))
}

/// The first of `box1`, `box2`, … that is not taken.
pub(crate) fn choose(taken: impl Fn(&str) -> bool) -> String {
    (1_u64..)
        .map(|n| format!("box{n}"))
        .find(|name| !taken(name))
        .unwrap_or_default()
}

/// The name of a sandbox that was made from another: the other's, shortened where it must be, and a number.
pub(crate) fn numbered(source: &str, number: u64) -> String {
    let number = format!("-{number}");
    let kept = source.len().min(64 - number.len());
    format!("{}{number}", &source[..kept])
}

/// What the control group of the templates is called: no sandbox's name.
pub(crate) const TEMPLATES: &str = "+templates";

/// What the names begin with that are no sandbox's.
pub(crate) const NAMELESS: char = '+';

/// What a sandbox is called that nobody has asked for yet: no sandbox's name.
pub(crate) fn nameless(number: u64) -> String {
    format!("{NAMELESS}{number}")
}

/// Checks limits and host name.
pub(crate) fn check_spec(spec: &SandboxSpec) -> Result<()> {
    let invalid = |why: String| Err(Error::Invalid(why));
    if let Some(hostname) = &spec.hostname
        && (hostname.is_empty()
            || hostname.len() > 64
            || !hostname
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || ".-".contains(c)))
    {
        return invalid(format!(
            "{hostname:?} cannot be a host name: it must be 1 to 64 of a-z A-Z 0-9 . -"
        ));
    }
    if spec.memory.is_some_and(|m| m < 1 << 20) {
        return invalid("a memory limit below 1 MiB leaves no room for any program".to_owned());
    }
    if spec.disk.is_some_and(|d| d < 1 << 20) {
        return invalid("a disk quota below 1 MiB leaves no room for any file".to_owned());
    }
    if spec.inodes == Some(0) {
        return invalid("a quota of 0 files leaves no room for any".to_owned());
    }
    if spec.pids == Some(0) {
        return invalid("a limit of 0 processes leaves no room for any program".to_owned());
    }
    match spec.cpus {
        Some(cpus) if !(0.01..=4096.0).contains(&cpus) => {
            invalid(format!("{cpus} is no sensible number of processors"))
        }
        _ => Ok(()),
    }
}

/// Checks a base directory against the state directory (absolute, without links). Returns it without links, and what is
/// to be hidden in it: the state directory, as seen from the base.
pub(crate) fn check_base(base: &Path, state_dir: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    let cannot = |why: &str| {
        Err(Error::Invalid(format!(
            "{} cannot be the base of a sandbox: {why}",
            base.display()
        )))
    };
    let real = match base.canonicalize() {
        Ok(real) => real,
        Err(e) => return cannot(&e.to_string()),
    };
    if !real.is_dir() {
        return cannot("it is not a directory");
    }
    if real.starts_with(state_dir) {
        return cannot("it is, or lies in, the state directory of the sandboxes");
    }
    let hidden = state_dir
        .strip_prefix(&real)
        .map(|inside| Path::new("/").join(inside));
    Ok((real, hidden.into_iter().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_safe_as_file_names_are_taken() {
        for good in ["a", "A9_.-x", &"x".repeat(64)] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ä", &"x".repeat(65)] {
            check_name(bad).unwrap_err();
        }
        assert_eq!(choose(|n| n == "box1"), "box2");
    }

    #[test]
    fn the_state_directory_is_hidden_in_a_base_that_contains_it_and_no_base_itself() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let state = dir.join("state");
        std::fs::create_dir_all(state.join("sub")).unwrap();
        let (base, hidden) = check_base(&dir, &state).unwrap();
        assert_eq!(base, dir);
        assert_eq!(hidden, [PathBuf::from("/state")]);
        check_base(&state, &state).unwrap_err();
        check_base(&state.join("sub"), &state).unwrap_err();
        check_base(&dir.join("none"), &state).unwrap_err();
        std::fs::write(dir.join("file"), "").unwrap();
        check_base(&dir.join("file"), &state).unwrap_err();
        assert!(check_base(Path::new("/proc"), &state).unwrap().1.is_empty());
    }

    #[test]
    fn senseless_limits_are_refused() {
        let with = |f: fn(&mut SandboxSpec)| {
            let mut spec = SandboxSpec::default();
            f(&mut spec);
            check_spec(&spec)
        };
        with(|_| ()).unwrap();
        with(|s| s.cpus = Some(f64::NAN)).unwrap_err();
        with(|s| s.cpus = Some(0.0)).unwrap_err();
        with(|s| s.pids = Some(0)).unwrap_err();
        with(|s| s.memory = Some(5)).unwrap_err();
        with(|s| s.hostname = Some("a b".into())).unwrap_err();
    }
}
