//! Durable checkpoints that were changed on purpose, with checksums that are right: they are refused, or what they say is done
//! as far as it can be, and the service goes on in any case.
//!
//! Some rounds; `DELTABOX_ROUNDS=500` by hand.

use std::fs;
use std::path::{Path, PathBuf};

use deltalog::{Format, LogReader, LogWriter};

use crate::lab::{Lab, Outcome, PYTHON, Program, installed, output};
use crate::walk::Dice;
use crate::work::number;

/// The logs of a checkpoint: kind, version and file. The processes are what there is most to be wrong in.
const LOGS: [(&[u8; 4], u32, &str); 5] = [
    (b"PROC", 1, "processes"),
    (b"PROC", 1, "processes"),
    (b"PAGE", 1, "pages.meta"),
    (b"FMET", 2, "files.meta"),
    (b"SESS", 1, "sessions"),
];

/// Something of each kind that an image holds.
const PROGRAM: &str = "
import os, select, signal, socket, sys, threading
one, two = socket.socketpair()
one.send(b'waits')
server = socket.create_server(('127.0.0.1', 0))
client = socket.create_connection(server.getsockname())
peer, _ = server.accept()
pipe = os.pipe()
os.write(pipe[1], b'waits')
file = open('/tmp/file', 'w')
poller = select.epoll()
poller.register(pipe[0], select.EPOLLIN)
signal.setitimer(signal.ITIMER_REAL, 1000)
threading.Thread(target=lambda: os.read(two.detach(), 0) or threading.Event().wait(), daemon=True).start()
if os.fork() == 0:
    signal.pause()
print('ready', flush=True)
sys.stdin.readline()
";

type Records = Vec<(u32, Vec<u8>)>;

fn read(path: &Path, format: Format) -> Records {
    let mut log = LogReader::open(path, format).unwrap();
    let mut records = Vec::new();
    while let Some(record) = log.next_record().unwrap() {
        records.push((record.tag, record.payload));
    }
    records
}

fn write(path: &Path, format: Format, records: &Records) {
    fs::remove_file(path).unwrap();
    let mut log = LogWriter::create(path, format).unwrap();
    for (tag, payload) in records {
        log.append(*tag, payload).unwrap();
    }
    log.finish().unwrap();
}

/// Changes something in a log.
fn spoil(records: &mut Records, dice: &mut Dice) {
    let number = dice.roll(records.len());
    let payload = &mut records[number].1;
    let at = dice.roll(payload.len().max(1));
    match dice.roll(12) {
        0 => drop(records.remove(number)),
        1 => {
            let twice = records[number].clone();
            records.push(twice);
        }
        2 => payload.truncate(at),
        3 => records[number].0 = dice.roll(12) as u32,
        // Numbers of any size, by what stands for them: extreme ones more often than not.
        4..=7 => {
            let extreme = [0xff, 0x7f, 0x80, 0][dice.roll(4)];
            let end = payload.len().min(at + dice.roll(9));
            payload[at.min(end)..end].fill(extreme);
        }
        _ => {
            for _ in 0..=dice.roll(3) {
                let at = dice.roll(payload.len().max(1));
                if let Some(byte) = payload.get_mut(at) {
                    *byte = dice.roll(256) as u8;
                }
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

#[test]
fn no_image_however_wrong_ends_the_service() -> Outcome {
    if !installed(PYTHON) {
        return Ok(());
    }
    let mut lab = Lab::new();
    let sandbox = lab.sandbox();
    let mut program = Program::start(&sandbox, &[PYTHON, "-c", PROGRAM])?;
    assert_eq!(program.hear()?, "ready");
    let id = sandbox.checkpoint_durable(None).unwrap().id;
    let name = sandbox.name().to_owned();
    drop((sandbox, program));
    let place: PathBuf = ["checkpoints", &name, &id.to_string()].iter().collect();
    let place = lab.state_dir().join(place);
    let kept = tempfile::tempdir().unwrap();
    copy(&place, kept.path());
    let mut dice = Dice::new(number("DELTABOX_SEED", 4711) as u64);
    let mut refused = 0;
    let rounds = number("DELTABOX_ROUNDS", 25);
    for _ in 0..rounds {
        let (kind, version, file) = LOGS[dice.roll(LOGS.len())];
        let format = Format {
            kind: *kind,
            version,
        };
        let mut records = read(&kept.path().join(file), format);
        spoil(&mut records, &mut dice);
        lab = lab.restarted_with(|| {
            copy(kept.path(), &place);
            write(&place.join(file), format, &records);
        });
        let again = lab.host.get(&name);
        refused += u32::from(again.and_then(|sandbox| sandbox.rollback(id)).is_err());
        assert_eq!(output(&lab.sandbox(), "echo alive"), "alive");
    }
    eprintln!("{refused} of {rounds} were refused");
    Ok(())
}
