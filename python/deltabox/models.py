"""What the API tells of sandboxes, sessions, checkpoints and their differences. All times are in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Iterator, Literal, Mapping, TypeVar, Union

T = TypeVar("T")


def parse(kind: type[T], answer: Mapping[str, Any]) -> T:
    """A dataclass from a JSON object; members that this version does not know are left out."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in answer.items() if key in known})


@dataclass(frozen=True)
class ServiceInfo:
    """What the service is."""

    version: str
    pid: int
    state_dir: str
    started: int
    """In seconds since 1970."""
    cleaned_up: list[str]
    """What a service that was killed had left behind."""


@dataclass(frozen=True)
class Feature:
    """A feature of the kernel, as ``deltabox doctor`` tells of it."""

    name: str
    present: bool
    required: bool
    detail: str


@dataclass(frozen=True)
class SandboxInfo:
    """What a sandbox is and how it is doing."""

    name: str
    state: Literal["running", "stopped", "failed"]
    base: str
    current: str | None
    """The checkpoint that its state comes from."""
    epoch: int
    """How often it was rolled back."""
    created: int
    """In seconds since 1970."""
    checkpoints: int
    durable: int
    """How many of them are on disk."""
    processes: int
    file_bytes: int
    page_bytes: int
    warnings: list[str]
    reason: str | None = None
    """Why it failed, in state ``failed``."""


@dataclass(frozen=True)
class SessionInfo:
    """A command or shell that was started in a sandbox."""

    id: str
    argv: list[str]
    pid: int
    """Inside."""
    tty: bool
    exit: int | None
    """0-255, 128+n for signal n; ``None`` while it runs."""
    output: int
    """Bytes of output so far, of both streams together."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was just taken."""

    id: str
    stop: float
    """How long the processes stood still."""
    total: float
    pages: int
    """Pages of memory that were copied."""
    processes: int
    phases: list[tuple[str, float]] = field(repr=False)
    """Names and times of the parts, in order."""
    message: str | None = None

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True)
class CheckpointInfo:
    """A node of the tree."""

    id: str
    parent: str | None
    message: str | None
    created: int
    """In seconds since 1970."""
    processes: int
    current: bool
    """Whether the sandbox's state comes from it."""
    state: str = "warm"
    """``"warm"`` (in memory), ``"durable"`` (on disk), or ``"failed"``."""
    reason: str | None = None
    """Why it is failed: it was to be durable and is not, or what is on disk cannot be used."""

    def __str__(self) -> str:
        return self.id


CheckpointLike = Union[Checkpoint, CheckpointInfo, str]
"""A checkpoint, or its id (``"c17"``)."""


@dataclass(frozen=True)
class Tree:
    """The checkpoints of a sandbox, parents before children."""

    nodes: list[CheckpointInfo]

    def __iter__(self) -> Iterator[CheckpointInfo]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, checkpoint: object) -> bool:
        return any(node.id == str(checkpoint) for node in self.nodes)

    def __getitem__(self, checkpoint: CheckpointLike) -> CheckpointInfo:
        for node in self.nodes:
            if node.id == str(checkpoint):
                return node
        raise KeyError(str(checkpoint))

    @property
    def current(self) -> CheckpointInfo | None:
        """The node that the sandbox's state comes from."""
        return next((node for node in self.nodes if node.current), None)

    def children(self, checkpoint: CheckpointLike | None) -> list[CheckpointInfo]:
        """The nodes below one; the roots for ``None``."""
        parent = None if checkpoint is None else str(checkpoint)
        return [node for node in self.nodes if node.parent == parent]


@dataclass(frozen=True)
class RollbackReport:
    """What a rollback did."""

    id: str
    epoch: int
    total: float
    pages: int
    """Pages of memory that were written back."""
    kept: int
    """Processes that were undone in place."""
    rebuilt: int
    """Processes that were made again."""
    killed: int
    """Processes that had come since."""
    fallback: str | None
    """Why all processes had to be made again, where undoing in place failed."""
    notes: list[str]
    phases: list[tuple[str, float]] = field(repr=False)


@dataclass(frozen=True)
class FileChange:
    """A file that differs between two checkpoints."""

    kind: Literal["added", "modified", "deleted", "renamed"]
    path: str
    """Where it is in the second checkpoint; of a deleted one, where it was."""
    renamed_from: str | None = None


@dataclass(frozen=True)
class ProcessName:
    """A process inside."""

    pid: int
    command: str


@dataclass(frozen=True)
class Difference:
    """What differs between two checkpoints."""

    files: list[FileChange]
    came: list[ProcessName]
    """Processes that only the second one has."""
    went: list[ProcessName]
    """Processes that only the first one has."""

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Difference:
        """From the API's answer."""
        return cls(
            files=[
                FileChange(f["kind"], f.get("path") or f["to"], f.get("from"))
                for f in answer["files"]
            ],
            came=[parse(ProcessName, p) for p in answer["came"]],
            went=[parse(ProcessName, p) for p in answer["went"]],
        )


@dataclass(frozen=True)
class Output:
    """A piece of output."""

    stream: Literal["stdout", "stderr"]
    data: bytes

    @property
    def text(self) -> str:
        """As UTF-8; what is none becomes U+FFFD."""
        return self.data.decode(errors="replace")


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it wrote."""

    exit_code: int
    """0-255, 128+n when signal n killed it."""
    stdout_bytes: bytes = field(repr=False)
    stderr_bytes: bytes = field(repr=False)
    timed_out: bool = False
    """Whether it was killed because its time had run out."""
    dropped: int = 0
    """Bytes of output that were more than the limit, or that nobody read in time."""

    @property
    def stdout(self) -> str:
        """Standard output as UTF-8; what is none becomes U+FFFD."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """Standard error as UTF-8; what is none becomes U+FFFD."""
        return self.stderr_bytes.decode(errors="replace")

    @property
    def ok(self) -> bool:
        """Whether it ended with 0, in time."""
        return self.exit_code == 0 and not self.timed_out


@dataclass(frozen=True)
class ShellResult:
    """What a command in a shell wrote, and its status."""

    exit_code: int
    output: str
    """Standard output and error as they came, as UTF-8."""

    @property
    def ok(self) -> bool:
        """Whether it ended with 0."""
        return self.exit_code == 0
