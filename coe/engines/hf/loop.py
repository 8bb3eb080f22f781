"""The loop of a batch: rows leave it when they are finished, and others join it between two tokens.

transformers prepares the inputs and the cache, then calls this loop (`generate(custom_generate=...)`). Its own loop
computes finished rows until the last row of the batch ends; answers of different lengths make that most of the work.

Its continuous batching (`transformers.generation.continuous_batching`, 5.19) admits requests while others run, but
cannot carry these rows: it packs all tokens into one sequence, where adapters by row do not apply;
it draws from torch's generator of the process, so that a seed depends on the other requests; settings by request are
temperature, top-k and top-p only, without penalties, biases or a grammar; log-probabilities are those of the chosen
token after these, and none of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from coe.engines.hf.batch import BatchRow, deliver
from coe.engines.hf.decoding import Decoding
from coe.engines.hf.load import translate
from coe.engines.hf.lora.adapters import AdapterSlots
from coe.engines.hf.lora.mixture import RowSlot
from coe.errors import EngineError, OutOfMemory

if TYPE_CHECKING:
    from torch import Tensor


class Admission(Protocol):
    """Which rows join a running batch."""

    n_prefill: int
    """Most tokens of prompts to read between two tokens of the batch."""

    def take(self, running: Sequence[BatchRow], n_columns: int) -> list[BatchRow]:
        """Rows to join now, with their adapters loaded; returns at once.

        Args:
            n_columns: width of the key-value cache of the batch.
        """
        ...

    def put_back(self, rows: Sequence[BatchRow]) -> None:
        """Let rows wait again: there was no memory for them."""
        ...


class BatchLoop:
    """A `custom_generate` of transformers. Readers get text after every step.

    A step reads one token of every row, then up to `n_prefill` tokens of the prompts of rows that join: the others wait
    no longer for them. Rows that join have a cache of their own until their prompts are read.

    Args:
        rows: in the order of the prompts.
        slots: applies the adapter of each row.
        admission: `None` lets no row join.
        pad: token id for padding.
        between: called before every step with the slots of all rows; it may run other forwards, with other adapters.
    """

    def __init__(
        self,
        rows: Sequence[BatchRow],
        slots: AdapterSlots,
        admission: Admission | None = None,
        pad: int = 0,
        between: Callable[[Sequence[RowSlot]], None] = lambda slots: None,
    ) -> None:
        self._rows, self._slots, self._admission, self._pad = list(rows), slots, admission, pad
        self._between = between
        self._coming: Decoding | None = None
        self._n_crowded: int | None = None  # rows of the batch when memory ran out for others

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """Generate until every row is finished, those that have joined included.

        Args:
            input_ids: (n_rows, n_tokens) left-padded prompts.
            logits_processor, stopping_criteria, generation_config: not used; rows carry their own settings.
            inputs: what transformers prepared: attention mask, positions, cache.

        Returns:
            (n_left, n_tokens) tokens of the rows that remained until the end.
        """
        running = Decoding(model, self._rows, input_ids, inputs, self._slots.keep)
        running.prefill()
        running.advance()
        while not running.is_done or self._coming is not None:
            self._between([row.slot for row in (*running.rows, *(self._coming.rows if self._coming else ()))])
            if not running.is_done:
                self._select(running, running)
                running.decode()
            running = self._with_others(model, running)
            running.advance()
        return running.input_ids

    def _with_others(self, model: Any, running: Decoding) -> Decoding:
        """The rows of the batch, with those that can join now."""
        if self._coming is None and not running.is_done:
            self._coming = self._others(model, running)
        if (coming := self._coming) is None:
            return running
        try:
            with translate("a request failed while its prompt was read", EngineError):
                joined = self._read(coming, running)
        except EngineError as error:
            self._coming = None
            self._refuse(coming.rows, running, error)
            return running
        if joined is None:
            return running
        self._coming = None
        return joined

    def _others(self, model: Any, running: Decoding) -> Decoding | None:
        if self._admission is None or not running.is_joinable or self._is_crowded(running):
            return None
        rows = self._admission.take(running.rows, running.input_ids.shape[1])
        if not rows:
            return None
        ids, inputs = prepared(model, *padded(rows, self._pad, running.input_ids.device))
        return Decoding(model, rows, ids, inputs, self._slots.keep)

    def _is_crowded(self, running: Decoding) -> bool:
        return self._n_crowded is not None and len(running.rows) >= self._n_crowded

    def _read(self, coming: Decoding, running: Decoding) -> Decoding | None:
        """The batch with the rows that join; `None` while there is more of their prompts to read."""
        assert self._admission is not None
        self._select(coming, running, coming)
        n_columns = max(1, self._admission.n_prefill // len(coming.rows))
        if not coming.prefill(None if running.is_done else n_columns):
            return None
        if running.is_done:
            return coming
        running.join(coming)
        self._n_crowded = None
        return running

    def _select(self, group: Decoding, *batch: Decoding) -> None:
        names = [row.slot for row in group.rows]
        self._slots.select(names, among=[row.slot for each in batch for row in each.rows])

    def _refuse(self, rows: Sequence[BatchRow], running: Decoding, error: EngineError) -> None:
        assert self._admission is not None
        if isinstance(error, OutOfMemory):  # as a batch of their own they may fit
            self._n_crowded = len(running.rows)
            self._admission.put_back(rows)
            return
        for row in rows:
            row.fail(error)
        deliver(rows)


def padded(rows: Sequence[BatchRow], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """The left-padded prompts of rows and their attention mask, (n_rows, n_tokens) each."""
    import torch

    width = max(len(row.prompt_ids) for row in rows)
    gaps = [width - len(row.prompt_ids) for row in rows]
    ids = [[pad] * gap + row.prompt_ids for gap, row in zip(gaps, rows, strict=True)]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def prepared(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Prompts with what transformers prepares for their first forward, as it does for a whole batch."""
    kept: dict[str, Any] = {}

    def keep(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **inputs: Any,
    ) -> Tensor:
        kept.update(inputs)
        return input_ids

    input_ids = model.generate(inputs=ids, attention_mask=mask, do_sample=False, max_new_tokens=1, custom_generate=keep)
    return input_ids, kept
