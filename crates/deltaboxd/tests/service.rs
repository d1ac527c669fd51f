//! The service over its socket, through the client: every test has a service process and a state directory of its own.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use deltabox::{CheckpointId, CommandSpec, HostConfig, SandboxSpec, SessionId, Stream, WindowSize};
use deltaboxd::api::{CheckpointRequest, End, ForkRequest, StartedSession, socket_path};
use deltaboxd::client::{Client, Error, FromSessionStream, SessionRef};
use deltaboxd::frame::{FromSession, ToSession};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Names the state directory to the copy of this program that is the service.
const STATE: &str = "DELTABOXD_TEST_STATE";

/// How long anything here may take before a test gives up: not a measurement.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
#[ignore = "is the service that the other tests start"]
fn service_process() {
    let state = std::env::var_os(STATE).expect("started by another test");
    let config = HostConfig {
        state_dir: state.into(),
        ..HostConfig::default()
    };
    deltaboxd::server::run(config).unwrap();
}

struct Service {
    process: Child,
    client: Client,
    state: TempDir,
}

impl Service {
    async fn start() -> Self {
        let state = tempfile::tempdir().unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "service_process", "--nocapture"])
            .env(STATE, state.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let service = Self {
            process,
            client: Client::new(state.path()),
            state,
        };
        let begun = Instant::now();
        while service.client.version().await.is_err() {
            assert!(begun.elapsed() < PATIENCE, "the service does not answer");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        service
    }

    async fn sandbox(&self, name: &str) {
        let spec = SandboxSpec {
            name: Some(name.into()),
            ..SandboxSpec::default()
        };
        self.client.create(&spec).await.unwrap();
    }

    async fn run(&self, sandbox: &str, script: &str) -> (String, End) {
        let started = self.exec(sandbox, sh(script)).await;
        let (_sink, stream) = self
            .client
            .attach(&session(sandbox, &started), 0)
            .await
            .unwrap()
            .split();
        let (stdout, _, end) = collect(stream).await;
        (String::from_utf8(stdout).unwrap(), end)
    }

    async fn exec(&self, sandbox: &str, command: CommandSpec) -> StartedSession {
        self.client.exec(sandbox, &command, true).await.unwrap()
    }

    /// Sends a request as it is, and gives the status and the body.
    async fn raw(&self, head: &str, body: &[u8]) -> (u16, String) {
        let mut socket = UnixStream::connect(socket_path(self.state.path()))
            .await
            .unwrap();
        let head = format!(
            "{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        // A body that is too long is refused before all of it is read.
        let _ = socket.write_all(body).await;
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok());
        (status.unwrap_or(0), answer)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let begun = Instant::now();
        while matches!(self.process.try_wait(), Ok(None)) {
            if begun.elapsed() > PATIENCE {
                let _ = self.process.kill();
                let _ = self.process.wait();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let socket = socket_path(self.state.path());
        if !std::thread::panicking() {
            assert!(!socket.exists(), "a stopped service left its socket");
        }
    }
}

fn sh(script: &str) -> CommandSpec {
    CommandSpec {
        argv: ["sh", "-c", script].map(String::from).to_vec(),
        ..CommandSpec::default()
    }
}

fn session(sandbox: &str, started: &StartedSession) -> SessionRef {
    SessionRef {
        sandbox: sandbox.into(),
        id: started.session.id,
        epoch: Some(started.epoch),
    }
}

async fn collect(mut stream: FromSessionStream) -> (Vec<u8>, Vec<u8>, End) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match stream.next().await.unwrap().expect("an end comes last") {
            FromSession::Output(Stream::Stdout, bytes) => stdout.extend_from_slice(&bytes),
            FromSession::Output(Stream::Stderr, bytes) => stderr.extend_from_slice(&bytes),
            FromSession::Missed(missed) => panic!("{missed:?}"),
            FromSession::End(end) => return (stdout, stderr, end),
        }
    }
}

async fn read_until(stream: &mut FromSessionStream, wanted: &str) -> String {
    let mut text = String::new();
    while !text.contains(wanted) {
        match stream.next().await.unwrap() {
            Some(FromSession::Output(_, bytes)) => text.push_str(&String::from_utf8_lossy(&bytes)),
            other => panic!("{other:?} instead of {wanted:?} after {text:?}"),
        }
    }
    text
}

