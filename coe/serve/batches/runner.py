"""The life of a batch in the gateway that has claimed it: its child process, the calls, the states, the results."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from coe.config import BatchesConfig
from coe.engine_config import EnginesConfig
from coe.orchestrator import AskExpert
from coe.runs.storage import Folder
from coe.serve.batches.answering import Account, ChargedAnswerer, ServiceHosts, Stop, answer_stage
from coe.serve.batches.claims import Claim
from coe.serve.batches.files import FileStore
from coe.serve.batches.ids import result_id
from coe.serve.batches.link import Message, Worker
from coe.serve.batches.order import Order, Serving
from coe.serve.batches.records import BatchRecord, BatchStore
from coe.serve.batches.stopped import CANCELLED, EXPIRED, FAILED
from coe.serve.batches.worker import ERRORS, OUTPUT
from coe.serve.http.keyring import Access, Keyring
from coe.serve.http.ledger import Ledger
from coe.serve.http.refusals import KeysUnavailable, Unauthorized
from registry.errors import RegistryError
from registry.storage import atomic_path

MOST_ATTEMPTS: Final = 5
"""Child processes of a batch that may die in a row; then it fails."""
LOOK_S: Final = 1.0
"""Seconds between two looks at whether a batch is cancelled, or its key gone."""
SAVE_S: Final = 1.0
"""Seconds between two writes of the counts."""
logger = logging.getLogger(__name__)


class WorkerDied(Exception):
    """The child process ended before the batch did."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What running a batch needs of its gateway.

    Attributes:
        files, batches: on disk.
        ask: calls one expert on the hosts. serving: experts and policies now.
        is_busy: whether the gateway has other requests.
        start: starts a child process. engines: those of the service.
        max_line_bytes: of a request.
        wall: seconds since the epoch.
    """

    settings: BatchesConfig
    files: FileStore
    batches: BatchStore
    keyring: Keyring
    ledger: Ledger | None
    ask: AskExpert
    serving: Callable[[], Serving]
    is_busy: Callable[[], bool]
    start: Callable[[], Awaitable[Worker]]
    engines: EnginesConfig
    max_line_bytes: int
    wall: Callable[[], float] = time.time


class Running:
    """One batch, while this process holds its claim."""

    def __init__(self, around: Environment, claim: Claim, record: BatchRecord) -> None:
        self._around, self._claim, self._record = around, claim, record
        self._folder = around.batches.folder(record.id)
        self._stop, self._saved_at = Stop(), 0.0
        self._access: Access | None = None
        self._saving = asyncio.Lock()

    async def run(self) -> None:
        """Run the batch to its end.

        Raises:
            WorkerDied: the child process died; the batch goes on at the next attempt.
        """
        if self._record.attempts >= MOST_ATTEMPTS:
            await self._fail(
                "batch_failed", "the processes that ran it died repeatedly; the log of the server has more"
            )
            return
        try:
            self._access = await self._around.keyring.access_of(self._record.owner)
        except Unauthorized as error:
            await self._fail(error.code, str(error))
            return
        cancelled = await asyncio.to_thread(self._around.batches.cancelled_at, self._record.id)
        if cancelled is not None and not self._record.times:
            await self._end_cancelled(cancelled)
            return
        worker = await self._started()
        watching = asyncio.ensure_future(self._watch(worker))
        try:
            await self._conversed(worker)
        finally:
            watching.cancel()
            await _to_its_end(worker.close())
            await asyncio.gather(watching, return_exceptions=True)

    async def _started(self) -> Worker:
        order = await asyncio.to_thread(self._order)
        worker = await self._around.start()
        await worker.send(order)
        return worker

    def _order(self) -> Message:
        """What the batch is run by: that of its first attempt, since a run has one set of experts and policies."""
        path = self._folder / "order.json"
        with suppress(FileNotFoundError, ValueError):
            kept: Message = json.loads(path.read_bytes())
            return kept
        access, serving = self._current(), self._around.serving()
        order = Order(
            batch=self._record.id,
            endpoint=self._record.endpoint,
            source=self._around.files.path(self._record.input_file_id).absolute(),
            folder=self._folder.absolute(),
            serving=replace(serving, policies=access.policies(serving.policies)),
            visible=access.experts(serving.snapshot),
            engines=self._around.engines,
            max_rows=self._around.settings.max_rows,
            max_line_bytes=self._around.max_line_bytes,
        ).to_json()
        with atomic_path(path) as staged:
            staged.write_text(json.dumps(order))
        return order

    async def _conversed(self, worker: Worker) -> None:
        """`_converse`, with the error itself where a group of tasks has one."""
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._converse(worker, tasks)
        except* Exception as group:
            raise group.exceptions[0] from None

    async def _converse(self, worker: Worker, tasks: asyncio.TaskGroup) -> None:
        """Do what the child needs, until it is done. It reports while its calls are answered."""
        while (message := await worker.receive()) is not None:
            if "answer" in message:
                tasks.create_task(self._answer(worker, message))
            elif "rows" in message:
                await self._count(message["rows"])
            elif "valid" in message:
                await self._begin(message["valid"])
            elif "finalizing" in message:
                if self._stop.code is None:
                    await self._save(self._record.at("finalizing", self._around.wall()))
            elif "done" in message:
                await self._finish(message["done"])
                return
            elif "invalid" in message:
                await self._save(self._record.at("failed", self._around.wall(), errors=tuple(message["invalid"])))
                return
            elif "failed" in message:
                await self._fail("batch_failed", message["failed"])
                return
            else:
                await self._again(message["again"])
                return
        await self._save(replace(self._record, attempts=self._record.attempts + 1))
        raise WorkerDied(f"the process that ran {self._record.id} died")

    async def _answer(self, worker: Worker, message: Message) -> None:
        around = self._around
        hosts = ServiceHosts(around.serving().snapshot, around.ask, around.settings.in_flight, around.is_busy)
        account = Account(self._record.id, self._current, around.ledger, around.wall)
        answerer = partial(_answerer, hosts, account, self._stop)
        if self._record.attempts:
            await self._save(replace(self._record, attempts=0))
        await answer_stage(worker, self._folder / "run", message["stage"], message["answer"], answerer)

    def _current(self) -> Access:
        assert self._access is not None  # asked for before
        return self._access

    async def _begin(self, rows: int) -> None:
        if self._record.status == "validating":
            await self._save(self._record.at("in_progress", self._around.wall(), total=rows))

    async def _count(self, completed: int) -> None:
        """Count answered rows; an attempt after a restart counts from the first again, which is not shown."""
        if completed <= self._record.completed:
            return
        self._record = replace(self._record, completed=completed)
        now = self._around.wall()
        if now - self._saved_at >= SAVE_S:
            await self._save(self._record)

    async def _finish(self, done: Mapping[str, Any]) -> None:
        """Add the results as files; then the batch has ended."""
        now = self._around.wall()
        output = await asyncio.to_thread(self._add, OUTPUT, "output", done["completed"])
        errors = await asyncio.to_thread(self._add, ERRORS, "error", done["failed"])
        status = {None: "completed", CANCELLED: "cancelled", EXPIRED: "expired", FAILED: "failed"}[self._stop.code]
        if status == "expired" and not done["stopped"]:
            status = "completed"  # the last answer came in time
        await self._save(
            self._record.at(
                status,
                now,
                output_file_id=output,
                error_file_id=errors,
                total=done["total"],
                completed=done["completed"],
                failed=done["failed"],
                usage=tuple(done["usage"]),
            )
        )
        await asyncio.to_thread(shutil.rmtree, self._folder / "run", ignore_errors=True)

    def _add(self, name: str, shown: str, lines: int) -> str | None:
        record, path = self._record, self._folder / name
        if not lines:
            path.unlink(missing_ok=True)
            return None
        file_id = result_id(record.id, name)
        filename = f"{record.id}_{shown}.jsonl"
        self._around.files.add(path, file_id, record.owner, filename, "batch_output", record.keep_s)
        return file_id

    async def _again(self, why: str) -> None:
        """Run the batch from its start: its run is of other routers, or of another version."""
        logger.warning("%s starts again: %s", self._record.id, why)
        await asyncio.to_thread(shutil.rmtree, self._folder / "run", ignore_errors=True)
        await asyncio.to_thread((self._folder / "order.json").unlink, missing_ok=True)
        await self._save(replace(self._record, attempts=self._record.attempts + 1, completed=0))

    async def _watch(self, worker: Worker) -> None:
        """Beat, and stop the batch when it is cancelled, expires or loses its key."""
        while True:
            try:
                await asyncio.to_thread(self._claim.beat)
                if self._stop.code is None and (code := await self._why_stop()) is not None:
                    self._stop.set(code)
                    await worker.send({"stop": code})
            except (OSError, RegistryError) as error:  # of the disk; what the batch itself writes there ends it
                logger.warning("%s: its state cannot be read or written: %s", self._record.id, error)
            await asyncio.sleep(LOOK_S)

    async def _why_stop(self) -> str | None:
        cancelled = await asyncio.to_thread(self._around.batches.cancelled_at, self._record.id)
        if cancelled is not None and not self._record.has_ended:
            times = {**self._record.times, "cancelling": cancelled}
            await self._save(replace(self._record, status="cancelling", times=times))
            return CANCELLED
        if self._around.wall() >= self._record.expires_at:
            return EXPIRED
        try:
            self._access = await self._around.keyring.access_of(self._record.owner)
        except KeysUnavailable:
            return None  # the rights as they were known last
        except Unauthorized as error:
            self._record = replace(self._record, errors=(_error(error.code, str(error)),))
            return FAILED
        return None

    async def _end_cancelled(self, cancelled: int) -> None:
        """End a batch that has not begun."""
        record = replace(self._record, times={"cancelling": cancelled})
        await self._save(record.at("cancelled", self._around.wall()))

    async def _fail(self, code: str, message: str) -> None:
        errors = (_error(code, message),)
        await self._save(self._record.at("failed", self._around.wall(), errors=errors))
        await asyncio.to_thread(shutil.rmtree, self._folder / "run", ignore_errors=True)

    async def _save(self, record: BatchRecord) -> None:
        self._record, self._saved_at = record, self._around.wall()
        async with self._saving:  # the latest one is written last
            await asyncio.to_thread(self._around.batches.save, self._record)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for work that a cancellation must not interrupt."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await working
        raise


def _answerer(
    hosts: ServiceHosts, account: Account, stop: Stop, folder: Folder, stage: int, units: Any, report: Any
) -> ChargedAnswerer:
    return ChargedAnswerer(hosts, folder, stage, units, report, account=account, stop=stop)


def _error(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "line": None, "message": message, "param": None}
