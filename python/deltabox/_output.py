"""A session's output as it comes: frames, a buffer, and a place in the log to begin from again."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import Iterator, Literal

from ._transport import Transport
from .errors import RolledBack, ServiceUnavailable
from .models import Output

_MAX_PAYLOAD = 1 << 20
"""The longest payload of a frame, in bytes."""

_STREAMS: dict[int, Literal["stdout", "stderr"]] = {1: "stdout", 2: "stderr"}


@dataclass(frozen=True)
class Exit:
    """How a session ended."""

    exit_code: int
    timed_out: bool


class Cursor:
    """A reader of a session in one epoch. Begins at ``consumed`` bytes of its output, and comes back to where it was after
    a timeout. After a rollback another cursor takes its place."""

    def __init__(self, transport: Transport, path: str, epoch: int, consumed: int) -> None:
        self._open: tuple[socket.socket, http.client.HTTPResponse] | None = None
        self._raw = bytearray()
        self.epoch = epoch
        self.consumed = consumed
        """How much of the output, of both streams, the user has taken."""
        self.missed = 0
        """How much had to be dropped before it was read."""
        self.buffer = bytearray()
        """Read and not yet taken."""
        self.end: Exit | None = None
        self._pieces: deque[tuple[Literal["stdout", "stderr"], int]] = deque()
        self._transport = transport
        self._path = path
        self._received = consumed
        self._pid = os.getpid()

    def __del__(self) -> None:
        # The session waits for readers that lag behind: one that nobody has any more must be gone.
        self.close()

    def fill(self, deadline: float | None) -> bool:
        """Waits for more output or the end; false when the deadline (of ``time.monotonic``) passed."""
        before = self._received
        while self.end is None and self._received == before:
            frame = self._frame()
            if frame is not None:
                self._apply(*frame)
            elif not self._receive(deadline):
                return False
        return True

    def take(self, size: int) -> Iterator[Output]:
        """Takes ``size`` bytes from the front of the buffer."""
        while size > 0:
            stream, length = self._pieces.popleft()
            if length > size:
                self._pieces.appendleft((stream, length - size))
                length = size
            data = bytes(self.buffer[:length])
            del self.buffer[:length]
            self.consumed += length
            size -= length
            yield Output(stream, data)

    def close(self) -> None:
        """Leaves the session, which goes on. What was read and not taken stays."""
        if self._open is not None:
            sock, answer = self._open
            self._open = None
            answer.close()
            sock.close()
        self._raw.clear()

    def _receive(self, deadline: float | None) -> bool:
        timeout = None
        if deadline is not None:
            # Not 0, which would mean something else to a socket.
            timeout = max(deadline - time.monotonic(), 1e-6)
        if self._pid != os.getpid():
            # The connection is that of the process which forked this one, and goes on reading from it.
            self.close()
            self._pid = os.getpid()
        try:
            if self._open is None:
                path = f"{self._path}/output?offset={self._received}"
                self._open = self._transport.stream(path, epoch=self.epoch, timeout=timeout)
            sock, answer = self._open
            sock.settimeout(timeout)
            data = answer.read1(_MAX_PAYLOAD)
        except TimeoutError:
            # The answer cannot be read on after a timeout; the next one begins behind the last whole frame.
            self.close()
            return False
        except (OSError, http.client.HTTPException) as why:
            self.close()
            raise ServiceUnavailable(f"the service went away during the output: {why}") from why
        except BaseException:
            self.close()
            raise
        if not data:
            self.close()
            raise ServiceUnavailable("the service closed the output before its end")
        self._raw += data
        return True

    def _frame(self) -> tuple[int, bytes] | None:
        if len(self._raw) < 5:
            return None
        length = int.from_bytes(self._raw[1:5], "big")
        if length > _MAX_PAYLOAD:
            self.close()
            raise ServiceUnavailable(f"a frame of {length} bytes; at most {_MAX_PAYLOAD} are accepted")
        if len(self._raw) < 5 + length:
            return None
        channel, payload = self._raw[0], bytes(self._raw[5 : 5 + length])
        del self._raw[: 5 + length]
        return channel, payload

    def _apply(self, channel: int, payload: bytes) -> None:
        if channel in _STREAMS:
            self.buffer += payload
            self._pieces.append((_STREAMS[channel], len(payload)))
            self._received += len(payload)
        elif channel == 6:
            missed = json.loads(payload)["missed"]
            self._received += missed
            self.consumed += missed
            self.missed += missed
        elif channel == 3:
            end = json.loads(payload)
            self.close()
            if end["end"] == "rolled_back":
                epoch = end["epoch"]
                raise RolledBack(f"rolled back at epoch {epoch}", epoch)
            self.end = Exit(end["status"], end["timed_out"])
        # Other channels are of services newer than this.
