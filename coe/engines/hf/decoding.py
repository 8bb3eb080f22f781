"""Rows that go through the model together: one token a step for every row that is not finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from coe.engines.hf.batch import BatchRow, deliver
from coe.engines.hf.layer_hooks import LayerHooks
from coe.engines.hf.logprobs import PromptScorer, any_wanted, score_rows
from coe.engines.hf.row_caches import (
    drop_columns,
    is_joinable,
    is_selectable,
    join,
    padded_left,
    select_rows,
)
from coe.engines.hf.sampling import RowSampler
from coe.engines.latent.cache_channel import last_entries, put
from coe.engines.logprobs import Scored
from coe.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor


class Decoding:
    """Rows, their tokens and their cache. After `prefill`, `advance` and `decode` alternate.

    Args:
        model: a transformers causal language model.
        rows: in the order of the prompts.
        input_ids: (n_rows, n_tokens) left-padded prompts.
        inputs: what transformers prepared for a forward: attention mask, positions, cache.
        on_kept: called with the positions of the remaining rows, whenever finished rows leave.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[BatchRow],
        input_ids: Tensor,
        inputs: dict[str, Any],
        on_kept: Callable[[Sequence[int]], None] = lambda rows: None,
    ) -> None:
        self._model, self._rows, self._input_ids, self._inputs = model, list(rows), input_ids, inputs
        self._on_kept = on_kept
        self._hooks = LayerHooks(model, rows)
        self._n_read = 0  # columns of the prompts that the cache has
        n_top = [row.n_prompt_top for row in rows]
        lengths = [len(row.prompt_ids) for row in rows]
        self._scorer = PromptScorer(model, lengths, n_top, input_ids) if any_wanted(n_top) else None
        self._scores: Tensor | None = None  # of the next token, (n_rows, n_vocabulary) float32
        self._hidden: Sequence[Tensor | None] = [None] * len(rows)
        self._prompts: list[Sequence[Scored] | None] = [()] * len(rows)  # None: of a row that has begun

    @property
    def rows(self) -> Sequence[BatchRow]:
        """The rows; finished ones too, if they could not leave."""
        return self._rows

    @property
    def input_ids(self) -> Tensor:
        """The tokens of all rows, (n_rows, n_tokens), left-padded."""
        return self._input_ids

    @property
    def scores(self) -> Tensor:
        """Of the next token, (n_rows, n_vocabulary) float32; after `prefill` or `decode`, until `advance`."""
        assert self._scores is not None
        return self._scores

    @property
    def is_done(self) -> bool:
        """Whether every row is finished."""
        return all(row.done for row in self._rows)

    @property
    def is_joinable(self) -> bool:
        """Whether other rows can join."""
        return is_selectable(self._inputs) and is_joinable(self._inputs)

    def prefill(self, n_tokens: int | None = None) -> bool:
        """Read the prompts, or their next columns; returns whether they are read.

        Args:
            n_tokens: most columns to read; `None` reads all that are left.
        """
        width = self._input_ids.shape[1]
        last = width if n_tokens is None else min(width, self._n_read + n_tokens)
        for end in sorted({*self._stops(last), last}):
            self._read_to(end)
        return self._n_read == width

    def _stops(self, last: int) -> Iterator[int]:
        """The columns before `last` at which rows put entries of their peers into the cache."""
        for row in self._rows:
            if row.columns is not None and row.columns.entries:
                stop = self._input_ids.shape[1] - row.columns.n_suffix
                if self._n_read < stop < last:
                    yield stop

    def _read_to(self, end: int) -> None:
        width = self._input_ids.shape[1]
        n_new = end - self._n_read if self._n_read else None
        run = self._scorer or self._model
        if end < width:
            part = {name: value[:, :end] if _is_by_column(value) else value for name, value in self._inputs.items()}
            with self._hooked(self._n_read, end):
                _forward(self._model, self._input_ids[:, :end], part, n_new, run)
            self._n_read = end
            self._put_entries()
            return
        self._step(n_new, run)
        self._n_read = width
        if self._scorer is not None:
            self._prompts, self._scorer = list(self._scorer.prompts), None

    def _put_entries(self) -> None:
        """Put the entries of their peers into the cache, for the rows whose suffix comes next."""
        width, starts = self._input_ids.shape[1], self._starts()
        for position, row in enumerate(self._rows):
            if row.columns is not None and width - row.columns.n_suffix == self._n_read:
                for entries in row.columns.entries:
                    put(self._inputs["past_key_values"], position, entries, padding=starts[position])

    def decode(self) -> None:
        """Read the last token of every row."""
        self._step(1 if self._inputs.get("use_cache") else None, self._model)

    def _step(self, n_new: int | None, run: Callable[..., Any]) -> None:
        width = self._input_ids.shape[1]
        with self._hooked(width - n_new if n_new else 0, width):
            if not any(row.state for row in self._rows):
                self._scores, self._inputs = _forward(self._model, self._input_ids, self._inputs, n_new, run)
                return
            with _read_by_head(self._model) as read:
                self._scores, self._inputs = _forward(self._model, self._input_ids, self._inputs, n_new, run)
        self._hidden = list(read[0][:, -1])

    def _hooked(self, begin: int, end: int) -> AbstractContextManager[None]:
        """What rows see of a forward of these columns, and add to it."""
        return self._hooks.around(begin, end, self._starts())

    def _starts(self) -> list[int]:
        """The first column of each row that is no padding."""
        width = self._input_ids.shape[1]
        return [width - _length(row) for row in self._rows]

    def advance(self) -> None:
        """Choose the next token of each row, hand out the text, and let finished rows leave."""
        scores, self._scores = self._scores, None
        if scores is None:
            return
        finite = scores.amax(dim=-1).isfinite().tolist()  # not finite if any score is NaN, too
        self._begin(finite)
        self._show_states()
        tokens, scored = self._choose(self._input_ids, scores)
        self._input_ids = _append(self._input_ids, tokens)
        self._push(tokens.tolist(), finite, scored)
        if not self.is_done:
            self._drop_finished()

    def feed(self, token: int) -> None:
        """Append a token to every row, which was chosen elsewhere; then `decode` reads it."""
        self._scores = None
        self._input_ids = _append(self._input_ids, self._input_ids.new_full((len(self._rows),), token))

    def join(self, other: Decoding) -> None:
        """Take the rows of `other` over; both have read their tokens, and no next ones are chosen.

        If that fails, such as for lack of memory, nothing has changed.
        """
        assert self._scores is not None and other._scores is not None
        rows, width = self._rows + other._rows, max(self._input_ids.shape[1], other._input_ids.shape[1])
        ids = _stacked(self._input_ids, other._input_ids, width)
        scores = _stacked(self._scores, other._scores, self._scores.shape[1])
        inputs = {**self._inputs, "attention_mask": self._mask([_length(row) + 1 for row in rows], width + 1)}
        if (positions := self._inputs.get("position_ids")) is not None:
            inputs["position_ids"] = _stacked(positions, other._inputs["position_ids"], width + 1)
        hooks = LayerHooks(self._model, rows)
        hooks.stack()
        join(self._inputs["past_key_values"], other._inputs["past_key_values"])
        self._rows, self._input_ids, self._scores, self._inputs = rows, ids, scores, inputs
        self._hidden, self._prompts = [*self._hidden, *other._hidden], self._prompts + other._prompts
        self._hooks = hooks

    def _begin(self, finite: Sequence[bool]) -> None:
        for row, is_finite, prompt in zip(self._rows, finite, self._prompts, strict=True):
            if is_finite and not row.done and prompt is not None:
                row.begin(prompt)
        self._prompts = [None] * len(self._rows)

    def _show_states(self) -> None:
        for row, hidden in zip(self._rows, self._hidden, strict=True):
            if row.state is not None and hidden is not None and not row.done:
                row.show(hidden)

    def _choose(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Sequence[Scored | None]]:
        return choose(self._rows, input_ids, scores)

    def _push(self, tokens: Sequence[int], finite: Sequence[bool], scored: Sequence[Scored | None]) -> None:
        for i, (row, token, is_finite, score) in enumerate(zip(self._rows, tokens, finite, scored, strict=True)):
            if row.done:
                continue
            if row.capture is not None:
                row.capture.entries = partial(last_entries, self._inputs["past_key_values"], i)
            if is_finite:
                row.advance(token, score)
            else:
                row.fail(_not_finite(row))
        deliver(self._rows)

    def _drop_finished(self) -> None:
        """Let the finished rows leave, if the cache supports that, with the padding that only they needed."""
        kept = [i for i, row in enumerate(self._rows) if not row.done]
        if len(kept) == len(self._rows) or not is_selectable(self._inputs):
            return
        n_rows, self._rows = len(self._rows), [self._rows[i] for i in kept]
        select_rows(self._inputs["past_key_values"], kept, self._input_ids.device)
        self._inputs = {
            name: value[kept] if _is_by_column(value) and len(value) == n_rows else value
            for name, value in self._inputs.items()
        }
        self._input_ids = self._input_ids[kept]
        self._prompts = [self._prompts[i] for i in kept]
        self._hidden = [self._hidden[i] for i in kept]
        self._hooks = LayerHooks(self._model, self._rows)
        self._on_kept(kept)
        if is_joinable(self._inputs):
            self._trim()

    def _trim(self) -> None:
        lengths = [_length(row) for row in self._rows]
        n_columns = max(lengths)
        if surplus := self._input_ids.shape[1] - n_columns:
            drop_columns(self._inputs["past_key_values"], surplus)
            self._input_ids = self._input_ids[:, surplus:]
            if (positions := self._inputs.get("position_ids")) is not None:
                self._inputs["position_ids"] = positions[:, surplus:]
        self._inputs["attention_mask"] = self._mask(lengths, n_columns)

    def _mask(self, lengths: Sequence[int], n_columns: int) -> Tensor | None:
        """Which columns are tokens of each row, (n_rows, n_columns); `None` without padding, which is faster."""
        if min(lengths) == n_columns:
            return None
        import torch

        device = self._input_ids.device
        first = n_columns - torch.tensor(lengths, device=device)
        return (torch.arange(n_columns, device=device) >= first[:, None]).long()


