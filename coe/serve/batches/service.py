"""Batches: files and batches of one gateway, over a folder that all gateways of the service use.

batches = Batches(settings, config.engines, ask=..., ...)
batches.update(snapshot, ...)   # experts and policies now; a batch keeps those that it began with
batches.start(is_busy)          # inside the event loop: runs what waits, also what a gateway before has left
await batches.close()           # what runs goes on in another gateway, or after a restart
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, Final

from coe.config import PolicyConfig, ServeConfig
from coe.engine_config import EnginesConfig
from coe.orchestrator import AskExpert
from coe.protocol.batches import ParsedBatch
from coe.serve.batches.claims import Claim, Claims
from coe.serve.batches.errors import FileInUse, NoSuchFile
from coe.serve.batches.files import FileStore, Upload
from coe.serve.batches.ids import new_batch_id
from coe.serve.batches.link import ChildProcess, Worker
from coe.serve.batches.order import Serving
from coe.serve.batches.records import BatchRecord, BatchStore
from coe.serve.batches.runner import Environment, Running, WorkerDied
from coe.serve.http.batch_store import Stored
from coe.serve.http.file_uploads import FileUploads
from coe.serve.http.keyring import Access, Keyring
from coe.serve.http.ledger import Ledger
from registry.store import Snapshot

POLL_S: Final = 2.0
"""Seconds between two looks for batches of other gateways that wait."""
SWEEP_S: Final = 600.0
"""Seconds between two deletions of what has expired."""
RETRY_S: Final = 5.0
"""Seconds until a batch whose child process died is run again."""
logger = logging.getLogger(__name__)
Body = Mapping[str, Any]


class Batches:
    """Files and batches (`coe.serve.http.batch_store.Batches`), and what runs them.

    Args:
        settings: its section `batches` is given.
        engines: those of the service; a child process reads signals with them.
        ask: calls one expert on the hosts.
        start: starts a child process.
        wall: seconds since the epoch.
    """

    def __init__(
        self,
        settings: ServeConfig,
        engines: EnginesConfig,
        *,
        ask: AskExpert,
        keyring: Keyring,
        ledger: Ledger | None = None,
        start: Callable[[], Awaitable[Worker]] = ChildProcess.start,
        wall: Callable[[], float] = time.time,
    ) -> None:
        assert settings.batches is not None  # the caller's condition
        given = settings.batches
        self.uploads = FileUploads(settings, given.max_file_bytes)
        self._settings, self._wall = given, wall
        self._files, self._batches = FileStore(given, wall), BatchStore(given, wall)
        self._claims = Claims(given.folder, given.at_once, wall)
        self._serving: Serving | None = None
        self._is_busy: Callable[[], bool] = lambda: False
        self._wake, self._running = asyncio.Event(), dict[str, asyncio.Task[None]]()
        self._looking: asyncio.Task[None] | None = None
        self._environment = Environment(
            settings=given,
            files=self._files,
            batches=self._batches,
            keyring=keyring,
            ledger=ledger,
            ask=ask,
            serving=self._now,
            is_busy=lambda: self._is_busy(),
            start=start,
            engines=engines,
            max_line_bytes=settings.max_body_bytes,
            wall=wall,
        )

    def update(self, snapshot: Snapshot, policies: Mapping[str, PolicyConfig], default_policy: str) -> None:
        """Use other experts and policies for batches that begin from now on."""
        self._serving = Serving(snapshot, policies, default_policy)

    def start(self, is_busy: Callable[[], bool]) -> None:
        """Run what waits. `is_busy`: whether the gateway has other requests."""
        self._is_busy = is_busy
        if self._looking is None:
            self._looking = asyncio.ensure_future(self._look())

    async def close(self) -> None:
        """Stop running; nothing is lost but the calls in flight."""
        tasks = [*self._running.values(), *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._looking = None

    async def upload(self) -> Stored:
        """Begin a file. Raises StorageFull, Overloaded."""
        return await asyncio.to_thread(self._files.upload)

    async def commit(self, access: Access, upload: Stored, filename: str, purpose: str, keep_s: float | None) -> Body:
        """End a file. Raises StorageFull."""
        assert isinstance(upload, Upload)
        record = await asyncio.to_thread(upload.commit, access.id, filename, purpose, keep_s)
        return record.body()

    async def files(self, access: Access) -> Sequence[Body]:
        """All files of a key, the oldest first."""
        return [record.body() for record in await asyncio.to_thread(self._files.all, access.id)]

    async def file(self, access: Access, file_id: str) -> Body:
        """A file. Raises NoSuchFile."""
        return (await asyncio.to_thread(self._files.get, file_id, access.id)).body()

    async def delete(self, access: Access, file_id: str) -> None:
        """Delete a file.

        Raises:
            NoSuchFile: there is none.
            FileInUse: a batch that has not ended reads it.
        """
        await asyncio.to_thread(self._delete, access, file_id)

    async def content(self, access: Access, file_id: str) -> tuple[Body, IO[bytes]]:
        """A file, and its content. Raises NoSuchFile."""
        record = await asyncio.to_thread(self._files.get, file_id, access.id)
        return record.body(), await asyncio.to_thread(self._files.open, record)

    async def create(self, access: Access, batch: ParsedBatch) -> Body:
        """Make a batch.

        Raises:
            NoSuchFile: there is no such input file.
            TooManyBatches: too many of this key wait.
        """
        body = await asyncio.to_thread(self._create, access, batch)
        self._wake.set()
        return body

    async def batches(self, access: Access) -> Sequence[Body]:
        """All batches of a key, the oldest first."""
        return await asyncio.to_thread(lambda: list(map(self._batches.body, self._batches.all(access.id))))

    async def batch(self, access: Access, batch_id: str) -> Body:
        """A batch. Raises NoSuchBatch."""
        return await asyncio.to_thread(lambda: self._batches.body(self._batches.get(batch_id, access.id)))

    async def cancel(self, access: Access, batch_id: str) -> Body:
        """Cancel a batch; one that has ended stays as it is. Raises NoSuchBatch."""
        body = await asyncio.to_thread(self._cancel, access, batch_id)
        self._wake.set()
        return body

    def _delete(self, access: Access, file_id: str) -> None:
        record = self._files.get(file_id, access.id)
        if file_id in self._batches.inputs():
            raise FileInUse(f"a batch reads {file_id}: cancel it, or wait until it has ended")
        self._files.delete(record)

    def _create(self, access: Access, batch: ParsedBatch) -> Body:
        file = self._files.get(batch.input_file_id, access.id)
        if file.purpose != "batch":
            raise NoSuchFile(f"{file.id} is no file of requests: its purpose is {file.purpose!r}")
        record = BatchRecord(
            id=new_batch_id(),
            owner=access.id,
            endpoint=batch.endpoint,
            input_file_id=file.id,
            created_at=int(self._wall()),
            metadata=batch.metadata,
            keep_s=batch.keep_s,
        )
        self._batches.create(record)
        return self._batches.body(record)

    def _cancel(self, access: Access, batch_id: str) -> Body:
        record = self._batches.get(batch_id, access.id)
        if not record.has_ended:
            self._batches.cancel(record)
        return self._batches.body(record)

    def _now(self) -> Serving:
        assert self._serving is not None  # nothing runs before the first one
        return self._serving

    async def _look(self) -> None:
        """Claim and run what waits, and delete what has expired."""
        swept_at = -SWEEP_S
        while True:
            try:
                if self._serving is not None:
                    await self._claim_more()
                if time.monotonic() - swept_at >= SWEEP_S:
                    swept_at = time.monotonic()
                    await asyncio.to_thread(self._sweep)
            except Exception:  # of the disk; the next look may find it better
                logger.exception("the batches in %s cannot be read", self._settings.folder)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):  # `wait_for` may lose a cancellation
                    await self._wake.wait()
            self._wake.clear()

    def _sweep(self) -> None:
        self._files.sweep(self._batches.inputs)
        self._batches.sweep()

    async def _claim_more(self) -> None:
        if len(self._running) >= self._settings.at_once:
            return
        for record in await asyncio.to_thread(self._batches.waiting):
            if record.id in self._running:
                continue
            claim = await asyncio.to_thread(self._claims.take, record.id, self._batches.folder(record.id))
            if claim is None:
                continue
            running = asyncio.ensure_future(self._run(claim))
            self._running[record.id] = running
            if len(self._running) >= self._settings.at_once:
                return

    async def _run(self, claim: Claim) -> None:
        """Run a batch as far as it goes."""
        try:
            # Another gateway may have run it since it was listed.
            record = await asyncio.to_thread(self._batches.read, claim.batch_id)
            if record is not None and not record.has_ended:
                await Running(self._environment, claim, record).run()
        except WorkerDied as error:
            logger.warning("%s; it is run again", error)
            await asyncio.sleep(RETRY_S)
        except Exception:
            logger.exception("the batch %s stopped; it is run again", claim.batch_id)
            await asyncio.sleep(RETRY_S)
        finally:
            await asyncio.shield(asyncio.to_thread(claim.release))
            del self._running[claim.batch_id]
            self._wake.set()
