//! What runs in the demo's sandbox: a shell, a REPL and a server, and a tree that they work on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use deltabox::{CommandSpec, Sandbox, SessionId, WindowSize};

use super::project::{Project, Python, Source};
use super::talk::{self, Ended};

/// Where the demo's own programs are inside.
const TOOLS: &str = "/opt/deltabox-demo";
const PROGRAMS: [(&str, &str); 4] = [
    ("repl.py", include_str!("inside/repl.py")),
    ("server.py", include_str!("inside/server.py")),
    ("witness.py", include_str!("inside/witness.py")),
    ("edit.py", include_str!("inside/edit.py")),
];

/// What is left out of the standard library: what is not its own, or large.
const LIBRARY_WITHOUT: [&str; 4] = ["./site-packages", "./test", "__pycache__", "./config-*"];

/// Where a world has its tree and its server, inside.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) work: String,
    pub(super) port: u16,
}

impl Place {
    /// Where recorded commands expect the tree.
    pub(super) fn usual() -> Self {
        Self {
            work: "/testbed".into(),
            port: 8000,
        }
    }
}

/// The processes at work in a sandbox.
pub(super) struct World {
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) place: Place,
    shell: SessionId,
    repl: SessionId,
    server: SessionId,
}

/// Unpacks the project and the demo's programs into a fresh sandbox.
pub(super) fn furnish(
    sandbox: &Sandbox,
    place: &Place,
    project: &Project,
    python: &Python,
) -> Result<()> {
    let program = python
        .program
        .to_str()
        .context("Python's path is not text")?;
    let links =
        "mkdir -p $0/bin $0/requirements $1 && ln -sf $2 $0/bin/python && ln -sf $2 $0/bin/python3";
    sh(sandbox, &[links, TOOLS, &place.work, program], None)?;
    for (name, text) in PROGRAMS {
        let path = format!("{TOOLS}/{name}");
        sh(sandbox, &["cat > $0", &path], Some(&mut text.as_bytes()))?;
    }
    match &project.source {
        Source::Archive(path) => {
            let mut file = File::open(path).with_context(|| format!("opening {path:?}"))?;
            let unpack = "tar -xzf - --strip-components=1 --no-same-owner -C $0";
            sh(sandbox, &[unpack, &place.work], Some(&mut file))?;
        }
        Source::Library(path) => {
            copy_in(sandbox, path, &LIBRARY_WITHOUT, &place.work)?;
        }
    }
    if let Some(path) = &project.requirements {
        copy_in(sandbox, path, &[], &format!("{TOOLS}/requirements"))?;
    }
    Ok(())
}

/// Copies a directory of the host into the sandbox.
fn copy_in(sandbox: &Sandbox, from: &Path, without: &[&str], to: &str) -> Result<()> {
    let (mut tar, mut stream) = pack(from, without)?;
    let unpack = "tar -xf - --no-same-owner -C $0";
    sh(sandbox, &[unpack, to], Some(&mut stream))?;
    match tar.0.wait()?.success() {
        true => Ok(()),
        false => bail!("tar could not read {from:?}"),
    }
}

/// A tar of the host that packs a directory, and its output.
fn pack(from: &Path, without: &[&str]) -> Result<(Reaped, ChildStdout)> {
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(from);
    tar.args(without.iter().map(|name| format!("--exclude={name}")));
    let tar = tar.args(["-cf", "-", "."]).stdout(Stdio::piped()).spawn();
    let mut tar = Reaped(tar.context("running tar")?);
    let stream = tar.0.stdout.take().context("tar has no output")?;
    Ok((tar, stream))
}

/// Unpacks the project into a directory of the host.
pub(super) fn unpack_outside(project: &Project, to: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(to).arg("--no-same-owner");
    let (input, packing) = match &project.source {
        Source::Archive(path) => {
            tar.args(["--strip-components=1", "-xzf", "-"]);
            let file = File::open(path).with_context(|| format!("opening {path:?}"))?;
            (Stdio::from(file), None)
        }
        Source::Library(path) => {
            tar.args(["-xf", "-"]);
            let (packing, stream) = pack(path, &LIBRARY_WITHOUT)?;
            (Stdio::from(stream), Some(packing))
        }
    };
    let status = tar.stdin(input).status().context("running tar")?;
    drop(packing);
    match status.success() {
        true => Ok(()),
        false => bail!("tar could not unpack {} to {to:?}", project.title),
    }
}

/// A child that does not outlive its handle.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Both fail if it has ended, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a shell script with arguments from `$0` on; it must not fail.
pub(super) fn sh(
    sandbox: &Sandbox,
    script: &[&str],
    input: Option<&mut dyn Read>,
) -> Result<String> {
    let mut argv = vec!["sh", "-c"];
    argv.extend_from_slice(script);
    talk::run(sandbox, command(&argv), input)?.ok(script[0])
}

fn command(argv: &[&str]) -> CommandSpec {
    CommandSpec {
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        env: environment(),
        ..CommandSpec::default()
    }
}

