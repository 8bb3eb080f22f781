"""The worker thread of a resident model: it runs the batches of its requests, and jobs between their steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from coe.engines.hf.admission import Joining
from coe.engines.hf.batch import BatchRow, deliver
from coe.engines.hf.load import LoadedModel, translate
from coe.engines.hf.logprobs import SCORING_BYTES, scoring_bytes
from coe.engines.hf.loop import BatchLoop, padded
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.engines.hf.lora.mixture import RowSlot
from coe.engines.hf.waiting import BatchLimits, WaitingRows
from coe.errors import EngineError, OutOfMemory, Unsupported


class BatchWorker:
    """Takes the waiting requests, runs one `model.generate` for all of them, and hands text to each reader.

    Args:
        name: of the expert.
        loaded: the model, its tokenizer and limits.
        waiting: the queue; the thread ends once it is closed and empty.
        max_adapters: most adapters kept on the model.
        cache_bytes: bytes that the key-value cache of a batch may take, given those that it takes now.
        context_length: tokens of prompt and answer together.
        n_prefill: most tokens of prompts to read between two tokens of a running batch.

    Attributes:
        slots: the adapters of the model.
        batch: the rows that run now.
    """

    def __init__(
        self,
        name: str,
        loaded: LoadedModel,
        waiting: WaitingRows,
        *,
        max_batch: int,
        max_adapters: int,
        cache_bytes: Callable[[int], int],
        context_length: int,
        n_prefill: int,
    ) -> None:
        self._name, self._waiting = name, waiting
        self._loaded: LoadedModel | None = loaded
        self.slots = AdapterSlots(loaded.model, name, max_adapters)
        self.batch: list[BatchRow] = []
        self._max_batch, self._max_adapters, self._cache_bytes = max_batch, max_adapters, cache_bytes
        self._context_length, self._n_prefill = context_length, n_prefill
        self.thread = threading.Thread(target=self._work, name=f"hf:{name}", daemon=True)
        self.thread.start()

    def join(self) -> None:
        """Wait until the queue, which is closed, is empty; then free the adapters, and let go of the model."""
        self.thread.join()
        self.slots.close()
        self._loaded = None
        del self.slots

    def _work(self) -> None:
        try:
            while (rows := self._waiting.take(self.limits)) != []:
                self.batch = list(rows or ())
                self._run_jobs()
                if rows:
                    self._run(rows)
        except Exception as error:  # such as a lost device: all waiting requests must fail
            lost = [*self.batch, *self._waiting.abandon()]
            cause = EngineError(f"the worker of {self._name!r} ended: {type(error).__name__}: {error}; load it again")
            for row in lost:
                row.fail(cause)
            for job in self._waiting.take_jobs():
                job.fail(cause)
            deliver(lost)

    def _run_jobs(self, running: Sequence[RowSlot] = ()) -> None:
        """Run the jobs that wait.

        Args:
            running: slots of the rows of the running batch.
        """
        assert self._loaded is not None  # freed only after this thread has ended
        if self.slots.has_activated(running):
            return
        for job in self._waiting.take_jobs():
            job.run(self._loaded.model, self.slots, running)

    def limits(self, n_held: int = 0) -> BatchLimits:
        """What a batch may take, whose cache holds this many tokens now."""
        assert self._loaded is not None  # freed only after this thread has ended
        per_token = self._loaded.cache_bytes_per_token
        scoring = max(SCORING_BYTES, scoring_bytes(self._loaded.model, self._max_batch))
        return BatchLimits(
            rows=self._max_batch,
            adapters=self._max_adapters,
            tokens=self._cache_bytes(n_held * per_token) // per_token,
            positions=self._context_length,
            scoring=-(-scoring // per_token),
            prefill=self._n_prefill,
        )

    def _run(self, rows: Sequence[BatchRow]) -> None:
        for row in rows:
            self._acquire(row, rows)
        deliver(rows)
        live = [row for row in rows if not row.done]
        batches = self.slots.batches([row.slot for row in live])
        if not batches:
            return
        first, *others = ([live[position] for position in batch] for batch in batches)
        self._waiting.put_back([row for batch in others for row in batch])
        self.batch = list(first)
        self._generate_or_split(first)

    def _acquire(self, row: BatchRow, rows: Sequence[BatchRow]) -> None:
        """Load the adapter of a row; if that fails, only this row does."""
        if row.adapter is None:
            return
        try:
            with translate(f"adapter {row.adapter.spec.name!r} cannot be loaded", EngineError):
                row.slot = self.slots.acquire(row.adapter, {r.slot for r in rows if r.slot})
            if row.columns is not None and self.slots.has_activated([row.slot]):  # its prompt is read in parts
                raise Unsupported(
                    f"adapter {row.adapter.spec.name!r} acts from its invocation tokens on (aLoRA): it cannot read the "
                    "key-value entries of peers"
                )
        except EngineError as error:
            row.fail(error)

    def _generate_or_split(self, rows: Sequence[BatchRow], *, others_wait: bool = False) -> None:
        """If memory runs out before the first token, try half as many rows; none joins while the others wait."""
        if not self._attempt(rows, joinable=not others_wait):
            half = len(rows) // 2
            self._generate_or_split(rows[:half], others_wait=True)
            self._generate_or_split(rows[half:], others_wait=others_wait)

    def _attempt(self, rows: Sequence[BatchRow], *, joinable: bool) -> bool:
        try:
            with translate(f"{self._name!r} failed while generating", EngineError):
                self._generate(rows, joinable=joinable)
        except EngineError as error:
            if isinstance(error, OutOfMemory) and len(rows) > 1 and not any(row.n_generated for row in rows):
                return False
            failed = [*rows, *self.batch] if joinable else rows
            for row in failed:
                row.fail(error)
            deliver(failed)
        return True

    def _joining(self) -> Joining:
        return Joining(self._waiting, self.slots, self.limits, self._acquire, self.batch, self._n_prefill)

    def _generate(self, rows: Sequence[BatchRow], *, joinable: bool) -> None:
        import torch

        assert self._loaded is not None
        device, pad = self._loaded.model.device, min(self._loaded.eos, default=0)
        admission = self._joining() if joinable else None
        with torch.inference_mode():
            ids, mask = padded(rows, pad, device)
            self.slots.generate(
                [row.slot for row in rows],
                inputs=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max(1, *(row.max_tokens for row in rows)),
                custom_generate=BatchLoop(rows, self.slots, admission, pad, self._run_jobs),
            )
