"""HTTP/1.1 over the service's Unix socket, and the start of a service where none runs."""

from __future__ import annotations

import http.client
import json
import logging
import os
import select
import shutil
import socket
import subprocess
from collections import deque
from pathlib import Path
from typing import Any

from .errors import DeltaBoxError, ServiceUnavailable, of_answer

_log = logging.getLogger("deltabox")

_IDLE_KEPT = 8
"""Connections that are kept for later requests."""


class Connection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("deltabox")
        self._path = path
        self._pid = os.getpid()

    def connect(self) -> None:
        """Connects, or raises what ``socket`` raises."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(self._path))
        except BaseException:
            sock.close()
            raise
        self.sock = sock

    @property
    def stale(self) -> bool:
        """Whether the service has closed it (nothing is to be read from an idle one but its end), or it is that of the
        process which forked this one, and goes on using it."""
        if self._pid != os.getpid():
            return True
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))


class Transport:
    """Sends requests; may be used by many threads at a time, and on both sides of a ``fork``."""

    def __init__(self, state_dir: Path, binary: str | None, start: bool) -> None:
        self.state_dir = state_dir
        self._binary = binary
        self._start = start
        # Without a lock, which another thread could hold at a fork.
        self._idle: deque[Connection] = deque()

    def __del__(self) -> None:
        self.close()

    def request(
        self, method: str, path: str, body: Any = None, *, epoch: int | None = None
    ) -> Any:
        """The JSON that the service answers, or its text where that is no JSON. ``body`` is sent as it is if it is
        ``bytes``, else as JSON."""
        connection = self._take()
        try:
            answer = _exchange(connection, method, path, body, epoch)
            data = answer.read()
        except (OSError, http.client.HTTPException) as why:
            connection.close()
            raise ServiceUnavailable(
                f"the service went away during {method} {path}; whether it was done is not known: {why}"
            ) from why
        except BaseException:
            # Interrupted half-way: its answer must not be taken for another request's.
            connection.close()
            raise
        self._give_back(connection, answer)
        if answer.status >= 400:
            raise _refusal(answer.status, data)
        if answer.headers.get_content_type() == "application/json":
            return json.loads(data)
        return data.decode(errors="replace")

    def stream(
        self, path: str, *, epoch: int | None, timeout: float | None
    ) -> tuple[socket.socket, http.client.HTTPResponse]:
        """An answer whose body is read piece by piece, and its socket. To leave, close both.

        Raises ``TimeoutError`` when the answer does not begin within ``timeout``."""
        connection = self._take()
        sock = connection.sock
        sock.settimeout(timeout)
        try:
            answer = _exchange(connection, "GET", path, None, epoch)
            if answer.status < 400:
                return sock, answer
            refusal = _refusal(answer.status, answer.read())
        except TimeoutError:
            connection.close()
            raise
        except (OSError, http.client.HTTPException) as why:
            connection.close()
            raise ServiceUnavailable(f"the service went away during GET {path}: {why}") from why
        except BaseException:
            connection.close()
            raise
        connection.close()
        raise refusal

    def close(self) -> None:
        """Closes idle connections; later requests make new ones."""
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return

    def _take(self) -> Connection:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return self._connect()
            if not connection.stale:
                return connection
            connection.close()

    def _give_back(self, connection: Connection, answer: http.client.HTTPResponse) -> None:
        if answer.will_close or len(self._idle) >= _IDLE_KEPT:
            connection.close()
        else:
            self._idle.append(connection)

    def _connect(self) -> Connection:
        path = self.state_dir / "deltabox.sock"
        connection = Connection(path)
        try:
            try:
                connection.connect()
            except (FileNotFoundError, ConnectionRefusedError):
                if not self._start:
                    raise
                self._start_service()
                connection.connect()
        except OSError as why:
            raise ServiceUnavailable(f"no service can be reached at {path}: {why}") from why
        return connection

    def _start_service(self) -> None:
        """Has the command line start it: of many callers at a time one does, the others wait."""
        command = [self._program(), "--state-dir", str(self.state_dir), "--json", "ls"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
            )
        except OSError as why:
            raise ServiceUnavailable(f"the service cannot be started: {command[0]}: {why}") from why
        told = done.stderr.strip()
        if done.returncode != 0:
            raise ServiceUnavailable(f"the service cannot be started: {told or done.returncode}")
        for line in told.splitlines():
            _log.warning("%s", line.removeprefix("deltabox: "))

    def _program(self) -> str:
        program = self._binary or os.environ.get("DELTABOX_BIN") or shutil.which("deltabox")
        if program is None:
            raise ServiceUnavailable(
                f"no service runs in {self.state_dir}, and the program that starts one, deltabox, is not found;"
                " put it on the PATH or name it in DELTABOX_BIN"
            )
        return program


def _exchange(
    connection: Connection, method: str, path: str, body: Any, epoch: int | None
) -> http.client.HTTPResponse:
    headers = {}
    if epoch is not None:
        headers["deltabox-epoch"] = str(epoch)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        headers["content-type"] = "application/json"
    connection.request(method, "/v1" + path, body=body, headers=headers)
    return connection.getresponse()


def _refusal(status: int, data: bytes) -> DeltaBoxError:
    try:
        error = json.loads(data)["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "failed", data.decode(errors="replace") or f"status {status}"
    return of_answer(status, code, message)
