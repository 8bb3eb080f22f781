"""Server: one running server of an expert, behind a guard (`guard.py`): started until ready, looked at, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

from coe.engines.remote.events import MalformedStream
from coe.engines.remote.redaction import redacted
from coe.errors import EngineError, WeightsError
from coe.seam import visible
from registry.command_files import at_port
from registry.commands import ServerCommand
from registry.errors import SourceError
from registry.spec import ExpertSpec
from registry.storage import coe_home

MOST_LOG_BYTES: Final = 4 * 2**20
"""Bytes of the log of a server; one full log before it is kept, too."""
KEPT_LOGS: Final = 8
"""Logs that are kept for each expert, the newest ones."""
TAIL_LINES: Final = 20
"""Last lines of its output in the error of a server that does not start."""
_TAIL_BYTES: Final = 8192
_MOST_LINE: Final = 300
_POLL_S: Final = 0.05
_MOST_POLL_S: Final = 1.0
"""Seconds between the first two looks at a server that starts, and the most between later ones."""
_LOOK_S: Final = 0.02
"""Seconds between two looks at a server that is stopped."""
_HEALTH_S: Final = 5.0
"""Seconds that the answer to a health check may take."""
_MOST_HEALTH_BYTES: Final = 2**20
_STOP_S: Final = 5.0
"""Seconds beyond `stop_timeout_s` that the guard has to end."""
_LEAST_SECRET: Final = 8
"""Characters from which on a value of `env` is removed from messages: shorter ones are settings such as `4`."""
_GUARD: Final = Path(__file__).with_name("guard.py")
_numbers = count()
logger = logging.getLogger(__name__)


class Server:
    """A server process, its guard and its log. Create it with `started`.

    Attributes:
        url: base URL of its API, such as `http://127.0.0.1:41233/v1`.
        log: file of its output.
    """

    def __init__(
        self, name: str, command: ServerCommand, port: int, process: subprocess.Popen[bytes], pipe: int, log: Path
    ) -> None:
        self._name, self._command, self._process, self._pipe = name, command, process, pipe
        self._root, self.url, self.log = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}{command.api}", log

    @property
    def _paths(self) -> tuple[str, ...]:
        return (self._command.health,) if self._command.health else ("/health", f"{self._command.api}/models")

    @property
    def health(self) -> str:
        """The URLs of its health check, of which the first that exists counts."""
        return " or ".join(self._root + path for path in self._paths)

    @property
    def exit_status(self) -> int | None:
        """Its exit status, 128 + the number of the signal that ended it; None while it runs."""
        return self._process.poll()

    def memory_bytes(self) -> int:
        """Resident memory of its processes (RSS, so pages that they share count for each); 0 once they have ended."""
        total = 0
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        return total

    async def is_ready(self) -> bool:
        """Whether it answers its health check with 200 now."""
        from coe.engines.remote.client import fetch

        for path in self._paths:
            try:
                status, _ = await fetch(self._root + path, timeout_s=_HEALTH_S, most_bytes=_MOST_HEALTH_BYTES)
            except (TimeoutError, ConnectionError, MalformedStream):
                return False
            if status != 404:  # else it has no such path
                return status == 200
        return False

    def ended(self) -> str:
        """How it ended, with the last lines of its output, for operators."""
        status = self.exit_status
        how = f"was ended by signal {status - 128}" if status and status > 128 else f"ended with exit status {status}"
        return f"{how}; {self.tail()}"

    def tail(self) -> str:
        """The last lines of its output, without values of `env`, and where the rest is."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = file.read(_TAIL_BYTES).decode("utf-8", "replace")
        except OSError:
            text = ""
        lines = [visible(line)[:_MOST_LINE] for line in text.splitlines() if line.strip()][-TAIL_LINES:]
        secrets = [value for value in self._command.env.values() if len(value) >= _LEAST_SECRET]
        shown = redacted("\n".join(lines), secrets)
        return f"its last output ({self.log}):\n{shown}" if shown else f"it wrote nothing ({self.log})"

    async def stop(self) -> None:
        """End it and wait until it is gone: SIGTERM to its process group, SIGKILL after `stop_timeout_s`."""
        if self._pipe >= 0:
            pipe, self._pipe = self._pipe, -1
            os.close(pipe)
        if not await self._gone(self._command.stop_timeout_s + _STOP_S):
            logger.error("the server of expert %r does not end, and is killed", self._name)
            self.kill()
            await self._gone(_STOP_S)

    def kill(self) -> None:
        """Kill all its processes at once, also those that are stopped (SIGSTOP)."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()

    async def _gone(self, within_s: float) -> bool:
        for _ in range(math.ceil(within_s / _LOOK_S)):
            if self.exit_status is not None:
                return True
            await asyncio.sleep(_LOOK_S)
        return self.exit_status is not None


async def started(
    spec: ExpertSpec, folder: Path, environ: Mapping[str, str], *, unless: Callable[[], bool] = lambda: False
) -> Server:
    """Start the server of an expert on a free port, and wait until it is ready.

    Args:
        folder: in which the command runs.
        environ: of the server, beside its `env`.
        unless: whether to give up, looked at while waiting.

    Raises:
        WeightsError: the program is missing, or the server ends before it is ready or is not ready in time; with the
            last lines of its output.
        EngineError: `unless` said so.
    """
    assert spec.server is not None
    began, pause_s = time.monotonic(), _POLL_S
    server = await asyncio.to_thread(_launched, spec, spec.server, folder, environ)
    try:
        logger.info("expert %r: its server starts, %s, output in %s", spec.name, server.url, server.log)
        while not await server.is_ready():
            if server.exit_status is not None:
                raise _failed(spec, f"its server {server.ended()}")
            if unless():
                raise EngineError(f"{spec.name!r} was unloaded while its server started")
            if time.monotonic() - began > spec.server.start_timeout_s:
                raise _failed(
                    spec,
                    f"its server is not ready after {spec.server.start_timeout_s:g} s (`start_timeout_s`): "
                    f"{server.health} must answer with status 200; {await asyncio.to_thread(server.tail)}",
                )
            await asyncio.sleep(pause_s)
            pause_s = min(1.2 * pause_s, _MOST_POLL_S)
    except BaseException:
        await asyncio.shield(server.stop())
        raise
    logger.info("expert %r: its server is ready after %.1f s", spec.name, time.monotonic() - began)
    return server


def _failed(spec: ExpertSpec, why: str) -> WeightsError:
    return WeightsError(
        f"{spec.name!r} cannot be loaded: {why}", public=f"expert {spec.name!r} cannot be loaded: no server starts"
    )


def _launched(spec: ExpertSpec, command: ServerCommand, folder: Path, environ: Mapping[str, str]) -> Server:
    """Start guard and server. Blocks for milliseconds."""
    port = _free_port()
    try:
        arguments, added = at_port(command, port)
        log = _new_log(spec.name)
    except (SourceError, OSError) as error:
        raise _failed(spec, str(error)) from error
    environment = {**environ, **added}
    program = arguments[0]
    if os.sep in program:
        program = str(folder / program)
    if shutil.which(program, path=environment.get("PATH")) is None:
        where = f"no program in {folder}" if os.sep in arguments[0] else "not in the PATH of the service"
        raise _failed(spec, f"{arguments[0]!r} is {where}: install it, or name it with its folder")
    ours, theirs = os.pipe()  # no child process inherits the end that stays here
    try:
        guard = [sys.executable, "-I", "-S", str(_GUARD), str(ours), str(log), str(MOST_LOG_BYTES)]
        process = subprocess.Popen(
            [*guard, str(command.stop_timeout_s), program, *arguments[1:]],
            pass_fds=[ours],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=folder,
            env=environment,
        )
    except OSError as error:
        os.close(theirs)
        raise _failed(spec, f"no process can be started: {error}") from error
    finally:
        os.close(ours)
    return Server(spec.name, command, port, process, theirs, log)


def _free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _new_log(name: str) -> Path:
    """A new log file for the server of an expert; the oldest ones beyond KEPT_LOGS are removed."""
    folder = coe_home() / "logs" / "servers" / name.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    by_age = sorted(folder.glob("*.log*"), key=lambda path: path.stat().st_mtime)
    for old in by_age[: max(0, len(by_age) - KEPT_LOGS + 1)]:
        old.unlink(missing_ok=True)
    return folder / f"{os.getpid()}-{next(_numbers)}.log"
