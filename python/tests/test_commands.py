"""Commands, sessions, shells, files."""

from __future__ import annotations

import re
import unittest

from deltabox import (
    CommandFailed,
    CommandNotFound,
    InvalidRequest,
    Output,
    ReadTimeout,
    SessionNotFound,
    UnexpectedEnd,
)

from .service import ServiceTest


class Commands(ServiceTest):
    """One sandbox serves for all of them."""

    def setUp(self) -> None:
        self.sb = self.sandbox()

    def test_a_command_has_its_streams_status_and_surroundings(self) -> None:
        done = self.sb.run('echo "$A $PWD"; echo oops >&2; exit 7', env={"A": "é"}, cwd="/usr")
        self.assertEqual(("é /usr\n", "oops\n", 7), (done.stdout, done.stderr, done.exit_code))
        self.assertFalse(done.ok)
        self.assertEqual("a b\n", self.sb.run(["echo", "a b"]).stdout)
        self.assertEqual(128 + 9, self.sb.run("kill -9 $$").exit_code)
        self.assertEqual("65534\n", self.sb.run("id -u", user="nobody").stdout)

    def test_input_goes_in_while_output_comes_out(self) -> None:
        data = bytes(range(256)) * 8192
        done = self.sb.run("cat", input=data)
        self.assertEqual(data, done.stdout_bytes)
        self.assertEqual(0, self.sb.run("true", input=data).exit_code)

    def test_a_command_that_fails_raises_if_asked_to(self) -> None:
        with self.assertRaises(CommandFailed) as failed:
            self.sb.run("echo why >&2; exit 3", check=True)
        self.assertEqual(3, failed.exception.result.exit_code)
        self.assertIn("why", str(failed.exception))
        with self.assertRaises(CommandNotFound):
            self.sb.run(["no-such-program"])

    def test_a_command_is_killed_when_its_time_is_over(self) -> None:
        done = self.sb.run("echo begun; sleep 1000 | cat", timeout=0.5)
        self.assertTrue(done.timed_out)
        self.assertEqual("begun\n", done.stdout)

    def test_output_beyond_the_limit_is_counted_and_not_kept(self) -> None:
        seen: list[Output] = []
        done = self.sb.run("head -c 3000000 /dev/zero", max_output=1000, on_output=seen.append)
        self.assertEqual((1000, 2999000), (len(done.stdout_bytes), done.dropped))
        self.assertEqual(3000000, sum(len(piece.data) for piece in seen))

    def test_a_session_is_read_up_to_a_marker_and_loses_nothing_at_a_timeout(self) -> None:
        cat = self.sb.spawn("cat; echo done >&2", stdin=True)
        cat.send("one two")
        self.assertEqual(b"one", cat.read_until("one"))
        with self.assertRaises(ReadTimeout):
            cat.read_until("\n", timeout=0.1)
        cat.send_line(" 34")
        self.assertEqual(b" two 34", cat.read_until(re.compile(rb"\d+"), timeout=60))
        self.assertIsNone(cat.exit_code)
        cat.close_stdin()
        with self.assertRaises(UnexpectedEnd):
            cat.read_until("never")
        self.assertEqual(0, cat.exit_code)
        again = self.sb.session(cat.id, from_start=True)
        self.assertEqual(
            {"stdout": b"one two 34\n", "stderr": b"done\n"},
            {piece.stream: piece.data for piece in again},
        )

    def test_a_terminal_is_one(self) -> None:
        with_terminal = self.sb.spawn("stty size; read line; stty size", tty=(30, 100))
        with_terminal.read_until("30 100")
        with_terminal.resize(40, 120)
        with_terminal.send_line()
        self.assertIn("40 120", with_terminal.wait(timeout=60).stdout)
        with self.assertRaises(InvalidRequest):
            self.sb.spawn("cat").resize(1, 1)

    def test_sessions_are_signalled_and_killed(self) -> None:
        trapping = self.sb.spawn("trap 'echo caught; exit 4' INT; echo ready; while :; do sleep 0.05; done")
        trapping.read_until("ready")
        trapping.interrupt()
        done = trapping.wait(timeout=60)
        self.assertIn("caught", done.stdout)
        self.assertEqual(4, done.exit_code)
        asleep = self.sb.spawn("sleep 1000")
        with self.assertRaises(ReadTimeout):
            asleep.wait(timeout=0.05)
        asleep.kill()
        self.assertEqual(128 + 9, asleep.wait(timeout=60).exit_code)
        with self.assertRaises(SessionNotFound):
            self.sb.session("s4711")

    def test_a_shell_keeps_its_state_and_survives_what_is_wrong(self) -> None:
        for program in "bash", "sh":
            with self.subTest(program):
                shell = self.sb.shell(program)
                shell.run("cd /usr; x=1; f() { echo \"f $x\"; }")
                self.assertEqual("f 1\n/usr\n", shell.run("f\npwd").output)
                self.assertEqual("no newline", shell.run("printf 'no newline'").output)
                self.assertEqual(3, shell.run("(exit 3)").exit_code)
                self.assertFalse(shell.run("if then 'it''s").ok)
                self.assertTrue(shell.run("cat; ls /nonesuch; true").ok)
                self.assertIn("nonesuch", shell.run("ls /nonesuch").output)
                with self.assertRaises(UnexpectedEnd) as ended:
                    shell.run("echo bye; exit 5")
                self.assertEqual((b"bye\n", 5), (ended.exception.output, ended.exception.exit_code))

    def test_files_are_written_and_read(self) -> None:
        files = self.sb.files
        data = bytes(range(256)) * 5000
        files.write("/root/files/new dir/it's -x", data, mode=0o640)
        self.assertEqual(data, files.read_bytes("/root/files/new dir/it's -x"))
        self.assertEqual(["it's -x"], files.list("/root/files/new dir"))
        self.assertEqual("640\n", self.sb.run(["stat", "-c", "%a", "/root/files/new dir/it's -x"]).stdout)
        files.write("/root/files/text", "täxt\n")
        self.sb.run("chmod 600 /root/files/text; ln -s text /root/files/link", check=True)
        files.write("/root/files/link", "through")
        self.assertEqual("through", files.read("/root/files/text"))
        self.assertEqual("600\n", self.sb.run("stat -c %a /root/files/text").stdout)
        files.make_dir("/root/files/a/b")
        files.remove("/root/files/a")
        self.assertEqual(["link", "new dir", "text"], files.list("/root/files"))
        self.assertTrue(files.exists("/root/files/link"))
        self.assertFalse(files.exists("/root/files/a"))

    def test_files_fail_as_those_of_python_do(self) -> None:
        files = self.sb.files
        for call in files.read, files.list, files.remove:
            with self.assertRaises(FileNotFoundError):
                call("/nonesuch")
        with self.assertRaises(IsADirectoryError):
            files.read("/usr")
        with self.assertRaises(IsADirectoryError):
            files.write("/usr", "")
        with self.assertRaises(NotADirectoryError):
            files.list("/etc/passwd")
        with self.assertRaises(OSError):
            files.write("/etc/passwd/x", "")
        with self.assertRaisesRegex(OSError, "longer than 10 bytes"):
            files.read_bytes("/dev/zero", limit=10)
        with self.assertRaises(ValueError):
            files.read("relative")


if __name__ == "__main__":
    unittest.main()
