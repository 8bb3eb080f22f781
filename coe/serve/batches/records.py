"""BatchStore: the batches of a service on disk, for all its gateways.

    batches/<id>/batch.json    status, times, counts; written by the gateway that has claimed the batch
    batches/<id>/cancel        it is to be cancelled; written by any gateway
    batches/<id>/order.json    what its child process was given: experts and policies at its start
    batches/<id>/run/          the run folder of `coe batch`
    open/<id>                  an empty file for each batch that has not ended: what runs next is one listing

All methods block: call them in a thread.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from coe.config import BatchesConfig
from coe.errors import Overloaded
from coe.serve.batches.errors import NoSuchBatch, TooManyBatches
from coe.serve.batches.files import DAY_S
from coe.serve.batches.ids import is_id
from registry.storage import atomic_path

WINDOW_S: Final = 86_400
"""Seconds from creation within which a batch is answered: OpenAI's "24h"."""
MOST_BATCHES: Final = 20_000
"""Most batches of a folder, ended ones included."""
ENDED: Final = frozenset({"completed", "failed", "cancelled", "expired"})
_TIMES: Final = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch.

    Attributes:
        owner: id of the API key that made it; None: made before the service had keys.
        keep_s: seconds for which its results are kept; None: as all files.
        times: status -> when it began, in seconds since the epoch.
        errors: what is wrong with its input file, or with the batch, as OpenAI's `errors.data`.
        usage: prompt and completion tokens, once it has ended.
        attempts: child processes in a row that died without a new part.
    """

    id: str
    owner: str | None
    endpoint: str
    input_file_id: str
    created_at: int
    status: str = "validating"
    metadata: Mapping[str, str] | None = None
    keep_s: float | None = None
    times: Mapping[str, int] = field(default_factory=dict)
    errors: tuple[Mapping[str, Any], ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    usage: tuple[int, int] | None = None
    attempts: int = 0

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The record in a file; None if it is gone."""
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        usage = document["usage"] and tuple(document["usage"])
        return cls(**{**document, "errors": tuple(document["errors"]), "usage": usage})

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it will change."""
        return self.status in ENDED

    @property
    def expires_at(self) -> int:
        """When what is not answered is given up."""
        return self.created_at + WINDOW_S

    def at(self, status: str, now: float, **fields: Any) -> Self:
        """The batch with another status from now on."""
        return replace(self, status=status, times={**self.times, status: int(now)}, **fields)

    def body(self, cancel_at: int | None = None) -> dict[str, Any]:
        """As OpenAI's batch object. `cancel_at`: when it was cancelled, if its runner does not know yet."""
        status, times = self.status, dict(self.times)
        if cancel_at is not None and not self.has_ended:
            status = "cancelling"
            times.setdefault("cancelling", cancel_at)
        errors = {"object": "list", "data": [dict(error) for error in self.errors]} if self.errors else None
        body: dict[str, Any] = {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{f"{name}_at": times.get(name) for name in _TIMES},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": None if self.metadata is None else dict(self.metadata),
        }
        if self.usage is not None:
            read, written = self.usage
            body["usage"] = {
                "input_tokens": read,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": written,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": read + written,
            }
        return body


class BatchStore:
    """The batches in a folder.

    Args:
        wall: seconds since the epoch.
    """

    def __init__(self, settings: BatchesConfig, wall: Callable[[], float] = time.time) -> None:
        self._settings, self._wall = settings, wall
        self._batches, self._open = settings.folder / "batches", settings.folder / "open"

    def folder(self, batch_id: str) -> Path:
        """The folder of a batch."""
        return self._batches / batch_id

    def create(self, record: BatchRecord) -> None:
        """Add a batch, which waits from now on.

        Raises:
            TooManyBatches: its owner has too many that have not ended.
            Overloaded: there are too many batches.
        """
        waiting = sum(each.owner == record.owner for each in self.waiting())
        if waiting >= self._settings.max_waiting:
            raise TooManyBatches(f"{waiting} batches wait or run already (serve.batches.max_waiting); try again later")
        if self._batches.is_dir() and sum(1 for _ in self._batches.iterdir()) >= MOST_BATCHES:
            raise Overloaded(f"there are {MOST_BATCHES:,} batches already (serve.batches.keep_days); try again later")
        self.save(record)
        self._open.mkdir(parents=True, exist_ok=True)
        (self._open / record.id).touch()

    def save(self, record: BatchRecord) -> None:
        """Write a batch; one that has ended waits no more."""
        with atomic_path(self.folder(record.id) / "batch.json") as path:
            path.write_text(json.dumps(asdict(record)))
        if record.has_ended:
            (self._open / record.id).unlink(missing_ok=True)

    def get(self, batch_id: str, owner: str | None) -> BatchRecord:
        """A batch. Raises NoSuchBatch."""
        record = self.read(batch_id)
        if record is None or record.owner != owner:
            raise NoSuchBatch(f"there is no batch {batch_id[:80]!r}")
        return record

    def read(self, batch_id: str) -> BatchRecord | None:
        """A batch of any owner; None if there is none."""
        return BatchRecord.read(self.folder(batch_id) / "batch.json") if is_id("batch", batch_id) else None

    def all(self, owner: str | None) -> list[BatchRecord]:
        """All batches of an owner, the oldest first."""
        names = [path.name for path in self._batches.iterdir()] if self._batches.is_dir() else []
        found = (record for name in names if (record := self.read(name)) is not None)
        return sorted((each for each in found if each.owner == owner), key=lambda each: (each.created_at, each.id))

    def waiting(self) -> list[BatchRecord]:
        """The batches that have not ended, in the order in which they run: in turns by owner, the oldest first."""
        names = [path.name for path in self._open.iterdir()] if self._open.is_dir() else []
        found = [record for name in names if (record := self.read(name)) is not None]
        before: Counter[str | None] = Counter()
        ranked = []
        for record in sorted(found, key=lambda each: (each.created_at, each.id)):
            ranked.append((before[record.owner], record.created_at, record.id, record))
            before[record.owner] += 1
        return [each[-1] for each in sorted(ranked, key=lambda each: each[:3])]

    def cancel(self, record: BatchRecord) -> int:
        """Cancel a batch; returns when it was first cancelled."""
        path = self.folder(record.id) / "cancel"
        with suppress(FileExistsError), path.open("x") as file:
            file.write(str(int(self._wall())))
        return self.cancelled_at(record.id) or int(self._wall())

    def cancelled_at(self, batch_id: str) -> int | None:
        """When a batch was cancelled, if it was."""
        try:
            return int((self.folder(batch_id) / "cancel").read_text() or self._wall())
        except FileNotFoundError:
            return None

    def body(self, record: BatchRecord) -> dict[str, Any]:
        """As OpenAI's batch object."""
        return record.body(None if record.has_ended else self.cancelled_at(record.id))

    def inputs(self) -> set[str]:
        """Ids of the input files of batches that have not ended."""
        return {record.input_file_id for record in self.waiting()}

    def sweep(self) -> None:
        """Delete batches that ended too long ago."""
        before = self._wall() - self._settings.keep_days * DAY_S
        for path in list(self._batches.iterdir()) if self._batches.is_dir() else ():
            record = self.read(path.name)
            if record is not None and record.has_ended and max(record.times.values()) < before:
                shutil.rmtree(path, ignore_errors=True)