def choose(rows: Sequence[BatchRow], input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Sequence[Scored | None]]:
    """The next token of each row, (n_rows,), and its log-probability where it is wanted.

    Args:
        input_ids: (n_rows, n_tokens) left-padded.
        scores: (n_rows, n_vocabulary) float32 of the next token; they are changed.
    """
    n_top = [None if row.done else row.n_top for row in rows]
    raw = scores.clone() if any_wanted(n_top) else scores
    for i, row in enumerate(rows):
        if row.processors is not None and not row.done:
            own = input_ids[i : i + 1, -_length(row) :]  # without padding
            scores[i : i + 1] = row.processors(own, scores[i : i + 1])
        if row.matcher is not None and not row.done:
            row.matcher.mask(scores[i], row.eos)
    tokens = RowSampler([row.sampling for row in rows])(input_ids, scores).argmax(dim=-1)
    return tokens, score_rows(raw, tokens, n_top)


def _not_finite(row: BatchRow) -> EngineError:
    """The error of a row whose scores are not finite, which names what it has read."""
    name = row.adapter.spec.name if row.adapter else "the model"
    notes = f" with the notes of {', '.join(row.peers)}" if row.peers else ""
    damaged = "these notes, the composition that reads them, or weights" if row.peers else "weights"
    return EngineError(
        f"the scores of the next token are not finite{notes}: {damaged} of {name!r} are damaged, or too large for the "
        "dtype of the engine"
    )


