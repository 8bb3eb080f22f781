"""The link between a gateway and the child process of a batch: lines of JSON over pipes.

    gateway -> child    the order; {"stop": reason}; {"work": report}; {"answered": stage}
    child -> gateway    {"valid": rows}; {"invalid": errors}; {"answer": units, "stage": n}; {"rows": completed};
                        {"done": counts}; {"again": why}; {"failed": why}

Both ends are the service's own. A child whose gateway ends sees the end of its pipe, and ends too.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, Protocol

MOST_MESSAGE_BYTES: Final = 64 * 2**20
"""Most bytes of a message: a stage of a large batch has tens of thousands of units."""
Message = Mapping[str, Any]


class Worker(Protocol):
    """The end of the gateway."""

    async def send(self, message: Message) -> None:
        """Send a message; one to a child that has ended is lost."""
        ...

    async def receive(self) -> Message | None:
        """The next message; None at the end."""
        ...

    async def close(self) -> None:
        """End the child, and wait for it."""
        ...


class ChildProcess:
    """A worker in a process of its own (`worker.main`)."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> ChildProcess:
        """Start the process."""
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "coe.serve.batches.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=MOST_MESSAGE_BYTES,
                process_group=0,  # Ctrl-C of a terminal is for `coe serve`, which ends it
            )
        )

    async def send(self, message: Message) -> None:
        """See `Worker`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(message))
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            return  # `receive` reports the end

    async def receive(self) -> Message | None:
        """See `Worker`."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        return decode(line) if line.endswith(b"\n") else None

    async def close(self) -> None:
        """See `Worker`."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its part files are whole at any moment
        await self._process.communicate()  # waits for the process, and closes both pipes


def encode(message: Message) -> bytes:
    """A message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of a line."""
    message: Message = json.loads(line)
    return message
