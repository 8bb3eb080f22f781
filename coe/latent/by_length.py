"""Batches of rows of similar length: little padding, and a bound of what one forward takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

TOKENS_AT_ONCE: Final = 2_048
"""Tokens of a batch, padding included, unless one row has more."""


def batches(
    lengths: Sequence[int], most_rows: int | None = None, most_tokens: int = TOKENS_AT_ONCE
) -> Iterator[list[int]]:
    """Positions of rows for each batch, the longest rows first.

    Args:
        lengths: tokens of each row.
        most_tokens: of a batch, padding included; a longer row is alone.
    """
    order, start = sorted(range(len(lengths)), key=lambda row: -lengths[row]), 0
    while start < len(order):
        n = max(1, most_tokens // max(1, lengths[order[start]]))
        rows = order[start : start + (n if most_rows is None else min(n, most_rows))]
        yield rows
        start += len(rows)
