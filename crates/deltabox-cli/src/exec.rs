//! Commands whose streams are carried through: `exec`, `shell`, `attach`, `logs`.

use std::io::{self, Read};

use bytes::Bytes;
use deltabox::{CommandSpec, WindowSize};
use deltaboxd::api::End;
use deltaboxd::client::{Client, FromSessionStream, SessionRef, ToSessionSink};
use deltaboxd::frame::{FromSession, ToSession};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::{Attach, Exec, Logs, Shell, Surroundings};
use crate::failure::Failure;
use crate::output::Output;
use crate::show;
use crate::terminal::{Raw, window};

/// What a command exits with whose time ran out, as that of timeout(1).
const TIMED_OUT: u8 = 124;

/// What a pipeline's program ends with when nobody reads its output: 128 + SIGPIPE.
const NOBODY_READS: u8 = 141;

pub(crate) async fn exec(client: &Client, json: bool, args: Exec) -> Result<u8, Failure> {
    let command = CommandSpec {
        timeout: args.timeout,
        tty: args.tty.then(window),
        stdin: args.interactive,
        ..spec(args.command, &args.surroundings, args.tty)
    };
    let started = client.exec(&args.name, &command, !args.detach).await?;
    if args.detach {
        show::say(json, &started, || started.session.id.to_string())?;
        return Ok(0);
    }
    let session = SessionRef {
        sandbox: args.name,
        id: started.session.id,
        epoch: Some(started.epoch),
    };
    carry(client, session, args.interactive, args.tty, json).await
}

pub(crate) async fn shell(client: &Client, json: bool, args: Shell) -> Result<u8, Failure> {
    let tty = io::IsTerminal::is_terminal(&io::stdin());
    let command = CommandSpec {
        tty: tty.then(window),
        stdin: true,
        // No program: the user's login shell.
        ..spec(Vec::new(), &args.surroundings, tty)
    };
    let started = client.exec(&args.name, &command, true).await?;
    let session = SessionRef {
        sandbox: args.name,
        id: started.session.id,
        epoch: Some(started.epoch),
    };
    carry(client, session, true, tty, json).await
}

pub(crate) async fn attach(client: &Client, json: bool, args: Attach) -> Result<u8, Failure> {
    let mut session = SessionRef {
        epoch: Some(client.sandbox(&args.name).await?.epoch),
        sandbox: args.name,
        id: args.session,
    };
    let info = client.session(&session).await?;
    if info.exit.is_some() {
        // Its output and status are all that is left, in whichever epoch.
        session.epoch = None;
    }
    carry(client, session, args.interactive, info.tty, json).await
}

pub(crate) async fn logs(client: &Client, json: bool, args: Logs) -> Result<u8, Failure> {
    let session = SessionRef {
        sandbox: args.name,
        id: args.session,
        epoch: None,
    };
    let mut frames = client.output(&session, 0, args.follow).await?;
    let mut output = Output::new(json);
    while let Some(frame) = frames.next().await? {
        match frame {
            FromSession::Output(stream, bytes) => output.write(stream, &bytes).await?,
            FromSession::Missed(missed) => output.missed(&missed).await?,
            FromSession::End(end) => output.end(&end).await?,
        }
    }
    Ok(0)
}

fn spec(argv: Vec<String>, surroundings: &Surroundings, tty: bool) -> CommandSpec {
    let mut env = surroundings.env();
    if let (true, Ok(term)) = (tty, std::env::var("TERM")) {
        env.entry("TERM".into()).or_insert(term);
    }
    CommandSpec {
        argv,
        env,
        cwd: surroundings.workdir.clone(),
        user: surroundings.user.clone(),
        ..CommandSpec::default()
    }
}

