"""The service that hosts the sandboxes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, Callable

from ._transport import Transport
from .models import Feature, SandboxInfo, ServiceInfo, parse


class Client:
    """The service of one state directory. Connects at the first request; may be used by many threads, after a ``fork``,
    and be pickled.

    ``state_dir`` is ``$DELTABOX_STATE_DIR`` or ``/var/lib/deltabox`` by default. Where no service runs the program
    ``deltabox`` is run to start one (``binary``, or ``$DELTABOX_BIN``, or found on the ``PATH``), unless ``start`` is false.
    """

    def __init__(
        self,
        state_dir: str | os.PathLike[str] | None = None,
        *,
        binary: str | os.PathLike[str] | None = None,
        start: bool = True,
    ) -> None:
        directory = state_dir or os.environ.get("DELTABOX_STATE_DIR") or "/var/lib/deltabox"
        self.state_dir = Path(directory).absolute()
        self._settings = (None if binary is None else os.fspath(binary), start)
        self._transport = Transport(self.state_dir, *self._settings)

    def __repr__(self) -> str:
        return f"Client({str(self.state_dir)!r})"

    def __reduce__(self) -> tuple[Callable[..., Client], tuple[Any, ...]]:
        return _client, (str(self.state_dir), *self._settings)

    def version(self) -> ServiceInfo:
        """What the service is."""
        return parse(ServiceInfo, self._transport.request("GET", "/version"))

    def sandboxes(self) -> list[SandboxInfo]:
        """All sandboxes."""
        return [parse(SandboxInfo, s) for s in self._transport.request("GET", "/sandboxes")]

    def doctor(self) -> list[Feature]:
        """Which features of the kernel are there."""
        return [parse(Feature, f) for f in self._transport.request("GET", "/doctor")]

    def metrics(self) -> str:
        """Counters and histograms, in the text format of Prometheus."""
        text: str = self._transport.request("GET", "/metrics")
        return text

    def stop(self) -> None:
        """Ends all sandboxes, then the service. Returns before it is done."""
        self._transport.request("POST", "/stop")

    def close(self) -> None:
        """Closes connections that are idle. The client can be used on."""
        self._transport.close()


def _client(state_dir: str, binary: str | None, start: bool) -> Client:
    return Client(state_dir, binary=binary, start=start)


_default: Client | None = None
_default_lock = threading.Lock()


def default_client() -> Client:
    """The client that is used where none is named."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Client()
        return _default
