"""The child process of a batch: it checks the input, routes, steps and merges; the gateway answers the calls.

`python -m coe.serve.batches.worker` reads the order and the gateway's messages on stdin, and writes its own to stdout
(`link`). It is a run of `coe batch` with another executor, in the same run folder format, so it resumes in the same
way. It has a lower priority than the gateway, which it does not share an interpreter with.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from coe.batch.answering import WorkReport
from coe.batch.errors import InputError
from coe.batch.manifest import manifest, open_batch_folder
from coe.batch.parts import PARTS, Job, PartRouter, PlannedPart, step_part
from coe.batch.results import LINES_FILE
from coe.batch.rows import InputRow
from coe.batch.run import Batch
from coe.batch.source import RawRow, Split, scan
from coe.batch.stages import WorkItem
from coe.config import PolicyConfig
from coe.errors import CoeError
from coe.local import build_policies
from coe.orchestrator import Orchestrator
from coe.policy import AUTO
from coe.runs.errors import RunFolderError
from coe.runs.folder import COMPLETE
from coe.runs.storage import Folder
from coe.serve.batches.link import Message, decode, encode
from coe.serve.batches.order import Order
from coe.serve.batches.stopped import is_stopped, stopped
from coe.serve.batches.validation import check_input
from coe.signals.features import Signals
from registry.errors import RegistryError
from registry.spec import RESERVED_PREFIX
from registry.storage import atomic_path
from routers.errors import RouterError

PART_ROWS: Final = 1024
"""Most rows of a part: what is written, and resumed, together."""
OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"
_NICE: Final = 10
logger = logging.getLogger(__name__)


class Link:
    """The end of the child. A thread reads the gateway's messages, so that a stop is known at any moment.

    Args:
        ended: called when the gateway has ended.
    """

    def __init__(self, read: IO[bytes], write: IO[bytes], ended: Callable[[], None]) -> None:
        self._read, self._write, self._ended = read, write, ended
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.stop: str | None = None
        self.order = decode(read.readline())
        threading.Thread(target=self._receive, name="link", daemon=True).start()

    def send(self, **message: Any) -> None:
        """Send a message."""
        self._write.write(encode(message))
        self._write.flush()

    def receive(self) -> Message:
        """Wait for the next message that is no stop. Raises EOFError once the gateway has ended."""
        if (message := self._messages.get()) is None:
            raise EOFError("the gateway has ended")
        return message

    def _receive(self) -> None:
        with suppress(OSError, ValueError):  # the end is closed
            for line in self._read:
                message = decode(line)
                if "stop" in message:
                    self.stop = message["stop"]
                else:
                    self._messages.put(message)
        self._messages.put(None)
        self._ended()


class GatewayExecutor:
    """The executor (`coe.batch.run.Executor`) whose calls the gateway answers."""

    hosts = 1

    def __init__(self, link: Link, orchestrator: Orchestrator) -> None:
        self._link, self._orchestrator = link, orchestrator

    def route(self, job: Job, bundles: Sequence[tuple[Split, ...]]) -> Iterator[PlannedPart]:
        """Route in this process."""
        router = _StoppableRouter(job, self._orchestrator, self._link)
        for bundle in bundles:
            yield from router.route(bundle)

    def step(self, job: Job, stage: int, parts: Sequence[int]) -> Iterator[PlannedPart]:
        """Step in this process."""
        for part in parts:
            yield step_part(job, part, stage)

    def answer(self, job: Job, stage: int, items: Sequence[WorkItem]) -> Iterator[WorkReport]:
        """Have the gateway answer."""
        units = [[[unit.part, unit.number, unit.expert, unit.residency, unit.calls] for unit in item] for item in items]
        self._link.send(answer=units, stage=stage)
        while "answered" not in (message := self._link.receive()):
            yield WorkReport.of(message["work"])


class _StoppableRouter(PartRouter):
    """Rows that are not routed when the batch is stopped become errors."""

    def __init__(self, job: Job, orchestrator: Orchestrator, link: Link) -> None:
        super().__init__(job, orchestrator)
        self._link = link

    def _parse(self, line: RawRow) -> InputRow:
        row = super()._parse(line)
        if self._link.stop is None or row.error is not None:
            return row
        return InputRow(row.line, row.id, row.model, row.endpoint, error=stopped(self._link.stop))


class Progress:
    """The watcher of a run: sends how many rows are answered, as far as that is known before the end.

    Rows are counted by the calls of the stage at work: exact where each row has one call.
    """

    def __init__(self, link: Link, rows: int) -> None:
        self._link, self._rows = link, rows
        self._calls = self._answered = self._sent = 0

    def phase(self, name: str, totals: Mapping[str, int]) -> None:
        """See `coe.batch.run.Watcher`."""
        self._calls, self._answered = (sum(totals.values()), 0) if name.startswith("answering") else (0, 0)

    def advance(self, name: str, done: int, failed: int = 0) -> None:
        """See `coe.batch.run.Watcher`."""
        if not self._calls:
            return
        self._answered += done - failed
        rows = self._answered * min(self._calls, self._rows) // self._calls
        if rows > self._sent:
            self._sent = rows
            self._link.send(rows=rows)


@dataclass(frozen=True, slots=True)
class Results:
    """What a batch left. stopped: rows that were not answered since it was stopped."""

    total: int
    completed: int
    failed: int
    stopped: int
    usage: tuple[int, int]


def work(link: Link) -> None:
    """Do the order of a link."""
    order = Order.from_json(link.order)
    checked = check_input(order.source, order.endpoint, max_rows=order.max_rows, max_line_bytes=order.max_line_bytes)
    if checked.errors:
        link.send(invalid=checked.errors)
        return
    link.send(valid=checked.rows)
    snapshot, config = order.serving.snapshot, order.config(_asked(order, checked.models))
    signals = Signals(snapshot, config.engines)
    try:
        policies = build_policies(config.policies, snapshot, signals)
        router = Orchestrator(snapshot, policies, ask=_no_expert, default_policy=config.default_policy)
        found = scan(str(order.source), PART_ROWS)
        wanted = manifest(config, snapshot, policies, found, AUTO)
        with open_batch_folder(Folder.of(str(order.folder / "run")), wanted, resume=True) as run:
            if run.status != COMPLETE:
                run.run |= {"input": found.manifest(), "registry_version": snapshot.version}
                job = Job(run.folder, found, config, snapshot, AUTO, visible=order.visible, logged_as=order.batch)
                Batch(job, run, GatewayExecutor(link, router), Progress(link, checked.rows))()
            run.folder.remove(PARTS)
            link.send(finalizing=True)
            results = _write_results(run.folder, order.folder, run.run["results"])
    finally:
        signals.close()
    done = {"total": results.total, "completed": results.completed, "failed": results.failed}
    link.send(done={**done, "stopped": results.stopped, "usage": results.usage})


def _asked(order: Order, models: Collection[str]) -> dict[str, PolicyConfig]:
    """The policies that the requests ask, of those that the key may ask: no router is loaded for nothing."""
    names = {order.serving.default_policy if each == AUTO else each.removeprefix(RESERVED_PREFIX) for each in models}
    return {name: policy for name, policy in order.serving.policies.items() if name in names}


def _no_expert(expert: str, request: object) -> Any:
    raise AssertionError("the process that routes a batch calls no expert")


def _write_results(run: Folder, folder: Path, counted: Mapping[str, Any]) -> Results:
    """Write the lines of a run as OpenAI has them: answers in one file, all else in another; none without a line."""
    with atomic_path(folder / OUTPUT) as good, atomic_path(folder / ERRORS) as bad, run.open(LINES_FILE) as lines:
        total, failed, n_stopped = _write_lines(lines, good, bad)
    usage = (counted["prompt_tokens"], counted["completion_tokens"])
    return Results(total, total - failed, failed, n_stopped, usage)


def _write_lines(lines: IO[bytes], good: Path, bad: Path) -> tuple[int, int, int]:
    """Returns how many lines there are, have an error, and were stopped."""
    total = failed = n_stopped = 0
    with good.open("wb") as answers, bad.open("wb") as errors:
        for text in lines:
            line, total = json.loads(text), total + 1
            response = line["response"]
            if response is not None and response["status_code"] == 200:
                answers.write(text)
                continue
            failed += 1
            if response is not None and is_stopped(response["body"]["error"]):
                n_stopped += 1
                error = {name: response["body"]["error"][name] for name in ("code", "message")}
                line |= {"response": None, "error": error}
                text = json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            errors.write(text)
    return total, failed, n_stopped


def serve(link: Link) -> None:
    """Do the order, and send what prevents it."""
    try:
        work(link)
    except InputError as error:
        link.send(invalid=[{"code": error.code, "line": None, "message": str(error), "param": None}])
    except RunFolderError as error:
        # The run is of another version of coe, or of routers that have changed since: the gateway starts it again. A
        # folder in use, by the child of a gateway that has just ended, is free at the next attempt.
        if "in use" in str(error):
            raise
        link.send(again=str(error))
    except (CoeError, RegistryError, RouterError, OSError) as error:
        logger.exception("the batch %s failed", link.order["batch"])
        text = error.client_text if isinstance(error, CoeError) else None
        link.send(failed=text or "the server failed on this batch; the cause is in its log")


def main() -> None:
    """Serve the gateway on stdin and stdout."""
    os.nice(_NICE)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    link = Link(sys.stdin.buffer, sys.stdout.buffer, ended=lambda: os._exit(1))
    sys.stdout = sys.stderr  # what a library prints is no message
    serve(link)


if __name__ == "__main__":
    main()
