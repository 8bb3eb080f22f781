"""The requests of one model that wait: the queue, which of them make a batch, and which join a running one.

The scheduler chooses between experts, and this queue within one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from coe.engines.hf.batch import BatchRow
from coe.engines.hf.jobs import Job
from coe.engines.hf.lora.mixture import adapters_of

PASSED_OVER_S: Final = 1.0
"""How long a request may see later ones join the running batch, which it cannot join itself. Then none of them joins
until it can, or has a batch of its own."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limits of a batch.

    Attributes:
        rows: most rows.
        adapters: most different adapters.
        tokens: most tokens in the key-value cache (rows x longest prompt and answer); `None` is no limit.
        positions: most padded prompt plus answer, the model's context.
        scoring: tokens in the key-value cache that take as much memory as scoring the prompts of a batch.
        entries: most log-probabilities of prompts; the objects that hold them take some 100 bytes each.
        padding: a batch's padded prompts may have this many times the tokens of its prompts...
        short: ...unless all its prompts are at most this long, when padding costs next to nothing.
        prefill: most tokens of prompts that a running batch reads between two of its own tokens.
    """

    rows: int
    adapters: int
    tokens: int | None
    positions: int
    scoring: int = 0
    entries: int = 1_000_000
    padding: float = 1.5
    short: int = 64
    prefill: int = 256


def choose_batch(waiting: Sequence[BatchRow], limits: BatchLimits) -> list[BatchRow]:
    """The rows to run next, from `waiting`, oldest first.

    The oldest is always included, so that no row starves; others join in order if they fit. Left padding makes every
    row as long as the longest, so a short question does not join a long document's batch unless many share the cost.
    """
    chosen: list[BatchRow] = []
    for row in waiting:
        if len(chosen) == limits.rows:
            break
        if not chosen or _fits([*chosen, row], limits):
            chosen.append(row)
    return chosen


def _fits(rows: Sequence[BatchRow], limits: BatchLimits) -> bool:
    width = max(len(row.prompt_ids) for row in rows) + max(row.max_tokens for row in rows)
    return (
        _n_adapters(rows) <= limits.adapters
        and width <= limits.positions
        and _n_entries(rows) <= limits.entries
        and _fits_memory(width, rows, rows, limits)
        and _are_alike(rows, limits)
    )


def choose_joining(
    waiting: Sequence[BatchRow],
    running: Sequence[BatchRow],
    limits: BatchLimits,
    can_join: Callable[[BatchRow], bool],
    now: float,
) -> list[BatchRow]:
    """The rows of `waiting`, oldest first, that join a running batch now, after one forward that reads their prompts.

    The batch drops padding that no row needs, so it is never wider than the longest prompt with its answer. A prompt
    longer than `limits.prefill` comes alone and is read in parts.

    Args:
        can_join: whether the adapter of a row can be mixed with those of the batch.
        now: on the clock of `BatchRow.arrived`.
    """
    chosen: list[BatchRow] = []
    for row in waiting:
        if len(running) + len(chosen) >= limits.rows:
            break
        if not (_fits_running([*chosen, row], running, limits) and can_join(row)):
            if now - row.arrived > PASSED_OVER_S:
                break
        elif not chosen or _are_read_together([*chosen, row], limits):
            chosen.append(row)
    return chosen


def _fits_running(joining: Sequence[BatchRow], running: Sequence[BatchRow], limits: BatchLimits) -> bool:
    rows = [*running, *joining]
    return _n_adapters(rows) <= limits.adapters and _fits_memory(
        max(len(row.prompt_ids) + row.max_tokens for row in rows), rows, joining, limits
    )


def _are_read_together(rows: Sequence[BatchRow], limits: BatchLimits) -> bool:
    n_tokens = max(len(row.prompt_ids) for row in rows) * len(rows)
    return n_tokens <= limits.prefill and _n_entries(rows) <= limits.entries and _are_alike(rows, limits)


def _n_adapters(rows: Sequence[BatchRow]) -> int:
    return len({adapter.key() for row in rows for adapter in adapters_of(row.adapter)})


def _n_entries(rows: Sequence[BatchRow]) -> int:
    """Log-probabilities of prompts that the rows want."""
    return sum(len(row.prompt_ids) * (1 + row.n_prompt_top) for row in rows if row.n_prompt_top is not None)


def _fits_memory(width: int, rows: Sequence[BatchRow], read: Sequence[BatchRow], limits: BatchLimits) -> bool:
    """Whether a cache of this width fits, and the log-probabilities of the prompts that are read."""
    scoring = limits.scoring if _n_entries(read) else 0
    return limits.tokens is None or width * len(rows) + scoring <= limits.tokens


def _are_alike(rows: Sequence[BatchRow], limits: BatchLimits) -> bool:
    """Whether padding the prompts to the longest one costs little."""
    prompts = [len(row.prompt_ids) for row in rows]
    return max(prompts) <= limits.short or max(prompts) * len(rows) <= limits.padding * sum(prompts)


class WaitingRows:
    """The queue between the event loop and the worker thread.

    Rows that arrive together should start together: that takes one forward, not one for each. So the first batch, if it
    is not full, waits for rows being prepared, and briefly for others. Rows that join a running batch do not wait, nor
    do jobs.

    Args:
        n_full: enough rows for a batch.
        gather_s: how long after an arrival to wait for another one.
        gather_at_most_s: how long to wait in all.
    """

    def __init__(self, n_full: int, gather_s: float = 0.003, gather_at_most_s: float = 0.1) -> None:
        self._n_full, self._gather_s, self._gather_at_most_s = n_full, gather_s, gather_at_most_s
        self._rows: list[BatchRow] = []
        self._jobs: deque[Job[Any]] = deque()
        self._n_expected = 0
        self._changed = threading.Condition()
        self._closed = False

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Announce a row that is prepared, and put or abandoned, inside this block."""
        self._expect(1)
        try:
            yield
        finally:
            self._expect(-1)

    def _expect(self, n: int) -> None:
        with self._changed:
            self._n_expected += n
            self._changed.notify()

    def put(self, row: BatchRow) -> bool:
        """Add a row; returns False if the queue is closed."""
        with self._changed:
            if not self._closed:
                row.arrived = time.monotonic()
                self._rows.append(row)
                self._changed.notify()
            return not self._closed

    def put_job(self, job: Job[Any]) -> bool:
        """Add a job; returns False if the queue is closed."""
        with self._changed:
            if not self._closed:
                self._jobs.append(job)
                self._changed.notify()
            return not self._closed

    def take_jobs(self) -> Iterator[Job[Any]]:
        """The jobs that wait now, oldest first, each taken when the one before is done; none is waited for."""
        for _ in range(len(self._jobs)):
            with self._changed:
                if not self._jobs:  # failed meanwhile, as the queue was closed
                    return
                job = self._jobs.popleft()
            yield job

    def close(self) -> None:
        """Accept no more rows and jobs; `take` returns the remaining rows, then nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, limits: Callable[[], BatchLimits]) -> list[BatchRow] | None:
        """Wait for rows and return a batch; an empty one if the queue is closed and empty, `None` if only jobs wait."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: bool(self._rows or self._jobs) or self._closed)
                self._gather()
                self._rows = [row for row in self._rows if not row.cancelled]
                if self._rows:
                    batch = choose_batch(self._rows, limits())
                    self._rows = [row for row in self._rows if row not in batch]
                    return batch
                if self._jobs:
                    return None
                if self._closed:
                    return []

    def take_joining(self, choose: Callable[[Sequence[BatchRow]], list[BatchRow]]) -> list[BatchRow]:
        """The waiting rows that `choose` selects, of those not cancelled; returns at once."""
        with self._changed:
            self._rows = [row for row in self._rows if not row.cancelled]
            chosen = choose(self._rows) if self._rows else []
            self._rows = [row for row in self._rows if row not in chosen]
            return chosen

    def put_back(self, rows: Sequence[BatchRow]) -> None:
        """Let rows wait again, before all others; also in a closed queue."""
        with self._changed:
            self._rows = [*rows, *self._rows]

    def abandon(self) -> list[BatchRow]:
        """Close, and return all waiting rows."""
        self.close()
        with self._changed:
            rows, self._rows = self._rows, []
            return rows

    def _gather(self) -> None:
        give_up_at = time.monotonic() + self._gather_at_most_s
        while not (self._closed or self._jobs) and len(self._rows) < self._n_full and time.monotonic() < give_up_at:
            if not self._changed.wait(self._gather_s) and not self._n_expected:
                return