fn exit(status: i32) -> End {
    End::Exit {
        status,
        timed_out: false,
    }
}

#[track_caller]
fn assert_code<T: std::fmt::Debug>(result: Result<T, Error>, status: u16, code: &str) {
    match result {
        Err(Error::Refused {
            status: s, code: c, ..
        }) => assert_eq!((s, c.as_str()), (status, code)),
        other => panic!("{other:?} instead of {code}"),
    }
}

fn named(message: Option<&str>) -> CheckpointRequest {
    CheckpointRequest {
        message: message.map(str::to_owned),
        durable: false,
    }
}

#[tokio::test]
async fn streams_carry_input_output_and_status() {
    let service = Service::start().await;
    service.sandbox("a").await;
    let command = CommandSpec {
        stdin: true,
        ..sh("cat; echo wrong >&2; exit 7")
    };
    let started = service.exec("a", command).await;
    let attached = service.client.attach(&session("a", &started), 0).await;
    let (mut sink, stream) = attached.unwrap().split();
    let input: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    let sent = async {
        sink.send(ToSession::Stdin(input.clone().into()))
            .await
            .unwrap();
        sink.send(ToSession::Stdin(Bytes::new())).await.unwrap();
    };
    let ((), (stdout, stderr, end)) = tokio::join!(sent, collect(stream));
    assert!(stdout == input, "{} bytes came back", stdout.len());
    assert_eq!(stderr, b"wrong\n");
    assert_eq!(end, exit(7));

    let info = service.client.session(&session("a", &started)).await;
    assert_eq!(info.unwrap().exit, Some(7));
}

#[tokio::test]
async fn output_can_be_read_again_from_any_byte_and_without_waiting() {
    let service = Service::start().await;
    service.sandbox("a").await;
    let started = service.exec("a", sh("echo 0123456789; sleep 1000")).await;
    let session = session("a", &started);
    let attached = service.client.attach(&session, 0).await.unwrap();
    read_until(&mut attached.split().1, "9\n").await;
    let mut output = service.client.output(&session, 4, false).await.unwrap();
    let frame = output.next().await.unwrap();
    let expected = FromSession::Output(Stream::Stdout, Bytes::from_static(b"456789\n"));
    assert_eq!(frame, Some(expected));
    assert_eq!(output.next().await.unwrap(), None);

    service.client.kill(&session).await.unwrap();
    let mut output = service.client.output(&session, 11, true).await.unwrap();
    let last = output.next().await.unwrap();
    assert_eq!(last, Some(FromSession::End(exit(137))));
}

#[tokio::test]
async fn a_terminal_is_resized_and_signalled_through_its_stream() {
    let service = Service::start().await;
    service.sandbox("a").await;
    let command = CommandSpec {
        tty: Some(WindowSize { rows: 10, cols: 20 }),
        stdin: true,
        ..sh(
            "trap 'exit 9' TERM; stty size; read x; stty size; echo ready; while :; do sleep 0.05; done",
        )
    };
    let started = service.exec("a", command).await;
    let attached = service.client.attach(&session("a", &started), 0).await;
    let (mut sink, mut stream) = attached.unwrap().split();
    read_until(&mut stream, "10 20").await;
    let size = WindowSize { rows: 30, cols: 99 };
    sink.send(ToSession::Resize(size)).await.unwrap();
    sink.send(ToSession::Stdin(Bytes::from_static(b"\n")))
        .await
        .unwrap();
    let text = read_until(&mut stream, "ready").await;
    assert!(text.contains("30 99"), "{text:?}");
    sink.send(ToSession::Signal(15)).await.unwrap();
    assert_eq!(collect(stream).await.2, exit(9));
}

