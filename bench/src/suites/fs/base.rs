//! What the workloads find in their trees: a repository with two commits, an archive, Python packages, a large file.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::run;

/// Files in the first commit of the repository, and in the archive.
const FILES: u32 = 3_000;
/// Files in each of its directories.
const PER_DIRECTORY: u32 = 20;
/// Every so many-th file is changed by the second commit; the one after it is removed, and one beside it added.
const CHANGED: u32 = 5;

/// Files that pytest looks into.
const TEST_FILES: u32 = 300;

/// The directory of the repository.
pub(super) const REPOSITORY: &str = "repo";

/// The name of the wheel.
pub(super) const WHEEL: &str = "bench_package-1.0-py3-none-any.whl";

/// A word that one file in a hundred contains.
pub(super) const RARE_WORD: &str = "needle";

/// The Python packages that are imported.
pub(super) struct Packages {
    /// The interpreter, not a wrapper of it.
    pub(super) interpreter: PathBuf,
    /// What is imported, as Python writes it.
    pub(super) imports: &'static str,
    /// Whether pytest is among them.
    pub(super) pytest: bool,
}

/// Fills the directory `base`. The large file has `large` bytes.
pub(super) fn fill(base: &Path, large: u64) -> Result<Packages> {
    let repo = base.join(REPOSITORY);
    fs::create_dir(&repo)?;
    let git = |args: &[&str]| run(super::git(&repo).args(args));
    git(&["init", "-q", "-b", "main"])?;
    write_sources(&repo)?;
    git(&["add", "-A"])?;
    git(&["commit", "-q", "-m", "first"])?;
    git(&["tag", "first"])?;
    git(&["archive", "-o", "../sources.tar", "HEAD"])?;
    change_sources(&repo)?;
    git(&["add", "-A"])?;
    git(&["commit", "-q", "-m", "second"])?;
    git(&["tag", "second"])?;
    git(&["gc", "-q"])?;
    let mut file = File::create(base.join("large"))?;
    let chunk: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
    for _ in 0..large >> 20 {
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    let packages = packages(base)?;
    write_tests(base)?;
    write_wheel(base, &packages)?;
    Ok(packages)
}

/// What pytest finds tests in.
fn write_tests(base: &Path) -> Result<()> {
    for file in 0..TEST_FILES {
        let dir = base.join(format!("tests/part{}", file / PER_DIRECTORY));
        fs::create_dir_all(&dir)?;
        let tests: String = (0..10)
            .map(|n| format!("def test_{n}():\n    assert {file} + {n} >= 0\n\n"))
            .collect();
        fs::write(dir.join(format!("test_{file}.py")), tests)?;
    }
    Ok(())
}

/// A wheel of the sources of the repository.
fn write_wheel(base: &Path, packages: &Packages) -> Result<()> {
    const PROGRAM: &str = "
import os, sys, zipfile
repo, out = sys.argv[1:]
info = 'bench_package-1.0.dist-info/'
with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as wheel:
    record = []
    def add(name, text):
        wheel.writestr(name, text)
        record.append(name + ',,')
    for top, dirs, files in os.walk(repo):
        dirs[:] = [d for d in dirs if d != '.git']
        for file in files:
            path = os.path.join(top, file)
            name = 'bench_package/' + os.path.relpath(path, repo)
            add(name, open(path, 'rb').read())
    add(info + 'METADATA', 'Metadata-Version: 2.1\\nName: bench-package\\nVersion: 1.0\\n')
    add(info + 'WHEEL', 'Wheel-Version: 1.0\\nGenerator: bench\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')
    record.append(info + 'RECORD,,')
    wheel.writestr(info + 'RECORD', '\\n'.join(record) + '\\n')
";
    let mut python = Command::new(&packages.interpreter);
    python.args(["-I", "-c", PROGRAM]);
    run(python.args([base.join("repo"), base.join(WHEEL)]))
}

fn directory(repo: &Path, file: u32) -> PathBuf {
    let dir = file / PER_DIRECTORY;
    repo.join(format!("part{}/unit{}", dir / 10, dir % 10))
}

fn write_sources(repo: &Path) -> Result<()> {
    for file in 0..FILES {
        let dir = directory(repo, file);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(format!("file{file}.py")), text(file))?;
    }
    Ok(())
}

fn change_sources(repo: &Path) -> Result<()> {
    for file in (0..FILES - 1).step_by(CHANGED as usize) {
        let dir = directory(repo, file);
        fs::write(dir.join(format!("file{file}.py")), text(file + 7))?;
        fs::write(dir.join(format!("more{file}.py")), text(file + 11))?;
        fs::remove_file(directory(repo, file + 1).join(format!("file{}.py", file + 1)))?;
    }
    Ok(())
}

/// Lines of words; 200 bytes to 16 KiB, most of it short, as sources are.
fn text(seed: u32) -> String {
    let lines = 5 + (seed * 7919 % 97) * (seed * 104_729 % 5);
    let mut text = String::new();
    for line in 0..lines {
        let word = (seed + line) * 2_654_435 % 10_007;
        text.push_str(&format!("def name{word}(self): return {line}\n"));
    }
    if seed % 100 == 3 {
        text.push_str(RARE_WORD);
    }
    text
}

/// Installs numpy, Django, sympy and pytest into a cache directory, once, and copies them into the base; the standard library where
/// that cannot be done.
fn packages(base: &Path) -> Result<Packages> {
    let found = Command::new("python3")
        .args([
            "-I",
            "-c",
            "import os, sys; print(sys.executable); print(os.__file__)",
        ])
        .output()
        .context("running python3")?;
    let found = String::from_utf8(found.stdout)?;
    let mut lines = found.lines().map(PathBuf::from);
    let (interpreter, library) = lines
        .next()
        .zip(lines.next())
        .context("python3 does not tell where it is")?;
    let site = base.join("site");
    let (from, imports, pytest) = match installed(&interpreter) {
        Ok(cache) => {
            let imports = "numpy, django.db.models, django.template, sympy";
            (cache, imports, true)
        }
        Err(error) => {
            eprintln!("no Python packages ({error:#}): importing the standard library instead");
            let library = library.parent().context("no standard library")?;
            let imports =
                "asyncio, ctypes, email, http.server, sqlite3, unittest.mock, xml.dom.minidom";
            (library.to_owned(), imports, false)
        }
    };
    run(Command::new("cp").arg("-a").args([from, site]))?;
    Ok(Packages {
        interpreter,
        imports,
        pytest,
    })
}

fn installed(interpreter: &Path) -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = cache.or_else(home).context("no cache directory")?;
    let cache = cache.join("deltabox-bench");
    let packages = cache.join("python-2");
    if packages.join("complete").exists() {
        return Ok(packages);
    }
    fs::create_dir_all(&cache)?;
    let pip = ["-m", "pip", "install", "-q", "--target"];
    let mut install = Command::new(interpreter);
    install
        .args(pip)
        .arg(&packages)
        .args(["numpy", "django<5", "sympy", "pytest"]);
    run(&mut install)?;
    fs::write(packages.join("complete"), "")?;
    Ok(packages)
}
