"""Sandboxes: commands, checkpoints, rollbacks, forks."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType
from typing import Any, Callable, Mapping, Sequence, TypeVar, Union
from urllib.parse import quote, urlencode

from .client import Client, default_client
from .errors import DeltaBoxError, InvalidRequest, RolledBack, SandboxNotFound
from .files import Files
from .models import (
    Checkpoint,
    CheckpointInfo,
    CheckpointLike,
    Difference,
    Output,
    Result,
    RollbackReport,
    SandboxInfo,
    SessionInfo,
    Tree,
    parse,
)
from .session import MAX_OUTPUT, Session, Shell

_S = TypeVar("_S", bound=Session)

Command = Union[str, Sequence[str]]
"""A line for ``sh -c``, or a program and its arguments."""


class Sandbox:
    """A sandbox, made by :meth:`create`, found by :meth:`connect`, or forked from another.

    As a context manager it is removed at the end. May be used by many threads at a time, and be pickled.

    Every request names the epoch that this object knows: when another client has rolled the sandbox back, it raises
    :class:`RolledBack` instead of working on a state that nobody expects. :meth:`rollback` and :meth:`refresh` take the
    sandbox as it is then.
    """

    def __init__(self, client: Client, name: str, epoch: int) -> None:
        self.client = client
        self.name = name
        self.epoch = epoch
        """How often it was rolled back, as far as this object knows."""
        self._transport = client._transport
        self._path = f"/sandboxes/{quote(name, safe='')}"
        self._sessions = _Sessions()

    @classmethod
    def create(
        cls,
        *,
        base: str | os.PathLike[str] = "/",
        name: str | None = None,
        memory: int | None = None,
        pids: int | None = None,
        cpus: float | None = None,
        hostname: str | None = None,
        disk: int | None = None,
        inodes: int | None = None,
        time_namespace: bool = False,
        client: Client | None = None,
    ) -> Sandbox:
        """Creates a sandbox whose files begin as the directory ``base``, which is never written to.

        ``memory`` is in bytes, ``cpus`` may be a fraction. ``disk`` (in bytes) and ``inodes`` bound what its files may take
        besides the base. With ``time_namespace`` its monotonic clocks go on where they were when a durable checkpoint is
        restored after a reboot. A name is chosen if none is given.
        """
        client = client or default_client()
        spec = {
            "base": os.path.abspath(base),
            "name": name,
            "memory": memory,
            "pids": pids,
            "cpus": cpus,
            "hostname": hostname,
            "disk": disk,
            "inodes": inodes,
            "time_namespace": {} if time_namespace else None,
        }
        info = parse(SandboxInfo, client._transport.request("POST", "/sandboxes", spec))
        return cls(client, info.name, info.epoch)

    @classmethod
    def connect(cls, name: str, client: Client | None = None) -> Sandbox:
        """A sandbox that is there already."""
        sandbox = cls(client or default_client(), name, 0)
        sandbox.refresh()
        return sandbox

    def __repr__(self) -> str:
        return f"<Sandbox {self.name}>"

    def __reduce__(self) -> tuple[type[Sandbox], tuple[Any, ...]]:
        return Sandbox, (self.client, self.name, self.epoch)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.remove()
        except SandboxNotFound:
            pass

    @property
    def files(self) -> Files:
        """Its files."""
        return Files(self)

    def info(self) -> SandboxInfo:
        """How it is doing, in whichever epoch."""
        return parse(SandboxInfo, self._transport.request("GET", self._path))

    def refresh(self) -> SandboxInfo:
        """Takes the sandbox as it is, after another client's rollback. Sessions that were started before are over for
        their objects; :meth:`Session.resume` finds those that are still there."""
        info = self.info()
        if info.epoch != self.epoch:
            self._sessions.forget()
            self.epoch = info.epoch
        return info

    # Commands

    def run(
        self,
        command: Command,
        *,
        input: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        on_output: Callable[[Output], object] | None = None,
        max_output: int = MAX_OUTPUT,
        check: bool = False,
    ) -> Result:
        """Runs a command to its end.

        A string is a line for ``sh -c``; a sequence is a program and its arguments. After ``timeout`` seconds the command
        and all its descendants are killed, and the result says ``timed_out``. ``on_output`` is called with every piece
        of output as it comes; of what is more than ``max_output`` bytes only the number is kept. With ``check``, a
        command that does not end well raises :class:`CommandFailed`.
        """
        spec = _spec(command, env, cwd, user, timeout, None, input is not None)
        session = self._spawn(Session, spec, attach=True)
        writer = None
        if input is not None:
            writer = threading.Thread(target=_feed, args=(session, input), daemon=True)
            writer.start()
        try:
            return session.wait(on_output=on_output, max_output=max_output, check=check)
        except DeltaBoxError:
            raise
        except BaseException:
            # The caller's own, from `on_output` or an interrupt: nobody wants the command any more.
            _kill_quietly(session)
            raise
        finally:
            session.close()
            if writer is not None:
                # Its request fails when the command has ended.
                writer.join()

    def spawn(
        self,
        command: Command,
        *,
        stdin: bool = False,
        tty: tuple[int, int] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
    ) -> Session:
        """Starts a command and returns at once. ``stdin`` says that input will be sent; ``tty`` puts it on a terminal of so
        many lines and columns."""
        return self._spawn(Session, _spec(command, env, cwd, user, timeout, tty, stdin))

    def shell(
        self,
        program: str = "bash",
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Shell:
        """Starts a persistent shell (any POSIX one: ``sh`` for a base that has no bash)."""
        return self._spawn(Shell, _spec([program], env, cwd, user, None, None, True))

    def session(self, id: str, *, from_start: bool = False) -> Session:
        """A session that is there already: its output from now on, or from its start."""
        epoch, info = self._session(id)
        session = Session(self, info, epoch, 0 if from_start else info.output)
        self._sessions.add(session)
        return session

    def sessions(self) -> list[SessionInfo]:
        """All sessions; the last 256 of those that have ended too."""
        return [parse(SessionInfo, s) for s in self._request("GET", "/sessions")]

    # States

    def checkpoint(self, message: str | None = None, *, durable: bool = False) -> Checkpoint:
        """Checkpoints files, processes and sessions together. Fails with :class:`ProcessError` if something cannot be
        carried; the sandbox runs on as if nothing had happened.

        With ``durable`` it returns when the checkpoint is on disk, so that it outlives the service; if that fails
        (:class:`NotDurable`) the checkpoint is kept in memory."""
        here = self._sessions.now()
        body = {"message": message, "durable": durable}
        answer = self._request("POST", "/checkpoints", body)
        checkpoint = parse(Checkpoint, {**answer, "message": message})
        self._sessions.keep(checkpoint.id, here)
        return checkpoint

    def rollback(self, to: CheckpointLike) -> RollbackReport:
        """Gives the sandbox the state of a checkpoint of its tree back, in whichever epoch it is."""
        try:
            answer = self._transport.request(
                "POST", f"{self._path}/rollback", {"checkpoint": str(to)}
            )
        except DeltaBoxError:
            # It may have failed half-way, and the epoch be over; what failed is what to tell.
            try:
                self.refresh()
            except DeltaBoxError:
                pass
            raise
        report = parse(RollbackReport, answer)
        self.epoch = report.epoch
        self._sessions.restore(report.id, report.epoch)
        return report

    def fork(
        self,
        n: int = 1,
        *,
        at: CheckpointLike | None = None,
        names: Sequence[str] = (),
        seed_rng: bool = False,
    ) -> list[Sandbox]:
        """Makes ``n`` sandboxes that begin with the state of a checkpoint, or with the present one. Their sessions have
        the same ids; :meth:`Session.twin` finds them.

        They share even the state of random number generators. ``seed_rng`` tells them apart: ``/run/deltabox/generation`` in
        each holds its number and random bits, and commands that are started later have both in their environment."""
        body = {
            "checkpoint": None if at is None else str(at),
            "n": n,
            "names": list(names),
            "seed_rng": seed_rng,
        }
        here = self._sessions.now() if at is None else self._sessions.at(str(at))
        infos = [parse(SandboxInfo, s) for s in self._request("POST", "/fork", body)]
        forks = [Sandbox(self.client, info.name, info.epoch) for info in infos]
        for fork in forks:
            fork._sessions.begin(here)
        return forks

    def hint(
        self,
        checkpoint: CheckpointLike,
        *,
        pin: bool | None = None,
        forks: int | None = None,
    ) -> bool:
        """Says what is known of the forks of a checkpoint to come: that what they share is to be kept whatever comes (``pin``,
        which also makes it; ``False`` takes that back), and how many are likely at a time. Returns whether there is something
        that they share."""
        body = {"pin": pin, "forks": forks}
        path = f"/checkpoints/{quote(str(checkpoint), safe='')}/hint"
        return bool(self._request("POST", path, body)["template"])

    def tree(self) -> Tree:
        """Its checkpoints."""
        nodes = self._request("GET", "/checkpoints")["nodes"]
        return Tree([parse(CheckpointInfo, node) for node in nodes])

    def diff(self, a: CheckpointLike, b: CheckpointLike) -> Difference:
        """What differs between two checkpoints: what happened on the way from ``a`` to ``b``."""
        query = urlencode({"from": str(a), "to": str(b)})
        return Difference.of(self._request("GET", f"/diff?{query}"))

    def persist(self, checkpoint: CheckpointLike) -> None:
        """Makes a checkpoint durable that was made without; returns when it is on disk."""
        self._request("POST", f"/checkpoints/{quote(str(checkpoint), safe='')}/persist")

    def delete(self, checkpoint: CheckpointLike) -> None:
        """Forgets a checkpoint; its children become its parent's."""
        self._request("DELETE", f"/checkpoints/{quote(str(checkpoint), safe='')}")
        self._sessions.drop(str(checkpoint))

    def attempt(self, message: str | None = None, *, keep: bool = False) -> Attempt:
        """A context whose changes are undone when it is left by an exception, which is passed on, or after
        :meth:`Attempt.discard`. Its checkpoint is deleted at the end, unless ``keep``."""
        return Attempt(self, message, keep)

    def stop(self) -> None:
        """Ends all processes; a rollback makes it run again."""
        self._request("POST", "/stop")

    def remove(self) -> None:
        """Ends all processes and removes the sandbox with its checkpoints, in whichever epoch it is."""
        self._transport.request("DELETE", self._path)

    # For sessions

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        try:
            return self._transport.request(method, self._path + path, body, epoch=self.epoch)
        except RolledBack as over:
            over.epoch = self.info().epoch
            raise

    def _spawn(self, kind: type[_S], spec: dict[str, Any], attach: bool = False) -> _S:
        path = "/sessions?attach=true" if attach else "/sessions"
        answer = self._request("POST", path, spec)
        session = kind(self, parse(SessionInfo, answer), answer["epoch"])
        self._sessions.add(session)
        return session

    def _session(self, id: str) -> tuple[int, SessionInfo]:
        epoch = self.epoch
        return epoch, parse(SessionInfo, self._request("GET", f"/sessions/{quote(id, safe='')}"))

    def _follow(self, session: Session) -> None:
        self._sessions.add(session)

    def _read_before(self, session: Session) -> int | None:
        """How far a session of the source had been read when the state that this fork began with was captured; ``None``
        if that is not known here."""
        return self._sessions.before(session)


