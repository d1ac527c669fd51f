"""Sandboxes for AI agents whose whole state (files, processes, memory, shells) can be checkpointed, rolled back and forked.

    from deltabox import Sandbox

    with Sandbox.create() as sb:
        cp = sb.checkpoint("before")
        print(sb.run("pytest -q", cwd="/root/project").stdout)
        sb.rollback(cp)
"""

from .client import Client
from .errors import (
    ApiError,
    CheckpointNotFound,
    CommandFailed,
    CommandNotExecutable,
    CommandNotFound,
    DeltaBoxError,
    DiskFull,
    InvalidRequest,
    NameTaken,
    NotDurable,
    NotRunning,
    ProcessError,
    ReadTimeout,
    RolledBack,
    SandboxNotFound,
    ServiceStopping,
    ServiceUnavailable,
    SessionNotFound,
    SpawnFailed,
    TooLarge,
    UnexpectedEnd,
    Unusable,
)
from .files import Files
from .models import (
    Checkpoint,
    CheckpointInfo,
    Difference,
    Feature,
    FileChange,
    Output,
    ProcessName,
    Result,
    RollbackReport,
    SandboxInfo,
    ServiceInfo,
    SessionInfo,
    ShellResult,
    Tree,
)
from .sandbox import Attempt, Sandbox
from .session import Session, Shell

__all__ = [
    "ApiError",
    "Attempt",
    "Checkpoint",
    "CheckpointInfo",
    "CheckpointNotFound",
    "Client",
    "CommandFailed",
    "CommandNotExecutable",
    "CommandNotFound",
    "DeltaBoxError",
    "Difference",
    "DiskFull",
    "Feature",
    "FileChange",
    "Files",
    "InvalidRequest",
    "NameTaken",
    "NotDurable",
    "NotRunning",
    "Output",
    "ProcessError",
    "ProcessName",
    "ReadTimeout",
    "Result",
    "RollbackReport",
    "RolledBack",
    "Sandbox",
    "SandboxInfo",
    "SandboxNotFound",
    "ServiceInfo",
    "ServiceStopping",
    "ServiceUnavailable",
    "Session",
    "SessionInfo",
    "SessionNotFound",
    "Shell",
    "ShellResult",
    "SpawnFailed",
    "TooLarge",
    "Tree",
    "UnexpectedEnd",
    "Unusable",
]