def _length(row: BatchRow) -> int:
    return len(row.prompt_ids) + row.n_generated


def _is_by_column(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.ndim == 2


def _forward(
    model: Any, input_ids: Tensor, inputs: dict[str, Any], n_new: int | None, run: Callable[..., Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Scores of the next token, (n_rows, n_vocabulary) float32, and the inputs of the next step.

    n_new: tokens that the cache does not have; `None` if it has none.
    run: the forward of the model, or one that also scores the prompts.
    """
    import torch

    first = n_new is None
    prepared = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=n_new, is_first_iteration=first, **inputs
    )
    output = run(**prepared, return_dict=True)
    following = model._update_model_kwargs_for_generation(output, inputs)
    # A copy, so that the scores of a whole prompt are freed.
    return output.logits[:, -1].to(copy=True, dtype=torch.float32), following


@contextmanager
def _read_by_head(model: Any) -> Iterator[list[Tensor]]:
    """Within the block, collects what the head reads: (n_rows, n_tokens, n_hidden) a call."""
    read: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        yield read
    finally:
        hook.remove()


def _append(input_ids: Tensor, tokens: Tensor) -> Tensor:
    import torch

    return torch.cat([input_ids, tokens[:, None]], dim=-1)


def _stacked(a: Tensor, b: Tensor, n_columns: int) -> Tensor:
    """The rows of both, right-aligned."""
    import torch

    return torch.cat([padded_left(a, n_columns), padded_left(b, n_columns)])
