"""The scores of tokens that a batch generates, and of its prompts (`coe.engines.logprobs`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from coe.engines.logprobs import Scored

if TYPE_CHECKING:
    from torch import Tensor

SCORING_BYTES: Final = 128 * 2**20
"""Memory for the scores of a chunk of prompt positions. A chunk has at least one position of every row."""
_BYTES_PER_SCORE: Final = 12
"""Float32 arrays of a chunk that exist at once: the model's scores, the copy, and the exponentials of their sum."""


def score(logits: Tensor, tokens: Tensor, n_top: int) -> list[Scored]:
    """The log-probability of each token, and those of the `n_top` most likely ones at its place.

    Args:
        logits: (n_tokens, n_vocabulary) scores of the model, of any float type.
        tokens: (n_tokens,) ids.
    """
    logits = logits.float()
    mass = logits.logsumexp(dim=-1, keepdim=True)
    chosen = (logits.gather(1, tokens[:, None]) - mass).squeeze(1).tolist()
    best = logits.topk(min(n_top, logits.shape[-1]), dim=-1)
    ids, values = best.indices.tolist(), (best.values - mass).tolist()
    rows = zip(tokens.tolist(), chosen, ids, values, strict=True)
    return [Scored(token, logprob, tuple(zip(i, v, strict=True))) for token, logprob, i, v in rows]


def any_wanted(n_top: Sequence[int | None]) -> bool:
    """Whether a row wants log-probabilities."""
    return any(n is not None for n in n_top)


def score_rows(logits: Tensor, tokens: Tensor, n_top: Sequence[int | None]) -> list[Scored | None]:
    """The scores of one token in each row that wants them, with its own number of most likely ones.

    Args:
        logits: (n_rows, n_vocabulary). tokens: (n_rows,). n_top: (n_rows,); `None` wants nothing.
    """
    wanted = [i for i, n in enumerate(n_top) if n is not None]
    if not wanted:
        return [None] * len(n_top)
    most = max(n for n in n_top if n is not None)
    found = iter(score(logits[wanted], tokens[wanted], most))
    return [None if n is None else _cut(next(found), n) for n in n_top]


def _cut(scored: Scored, n_top: int) -> Scored:
    return Scored(scored.token, scored.logprob, scored.top[:n_top])


def scoring_bytes(model: Any, n_rows: int) -> int:
    """Bytes for the scores of one position of every row."""
    return int(_BYTES_PER_SCORE * n_rows * model.get_output_embeddings().weight.shape[0])


class PromptScorer:
    """Scores the prompts of a batch in its first forward, or in those that read them part by part.

    The scores of all positions would be an array (n_rows, n_tokens, n_vocabulary). The forward computes those of the
    last position, as always. Then the head of the model (with whatever the model does to its scores) runs on chunks of
    the hidden states of the body, within SCORING_BYTES.

    Args:
        model: a transformers causal language model.
        lengths: (n_rows,) tokens of each prompt.
        n_top: (n_rows,) most likely tokens to return at each place; `None` does not score the row.
        ids: (n_rows, n_tokens) the left-padded prompts, if a forward reads a part of them.

    Attributes:
        prompts: after the last forward, (n_rows,) the scores of each prompt; none for rows that are not scored.
    """

    def __init__(self, model: Any, lengths: Sequence[int], n_top: Sequence[int | None], ids: Any = None) -> None:
        self._model, self._lengths, self._n_top = model, lengths, n_top
        self._wanted = [i for i, n in enumerate(n_top) if n is not None]
        self._ids: Tensor | None = ids
        self._n_read = 0
        self.prompts: list[list[Scored]] = [[] for _ in lengths]

    def __call__(self, **inputs: Any) -> Any:
        """The output of the model's forward. `input_ids` is (n_rows, n_tokens), the next columns of the prompts."""
        body = getattr(self._model, self._model.base_model_prefix)
        kept: list[Any] = []
        hook = body.register_forward_hook(lambda _module, _args, output: kept.append(output))
        try:
            output = self._model(**inputs)
        finally:
            hook.remove()
        with _returns(body, kept[-1]):
            self._score(inputs)
        return output

    def _score(self, inputs: Mapping[str, Any]) -> None:
        """Score the tokens after those of a forward; the last column of the prompts predicts none of them."""
        begin = self._n_read
        self._n_read += inputs["input_ids"].shape[1]
        ids: Tensor = inputs["input_ids"] if self._ids is None else self._ids
        width = ids.shape[1]
        for i in self._wanted if not begin else ():
            self.prompts[i].append(Scored(int(ids[i, -self._lengths[i]]), None))
        for start, end in self._chunks(begin, min(self._n_read, width - 1), width):
            logits = self._logits(inputs, start - begin, end - begin)
            for i in self._wanted:
                first = max(start, width - self._lengths[i])  # padding is not scored
                if first < end:
                    here = score(logits[i, first - start :], ids[i, first + 1 : end + 1], self._n_top[i] or 0)
                    self.prompts[i] += here

    def _chunks(self, begin: int, end: int, width: int) -> Iterator[tuple[int, int]]:
        """Ranges of columns in those of a forward; each column predicts the token after it."""
        size = max(1, SCORING_BYTES // scoring_bytes(self._model, len(self._lengths)))
        first = max(begin, width - max(self._lengths[i] for i in self._wanted))
        for start in range(first, end, size):
            yield start, min(start + size, end)

    def _logits(self, inputs: Mapping[str, Any], start: int, end: int) -> Tensor:
        """Scores (n_rows, end - start, n_vocabulary) of these positions of the forward."""
        import torch

        positions = torch.arange(start, end, device=inputs["input_ids"].device)
        output = self._model(**{**inputs, "logits_to_keep": positions})
        logits: Tensor = output.logits
        # A model without `logits_to_keep` has computed all positions.
        return logits if logits.shape[1] == end - start else logits[:, start:end]


@contextmanager
def _returns(module: Any, output: Any) -> Iterator[None]:
    """Within the block, calls of the module return `output` and compute nothing."""
    own = vars(module).get("forward")  # a library may have replaced the method of this very module
    module.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
