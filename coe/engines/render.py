"""Chat templates come from model repositories, so they run in processes of their own, within limits.

A template can ask for any amount of CPU time and memory, in a loop or in one operation of C code that holds the
interpreter's lock (`'a' * 10**10`, `'%9999999999d' % 1`). A thread cannot be stopped there; a process can.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from coe.errors import EngineError, Rejected, TemplateError
from coe.seam import one_line

_SCRIPT: Final = Path(__file__).with_name("render_worker.py")
_MOST_MESSAGE_CHARACTERS: Final = 500
_MOST_REPLY_BYTES: Final = 2**28
_IDLE_S: Final = 60.0
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
            character of the conversation.
        short_characters: a conversation of at most this many is short: a template that exceeds a limit on it is
            refused for `pause_s` seconds. On a longer one, only that request fails.
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


@dataclass(eq=False, slots=True)
class _Job:
    template: str
    variables: Mapping[str, Any]
    expert: str
    text: Future[str] = field(default_factory=Future)

    @property
    def n_characters(self) -> int:
        return sum(len(str(message["content"])) for message in self.variables["messages"])


class _LimitExceeded(Exception):
    """A render exceeded a limit; the message completes "the chat template of X ..."."""


class Renderer:
    """Renders chat templates in up to `most_processes` child processes.

    Renders of one template run one after the other, so a slow template delays its own expert only. Processes start with
    the first renders (0.1 s, 25 MiB each) and end with this object, or with this process.
    """

    def __init__(self, limits: RenderLimits | None = None, most_processes: int = 4) -> None:
        self._queue = _Queue(limits or RenderLimits(), most_processes)
        self._close = weakref.finalize(self, self._queue.close)

    def start(self) -> None:
        """Start the first process, so that the first render need not wait for it."""
        self._queue.add_thread(only_first=True)

    def submit(self, template: str, variables: Mapping[str, Any], *, expert: str) -> Future[str]:
        """Render a template of Jinja with variables that JSON can hold, among them `messages`; see `render`."""
        return self._queue.put(_Job(template, variables, expert))

    async def render(self, template: str, variables: Mapping[str, Any], *, expert: str) -> str:
        """The text of a conversation.

        Args:
            expert: name for error messages.

        Raises:
            Rejected: the template rejects this conversation.
            TemplateError: the template fails on every conversation, or exceeds a limit.
            EngineError: the renderer is closed, or no process can be started.
        """
        return await asyncio.wrap_future(self.submit(template, variables, expert=expert))

    def close(self) -> None:
        """End the processes; waiting renders fail."""
        self._close()


class _Queue:
    """Jobs, and the threads that each pass them to a process. Threads hold no reference to the `Renderer`."""

    def __init__(self, limits: RenderLimits, most: int) -> None:
        self._limits, self._most = limits, most
        self._jobs: deque[_Job] = deque()
        self._running: set[str] = set()
        self._paused: dict[str, tuple[float, str]] = {}
        self._n_threads = self._n_idle = 0
        self._changed = threading.Condition()
        self._workers: set[_Worker] = set()
        self._closed = False

    def put(self, job: _Job) -> Future[str]:
        with self._changed:
            if self._closed:
                raise EngineError(f"chat templates are not rendered any more: {job.expert!r} was unloaded")
            self._jobs.append(job)
            self._changed.notify()
        self.add_thread()
        return job.text

    def add_thread(self, *, only_first: bool = False) -> None:
        """Start a thread if more templates could be rendered now than threads are free."""
        with self._changed:
            ready = {job.template for job in self._jobs} - self._running
            wanted = not self._n_threads if only_first else len(ready) > self._n_idle
            if not wanted or self._closed or self._n_threads == self._most:
                return
            self._n_threads += 1
            self._n_idle += 1
        threading.Thread(target=self._serve, name="render", daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            jobs, workers = list(self._jobs), list(self._workers)
            self._jobs.clear()
            self._changed.notify_all()
        for worker in workers:
            worker.kill()
        for job in jobs:
            if job.text.set_running_or_notify_cancel():
                job.text.set_exception(EngineError(f"{job.expert!r} was unloaded before its prompt was rendered"))

    def _next(self) -> _Job | None:
        """The oldest job whose template is not being rendered."""
        return next((job for job in self._jobs if job.template not in self._running), None)

    def _take(self) -> _Job | None:
        """Wait for a job; `None` ends the thread."""
        with self._changed:
            while (job := self._next()) is None and not self._closed:
                if not self._changed.wait(_IDLE_S) and self._n_threads > 1:
                    break
            self._n_idle -= 1
            if job is None or self._closed:
                self._n_threads -= 1
                return None
            self._jobs.remove(job)
            self._running.add(job.template)
            return job

    def _serve(self) -> None:
        worker = _Worker(self._limits)
        with self._changed:
            self._workers.add(worker)
        while (job := self._take()) is not None:
            if job.text.set_running_or_notify_cancel():
                self._run(worker, job)
            with self._changed:
                self._running.discard(job.template)
                self._n_idle += 1
                self._changed.notify_all()  # jobs of the same template may run now
        with self._changed:
            self._workers.discard(worker)
        worker.kill()

    def _run(self, worker: _Worker, job: _Job) -> None:
        try:
            self._check_pause(job)
            job.text.set_result(self._render(worker, job))
        except Exception as error:  # whatever it is, the reader waits for it
            job.text.set_exception(error)

    def _check_pause(self, job: _Job) -> None:
        until, what = self._paused.get(job.template, (0.0, ""))
        if (left := until - time.monotonic()) > 0:
            raise TemplateError(f"the chat template of {job.expert!r} {what}; it is not rendered for {left:.0f} s")
        self._paused.pop(job.template, None)

    def _render(self, worker: _Worker, job: _Job) -> str:
        try:
            if len(job.template) > (most := self._limits.template_characters):
                raise _LimitExceeded(f"is longer than {most:,} characters")
            reply = worker.ask(job)
        except _LimitExceeded as error:
            raise self._exceeded(job, str(error)) from None
        except OSError as error:
            raise EngineError(f"the process that renders chat templates failed: {error}") from error
        message = one_line(reply.get("message", ""), _MOST_MESSAGE_CHARACTERS)
        match reply.get("error"):
            case None:
                return str(reply["text"])
            case "refused":
                raise Rejected(f"the chat template of {job.expert!r} rejects these messages: {message}")
            case "limit":
                raise self._exceeded(job, f"exceeds a limit: {message}")
        raise TemplateError(f"the chat template of {job.expert!r} is broken: {message}")

    def _exceeded(self, job: _Job, what: str) -> TemplateError:
        if job.n_characters <= self._limits.short_characters:
            with self._changed:
                self._paused[job.template] = (time.monotonic() + self._limits.pause_s, what)
        return TemplateError(f"the chat template of {job.expert!r} {what}")


class _Worker:
    """A child process that renders, started again whenever it has ended."""

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._killed = False
        with suppress(OSError):  # reported by the first job
            self._start()

    def ask(self, job: _Job) -> dict[str, str]:
        """The reply of `render_worker.answer`. Raises _LimitExceeded, or OSError if the process does not run."""
        limits = self._limits
        request = {
            "template": job.template,
            "variables": job.variables,
            "cpu_s": limits.cpu_s,
            "most_characters": limits.characters
            + limits.per_message * len(job.variables["messages"])
            + limits.per_character * job.n_characters,
        }
        data = json.dumps(request).encode()
        code = None
        for _ in range(2):  # a process that another program ended is no fault of the template
            reply, code = self._exchange(data)
            if reply is not None:
                return reply
            if code not in (-signal.SIGKILL, -signal.SIGTERM):
                break
        if code == -signal.SIGPROF:
            raise _LimitExceeded(f"takes more than {limits.cpu_s:g} s of CPU time")
        if code is None:
            raise OSError(f"it did not reply within {limits.wall_s:g} s")
        if code == 1:
            raise OSError("it ended with exit code 1")  # its own error, such as a missing package
        raise _LimitExceeded(f"ends the process that renders it (exit code {code})")

    def _exchange(self, data: bytes) -> tuple[dict[str, str] | None, int | None]:
        """The reply; or the exit code of the process, which has ended; or neither, after `wall_s`."""
        if self._process is None or self._connection is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._connection is not None
        try:
            self._connection.send_bytes(data)
            if self._connection.poll(self._limits.wall_s):
                reply: dict[str, str] = json.loads(self._connection.recv_bytes(_MOST_REPLY_BYTES))
                return reply, None
        except (OSError, EOFError, ValueError):
            with suppress(subprocess.TimeoutExpired):
                return None, self._process.wait(1)
        self._stop()
        return None, None

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
