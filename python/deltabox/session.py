"""Commands and shells that run in a sandbox."""

from __future__ import annotations

import re
import secrets
import shlex
import signal as signals
import time
from typing import TYPE_CHECKING, Any, Callable, Iterator, Pattern, TypeVar

from ._output import Cursor
from .errors import CommandFailed, ReadTimeout, UnexpectedEnd
from .models import Output, Result, SessionInfo, ShellResult, parse

if TYPE_CHECKING:
    from .sandbox import Sandbox

S = TypeVar("S", bound="Session")

MAX_OUTPUT = 64 << 20
"""The most bytes of output that are collected, where nothing else is asked for."""

_INPUT_PIECE = 256 << 10
"""How much input is sent in one request, in bytes."""


class Session:
    """A command or shell in a sandbox, made by :meth:`Sandbox.spawn` or found by :meth:`Sandbox.session`.

    It belongs to the sandbox's state. When its ``Sandbox`` object is rolled back to a checkpoint that it took while the
    session was there, the session goes on from there, and so does this object: what it had read since is read again
    if it is written again. A session that was started after the checkpoint is over: all calls raise :class:`RolledBack`.

    Not to be read by two threads at a time; anything else may be called from any thread.
    """

    def __init__(self, sandbox: Sandbox, info: SessionInfo, epoch: int, consumed: int = 0) -> None:
        self.sandbox = sandbox
        self.id = info.id
        self.argv = info.argv
        self.pid = info.pid
        """Its pid in the sandbox."""
        self.tty = info.tty
        """Whether it is on a terminal, whose output all counts as standard output."""
        self._move(epoch, consumed)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} of {self.sandbox.name}: {shlex.join(self.argv)}>"

    def info(self) -> SessionInfo:
        """How it is doing."""
        return parse(SessionInfo, self._request("GET"))

    @property
    def exit_code(self) -> int | None:
        """0-255, 128+n when signal n killed it; ``None`` while it runs. Does not wait."""
        end = self._cursor.end
        return end.exit_code if end else self.info().exit

    def send(self, data: str | bytes) -> None:
        """Writes to its standard input or terminal; waits while the command does not read. Needs a session that was
        started with ``stdin=True`` or on a terminal."""
        data = data.encode() if isinstance(data, str) else data
        for begin in range(0, len(data), _INPUT_PIECE):
            self._request("POST", "/stdin", data[begin : begin + _INPUT_PIECE])

    def send_line(self, line: str = "") -> None:
        """Writes a line."""
        self.send(line + "\n")

    def close_stdin(self) -> None:
        """Ends its input."""
        self._request("POST", "/close-stdin")

    def signal(self, number: int) -> None:
        """Sends a signal to the command's process group."""
        self._request("POST", "/signal", {"signal": int(number)})

    def interrupt(self) -> None:
        """Sends SIGINT, as Ctrl-C does."""
        self.signal(signals.SIGINT)

    def kill(self) -> None:
        """Kills the command and all its descendants."""
        self._request("POST", "/kill")

    def resize(self, rows: int, cols: int) -> None:
        """Sets the size of its terminal."""
        self._request("POST", "/resize", {"rows": rows, "cols": cols})

    def __iter__(self) -> Iterator[Output]:
        """The output that has not been read yet, as it comes, until the session ends."""
        cursor = self._cursor
        while True:
            yield from cursor.take(len(cursor.buffer))
            if cursor.end is not None:
                return
            cursor.fill(None)

    def read_until(
        self,
        marker: str | bytes | Pattern[bytes],
        timeout: float | None = None,
        limit: int = MAX_OUTPUT,
    ) -> bytes:
        """Reads both streams, as they come, up to and with ``marker``: text, or a compiled pattern of bytes.

        Raises :class:`ReadTimeout` after ``timeout`` seconds; nothing is lost, the next call finds what has come.
        Raises :class:`UnexpectedEnd` when the session ends first, ``BufferError`` when more than ``limit`` bytes came.
        """
        cursor = self._cursor
        deadline = _deadline(timeout)
        find = _finder(marker)
        while True:
            end = find(cursor.buffer)
            if end is not None:
                return b"".join(piece.data for piece in cursor.take(end))
            if len(cursor.buffer) > limit:
                raise BufferError(f"{marker!r} did not come within {limit} bytes of {self!r}")
            if cursor.end is not None:
                rest = b"".join(piece.data for piece in cursor.take(len(cursor.buffer)))
                status = cursor.end.exit_code
                raise UnexpectedEnd(
                    f"{self!r} ended with status {status} before {marker!r} came", rest, status
                )
            if not cursor.fill(deadline):
                raise ReadTimeout(f"{marker!r} did not come within {timeout} s from {self!r}")

    def wait(
        self,
        timeout: float | None = None,
        *,
        on_output: Callable[[Output], object] | None = None,
        max_output: int = MAX_OUTPUT,
        check: bool = False,
    ) -> Result:
        """Waits for the session's end. The result has the output that had not been read before.

        ``on_output`` is called with every piece as it comes. Of what is more than ``max_output`` bytes only the number
        is kept. Raises :class:`ReadTimeout` after ``timeout`` seconds (the command runs on; :meth:`kill` ends it), and
        with ``check`` :class:`CommandFailed` if the command did not end well.
        """
        cursor = self._cursor
        deadline = _deadline(timeout)
        missed = cursor.missed
        streams = {"stdout": bytearray(), "stderr": bytearray()}
        room, dropped = max_output, 0
        while True:
            for piece in cursor.take(len(cursor.buffer)):
                kept = piece.data[:room]
                streams[piece.stream] += kept
                room -= len(kept)
                dropped += len(piece.data) - len(kept)
                if on_output is not None:
                    on_output(piece)
            if cursor.end is not None:
                break
            if not cursor.fill(deadline):
                stdout, stderr = bytes(streams["stdout"]), bytes(streams["stderr"])
                raise ReadTimeout(f"{self!r} did not end within {timeout} s", stdout, stderr)
        result = Result(
            exit_code=cursor.end.exit_code,
            stdout_bytes=bytes(streams["stdout"]),
            stderr_bytes=bytes(streams["stderr"]),
            timed_out=cursor.end.timed_out,
            dropped=dropped + cursor.missed - missed,
        )
        if check and not result.ok:
            raise CommandFailed(shlex.join(self.argv), result)
        return result

    def resume(self, from_start: bool = False) -> None:
        """Takes the session of this number in the sandbox's present state as this one, after a rollback that this
        object does not follow by itself (to a checkpoint that another client took). Reads on at the end of what it has
        written, or at the beginning. Whether it is the same session only the caller can know.

        Raises :class:`SessionNotFound` when there is none.
        """
        epoch, info = self.sandbox._session(self.id)
        self.sandbox._follow(self)
        self._move(epoch, 0 if from_start else info.output)

    def twin(self: S, sandbox: Sandbox) -> S:
        """The same session in a fork of its sandbox. Reads on where this one had read to when the state that was forked was
        captured; where that is not known, since another client captured it, where this one has read to by now, at most where
        the twin ends."""
        epoch, info = sandbox._session(self.id)
        read = sandbox._read_before(self)
        if read is None:
            read = min(self._cursor.consumed, info.output)
        twin = type(self)(sandbox, info, epoch, read)
        sandbox._follow(twin)
        return twin

    def close(self) -> None:
        """Stops reading; the command no longer waits for this reader. It can be read on from the same place."""
        self._cursor.close()

    def _move(self, epoch: int, consumed: int) -> None:
        path = f"{self.sandbox._path}/sessions/{self.id}"
        # The old cursor may be in another thread's hands, who will find its epoch over.
        self._cursor = Cursor(self.sandbox._transport, path, epoch, consumed)

    def _request(self, method: str, path: str = "", body: Any = None) -> Any:
        path = f"{self.sandbox._path}/sessions/{self.id}{path}"
        return self.sandbox._transport.request(method, path, body, epoch=self._cursor.epoch)


