"""Exceptions: one class for each error code of the API, and those that arise on this side."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models import Result


class DeltaBoxError(Exception):
    """The base of all exceptions of this package."""


class ServiceUnavailable(DeltaBoxError):
    """The service cannot be reached or started, or went away before it had answered."""


class RolledBack(DeltaBoxError):
    """What was used belongs to a future that a rollback has ended.

    A session that was started since, a stream of its output, or a :class:`~deltabox.Sandbox` object whose sandbox
    somebody else has rolled back; :meth:`Sandbox.refresh <deltabox.Sandbox.refresh>` accepts the new state.
    """

    def __init__(self, message: str, epoch: int | None = None) -> None:
        super().__init__(message)
        self.epoch = epoch
        """The sandbox's epoch since the rollback, where it is known."""


class CommandFailed(DeltaBoxError):
    """A command ended with a status other than 0, or ran out of time, and ``check`` was asked for."""

    def __init__(self, command: str, result: Result) -> None:
        why = "ran out of time" if result.timed_out else f"ended with status {result.exit_code}"
        tail = result.stderr.strip()[-2000:]
        super().__init__(f"{command} {why}" + (f": {tail}" if tail else ""))
        self.result = result
        """Its output and status."""


class ReadTimeout(DeltaBoxError, TimeoutError):
    """The output did not come in time. The command runs on."""

    def __init__(self, message: str, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message)
        self.stdout = stdout
        """What ``wait`` had read of standard output until then."""
        self.stderr = stderr
        """What ``wait`` had read of standard error until then."""


class UnexpectedEnd(DeltaBoxError, EOFError):
    """The session ended before the output that was waited for."""

    def __init__(self, message: str, output: bytes, exit_code: int) -> None:
        super().__init__(message)
        self.output = output
        """What it had written last."""
        self.exit_code = exit_code
        """Its status."""


class ApiError(DeltaBoxError):
    """The service refused a request, or could not fulfil it."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        """The status of HTTP."""
        self.code = code
        """The error's code in the API."""


class InvalidRequest(ApiError):
    """What was asked for makes no sense."""


class SandboxNotFound(ApiError):
    """No sandbox has this name."""


class CheckpointNotFound(ApiError):
    """The sandbox has no such checkpoint."""


class SessionNotFound(ApiError):
    """The sandbox has no such session."""


class NameTaken(ApiError):
    """A sandbox has this name already."""


class NotRunning(ApiError):
    """The sandbox is stopped or failed; a rollback makes it run again."""


class ProcessError(ApiError):
    """Something about the processes that cannot be carried, by name; the sandbox runs on."""


class TooLarge(ApiError):
    """The request was too long."""


class SpawnFailed(ApiError):
    """The command could not be started."""


class CommandNotFound(SpawnFailed):
    """There is no such program in the sandbox."""


class CommandNotExecutable(SpawnFailed):
    """The program may not be executed."""


class NotDurable(ApiError):
    """The checkpoint was made, and is in memory; but it could not be put on disk."""


class Unusable(ApiError):
    """What is on disk of a checkpoint is damaged, or does not fit this machine any more."""


class DiskFull(ApiError):
    """There is no room left in the state directory."""


class ServiceStopping(ApiError):
    """The service ends."""


_BY_CODE: dict[str, type[ApiError]] = {
    "invalid": InvalidRequest,
    "no_sandbox": SandboxNotFound,
    "no_checkpoint": CheckpointNotFound,
    "no_session": SessionNotFound,
    "name_taken": NameTaken,
    "not_running": NotRunning,
    "processes": ProcessError,
    "too_large": TooLarge,
    "spawn": SpawnFailed,
    "command_not_found": CommandNotFound,
    "command_not_executable": CommandNotExecutable,
    "not_durable": NotDurable,
    "unusable": Unusable,
    "disk_full": DiskFull,
    "stopping": ServiceStopping,
}


def of_answer(status: int, code: str, message: str) -> DeltaBoxError:
    """The exception for an answer of the service that is not a success."""
    if code == "epoch":
        return RolledBack(message)
    return _BY_CODE.get(code, ApiError)(status, code, message)
