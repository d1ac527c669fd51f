//! The project that the demo works on: a Django release, or the standard library of the host's Python.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::instance::Instance;

/// Releases whose contents are known; pip checks others against the index.
const RELEASES: [(&str, &str); 2] = [
    (
        "Django==4.2",
        "c36e2ab12824e2ac36afa8b2515a70c53c7742f0d6eaefa7311ec379558db997",
    ),
    (
        "Django==5.0",
        "7d29e14dfbc19cb6a95a4bd669edbde11f5d4c6a71fdaa42c2d40b6846e807f7",
    ),
];

/// What Django's own tests import.
const REQUIREMENTS: [&str; 2] = ["asgiref", "sqlparse"];

/// The host's Python, which the sandboxes see too.
pub(super) struct Python {
    pub(super) program: PathBuf,
    library: PathBuf,
}

impl Python {
    /// The `python3` of the search path.
    pub(super) fn find() -> Result<Self> {
        let code = "import os, sys, sysconfig\n\
            print(os.path.realpath(sys.executable)); print(sysconfig.get_path('stdlib'))";
        let text = output(Command::new("python3").args(["-c", code])).context(
            "asking python3 where it is; the demo needs Python 3.8 or newer on the search path",
        )?;
        let mut lines = text.lines().map(PathBuf::from);
        match (lines.next(), lines.next()) {
            (Some(program), Some(library)) => Ok(Self { program, library }),
            _ => bail!("python3 does not say where it is: {text:?}"),
        }
    }
}

/// Where the files come from.
pub(super) enum Source {
    /// A gzipped tar archive with one directory at its top.
    Archive(PathBuf),
    /// A directory of Python modules.
    Library(PathBuf),
}

/// What is worked on, and how it is tested.
pub(super) struct Project {
    pub(super) title: String,
    pub(super) source: Source,
    /// Packages that the tests import, a directory.
    pub(super) requirements: Option<PathBuf>,
    /// The module that gets defects.
    pub(super) target: &'static str,
    /// A directory whose files no test reads.
    pub(super) spare: &'static str,
    /// A shell command that prints unittest's summary.
    pub(super) test: String,
    /// A recorded instance whose commands are the actions.
    pub(super) instance: Option<Instance>,
}

impl Project {
    /// Django from the cache or downloaded; where that cannot be, the standard library, with the reason.
    pub(super) fn open(python: &Python, offline: bool) -> (Self, Option<anyhow::Error>) {
        let why = match offline {
            true => None,
            false => match Self::release("Django==4.2", &["utils_tests.test_dateformat"], python) {
                Ok(project) => return (project, None),
                Err(why) => Some(why),
            },
        };
        (Self::standard_library(python), why)
    }

    /// The release and tests of a recorded instance.
    pub(super) fn recorded(instance: Instance, python: &Python) -> Result<Self> {
        let modules: Vec<_> = instance.test_modules.iter().map(String::as_str).collect();
        let mut project = Self::release(&instance.sdist, &modules, python)?;
        project.title = format!("{} ({})", instance.instance_id, instance.sdist);
        project.instance = Some(instance);
        Ok(project)
    }

    fn release(requirement: &str, modules: &[&str], python: &Python) -> Result<Self> {
        let cache = cache_dir()?;
        Ok(Self {
            title: requirement.replace("==", " "),
            source: Source::Archive(archive(requirement, &cache, python)?),
            requirements: Some(requirements(&cache, python)?),
            target: "django/utils/dateformat.py",
            spare: "docs",
            test: format!(
                "cd tests && timeout 100 python3 runtests.py --settings=test_sqlite --parallel 1 {}",
                modules.join(" ")
            ),
            instance: None,
        })
    }