/// Carries the streams of a session through until its end; gives its exit code.
async fn carry(
    client: &Client,
    session: SessionRef,
    interactive: bool,
    tty: bool,
    json: bool,
) -> Result<u8, Failure> {
    let signals = Signals::listen()?;
    let (sink, stream) = client.attach(&session, 0).await?.split();
    let raw = match interactive && tty {
        true => Raw::enter()?,
        false => None,
    };
    let mut output = Output::new(json);
    let ended = tokio::select! {
        ended = receive(stream, &mut output) => ended,
        failed = send_input(sink, interactive) => Err(failed),
        left = signals.forward(client, &session, raw.is_some()) => return Ok(left),
    };
    drop(raw);
    match ended {
        Ok(end) => {
            output.end(&end).await?;
            Ok(exit_code(&end))
        }
        Err(Failure::NobodyReads) => {
            // What a local pipeline does to its first program: here the whole command ends.
            client.kill(&session).await?;
            Err(Failure::Told(NOBODY_READS))
        }
        Err(other) => Err(other),
    }
}

fn exit_code(end: &End) -> u8 {
    match *end {
        End::Exit {
            timed_out: true, ..
        } => {
            show::note("the command's time ran out; it was killed");
            TIMED_OUT
        }
        // A status is 0-255 by its definition; anything else is a failure.
        End::Exit { status, .. } => u8::try_from(status).unwrap_or(1),
        End::RolledBack { epoch } => {
            show::note(&format!("rolled back at epoch {epoch}"));
            1
        }
    }
}

async fn receive(mut stream: FromSessionStream, output: &mut Output) -> Result<End, Failure> {
    while let Some(frame) = stream.next().await? {
        match frame {
            FromSession::Output(stream, bytes) => output.write(stream, &bytes).await?,
            FromSession::Missed(missed) => output.missed(&missed).await?,
            FromSession::End(end) => return Ok(end),
        }
    }
    Err(anyhow::anyhow!("the service closed the stream before the command ended").into())
}

/// Sends our standard input. Returns only when that fails: its end is sent, not returned.
async fn send_input(mut sink: ToSessionSink, interactive: bool) -> Failure {
    if interactive {
        let mut input = read_stdin();
        while let Some(bytes) = input.recv().await {
            if let Err(why) = sink.send(ToSession::Stdin(bytes)).await {
                return why.into();
            }
        }
    }
    // The sink stays: to drop it would be to leave.
    std::future::pending().await
}

/// A thread that reads standard input, at its end an empty piece. It cannot be woken from a read, so nobody waits
/// for it: the program exits under it.
fn read_stdin() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        loop {
            // A terminal that is gone is the end of its input.
            let n = match io::stdin().lock().read(&mut buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                read => read.unwrap_or(0),
            };
            let sent = sender.blocking_send(Bytes::copy_from_slice(&buffer[..n]));
            if n == 0 || sent.is_err() {
                return;
            }
        }
    });
    receiver
}

/// The signals that we get while a command runs.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    window: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
            window: signal(SignalKind::window_change())?,
        })
    }

    /// Passes them on to the command; by requests of their own, as its input may be stuck. In raw mode they are meant
    /// for us (Ctrl-C is a character then): we leave, with the exit code that this returns.
    async fn forward(mut self, client: &Client, session: &SessionRef, raw: bool) -> u8 {
        loop {
            let kind = tokio::select! {
                _ = self.interrupt.recv() => SignalKind::interrupt(),
                _ = self.terminate.recv() => SignalKind::terminate(),
                _ = self.hangup.recv() => SignalKind::hangup(),
                _ = self.window.recv() => {
                    resize(client, session, window()).await;
                    continue;
                }
            };
            let number = kind.as_raw_value();
            if raw {
                return 128 + number as u8;
            }
            if let Err(why) = client.signal(session, number).await {
                show::note(&format!("signal {number} was not passed on: {why}"));
            }
        }
    }
}

/// A session without a terminal, or one that has just ended, has no size to set; that is no failure.
async fn resize(client: &Client, session: &SessionRef, size: WindowSize) {
    if let Err(why) = client.resize(session, size).await {
        tracing::debug!(%why, "the terminal was not resized");
    }
}
