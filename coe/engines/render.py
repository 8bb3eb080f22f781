"""Chat templates come from model repositories, so they run in processes of their own, within limits.

A template can ask for any amount of CPU time and memory, in a loop or in one operation of C code that holds the
interpreter's lock (`'a' * 10**10`, `'%9999999999d' % 1`). A thread cannot be stopped there; a process can.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from coe.engines.render_process import ProcessEnded, RenderLimits, RenderProcess
from coe.errors import CoeError, EngineError, Rejected, TemplateError
from coe.seam import one_line

_MOST_MESSAGE_CHARACTERS: Final = 500
_IDLE_S: Final = 60.0
_PER_ENTRY, _PER_LEVEL = 8, 4  # characters around an entry of a JSON value, and of its indentation


@dataclass(eq=False, slots=True)
class _Job:
    """A render. `alone`: its second and last exchange is its own, since the first one failed."""

    template: str
    variables: Mapping[str, Any]
    expert: str
    text: Future[str] = field(default_factory=Future)
    alone: bool = False
    _data: bytes = b""

    @property
    def n_characters(self) -> int:
        """Characters of the texts of all messages, and of tool calls, tools and the caller's variables as JSON."""
        messages = self.variables["messages"]
        rest = [value for m in messages for name, value in m.items() if name not in ("role", "content")]
        rest += (value for name, value in self.variables.items() if name != "messages" and not name.endswith("_token"))
        n = sum(_characters(value) for value in rest if value and value is not True)
        return n + sum(len(str(message["content"])) for message in messages)

    def data(self, limits: RenderLimits) -> bytes:
        """The render as JSON."""
        most = limits.characters + limits.per_message * len(self.variables["messages"])
        most += limits.per_character * self.n_characters
        self._data = self._data or json.dumps({"variables": self.variables, "most_characters": most}).encode()
        return self._data

    def once_more(self) -> bool:
        """Whether it may have one more exchange, alone."""
        first, self.alone = not self.alone, True
        return first

    def end(self, outcome: str | Exception) -> None:
        """Give the reader its text or error, unless it has one, or has left."""
        if self.text.done() or not self.text.set_running_or_notify_cancel():
            return
        if isinstance(outcome, str):
            self.text.set_result(outcome)
        else:
            self.text.set_exception(outcome)


def _characters(value: Any) -> int:
    """Characters of a value as indented JSON, about."""
    n, rest = 0, [(value, 0)]
    while rest:
        value, depth = rest.pop()
        if isinstance(value, str):
            n += len(value)
            continue
        entries: Iterable[Any] = ()
        if isinstance(value, Mapping):
            n += sum(len(str(name)) for name in value)
            entries = value.values()
        elif isinstance(value, (list, tuple)):
            entries = value
        n += _PER_ENTRY + depth * _PER_LEVEL
        rest += ((entry, depth + 1) for entry in entries)
    return n


