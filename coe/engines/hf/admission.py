"""Rows of the queue that join the running batch of a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from coe.engines.hf.batch import BatchRow, deliver
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.engines.hf.waiting import BatchLimits, WaitingRows, choose_joining


class Joining:
    """Takes rows from the queue and loads their adapters; only the worker thread of the model calls this.

    Args:
        waiting: the queue.
        slots: the adapters of the model.
        limits: given the tokens that the cache of the batch holds now.
        acquire: loads the adapter of a row, among others in use; if that fails, the row has failed.
        batch: all rows of the batch, kept up to date: they fail together if the model does.
        n_prefill: most tokens of prompts to read between two tokens of the batch.
    """

    def __init__(
        self,
        waiting: WaitingRows,
        slots: AdapterSlots,
        limits: Callable[[int], BatchLimits],
        acquire: Callable[[BatchRow, Sequence[BatchRow]], None],
        batch: list[BatchRow],
        n_prefill: int,
    ) -> None:
        self._waiting, self._slots, self._limits, self._acquire = waiting, slots, limits, acquire
        self._batch = batch
        self.n_prefill = n_prefill

    def take(self, running: Sequence[BatchRow], n_columns: int) -> list[BatchRow]:
        """Rows to join now, oldest first, with their adapters loaded; returns at once.

        Args:
            running: the rows of the batch.
            n_columns: width of the key-value cache of the batch.
        """
        names = [row.slot for row in running]

        def fits(row: BatchRow) -> bool:
            return self._slots.can_join(row.adapter, names)

        def choose(waiting: Sequence[BatchRow]) -> list[BatchRow]:
            limits = self._limits(len(running) * n_columns)
            return choose_joining(waiting, running, limits, fits, time.monotonic())

        rows = self._waiting.take_joining(choose)
        if not rows:
            return []
        self._batch[:] = [*(row for row in self._batch if not row.done), *rows]
        for row in rows:
            self._acquire(row, [*running, *rows])
        deliver(rows)
        live = [row for row in rows if not row.done]
        self.put_back([row for row in live if not fits(row)])  # what an adapter needs is known once it is loaded
        return [row for row in live if fits(row)]

    def put_back(self, rows: Sequence[BatchRow]) -> None:
        """Let rows wait again, before all others."""
        if rows:
            self._batch[:] = [row for row in self._batch if row not in rows]
            self._waiting.put_back(rows)
