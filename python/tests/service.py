"""A service of its own for each test case, which ends with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import unittest

from deltabox import Client, Sandbox

BINARY = os.environ.get("DELTABOX_BIN") or shutil.which("deltabox")


def _why_not() -> str | None:
    if BINARY is None:
        return "the program deltabox is not found; name it in DELTABOX_BIN"
    if os.geteuid() != 0:
        return "sandboxes need root"
    return None


class ServiceTest(unittest.TestCase):
    """Tests with a service in a state directory of its own, in ``self.client``."""

    client: Client

    @classmethod
    def setUpClass(cls) -> None:
        why = _why_not()
        if why is not None:
            raise unittest.SkipTest(why)
        directory = tempfile.mkdtemp(prefix="deltabox-python-")
        # In the order of the last to the first; also when a test or the start fails.
        cls.addClassCleanup(shutil.rmtree, directory)
        cls.addClassCleanup(_stop, directory)
        cls.client = Client(directory, binary=BINARY)
        cls.addClassCleanup(cls.client.close)

    def sandbox(self) -> Sandbox:
        """A sandbox over the host's root directory, removed with the test."""
        sandbox = Sandbox.create(client=self.client)
        self.addCleanup(sandbox.__exit__)
        return sandbox


def _stop(directory: str) -> None:
    assert BINARY is not None
    subprocess.run(
        [BINARY, "--state-dir", directory, "service", "stop"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
