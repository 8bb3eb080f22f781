"""The process between a host and the server that it starts: `python guard.py FD LOG BYTES SECONDS COMMAND...`.

It ends the server with the host, however that ends, and keeps the server's output in a bounded log. The standard
library alone, so that it starts in a moment and takes little memory.

The host keeps the other end of the pipe FD open and writes nothing to it: when it closes that end, or dies (`kill -9`
included), the guard sends SIGTERM to the process group of the server, and SIGKILL after SECONDS. On Linux the kernel
kills the server if the guard itself is killed. When the server ends, what is left of its process group is killed; the
exit status of the guard is that of the server, or 128 + the number of the signal that ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

POLL_S = 0.5
"""Seconds between two looks at processes that end without a sign on a pipe."""
DRAIN_S = 1.0
"""Seconds in which the rest of the output is read after the server has ended."""
NOT_STARTED = 127
_PR_SET_PDEATHSIG = 1


class BoundedLog:
    """A file of at most `most_bytes`, twice: a full one becomes `<path>.1` and replaces the one before.

    What cannot be written (a full disk) is dropped: the server must not stop for it.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path, self._most_bytes = path, most_bytes
        self._file: IO[bytes] | None = None
        self._n_bytes = 0

    def write(self, data: bytes) -> None:
        """Append."""
        with contextlib.suppress(OSError):
            if self._file is not None and self._n_bytes + len(data) > self._most_bytes:
                self._file.close()
                self._file = None
                self._path.replace(f"{self._path}.1")
            if self._file is None:
                self._file, self._n_bytes = self._path.open("wb", buffering=0), 0
            self._n_bytes += self._file.write(data) or 0

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _end_with_guard() -> None:
    """In the server's process, before it executes the command: the kernel kills it when the guard dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _send(group: int, number: int) -> None:
    """Send a signal to the processes of a group that are left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


class Guard:
    """Watches the host and the server.

    Args:
        host: our end of the pipe. grace_s: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, host: int, log: BoundedLog, grace_s: float) -> None:
        self._host, self._log, self._grace_s = host, log, grace_s
        self._parent = os.getppid()
        self._ending = False
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run(self, command: list[str]) -> int:
        """Start the server, and return its exit status when it has ended."""
        try:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_guard,  # no other thread runs here
            )
        except (OSError, subprocess.SubprocessError) as error:
            self._log.write(f"cannot be started: {error}\n".encode())
            return NOT_STARTED
        assert server.stdout is not None
        os.set_blocking(server.stdout.fileno(), False)
        kill_at: float | None = None
        with selectors.DefaultSelector() as pipes:
            pipes.register(self._host, selectors.EVENT_READ)
            pipes.register(server.stdout, selectors.EVENT_READ)
            while server.poll() is None:
                self._read(pipes, POLL_S)
                if self._ending and kill_at is None:
                    kill_at = time.monotonic() + self._grace_s
                    _send(server.pid, signal.SIGTERM)
                if kill_at is not None and time.monotonic() >= kill_at:
                    _send(server.pid, signal.SIGKILL)
            _send(server.pid, signal.SIGKILL)
            ends = time.monotonic() + DRAIN_S
            while self._reads(pipes, server.stdout) and time.monotonic() < ends:
                self._read(pipes, 0.05)
        return server.returncode if server.returncode >= 0 else 128 - server.returncode

    def _read(self, pipes: selectors.BaseSelector, timeout_s: float) -> None:
        """Wait for output or the end of the host."""
        if os.getppid() != self._parent:  # a copy of the pipe's other end in a third process would hide that
            self._ending = True
        for key, _ in pipes.select(timeout_s):
            data = os.read(key.fd, 65_536)
            if not data:
                pipes.unregister(key.fileobj)
            if key.fd == self._host:
                self._ending = True
            elif data:
                self._log.write(data)

    @staticmethod
    def _reads(pipes: selectors.BaseSelector, output: IO[bytes]) -> bool:
        return any(key.fileobj is output for key in pipes.get_map().values())

    def _end(self, *_: object) -> None:
        self._ending = True


def main(host: int, log: Path, most_bytes: int, grace_s: float, command: list[str]) -> int:
    """Guard the server that the command starts; return its exit status."""
    with contextlib.closing(BoundedLog(log, most_bytes)) as written:
        return Guard(host, written, grace_s).run(command)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:]))
