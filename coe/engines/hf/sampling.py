"""Temperature, top-p and seed for each row, whatever else is in its batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor

_CANDIDATES: Final = 512
"""Best tokens considered before all are sorted: sorting a vocabulary can cost more than a small model's forward."""


@dataclass(slots=True)
class Sampling:
    """How one row samples: one draw per token, from the row's seed alone."""

    temperature: float
    top_p: float
    rng: random.Random = field(default_factory=random.Random)

    @classmethod
    def of(cls, temperature: float, top_p: float, seed: int | None) -> Sampling | None:
        """`None` for greedy; no seed draws one from the system."""
        return None if temperature == 0 else cls(temperature, top_p, random.Random(seed))


class RowSampler:
    """A transformers logits processor that leaves greedy rows alone and decides the others.

    A sampled row gets its token forced (all other scores -inf), so `generate` runs with `do_sample=False` and its
    process-wide generator plays no part. Sampling inverts the cumulative distribution of the tokens, best first, at the
    row's own draw: nearly equal logits (another batch shape) give the same token.

    Args:
        rows: (n_rows,) how each row of the batch samples; `None` is greedy.
    """

    def __init__(self, rows: Sequence[Sampling | None]) -> None:
        self._sampled = [(i, row) for i, row in enumerate(rows) if row is not None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (n_rows, n_vocabulary) -> scores whose argmax is each row's token. `input_ids` is not used."""
        if not self._sampled:
            return scores
        import torch

        where = torch.tensor([i for i, _ in self._sampled], device=scores.device)
        tokens = pick(scores[where], [row for _, row in self._sampled])
        scores[where] = float("-inf")
        scores[where, tokens] = 0.0
        return scores


def pick(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """One token a row, (n_rows,), from logits (n_rows, n_vocabulary) by temperature and nucleus (arXiv 1904.09751).

    The nucleus is the smallest set of best tokens whose mass reaches top_p, at least one token.
    """
    import torch

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    # The best logit becomes 0 before dividing, so that a tiny temperature cannot overflow.
    scaled = (logits.float() - logits.max(dim=-1, keepdim=True).values) / column([r.temperature for r in rows])
    mass, top_p = torch.logsumexp(scaled, dim=-1, keepdim=True), column([r.top_p for r in rows])
    draws = column([r.rng.random() for r in rows])
    ids, cumulative = _best_first(scaled, mass, _CANDIDATES)
    seen = cumulative[:, -1:]
    if not bool(((seen >= top_p) | ((top_p == 1) & (seen > draws))).all()):
        ids, cumulative = _best_first(scaled, mass, scaled.shape[-1])
    last = (cumulative < top_p).sum(dim=-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
    nucleus = cumulative.gather(1, last).where(top_p < 1, 1.0)
    chosen = (cumulative <= draws * nucleus).sum(dim=-1, keepdim=True).minimum(last)
    tokens: Tensor = ids.gather(1, chosen).squeeze(1)
    return tokens


def _best_first(scaled: Tensor, mass: Tensor, n: int) -> tuple[Any, Any]:
    """Ids and cumulative probabilities of the n most probable tokens, each (n_rows, n)."""
    best = scaled.topk(min(n, scaled.shape[-1]), dim=-1)
    return best.indices, (best.values - mass).exp().cumsum(dim=-1)