#[tokio::test]
async fn what_does_not_exist_is_refused_by_name() {
    let service = Service::start().await;
    let client = &service.client;
    assert_code(client.sandbox("nope").await, 404, "no_sandbox");
    assert_code(client.remove("nope").await, 404, "no_sandbox");
    assert_code(
        client.exec("../a", &sh("true"), false).await,
        404,
        "no_sandbox",
    );
    service.sandbox("a").await;
    let again = SandboxSpec {
        name: Some("a".into()),
        ..SandboxSpec::default()
    };
    assert_code(client.create(&again).await, 409, "name_taken");
    let nowhere = CheckpointId(999);
    assert_code(client.rollback("a", nowhere).await, 404, "no_checkpoint");
    assert_code(client.delete("a", nowhere).await, 404, "no_checkpoint");
    assert_code(
        client.diff("a", nowhere, nowhere).await,
        404,
        "no_checkpoint",
    );
    let nobody = SessionRef {
        sandbox: "a".into(),
        id: SessionId(999),
        epoch: None,
    };
    assert_code(client.session(&nobody).await, 404, "no_session");
    assert_code(client.attach(&nobody, 0).await, 404, "no_session");
    assert_code(client.output(&nobody, 0, true).await, 404, "no_session");
    let command = CommandSpec {
        argv: vec!["/no/such/program".into()],
        ..CommandSpec::default()
    };
    assert_code(
        client.exec("a", &command, false).await,
        422,
        "command_not_found",
    );
}

#[tokio::test]
async fn malformed_requests_are_refused_and_harm_nothing() {
    let service = Service::start().await;
    let huge = vec![b' '; 2 << 20];
    let cases: [(&str, &[u8], u16); 9] = [
        ("GET /nowhere", b"", 404),
        ("PUT /v1/sandboxes", b"", 405),
        ("POST /v1/sandboxes", b"{", 400),
        ("POST /v1/sandboxes", b"{\"base\": 7}", 400),
        ("POST /v1/sandboxes", b"{\"bass\": \"/\"}", 400),
        ("POST /v1/sandboxes", b"{\"base\": \"/etc/passwd\"}", 400),
        ("POST /v1/sandboxes", &huge, 413),
        ("DELETE /v1/sandboxes/a/checkpoints/7", b"", 400),
        ("GET /v1/sandboxes/a/diff?from=c1", b"", 400),
    ];
    for (head, body, expected) in cases {
        let (status, answer) = service.raw(head, body).await;
        assert_eq!(status, expected, "{head}: {answer}");
        let (_, json) = answer.split_once("\r\n\r\n").unwrap();
        let error: serde_json::Value = serde_json::from_str(json).expect(json);
        assert!(error["error"]["code"].is_string(), "{head}: {answer}");
        assert!(error["error"]["message"].is_string(), "{head}: {answer}");
    }
    assert!(service.client.sandboxes().await.unwrap().is_empty());
}

#[tokio::test]
async fn every_route_of_the_openapi_document_exists() {
    let service = Service::start().await;
    let (status, answer) = service.raw("GET /v1/openapi.json", b"").await;
    assert_eq!(status, 200);
    let document = answer.split_once("\r\n\r\n").unwrap().1;
    let document: serde_json::Value = serde_json::from_str(document).unwrap();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in ["get", "post", "delete"] {
            if methods.get(method).is_none() || path == "/v1/stop" {
                continue;
            }
            let path = path.replace("{name}", "nope").replace("{id}", "x1");
            let head = format!("{} {path}", method.to_uppercase());
            let (_, answer) = service.raw(&head, b"!").await;
            assert!(
                !answer.contains("\"code\":\"no_route\""),
                "{head}: {answer}"
            );
            assert!(
                !answer.contains("\"code\":\"no_method\""),
                "{head}: {answer}"
            );
        }
    }
}

