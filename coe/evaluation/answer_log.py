"""The answers of a run in the order of completion, in an append-only file that survives a kill."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from coe.runs.errors import RunFolderError
from registry.json_text import loads
from registry.storage import translate_disk_full

_FLUSH_RECORDS = 16
_FLUSH_S = 1.0
_REMEDY = "delete the line, or use another --out"


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """One question answered, or failed.

    Attributes:
        run: fingerprint of the run it belongs to.
        answer: the text; empty after a failure.
        seconds: from the call to the last token, with waiting for the host and for weights.
        error: `ErrorType: message` of a failure, whose score is 0.
        cost_usd: of all expert calls of a policy's answer; None where a price is unknown, and for experts.
        final: False for a failure that a resumed run repeats.
    """

    run: str
    expert: str
    task: str
    row: str
    answer: str
    score: float
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    error: str | None = None
    final: bool = True
    cost_usd: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """As `Question.key`."""
        return self.expert, self.task, self.row


class AnswerLog:
    """Appends records to a file in batches of whole lines. Use as a context manager.

    A batch is written after 16 records or one second, and at the end; a kill loses at most one batch.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._pending: list[bytes] = []
        self._flushed_s = clock()

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.flush()
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def append(self, record: AnswerRecord) -> None:
        """Add a record; it is on disk after the next flush."""
        self._pending.append(json.dumps(asdict(record)).encode() + b"\n")
        if len(self._pending) >= _FLUSH_RECORDS or self._clock() - self._flushed_s >= _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is pending.

        Raises:
            DiskFull: nothing of the batch is written.
        """
        batch, self._pending = b"".join(self._pending), []
        size = os.fstat(self._descriptor).st_size
        with translate_disk_full(self._path):
            try:
                while batch:
                    batch = batch[os.write(self._descriptor, batch) :]
            except OSError:
                os.ftruncate(self._descriptor, size)  # no half line before whole ones
                raise
        self._flushed_s = self._clock()


def read_log(path: Path, run: str) -> tuple[list[AnswerRecord], bool]:
    """The records of a log, the last one of each key, and whether a half line was removed from its end.

    Raises:
        RunFolderError: a line is damaged, or belongs to another run.
    """
    if not path.exists():
        return [], False
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    records = {record.key: record for record in _parse(whole, path, run)}
    return list(records.values()), whole != content


def _parse(content: bytes, path: Path, run: str) -> Iterator[AnswerRecord]:
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = AnswerRecord(**loads(line))
        except (ValueError, TypeError) as error:
            raise RunFolderError(f"{path}:{number}: damaged ({error}); {_REMEDY}") from error
        if record.run != run:
            raise RunFolderError(f"{path}:{number}: an answer of another run; delete the line, or use another --out")
        yield record
