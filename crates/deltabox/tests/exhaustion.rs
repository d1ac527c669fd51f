//! Forks for which something runs out: an error, and nothing is left of them. Alone in this program, for limits are those of
//! a process.

mod common;

use common::{Fixture, output, read_until, sh};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

fn open_files() -> u64 {
    std::fs::read_dir("/proc/self/fd").unwrap().count() as u64
}

fn limit_files(most: Option<u64>) {
    let all = getrlimit(Resource::Nofile);
    let limit = Rlimit {
        current: most,
        ..all
    };
    setrlimit(Resource::Nofile, limit).unwrap();
}

#[test]
fn forks_for_which_descriptors_run_out_fail_whole_and_later_ones_work() {
    let f = Fixture::new();
    let usual = getrlimit(Resource::Nofile).current;
    let source = f.sandbox();
    output(&source, "echo kept > /file");
    let program = source
        .spawn(sh("mkfifo /f; exec 3<>/f; echo ready; read -r forever <&3"))
        .unwrap();
    // While a program starts, the files that it reads are opened: without descriptors that fails, and so does the program.
    read_until(&mut program.events(0), "ready");
    let checkpoint = source.checkpoint(None).unwrap().id;
    let mut failed = 0;
    for left in (4..100).step_by(12) {
        limit_files(Some(open_files() + left));
        let forks = f.host.fork(source.name(), Some(checkpoint), 3, &[]);
        limit_files(usual);
        match forks {
            Ok(forks) => {
                for fork in forks {
                    assert_eq!(output(&fork, "cat /file"), "kept");
                    f.host.remove(fork.name()).unwrap();
                }
            }
            Err(_) => failed += 1,
        }
        assert_eq!(f.host.list().len(), 1, "with {left} descriptors left");
        assert_eq!(source.info().processes, 1);
    }
    assert!(failed > 0, "the limit was never met");
    let forks = f
        .host
        .fork(source.name(), Some(checkpoint), 3, &[])
        .unwrap();
    for fork in &forks {
        assert_eq!(output(fork, "cat /file"), "kept");
    }
    source.rollback(checkpoint).unwrap();
    assert_eq!(output(&source, "cat /file"), "kept");
}
