//! A Python in a sandbox that does what it is told.

use std::sync::Arc;
use std::time::Instant;

use deltabox::{CommandSpec, Sandbox, Session, SessionEvent, SessionId};

use super::PATIENCE;

/// A Python that does what it is told, line by line.
pub(crate) fn python(sandbox: &Sandbox) -> Arc<Session> {
    let argv = ["python3", "-I", "-u", "-c", DRIVER].map(str::to_owned);
    let command = CommandSpec {
        argv: argv.to_vec(),
        stdin: true,
        ..CommandSpec::default()
    };
    sandbox.spawn(command).unwrap()
}

/// Evaluates lines, in itself or (`>` first) in the child that `CHILD` makes.
pub(crate) const DRIVER: &str = r#"
import os, sys, hashlib
def serve(source, sink):
  names = {'os': os, 'sys': sys, 'hashlib': hashlib}
  for line in source:
    if line.startswith('>'):
      down.write(line[1:]); down.flush(); sink.write(up.readline()); sink.flush(); continue
    try: sink.write(repr(eval(line, names)) + '\n')
    except SyntaxError: exec(line, names); sink.write('done\n')
    sink.flush()
a, b, c, d = *os.pipe(), *os.pipe()
M = bytearray(1 << 20)
if os.fork() == 0:
  os.close(b); os.close(c)
  serve(os.fdopen(a), os.fdopen(d, 'w'))
  os._exit(0)
os.close(a); os.close(d)
down, up = os.fdopen(b, 'w'), os.fdopen(c)
serve(sys.stdin, sys.stdout)
"#;

pub(crate) fn ask(sandbox: &Sandbox, id: SessionId, line: &str) -> String {
    let session = sandbox.session(id).unwrap();
    let mut events = session.events(session.info().output);
    session.write(format!("{line}\n").as_bytes()).unwrap();
    let begun = Instant::now();
    let mut heard = String::new();
    while !heard.ends_with('\n') {
        assert!(begun.elapsed() < PATIENCE, "{line}: {heard:?}");
        match events.next(Some(PATIENCE)) {
            Some(SessionEvent::Output { bytes, .. }) => {
                heard.push_str(&String::from_utf8_lossy(&bytes));
            }
            other => panic!("{line}: {other:?} after {heard:?}"),
        }
    }
    heard.trim_end().to_owned()
}

pub(crate) const FILL: &str =
    "M = bytearray(b''.join(i.to_bytes(4, 'little') * 1024 for i in range(1536)))";

pub(crate) const SUM: &str = "hashlib.sha256(M).hexdigest()";

/// Lines that change some memory, let it grow, drop some and give some back; `n` tells them apart.
pub(crate) fn change(sandbox: &Sandbox, id: SessionId, n: usize) {
    for prefix in ["", ">"] {
        let at = n * 40_000 % (1 << 20);
        let write = format!("M[{at}:{at} + 20_000] = bytes([{n}]) * 20_000");
        assert_eq!(ask(sandbox, id, &format!("{prefix}{write}")), "done");
        let grow =
            format!("N = [bytearray([{n}]) * (300_000 + 70_000 * k) for k in range({n} % 4)]");
        assert_eq!(ask(sandbox, id, &format!("{prefix}{grow}")), "done");
    }
}

pub(crate) fn sums(sandbox: &Sandbox, id: SessionId) -> Vec<String> {
    ["", ">"]
        .into_iter()
        .flat_map(|prefix| {
            [SUM, "[hashlib.sha256(n).hexdigest() for n in N]"].map(|q| format!("{prefix}{q}"))
        })
        .map(|question| ask(sandbox, id, &question))
        .collect()
}
