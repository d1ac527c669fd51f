"""Checkpoints, rollbacks, forks, and what becomes of objects that know another state."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor

from deltabox import (
    CheckpointNotFound,
    Client,
    InvalidRequest,
    NameTaken,
    NotRunning,
    RolledBack,
    Sandbox,
    SandboxNotFound,
    ServiceUnavailable,
)

from .service import ServiceTest

COUNTER = """
import sys
n = 0
for line in sys.stdin:
    n += 1
    print(n, line, end="", flush=True)
"""


class States(ServiceTest):
    """Checkpoints and what can be done with them."""

    def test_a_durable_checkpoint_says_so(self) -> None:
        sb = self.sandbox()
        warm = sb.checkpoint()
        durable = sb.checkpoint("kept", durable=True)
        states = {node.id: (node.state, node.reason) for node in sb.tree()}
        self.assertEqual({warm.id: ("warm", None), durable.id: ("durable", None)}, states)
        self.assertEqual(1, sb.info().durable)
        sb.persist(warm)
        self.assertEqual({"durable"}, {node.state for node in sb.tree()})

    def test_a_rollback_gives_files_and_memory_back(self) -> None:
        sb = self.sandbox()
        counter = sb.spawn(["python3", "-u", "-c", COUNTER], stdin=True)
        counter.send_line("a")
        self.assertEqual(b"1 a\n", counter.read_until("\n"))
        sb.files.write("/root/note", "old")
        before = sb.checkpoint("before")
        self.assertGreaterEqual(before.total, before.stop)
        for text in "b", "c":
            counter.send_line(text)
            counter.read_until("\n")
        sb.files.write("/root/note", "new")
        sb.files.write("/root/more", "")
        late = sb.spawn("sleep 1000")
        after = sb.checkpoint()

        changed = {(f.kind, f.path) for f in sb.diff(before, after).files}
        self.assertLessEqual({("modified", "/root/note"), ("added", "/root/more")}, changed)
        self.assertIn("sleep", " ".join(p.command for p in sb.diff(before, after).came))

        report = sb.rollback(before)
        self.assertEqual((before.id, 1, 1), (report.id, report.epoch, sb.epoch))
        self.assertEqual("old", sb.files.read("/root/note"))
        self.assertFalse(sb.files.exists("/root/more"))
        counter.send_line("again")
        self.assertEqual(b"2 again\n", counter.read_until("\n"))
        with self.assertRaises(RolledBack):
            late.wait()
        with self.assertRaises(RolledBack):
            late.kill()

        sb.rollback(after.id)
        self.assertEqual("new", sb.files.read("/root/note"))
        counter.send_line("x")
        self.assertEqual(b"4 x\n", counter.read_until("\n"))
        self.assertIsNone(late.exit_code)

        tree = sb.tree()
        self.assertEqual([before.id, after.id], [node.id for node in tree])
        self.assertEqual(after.id, tree.current and tree.current.id)
        self.assertEqual("before", tree[before].message)
        self.assertEqual([after.id], [node.id for node in tree.children(before)])
        sb.delete(before)
        self.assertNotIn(before, sb.tree())
        with self.assertRaises(CheckpointNotFound):
            sb.rollback(before)

    def test_output_that_was_not_read_at_the_checkpoint_is_read_after_the_rollback(self) -> None:
        sb = self.sandbox()
        cat = sb.spawn(["cat"], stdin=True)
        cat.send_line("one\ntwo")
        cat.read_until("one\n")
        # In the buffer or on the way, and so of the state.
        cat.read_until("two", timeout=60)
        cat.send_line("three")
        self.assertEqual(b"\nthree", cat.read_until("three", timeout=60))
        checkpoint = sb.checkpoint()
        self.assertEqual(b"\n", cat.read_until("\n", timeout=60))
        sb.rollback(checkpoint)
        cat.send_line("four")
        self.assertEqual(b"\nfour", cat.read_until("four", timeout=60))

    def test_a_shell_follows_its_sandbox_through_a_tree(self) -> None:
        sb = self.sandbox()
        shell = sb.shell()
        shell.run("v=root")
        root = sb.checkpoint()
        nodes = {}
        for name in "left", "right":
            sb.rollback(root)
            shell.run(f"v={name}; cd /usr")
            nodes[name] = sb.checkpoint(name)
        for name in "left", "right", "left":
            sb.rollback(nodes[name])
            self.assertEqual(f"{name} /usr\n", shell.run('echo "$v $PWD"').output)
        sb.rollback(root)
        self.assertEqual("root\n", shell.run('echo "$v"').output)

    def test_forks_go_their_own_ways(self) -> None:
        sb = self.sandbox()
        shell = sb.shell()
        shell.run("v=7")
        at = sb.checkpoint()
        shell.run("v=8")
        children = sb.fork(3, at=at)
        for child in children:
            self.addCleanup(child.__exit__)
        self.assertEqual(3, len({child.name for child in children}))

        def use(child: Sandbox) -> str:
            twin = shell.twin(child)
            twin.run(f"v=$v.{child.name}")
            return twin.run("echo $v").output

        with ThreadPoolExecutor() as pool:
            values = list(pool.map(use, children))
        self.assertEqual([f"7.{child.name}\n" for child in children], values)
        self.assertEqual("8\n", shell.run("echo $v").output)

    def test_a_twin_reads_on_where_its_session_had_read_to_then(self) -> None:
        sb = self.sandbox()
        shell = sb.shell()
        first = sb.checkpoint()
        shell.run("v=long; seq 1000")
        second = sb.checkpoint()
        sb.rollback(first)
        [fork] = sb.fork(at=second)
        self.assertEqual("long\n", shell.twin(fork).run("echo $v").output)
        shell.run("v=longer; seq 2000")
        [fork, other] = sb.fork(2, at=second)
        self.assertEqual("long\n", shell.twin(fork).run("echo $v").output)
        self.assertEqual("long\n", shell.twin(other).run("echo $v").output)
        [fork] = sb.fork()
        self.assertEqual("longer\n", shell.twin(fork).run("echo $v").output)

    def test_a_failed_attempt_leaves_no_trace(self) -> None:
        sb = self.sandbox()
        with self.assertRaisesRegex(ValueError, "mine"):
            with sb.attempt():
                sb.files.write("/root/x", "")
                raise ValueError("mine")
        self.assertFalse(sb.files.exists("/root/x"))
        with sb.attempt() as attempt:
            sb.files.write("/root/x", "")
            attempt.discard()
        self.assertFalse(sb.files.exists("/root/x"))
        self.assertEqual(0, len(sb.tree()))
        with sb.attempt("kept", keep=True) as attempt:
            sb.files.write("/root/x", "")
        self.assertTrue(sb.files.exists("/root/x"))
        self.assertEqual("kept", sb.tree()[attempt.checkpoint].message)

    def test_a_hint_makes_what_forks_share(self) -> None:
        sb = self.sandbox()
        shell = sb.shell()
        shell.run("v=1")
        checkpoint = sb.checkpoint()
        self.assertFalse(sb.hint(checkpoint))
        self.assertTrue(sb.hint(checkpoint, pin=True, forks=2))
        self.assertTrue(sb.hint(checkpoint, pin=False))
        self.assertEqual("1\n", shell.twin(sb.fork(at=checkpoint)[0]).run("echo $v").output)

    def test_a_reader_that_waits_is_told_of_a_rollback(self) -> None:
        sb = self.sandbox()
        checkpoint = sb.checkpoint()
        session = sb.spawn("echo begun; sleep 1000")
        session.read_until("begun")
        told: list[RolledBack] = []

        def read() -> None:
            try:
                session.wait()
            except RolledBack as over:
                told.append(over)

        reader = threading.Thread(target=read)
        reader.start()
        sb.rollback(checkpoint)
        reader.join(60)
        self.assertEqual([1], [over.epoch for over in told])

    def test_another_clients_rollback_is_not_passed_over(self) -> None:
        sb = self.sandbox()
        shell = sb.shell()
        shell.run("v=1")
        checkpoint = sb.checkpoint()
        other = Sandbox.connect(sb.name, self.client)
        other.rollback(checkpoint.id)
        for call in sb.checkpoint, lambda: sb.run("true"), lambda: shell.run("true"):
            with self.assertRaises(RolledBack):
                call()
        sb.refresh()
        self.assertTrue(sb.run("true").ok)
        with self.assertRaises(RolledBack):
            shell.run("true")
        shell.resume()
        self.assertEqual("1\n", shell.run("echo $v").output)

    def test_a_stopped_sandbox_runs_again_after_a_rollback(self) -> None:
        sb = self.sandbox()
        shell = sb.shell()
        shell.run("v=1")
        checkpoint = sb.checkpoint()
        sb.stop()
        self.assertEqual("stopped", sb.info().state)
        with self.assertRaises(NotRunning):
            sb.run("true")
        sb.rollback(checkpoint)
        self.assertEqual("1\n", shell.run("echo $v").output)

    def test_sandboxes_are_found_by_name_and_from_other_processes(self) -> None:
        sb = self.sandbox()
        sb.run("echo 1 > /root/x")
        copy = pickle.loads(pickle.dumps(sb))
        self.assertEqual("1\n", copy.files.read("/root/x"))
        cat = sb.spawn("cat", stdin=True)
        cat.send_line("1\n2")
        cat.read_until("1\n")
        pid = os.fork()
        if pid == 0:
            try:
                same = sb.files.read("/root/x") == "1\n" and cat.read_until("2") == b"2"
                os._exit(0 if same else 1)
            finally:
                os._exit(2)
        self.assertEqual(0, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        self.assertEqual("1\n", sb.files.read("/root/x"))
        self.assertEqual(b"2\n", cat.read_until("\n", timeout=60))
        self.assertIn(sb.name, [info.name for info in self.client.sandboxes()])
        with self.assertRaises(NameTaken):
            Sandbox.create(name=sb.name, client=self.client)
        with self.assertRaises(InvalidRequest):
            Sandbox.create(name="no/name", client=self.client)
        sb.remove()
        with self.assertRaises(SandboxNotFound):
            Sandbox.connect(sb.name, self.client)

    def test_without_a_service_the_error_says_so(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            with self.assertRaisesRegex(ServiceUnavailable, "deltabox.sock"):
                Client(directory, start=False).version()
            with self.assertRaisesRegex(ServiceUnavailable, "/nonesuch"):
                Client(directory, binary="/nonesuch").version()
        self.assertEqual(str(self.client.state_dir), self.client.version().state_dir)
        self.assertTrue(self.client.doctor())
        self.assertIn("deltabox", self.client.metrics())


if __name__ == "__main__":
    unittest.main()
