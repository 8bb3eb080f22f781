"""The decoding loop of a batch: one token a step for every row that is not finished.

transformers prepares the inputs and the cache, then calls this loop (`generate(custom_generate=...)`). Its own loop
computes finished rows until the last row of the batch ends; answers of different lengths make that most of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from coe.engines.hf.batch import BatchRow, deliver
from coe.engines.hf.logprobs import PromptScorer, Scored, any_wanted, score_rows
from coe.engines.hf.sampling import RowSampler
from coe.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

_NOT_FINITE: Final = (
    "the scores of the next token are not finite: weights of {!r} are damaged, or too large for the dtype of the engine"
)


class Decoding:
    """A `custom_generate` of transformers for the rows of one batch. Readers get text after every step.

    Args:
        rows: in the order of the prompts.
        on_kept: called with the positions of the remaining rows, whenever finished rows leave the batch.
    """

    def __init__(self, rows: Sequence[BatchRow], on_kept: Callable[[Sequence[int]], None]) -> None:
        self._rows = list(rows)
        self._on_kept = on_kept

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **inputs: Any,
    ) -> Tensor:
        """Generate until every row is finished.

        Args:
            input_ids: (n_rows, n_tokens) left-padded prompts.
            logits_processor, stopping_criteria, generation_config: not used; rows carry their own settings.
            inputs: what transformers prepared: attention mask, positions, cache.

        Returns:
            (n_left, n_tokens + n_new) tokens of the rows that remained until the end.
        """
        n_new = None  # all tokens of the prompt first
        scorer = self._scorer(model)
        begun = False
        while True:
            scores, inputs = _forward(model, input_ids, inputs, n_new, model if begun or not scorer else scorer)
            n_new = 1 if inputs.get("use_cache") else None
            finite = scores.amax(dim=-1).isfinite().tolist()  # not finite if any score is NaN, too
            if not begun:
                self._begin(finite, scorer.prompts if scorer else [()] * len(self._rows))
                begun = True
            tokens, scored = self._choose(input_ids, scores)
            input_ids = _append(input_ids, tokens)
            self._advance(tokens.tolist(), finite, scored)
            if all(row.done for row in self._rows):
                return input_ids
            input_ids, inputs = self._drop_finished(input_ids, inputs)

    def _scorer(self, model: Any) -> PromptScorer | None:
        n_top = [row.n_prompt_top for row in self._rows]
        return PromptScorer(model, [len(row.prompt_ids) for row in self._rows], n_top) if any_wanted(n_top) else None

    def _begin(self, finite: Sequence[bool], prompts: Sequence[Sequence[Scored]]) -> None:
        for row, is_finite, prompt in zip(self._rows, finite, prompts, strict=True):
            if is_finite and not row.done:
                row.begin(prompt)

    def _choose(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Sequence[Scored | None]]:
        """The next token of each row, (n_rows,), and its log-probability where it is wanted."""
        n_top = [None if row.done else row.n_top for row in self._rows]
        raw = scores.clone() if any_wanted(n_top) else scores
        for i, row in enumerate(self._rows):
            if row.processors is not None and not row.done:
                own = input_ids[i : i + 1, -len(row.prompt_ids) - row.n_generated :]  # without padding
                scores[i : i + 1] = row.processors(own, scores[i : i + 1])
            if row.matcher is not None and not row.done:
                row.matcher.mask(scores[i], row.eos)
        tokens = RowSampler([row.sampling for row in self._rows])(input_ids, scores).argmax(dim=-1)
        return tokens, score_rows(raw, tokens, n_top)

    def _advance(self, tokens: Sequence[int], finite: Sequence[bool], scored: Sequence[Scored | None]) -> None:
        for row, token, is_finite, score in zip(self._rows, tokens, finite, scored, strict=True):
            if row.done:
                continue
            if is_finite:
                row.advance(token, score)
            else:
                row.fail(EngineError(_NOT_FINITE.format(row.adapter.spec.name if row.adapter else "the model")))
        deliver(self._rows)

    def _drop_finished(self, input_ids: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The tokens and inputs without the finished rows, if the cache supports that."""
        kept = [i for i, row in enumerate(self._rows) if not row.done]
        if len(kept) == len(self._rows) or not _is_selectable(inputs):
            return input_ids, inputs
        inputs = _select(inputs, kept, len(self._rows), input_ids.device)
        self._rows = [self._rows[i] for i in kept]
        self._on_kept(kept)
        return input_ids[kept], inputs


def _forward(
    model: Any, input_ids: Tensor, inputs: dict[str, Any], n_new: int | None, run: Callable[..., Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Scores of the next token, (n_rows, n_vocabulary) float32, and the inputs of the next step.

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


def _append(input_ids: Tensor, tokens: Tensor) -> Tensor:
    import torch

    return torch.cat([input_ids, tokens[:, None]], dim=-1)


def _is_selectable(inputs: Mapping[str, Any]) -> bool:
    """Whether rows can leave: the cache holds nothing but keys and values by row, and the inputs are by row."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache, positions = inputs.get("past_key_values"), inputs.get("position_ids")
    by_row = positions is None or positions.ndim == 2  # image and video models have an additional leading axis
    return (
        by_row
        and isinstance(cache, DynamicCache)
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    )


def _select(inputs: dict[str, Any], kept: Sequence[int], n_rows: int, device: Any) -> dict[str, Any]:
    """Masks, positions and cache of the rows in `kept`."""
    import torch

    cache = inputs["past_key_values"]
    cache.batch_select_indices(torch.tensor(kept, device=device))
    return {
        name: value[kept] if isinstance(value, torch.Tensor) and value.ndim == 2 and len(value) == n_rows else value
        for name, value in inputs.items()
    }
