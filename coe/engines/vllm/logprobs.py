"""vLLM's log-probabilities as ours. Both are natural logarithms before temperature, penalties and constraints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coe.engines.logprobs import Scored


def scored(tokens: Sequence[int], positions: Sequence[Mapping[int, Any]], n_top: int) -> Iterator[Scored]:
    """The chosen token of each position, and the `n_top` most likely ones.

    Args:
        tokens: (n_tokens,) the tokens.
        positions: (n_tokens,) token id -> vLLM's Logprob: the chosen token and at least the most likely ones.
    """
    for token, position in zip(tokens, positions, strict=True):
        ranked = sorted(position.items(), key=lambda item: item[1].rank)
        top = tuple((each, found.logprob) for each, found in ranked if found.rank <= n_top)
        yield Scored(token, position[token].logprob, top[:n_top])


def scored_prompt(tokens: Sequence[int], positions: Sequence[Mapping[int, Any] | None], n_top: int) -> list[Scored]:
    """The same for a prompt; nothing precedes its first token."""
    return [Scored(tokens[0], None), *scored(tokens[1:], [each for each in positions[1:] if each is not None], n_top)]