/// The host's Python comes first, as `python` too.
fn environment() -> BTreeMap<String, String> {
    let path = format!("{TOOLS}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    [("PATH", path.as_str()), ("PS1", "$ ")]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

impl World {
    /// Starts the shell, the REPL and the server, and waits until all three answer.
    pub(super) fn start(sandbox: &Arc<Sandbox>, place: &Place) -> Result<Self> {
        let Place { work, port } = place;
        let mut shell = command(&["bash", "--noprofile", "--norc", "--noediting"]);
        shell.cwd = Some(work.into());
        shell.stdin = true;
        shell.tty = Some(WindowSize { rows: 24, cols: 80 });
        let mut repl = command(&["python3", "-I", "-q", "-i", &format!("{TOOLS}/repl.py")]);
        repl.stdin = true;
        let server = format!("{TOOLS}/server.py");
        let server = command(&["python3", "-I", &server, &port.to_string(), work]);
        let world = Self {
            sandbox: sandbox.clone(),
            place: place.clone(),
            shell: sandbox.spawn(shell)?.info().id,
            repl: sandbox.spawn(repl)?.info().id,
            server: sandbox.spawn(server)?.info().id,
        };
        world.shell("set +H; DEMO_STEPS=() DEMO_JOBS=()")?;
        world.repl("digest()")?;
        world.shell(&format!(
            "until (: < /dev/tcp/127.0.0.1/{port}) 2> /dev/null; do sleep 0.05; done"
        ))?;
        Ok(world)
    }

    /// The same sessions in a fork of the sandbox.
    pub(super) fn in_fork(&self, sandbox: Arc<Sandbox>) -> Self {
        Self {
            sandbox,
            place: self.place.clone(),
            ..*self
        }
    }

    /// Kills all that [`World::start`] started, and all that came of it.
    pub(super) fn end(&self) -> Result<()> {
        for id in [self.shell, self.repl, self.server] {
            self.sandbox.session(id)?.kill()?;
        }
        Ok(())
    }

    /// Has the persistent shell run a line; its output.
    pub(super) fn shell(&self, line: &str) -> Result<String> {
        talk::ask(&self.sandbox, self.shell, |n| {
            format!("printf '\\n<<%s\\n' {n}; {line}; printf '\\n>>%s\\n' {n}\n")
        })
    }

    /// Has the REPL evaluate an expression; its text.
    pub(super) fn repl(&self, expression: &str) -> Result<String> {
        let answer = talk::ask(&self.sandbox, self.repl, |n| {
            format!("print('\\n<<' + '{n}', {expression}, '>>' + '{n}', sep='\\n', flush=True)\n")
        })?;
        Ok(answer.trim().to_owned())
    }

    /// Runs one of the demo's programs to its end.
    pub(super) fn tool(&self, name: &str, args: &[&str]) -> Result<String> {
        let path = format!("{TOOLS}/{name}");
        let argv = [&["python3", "-I", path.as_str()], args].concat();
        talk::run(&self.sandbox, command(&argv), None)?.ok(name)
    }

    /// Runs a recorded command as it was run when it was recorded: a shell of its own, in the tree.
    pub(super) fn recorded(&self, line: &str) -> Result<Ended> {
        let mut command = command(&["bash", "-c", line]);
        command.cwd = Some(self.place.work.clone().into());
        command.env.insert("PYTHONPATH".into(), self.python_path());
        talk::run(&self.sandbox, command, None)
    }

    /// Runs the project's test in the persistent shell; the end of its output.
    pub(super) fn test(&self, project: &Project) -> Result<String> {
        let (work, path, test) = (&self.place.work, self.python_path(), &project.test);
        self.shell(&format!(
            "(export PYTHONPATH={path}; cd {work}; {test}) > /tmp/demo-test.log 2>&1; tail -n 5 /tmp/demo-test.log"
        ))
    }

    /// Changes what is alive, in a way that `seed` determines: the shell's variables, functions and jobs, the REPL's
    /// memory, the server's notes.
    pub(super) fn live(&self, seed: u64) -> Result<()> {
        let port = self.place.port;
        let job = match seed % 3 {
            0 => "bash -c 'sleep 100000 & wait'",
            _ => "sleep 100000",
        };
        self.shell(&format!(
            "DEMO_STEPS+=({seed}); export DEMO_LAST={seed}; demo_{seed}() {{ echo {seed}; }}; \
             {job} & DEMO_JOBS+=($!)"
        ))?;
        if seed.is_multiple_of(2) {
            self.shell(
                "kill $DEMO_JOBS; wait $DEMO_JOBS; DEMO_JOBS=(\"${DEMO_JOBS[@]:1}\"); jobs > /dev/null",
            )?;
        }
        self.repl(&format!("step({seed})"))?;
        let note = format!("note {seed}");
        self.shell(&format!(
            "(exec 9<> /dev/tcp/127.0.0.1/{port}; printf 'POST /notes HTTP/1.0\\r\\nContent-Length: {}\\r\\n\\r\\n{note}' >&9; \
             cat <&9 > /dev/null)",
            note.len()
        ))?;
        Ok(())
    }

    fn python_path(&self) -> String {
        format!("{}:{TOOLS}/requirements", self.place.work)
    }
}
