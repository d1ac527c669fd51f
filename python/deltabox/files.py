"""The files of a sandbox, through commands that run in it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models import Result
    from .sandbox import Sandbox

# The scripts are for any POSIX shell. $1 is the path; these are their ways to say what is wrong with it.
_MISSING, _DIRECTORY, _NO_DIRECTORY = 71, 72, 73

_READ = f"""
[ -e "$1" ] || exit {_MISSING}
[ ! -d "$1" ] || exit {_DIRECTORY}
exec head -c "$2" <"$1"
"""
# Beside the old file and then in its place: nobody sees half of it. A link's target is replaced, not the link. Programs
# are run only where they are needed, as most files are short.
_WRITE = f"""
[ ! -d "$1" ] || exit {_DIRECTORY}
path=$1
if [ -L "$path" ]; then path=$(readlink -f -- "$1" && echo .) && path=${{path%?.}} || exit; fi
[ -d "${{path%/*}}/" ] || mkdir -p -- "${{path%/*}}/" || exit
new=$(mktemp -- "$path.XXXXXX") || exit
trap 'rm -f -- "$new"' EXIT
if [ -e "$path" ]; then cp -p -- "$path" "$new" || exit; fi
cat >"$new" || exit
if [ -n "$2" ] || [ ! -e "$path" ]; then chmod -- "${{2:-=rw}}" "$new" || exit; fi
mv -f -- "$new" "$path" && trap - EXIT
"""
_LIST = f"""
[ -e "$1" ] || exit {_MISSING}
[ -d "$1" ] || exit {_NO_DIRECTORY}
cd -- "$1" && exec find . -mindepth 1 -maxdepth 1 -print0
"""
_REMOVE = f"""
[ -e "$1" ] || [ -L "$1" ] || exit {_MISSING}
exec rm -rf -- "$1"
"""

MAX_FILE = 64 << 20
"""The longest file that is read, where nothing else is asked for, in bytes."""


class Files:
    """Reads and writes files as root inside, or as ``user``. Paths begin at the sandbox's root directory."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def read(self, path: str, *, user: str | None = None, limit: int = MAX_FILE) -> str:
        """A file as UTF-8. Raises what ``open`` and ``bytes.decode`` raise, ``OSError`` with ``EFBIG`` if it is longer
        than ``limit`` bytes."""
        return self.read_bytes(path, user=user, limit=limit).decode()

    def read_bytes(self, path: str, *, user: str | None = None, limit: int = MAX_FILE) -> bytes:
        """A file. Raises what ``open`` raises, ``OSError`` with ``EFBIG`` if it is longer than ``limit`` bytes."""
        # One byte more tells; a file may well have no end.
        done = self._script(_READ, path, str(limit + 1), user=user, max_output=limit + (64 << 10))
        if len(done.stdout_bytes) > limit:
            raise OSError(errno.EFBIG, f"longer than {limit} bytes", path)
        return done.stdout_bytes

    def write(
        self, path: str, data: str | bytes, *, mode: int | None = None, user: str | None = None
    ) -> None:
        """Writes a file, whole or not at all, and makes the directories that it needs. A file that is there keeps its
        mode and owner, unless ``mode`` says another."""
        octal = "" if mode is None else format(mode, "o")
        self._script(_WRITE, path, octal, input=data, user=user)

    def exists(self, path: str) -> bool:
        """Whether there is anything; a link counts by itself."""
        _check(path)
        found = self._sandbox.run(["sh", "-c", '[ -e "$1" ] || [ -L "$1" ]', "sh", path])
        return found.ok

    def list(self, path: str = "/", *, user: str | None = None) -> list[str]:
        """The names in a directory, sorted. Bytes that are not UTF-8 are as in ``os.fsdecode``."""
        out = self._script(_LIST, path, user=user).stdout_bytes
        return sorted(os.fsdecode(name[2:]) for name in out.split(b"\0") if name)

    def make_dir(self, path: str, *, user: str | None = None) -> None:
        """Makes a directory and those above it; no error if it is there."""
        self._script('exec mkdir -p -- "$1"', path, user=user)

    def remove(self, path: str, *, user: str | None = None) -> None:
        """Removes a file, or a directory with all that is in it."""
        self._script(_REMOVE, path, user=user)

    def _script(
        self,
        script: str,
        path: str,
        *args: str,
        input: str | bytes | None = None,
        user: str | None = None,
        max_output: int = MAX_FILE,
    ) -> Result:
        _check(path)
        command = ["sh", "-c", script, "sh", path, *args]
        done = self._sandbox.run(command, input=input, user=user, max_output=max_output)
        if done.exit_code == _MISSING:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if done.exit_code == _DIRECTORY:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if done.exit_code == _NO_DIRECTORY:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if not done.ok:
            why = done.stderr.strip() or f"status {done.exit_code}"
            raise OSError(errno.EIO, why, path)
        return done


def _check(path: str) -> None:
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f"{path!r} is not an absolute path")