class Renderer:
    """Renders chat templates in up to `most_processes` child processes.

    Renders of one template run one after the other, so a slow template delays its own expert only. Those that wait go
    to the process in one exchange. Processes start with the first renders (0.1 s, 25 MiB each) and end with this
    object, or with this process.
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
        self._jobs: dict[str, deque[_Job]] = {}  # template -> its waiting jobs; the template to take next is first
        self._running: set[str] = set()
        self._paused: dict[str, tuple[float, str]] = {}
        self._n_threads = self._n_idle = 0
        self._changed = threading.Condition()
        self._workers: set[RenderProcess] = set()
        self._closed = False

    def put(self, job: _Job) -> Future[str]:
        with self._changed:
            if self._closed:
                raise EngineError(f"chat templates are not rendered any more: {job.expert!r} was unloaded")
            self._jobs.setdefault(job.template, deque()).append(job)
            self._changed.notify()
        self.add_thread()
        return job.text

    def add_thread(self, *, only_first: bool = False) -> None:
        """Start a thread if more templates could be rendered now than threads are free."""
        with self._changed:
            ready = self._jobs.keys() - self._running
            wanted = not self._n_threads if only_first else len(ready) > self._n_idle
            if not wanted or self._closed or self._n_threads == self._most:
                return
            self._n_threads += 1
            self._n_idle += 1
        threading.Thread(target=self._serve, name="render", daemon=True).start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            jobs, workers = [job for waiting in self._jobs.values() for job in waiting], list(self._workers)
            self._jobs.clear()
            self._changed.notify_all()
        for worker in workers:
            worker.kill()
        _abandon(jobs)

    def _next(self) -> str | None:
        """The template whose turn it is, among those that are not being rendered."""
        return next((template for template in self._jobs if template not in self._running), None)

    def _take(self) -> list[_Job]:
        """Wait for jobs, and return those of one template that may be rendered together; none ends the thread."""
        with self._changed:
            while (template := self._next()) is None and not self._closed:
                if not self._changed.wait(_IDLE_S) and self._n_threads > 1:
                    break
            self._n_idle -= 1
            if template is None or self._closed:
                self._n_threads -= 1
                return []
            waiting = self._jobs.pop(template)
            jobs = [waiting.popleft()]
            while waiting and len(jobs) < self._limits.together and not (jobs[0].alone or waiting[0].alone):
                jobs.append(waiting.popleft())
            if waiting:
                self._jobs[template] = waiting  # behind the other templates
            self._running.add(template)
            return jobs

    def _serve(self) -> None:
        worker = RenderProcess(self._limits)
        with self._changed:
            self._workers.add(worker)
        while jobs := self._take():
            left = self._run(worker, jobs)
            with self._changed:
                self._running.discard(jobs[0].template)
                self._n_idle += 1
                if left and not self._closed:
                    self._jobs.setdefault(jobs[0].template, deque()).extendleft(reversed(left))
                    left = []
                self._changed.notify_all()  # jobs of the same template may run now
            _abandon(left)
        with self._changed:
            self._workers.discard(worker)
        worker.kill()

    def _run(self, worker: RenderProcess, jobs: Sequence[_Job]) -> list[_Job]:
        """Render jobs of one template in one exchange. Returns those that another exchange must render, in order."""
        try:
            ready, later = self._prepare(jobs)
            return (self._exchange(worker, ready) if ready else []) + later
        except Exception as error:  # whatever it is, the readers wait for it
            for job in jobs:
                job.end(error)
            return []

    def _prepare(self, jobs: Sequence[_Job]) -> tuple[list[_Job], list[_Job]]:
        """The jobs for this exchange, and those that are too large to join it."""
        ready: list[_Job] = []
        n_bytes = 0
        for position, job in enumerate(jobs):
            if job.text.done():  # its reader has left
                continue
            try:
                self._check(job)
                n_bytes += len(job.data(self._limits))
            except Exception as error:
                job.end(error)
                continue
            if ready and n_bytes > self._limits.together_bytes:
                return ready, list(jobs[position:])
            ready.append(job)
        return ready, []

    def _check(self, job: _Job) -> None:
        until, what = self._paused.get(job.template, (0.0, ""))
        if (left := until - time.monotonic()) > 0:
            raise TemplateError(f"the chat template of {job.expert!r} {what}; it is not rendered for {left:.0f} s")
        self._paused.pop(job.template, None)
        if len(job.template) > (most := self._limits.template_characters):
            raise self._exceeded(job, f"is longer than {most:,} characters")

    def _exchange(self, worker: RenderProcess, jobs: Sequence[_Job]) -> list[_Job]:
        waiting, later = deque(jobs), []
        try:
            for reply in worker.ask(jobs[0].template, [job.data(self._limits) for job in jobs]):
                job = waiting.popleft()
                if _is_for_later(job, reply, shared=len(jobs) > 1):
                    later.append(job)
                else:
                    job.end(self._outcome(job, reply))
        except (ProcessEnded, OSError) as error:
            job = waiting.popleft()
            if isinstance(error, ProcessEnded) and error.crashed and job.once_more():
                later.append(job)
            else:
                job.end(self._failure(job, error))
        return [*later, *waiting]

    def _outcome(self, job: _Job, reply: Mapping[str, str]) -> str | CoeError:
        """The text, or the error, of a reply."""
        message = one_line(reply.get("message", ""), _MOST_MESSAGE_CHARACTERS)
        match reply.get("error"):
            case None:
                return reply["text"]
            case "refused":
                return Rejected(f"the chat template of {job.expert!r} rejects these messages: {message}")
            case "limit" | "memory":
                return self._exceeded(job, f"exceeds a limit: {message}")
        return TemplateError(f"the chat template of {job.expert!r} is broken: {message}")

    def _failure(self, job: _Job, error: ProcessEnded | OSError) -> CoeError:
        """The error of a render without a reply."""
        if isinstance(error, ProcessEnded) and error.out_of_time:
            return self._exceeded(job, f"takes more than {self._limits.cpu_s:g} s of CPU time")
        if isinstance(error, ProcessEnded) and error.crashed:
            return self._exceeded(job, f"ends the process that renders it (exit code {error.code})")
        return EngineError(f"the process that renders chat templates failed: {error}")

    def _exceeded(self, job: _Job, what: str) -> TemplateError:
        if job.n_characters <= self._limits.short_characters:
            with self._changed:
                self._paused[job.template] = (time.monotonic() + self._limits.pause_s, what)
        return TemplateError(f"the chat template of {job.expert!r} {what}")


def _is_for_later(job: _Job, reply: Mapping[str, str], *, shared: bool) -> bool:
    """Whether another exchange must render it: it was not started, or its neighbours may have taken the memory."""
    error = reply.get("error")
    return error == "later" or (error == "memory" and shared and job.once_more())


def _abandon(jobs: Iterable[_Job]) -> None:
    for job in jobs:
        job.end(EngineError(f"{job.expert!r} was unloaded before its prompt was rendered"))
