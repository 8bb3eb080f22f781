"""The notes of a batch in the form in which decoding reads them, token after token.

The sums are those of `Interactions.read`, in a third of its time: a token of a small model has few milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from coe.engines.latent.interaction import Interaction, Interactions
from coe.engines.latent.memory import Memories

_MOST_SCORES: Final = 2**24
"""Most scores that are in memory at once (64 MiB): long prompts are read in parts."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One interaction and what it reads. With a null note, n counts it: it is the first one.

    Attributes:
        norm: weight, bias and epsilon of LN. query, output: Wq and Wo. beta: (H, 1, 1), or None without spans.
        keys: (rows * H, d_h, n), scaled. values: (rows * H, n, d_h).
    """

    norm: tuple[Tensor, Tensor, float]
    query: Tensor
    output: Tensor
    beta: Tensor | None
    keys: Tensor
    values: Tensor


class PreparedReading:
    """Reads the notes of rows that have at least one each. Notes of text that is still being written are not for it.

    Args:
        interactions: of a composition.
        memories: of the rows.

    Attributes:
        layers: after which each interaction reads, counted from 1.
    """

    def __init__(self, interactions: Interactions, memories: Memories) -> None:
        self.interactions, self._memories = interactions, memories
        self.layers = interactions.where()
        self._heads, self._n_null = interactions.shape.heads, 0 if interactions.null is None else 1
        bias = memories.log_weights.masked_fill(~memories.mask, float("-inf"))
        # (rows, 1, 1, n), added to the scores; `None` if it is zero.
        self._bias = functional.pad(bias, (self._n_null, 0))[:, None, None] if bool(bias.any()) else None
        self._prepared = [self._of(q) for q in range(len(interactions.interactions))]

    def _of(self, q: int) -> _Prepared:
        this = self.interactions.interactions[q]
        assert isinstance(this, Interaction)
        keys, values = self._memories.keys[q], self._memories.values[q]  # (rows, n, H, d_h)
        if self.interactions.null is not None:
            null = (self.interactions.null @ this.key).view(1, 1, *keys.shape[2:]).expand(len(keys), -1, -1, -1)
            keys, values = torch.cat([null, keys], 1), functional.pad(values, (0, 0, 0, 0, 1, 0))
        keys = keys / math.sqrt(keys.shape[-1])
        return _Prepared(
            norm=(this.norm.weight, this.norm.bias, this.norm.eps),
            query=this.query,
            output=this.output,
            beta=None if this.beta is None else this.beta[:, None, None],
            keys=keys.permute(0, 2, 3, 1).flatten(0, 1).contiguous(),
            values=values.transpose(1, 2).flatten(0, 1).contiguous(),
        )

    def add(self, q: int, hidden: Tensor, spans: Tensor | None = None) -> Tensor:
        """The hidden states (rows, T, d) in float32, with what interaction q reads added to them.

        Args:
            hidden: of any float type.
            spans: (rows, T, 2) as in `Interactions.read`.
        """
        own = self._prepared[q]
        size = max(1, _MOST_SCORES // (len(own.keys) * own.keys.shape[-1]))
        if hidden.shape[1] <= size:
            return self._add(own, hidden.float(), spans)
        starts = range(0, hidden.shape[1], size)
        parts = [(hidden[:, i : i + size], None if spans is None else spans[:, i : i + size]) for i in starts]
        return torch.cat([self._add(own, part.float(), of_part) for part, of_part in parts], dim=1)

    def _add(self, own: _Prepared, hidden: Tensor, spans: Tensor | None) -> Tensor:
        rows, n_tokens, width = hidden.shape
        weight, bias, epsilon = own.norm
        queries = functional.layer_norm(hidden, (width,), weight, bias, epsilon) @ own.query  # (rows, T, d_s)
        shared = queries.shape[-1]
        queries = queries.view(rows, n_tokens, self._heads, -1).transpose(1, 2).flatten(0, 1)
        scores = torch.bmm(queries, own.keys)  # (rows * H, T, n)
        if self._bias is not None or spans is not None:
            by_row = scores.view(rows, self._heads, n_tokens, -1)
            if self._bias is not None:
                by_row += self._bias
            if own.beta is not None and spans is not None:
                overlaps = functional.pad(self._memories.overlaps(spans), (self._n_null, 0))[:, None]
                by_row += own.beta * overlaps
        context = torch.bmm(scores.softmax(-1), own.values)  # (rows * H, T, d_h)
        context = context.view(rows, self._heads, n_tokens, -1).transpose(1, 2).reshape(-1, shared)
        return torch.addmm(hidden.reshape(-1, width), context, own.output).view(rows, n_tokens, width)
