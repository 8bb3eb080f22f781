"""Checks that a grammar can be compiled within limits of time and memory, in processes that can be ended."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from coe.errors import EngineError

_SCRIPT: Final = Path(__file__).with_name("check_worker.py")
_MOST_REPLY_BYTES: Final = 2**20
# Of the environment, only what starting Python needs: no keys.
_ENVIRONMENT: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL")


@dataclass(frozen=True, slots=True)
class CheckLimits:
    """Limits of one check.

    Attributes:
        quick_cpu_s: CPU seconds of the first attempt. Schemas in use take 0.001 to 0.1.
        cpu_s: CPU seconds of the second one. The largest schema that is accepted takes 1.
        wall_s: seconds in all, for a process that does not run at all.
        memory_bytes: address space of a process.
    """

    quick_cpu_s: float = 0.1
    cpu_s: float = 2.0
    wall_s: float = 30.0
    memory_bytes: int = 2**29


class SlowGrammar(Exception):
    """The first attempt to compile a grammar has used its CPU time."""


class GrammarChecker:
    """Two child processes that compile grammars, one for quick ones and one for those that take longer.

    So a slow grammar delays the quick ones by `quick_cpu_s` and the start of a process. Each process is started with
    its first grammar and after each that ends it. It takes 0.1 s to start and 30 MiB. It ends with this object, or with
    this process.
    """

    def __init__(self, limits: CheckLimits | None = None) -> None:
        limits = limits or CheckLimits()
        self._quick = _Checks(replace(limits, cpu_s=min(limits.cpu_s, limits.quick_cpu_s)))
        self._slow = _Checks(limits)

    def problem(self, grammar: str) -> str | None:
        """Why a grammar cannot be compiled; `None` if it can. Blocks.

        Args:
            grammar: in a form that llguidance's LLMatcher takes.

        Raises:
            SlowGrammar: it takes more than `quick_cpu_s`; use `slow_problem`.
            EngineError: the process cannot be started, or does not run.
        """
        return self._quick.problem(grammar)

    def slow_problem(self, grammar: str) -> str | None:
        """The same for a slow grammar, within `cpu_s`, in the other process."""
        try:
            return self._slow.problem(grammar)
        except SlowGrammar as error:
            return str(error)

    def close(self) -> None:
        """End the processes."""
        self._quick.close()
        self._slow.close()


class _Checks:
    """The checks of one process, one after the other."""

    def __init__(self, limits: CheckLimits) -> None:
        self._limits = limits
        self._child = _Child()
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, self._child.stop)

    def problem(self, grammar: str) -> str | None:
        """See `GrammarChecker.problem`."""
        line = json.dumps({"grammar": grammar, "cpu_s": self._limits.cpu_s}).encode() + b"\n"
        with self._lock:
            try:
                for _ in range(2):  # a process that another program ended is no fault of the grammar
                    reply, code = self._child.ask(line, self._limits)
                    if reply is not None:
                        return "; ".join(json.loads(reply)["problems"]) or None
                    if code not in (-signal.SIGKILL, -signal.SIGTERM):
                        break
            except OSError as error:
                raise EngineError(f"the process that checks JSON schemas failed: {error}") from error
        if code is None:
            raise EngineError(f"the process that checks JSON schemas did not reply within {self._limits.wall_s:g} s")
        if code == 1:  # its own error, such as a missing package
            raise EngineError("the process that checks JSON schemas ended with exit code 1")
        if code == -signal.SIGPROF:
            raise SlowGrammar(
                f"it takes more than {self._limits.cpu_s:g} s to compile: lower its counts (minItems, maxItems)"
            )
        return "it takes too much memory to compile: lower its counts (minItems, maxItems)"


class _Child:
    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, line: bytes, limits: CheckLimits) -> tuple[bytes | None, int | None]:
        """The reply; or the exit code of the process, which has ended; or neither, after `wall_s`."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start(limits)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # its exit code tells why
            process.stdin.write(line)
            process.stdin.flush()
        reply = _read_line(process.stdout, time.monotonic() + limits.wall_s)
        if reply:
            return reply, None
        code = None
        if reply is not None:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(1)
        self.stop()
        return None, code

    def _start(self, limits: CheckLimits) -> subprocess.Popen[bytes]:
        self.stop()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), str(limits.memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        return self._process

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _read_line(pipe: Any, until: float) -> bytes | None:
    """The next line; empty if the pipe is closed, `None` if nothing came in time."""
    read = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not read.endswith(b"\n"):
            if not selector.select(max(0.0, until - time.monotonic())) or len(read) > _MOST_REPLY_BYTES:
                return None
            piece = os.read(pipe.fileno(), 2**16)
            if not piece:
                return b""
            read += piece
    return read
