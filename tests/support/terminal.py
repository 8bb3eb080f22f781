"""A command on a pseudo-terminal, whose screen is read and whose keys are pressed."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

COE = [sys.executable, "-c", "from coe.cli.entry import main; main()"]
CTRL_C, CTRL_D = "\x03", "\x04"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Terminal:
    """A running command and what it printed."""

    process: subprocess.Popen[bytes]
    master: int
    screen: str = ""
    # A character of several bytes may arrive in two pieces.
    _decoder: codecs.IncrementalDecoder = field(default_factory=codecs.getincrementaldecoder("utf-8"))

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, text: str, after: int = 0, timeout_s: float = 60) -> int:
        """Wait until the screen has `text` beyond position `after`; the position behind it."""
        deadline = time.monotonic() + timeout_s
        while (found := self.screen.find(text, after)) < 0:
            assert time.monotonic() < deadline, self.screen
            assert self._read(0.1) or self.process.poll() is None, self.screen
        return found + len(text)

    def press_until(self, keys: str, text: str, after: int = 0) -> int:
        """Press `keys` until the screen has `text`; the position behind it.

        A Ctrl-C in the instant between readline's prompt and its wait for keys is lost (a race in CPython): a user who
        sees no effect presses it again.
        """
        for _ in range(10):
            self.press(keys)
            with suppress(AssertionError):
                return self.wait_for(text, after, timeout_s=5)
        raise AssertionError(self.screen)

    def end(self, timeout_s: float = 30) -> int:
        """The exit status; all that is left to read is read."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.screen
            self._read(0.05)
        while self._read(0):
            pass
        return self.process.wait()

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.master], [], [], timeout_s)[0]:
            return False
        with suppress(OSError):  # Linux's error for a terminal that no process holds
            if piece := os.read(self.master, 65536):
                self.screen += _ESCAPES.sub("", self._decoder.decode(piece)).replace("\r", "")
                return True
        return False


@contextmanager
def terminal(*words: str, cwd: Path, environment: Mapping[str, str] | None = None) -> Iterator[Terminal]:
    """`coe` with these arguments on a terminal; killed at the end of the block if it still runs."""
    master, slave = pty.openpty()
    variables = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path.cwd()), **(environment or {})}
    process = subprocess.Popen(
        [*COE, *words], stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=variables, start_new_session=True,
        preexec_fn=_controlling,
    )  # fmt: skip
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(master)


def _controlling() -> None:
    """Make the terminal on stdin the session's own, so that its Ctrl-C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