    fn standard_library(python: &Python) -> Self {
        let code = "import difflib, doctest, unittest; \
            unittest.TextTestRunner().run(doctest.DocTestSuite(difflib))";
        Self {
            title: "Python's standard library".into(),
            source: Source::Library(python.library.clone()),
            requirements: None,
            target: "difflib.py",
            spare: "email",
            // Some edits make it loop for ever, some only with certain hashes.
            test: format!("PYTHONHASHSEED=0 timeout 20 python3 -c '{code}'"),
            instance: None,
        }
    }
}

/// The archive of a source release, from the cache or downloaded to it.
fn archive(requirement: &str, cache: &Path, python: &Python) -> Result<PathBuf> {
    let (name, version) = requirement
        .split_once("==")
        .filter(|(n, v)| plain(n) && plain(v))
        .with_context(|| format!("{requirement:?} is no release; NAME==VERSION is wanted"))?;
    let find = || {
        [name.to_owned(), name.to_lowercase()]
            .map(|name| cache.join(format!("{name}-{version}.tar.gz")))
            .into_iter()
            .find(|path| path.exists())
    };
    if find().is_none() {
        let options = ["download", "-q", "--no-deps", "--no-binary", ":all:", "-d"];
        pip(python, &options, cache, &[requirement])?;
    }
    let path = find().with_context(|| format!("pip left no archive of {requirement}"))?;
    let known = RELEASES.iter().find(|(name, _)| *name == requirement);
    if let Some((_, expected)) = known {
        let bytes = std::fs::read(&path).with_context(|| format!("reading {path:?}"))?;
        let found: String = Sha256::digest(&bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        if found != *expected {
            bail!("{path:?} has the SHA-256 sum {found}, not {expected}; remove it and try again");
        }
    }
    Ok(path)
}

fn plain(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('-')
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// The packages that Django's tests import, from the cache or installed to it.
fn requirements(cache: &Path, python: &Python) -> Result<PathBuf> {
    let dir = cache.join("requirements");
    if REQUIREMENTS.iter().all(|name| dir.join(name).is_dir()) {
        return Ok(dir);
    }
    pip(python, &["install", "-q", "--target"], &dir, &REQUIREMENTS)?;
    Ok(dir)
}

fn pip(python: &Python, options: &[&str], to: &Path, what: &[&str]) -> Result<()> {
    let mut command = Command::new(&python.program);
    command.args(["-m", "pip"]).args(options).arg(to).args(what);
    output(&mut command)
        .map(|_| ())
        .with_context(|| format!("getting {} with pip", what.join(" ")))
}

/// Runs a command of the host and returns what it wrote.
fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(std::process::Stdio::null()).output()?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}", output.status, last_lines(told.trim(), 3));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The end of a longer text.
pub(super) fn last_lines(text: &str, n: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(n)..].join("\n")
}

fn cache_dir() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| Path::new(v).is_absolute());
    let cache = set("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| set("HOME").map(|home| Path::new(&home).join(OsStr::new(".cache"))))
        .context("neither XDG_CACHE_HOME nor HOME is set: there is no place for downloads")?
        .join("deltabox");
    std::fs::create_dir_all(&cache).with_context(|| format!("making {cache:?}"))?;
    Ok(cache)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_requirement_cannot_smuggle_options_or_paths() {
        let python = Python {
            program: "/bin/false".into(),
            library: "/".into(),
        };
        for wrong in [
            "Django", "Django==", "--pre==1", "../x==1", "a==1;b", "a==../1",
        ] {
            let told = archive(wrong, Path::new("/nonexistent"), &python).unwrap_err();
            assert!(
                told.to_string().contains("is no release"),
                "{wrong}: {told}"
            );
        }
    }

    #[test]
    fn an_archive_with_other_contents_is_refused() {
        let cache = tempfile::tempdir().unwrap();
        std::fs::write(cache.path().join("Django-4.2.tar.gz"), "other").unwrap();
        let python = Python {
            program: "/bin/false".into(),
            library: "/".into(),
        };
        let told = archive("Django==4.2", cache.path(), &python).unwrap_err();
        assert!(told.to_string().contains("SHA-256"), "{told}");
    }
}