#[tokio::test]
async fn a_rollback_gives_the_state_back_and_ends_what_came_after() {
    let service = Service::start().await;
    let client = &service.client;
    service.sandbox("a").await;
    service.run("a", "echo one > /tmp/f").await;
    let kept = service.exec("a", sh("sleep 1000")).await;
    let first = client.checkpoint("a", &named(Some("first"))).await.unwrap();
    service
        .run("a", "echo two > /tmp/f; echo new > /tmp/g")
        .await;
    let second = client.checkpoint("a", &named(None)).await.unwrap();

    let difference = client.diff("a", first.id, second.id).await.unwrap();
    let paths: Vec<_> = difference.files.iter().map(|f| format!("{f:?}")).collect();
    assert!(
        paths
            .iter()
            .any(|p| p.contains("Modified") && p.contains("/tmp/f"))
    );
    assert!(
        paths
            .iter()
            .any(|p| p.contains("Added") && p.contains("/tmp/g"))
    );

    let abandoned = service.exec("a", sh("sleep 1000")).await;
    let attached = client.attach(&session("a", &abandoned), 0).await.unwrap();
    let (_sink, stream) = attached.split();
    let report = client.rollback("a", first.id).await.unwrap();
    let epoch = report.epoch;
    assert_eq!(collect(stream).await.2, End::RolledBack { epoch });
    assert_eq!(
        service.run("a", "cat /tmp/f").await,
        ("one\n".into(), exit(0))
    );

    let old = session("a", &abandoned);
    assert_code(client.kill(&old).await, 409, "epoch");
    let sessions = client.sessions("a").await.unwrap();
    let kept = sessions.iter().find(|s| s.id == kept.session.id);
    assert_eq!(kept.and_then(|s| s.exit), None, "{sessions:?}");

    let tree = client.tree("a").await.unwrap();
    let current: Vec<_> = tree.nodes.iter().filter(|n| n.current).collect();
    assert_eq!(current.len(), 1);
    assert_eq!(current[0].id, first.id);
    assert_eq!(current[0].message.as_deref(), Some("first"));
    client.delete("a", second.id).await.unwrap();
    assert_eq!(client.tree("a").await.unwrap().nodes.len(), 1);

    let (_, metrics) = service.raw("GET /v1/metrics", b"").await;
    assert!(metrics.contains("deltabox_checkpoint_stop_seconds_count 2"));
}

#[tokio::test]
async fn forks_have_the_state_and_lives_of_their_own() {
    let service = Service::start().await;
    let client = &service.client;
    service.sandbox("a").await;
    service.run("a", "echo source > /tmp/f").await;
    let id = client.checkpoint("a", &named(None)).await.unwrap().id;
    let request = ForkRequest {
        checkpoint: Some(id),
        n: 2,
        names: vec!["b".into(), "c".into()],
        seed_rng: false,
    };
    let forks = client.fork("a", &request).await.unwrap();
    let names: Vec<_> = forks.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["b", "c"]);
    service.run("b", "echo changed > /tmp/f").await;
    client.remove("a").await.unwrap();
    let of = |name| service.run(name, "cat /tmp/f");
    assert_eq!(of("b").await.0, "changed\n");
    assert_eq!(of("c").await.0, "source\n");
}

#[tokio::test]
async fn a_slow_reader_does_not_fill_the_service_with_output() {
    let service = Service::start().await;
    service.sandbox("a").await;
    let before = resident(&service.process);
    let started = service.exec("a", sh("head -c 300000000 /dev/zero")).await;
    let attached = service.client.attach(&session("a", &started), 0).await;
    let (_sink, mut stream) = attached.unwrap().split();
    // Not read until the command has ended or waits for us.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let grown = resident(&service.process).saturating_sub(before);
    assert!(grown < 100 << 20, "the service grew by {grown} bytes");
    let mut seen = 0;
    let end = loop {
        match stream.next().await.unwrap().expect("an end comes last") {
            FromSession::Output(_, bytes) => seen += bytes.len() as u64,
            FromSession::Missed(missed) => panic!("{missed:?}"),
            FromSession::End(end) => break end,
        }
    };
    assert_eq!((seen, end), (300_000_000, exit(0)));
}

fn resident(process: &Child) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", process.id())).unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size() as u64
}

#[tokio::test]
async fn a_stop_ends_streams_and_the_process() {
    let mut service = Service::start().await;
    service.sandbox("a").await;
    let started = service.exec("a", sh("sleep 1000")).await;
    let attached = service.client.attach(&session("a", &started), 0).await;
    let (_sink, mut stream) = attached.unwrap().split();
    service.client.stop_service().await.unwrap();
    let last = stream.next().await;
    assert!(matches!(last, Ok(Some(FromSession::End(_)))), "{last:?}");
    let status = tokio::task::spawn_blocking(move || {
        let status = service.process.wait().unwrap();
        drop(service);
        status
    });
    assert!(status.await.unwrap().success());
}