class Attempt:
    """See :meth:`Sandbox.attempt`."""

    def __init__(self, sandbox: Sandbox, message: str | None, keep: bool) -> None:
        self.sandbox = sandbox
        self.discarded = False
        """Whether the changes are (to be) undone."""
        self._message = message
        self._keep = keep
        self._checkpoint: Checkpoint | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The state before the attempt."""
        if self._checkpoint is None:
            raise ValueError("the attempt has not begun: use it in a with statement")
        return self._checkpoint

    def discard(self) -> None:
        """Undoes the changes at the end, without an exception."""
        self.discarded = True

    def __enter__(self) -> Attempt:
        self._checkpoint = self.sandbox.checkpoint(self._message)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.discarded = True
        if self.discarded:
            self.sandbox.rollback(self.checkpoint)
        if not self._keep:
            self.sandbox.delete(self.checkpoint)


_Read = list[tuple["weakref.ref[Session]", int]]
"""Sessions, and how far each was read at some moment."""


class _Sessions:
    """Which session objects belong to the present, and which were there at each checkpoint.

    The ids cannot tell: after a rollback the same one may be given to another session.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._present: weakref.WeakSet[Session] = weakref.WeakSet()
        self._at: dict[str, _Read] = {}
        self._before: _Read = []

    def add(self, session: Session) -> None:
        with self._lock:
            self._present.add(session)

    def now(self) -> _Read:
        """The present sessions, and how far each is read."""
        with self._lock:
            return [(weakref.ref(s), s._cursor.consumed) for s in self._present]

    def keep(self, checkpoint: str, here: _Read) -> None:
        with self._lock:
            self._at[checkpoint] = here

    def at(self, checkpoint: str) -> _Read:
        """The sessions of a checkpoint, as far as they are known."""
        with self._lock:
            return self._at.get(checkpoint, [])

    def begin(self, before: _Read) -> None:
        """The sandbox is a fork, which begins with these sessions of its source."""
        with self._lock:
            self._before = before

    def before(self, session: Session) -> int | None:
        """How far a session of the source was read then."""
        with self._lock:
            read = (consumed for reference, consumed in self._before if reference() is session)
            return next(read, None)

    def drop(self, checkpoint: str) -> None:
        with self._lock:
            self._at.pop(checkpoint, None)

    def restore(self, checkpoint: str, epoch: int) -> None:
        """The sandbox has the state of a checkpoint again."""
        with self._lock:
            self._present = weakref.WeakSet()
            for reference, consumed in self._at.get(checkpoint, []):
                session = reference()
                if session is not None:
                    session._move(epoch, consumed)
                    self._present.add(session)

    def forget(self) -> None:
        """The present is one that is not known."""
        with self._lock:
            self._present = weakref.WeakSet()


def _spec(
    command: Command,
    env: Mapping[str, str] | None,
    cwd: str | None,
    user: str | None,
    timeout: float | None,
    tty: tuple[int, int] | None,
    stdin: bool,
) -> dict[str, Any]:
    return {
        "argv": ["sh", "-c", command] if isinstance(command, str) else list(command),
        "env": dict(env or {}),
        "cwd": cwd,
        "user": user,
        "timeout": timeout,
        "tty": None if tty is None else {"rows": tty[0], "cols": tty[1]},
        "stdin": stdin,
    }


def _feed(session: Session, data: str | bytes) -> None:
    try:
        session.send(data)
        session.close_stdin()
    except (InvalidRequest, RolledBack):
        # The command ended, or reads no more, or is over: its result or its output's end tells.
        pass
    except DeltaBoxError:
        # It would wait for the rest of its input for ever.
        _kill_quietly(session)


def _kill_quietly(session: Session) -> None:
    try:
        session.kill()
    except DeltaBoxError:
        pass