class Shell(Session):
    """A shell that keeps its working directory, variables and jobs from command to command. On pipes."""

    def run(self, command: str, timeout: float | None = None) -> ShellResult:
        """Runs a command, which may have many lines, in the shell itself. Its standard input is empty.

        Raises :class:`ReadTimeout` after ``timeout`` seconds: the command runs on, and what comes from it is at the
        beginning of the next command's output. A rollback gives the shell back as it was.
        Raises :class:`UnexpectedEnd` when the shell ends, as with ``exit``.
        """
        marker = f"--{secrets.token_hex(16)}:"
        # `command` keeps a shell alive whose `eval` finds a syntax error.
        self.send(
            f"command eval {shlex.quote(command)} </dev/null 2>&1\nprintf '%s%d\\n' '{marker}' \"$?\"\n"
        )
        end = re.compile(re.escape(marker.encode()) + rb"(\d+)\n")
        output = self.read_until(end, timeout)
        found = end.search(output)
        assert found is not None
        return ShellResult(int(found[1]), output[: found.start()].decode(errors="replace"))


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _finder(marker: str | bytes | Pattern[bytes]) -> Callable[[bytearray], int | None]:
    """A function that gives the end of the marker in a buffer that grows."""
    if isinstance(marker, re.Pattern):
        pattern: Pattern[bytes] = marker

        def search(buffer: bytearray) -> int | None:
            found = pattern.search(buffer)
            return found.end() if found else None

        return search
    text = marker.encode() if isinstance(marker, str) else marker
    searched = 0

    def find(buffer: bytearray) -> int | None:
        nonlocal searched
        at = buffer.find(text, max(0, searched - len(text) + 1))
        searched = len(buffer)
        return None if at < 0 else at + len(text)

    return find
