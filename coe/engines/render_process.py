"""The child process that renders chat templates (`render_worker.py`), and the limits that it keeps."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

_SCRIPT: Final = Path(__file__).with_name("render_worker.py")
_MOST_REPLY_BYTES: Final = 2**28
# Of the environment, only what starting Python and formatting a date need: no keys.
_ENVIRONMENT: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TZ")


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """Limits of one render.

    Attributes:
        template_characters: longest template.
        cpu_s: CPU seconds. An ordinary render takes less than 0.001.
        wall_s: seconds in all, for a process that does not run at all.
        memory_bytes: address space of the process.
        characters, per_message, per_character: longest text: `characters`, and more for each message and each
            character of the conversation, tools included.
        short_characters: a conversation of at most this many is short: a template that exceeds a limit on it is
            refused for `pause_s` seconds. On a longer one, only that request fails.
        together, together_bytes, together_s: renders of one template that one exchange with the process carries: so
            many, of so many bytes of JSON, and none starts after so many seconds. One render may be larger, alone.
    """

    template_characters: int = 2**20
    cpu_s: float = 2.0
    wall_s: float = 30.0
    memory_bytes: int = 2**29
    characters: int = 2**17
    per_message: int = 512
    per_character: int = 2
    short_characters: int = 2**16
    pause_s: float = 60.0
    together: int = 64
    together_bytes: int = 2**18
    together_s: float = 0.05


class ProcessEnded(Exception):
    """The process ended before its next reply, with exit code `code`; None: it did not reply in time."""

    def __init__(self, code: int | None, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def out_of_time(self) -> bool:
        """Whether the render exceeded its CPU time."""
        return self.code == -signal.SIGPROF

    @property
    def crashed(self) -> bool:
        """Whether something else than its CPU time or an error of its own (such as a missing package) ended it."""
        return self.code not in (None, 1, -signal.SIGPROF)


class RenderProcess:
    """A child process that renders, started again whenever it has ended."""

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._killed = False
        with suppress(OSError):  # reported by the first render
            self._start()

    def ask(self, template: str, renders: Sequence[bytes]) -> Iterator[dict[str, str]]:
        """The reply to each render, as it is done; see `render_worker`.

        Raises:
            ProcessEnded: the process ended, or was ended, before its next reply.
            OSError: the process cannot be started.
        """
        limits = self._limits
        if self._process is None or self._connection is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._connection is not None
        shared = {"template": template, "cpu_s": limits.cpu_s, "together_s": limits.together_s}
        try:
            self._connection.send_bytes(b"\n".join([json.dumps(shared).encode(), *renders]))
            for _ in renders:
                if not self._connection.poll(limits.wall_s):
                    break
                yield json.loads(self._connection.recv_bytes(_MOST_REPLY_BYTES))
            else:
                return
        except (OSError, EOFError, ValueError):
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(1)
                raise ProcessEnded(code, f"it ended with exit code {code}") from None
        self._stop()
        raise ProcessEnded(None, f"it did not reply within {limits.wall_s:g} s")

    def _start(self) -> None:
        self._stop()
        if self._killed:
            raise OSError("the renderer is closed")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            # A process that does not read must not block its thread for ever.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(self._limits.wall_s) + 1, 0))
            command = [sys.executable, "-P", str(_SCRIPT), str(theirs.fileno()), str(self._limits.memory_bytes)]
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )
            self._connection = Connection(ours.detach())

    def _stop(self) -> None:
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """End the process, from any thread; its thread then reads the end of the connection."""
        self._killed = True
        if (process := self._process) is not None:
            process.kill()
            process.wait()
