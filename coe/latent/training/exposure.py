"""Which notes a row is trained with: peers are missing at times, or leave notes that have nothing to do with the row.

So the composition learns to answer without a peer that failed, and not to trust one that was chosen wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from coe.latent.config import TrainingConfig


@dataclass(frozen=True, slots=True)
class Source:
    """Whose notes of which row take the place of a peer's."""

    peer: str
    row: int


def exposure(
    row: int,
    n_rows: int,
    peers: Sequence[str],
    alike: Mapping[str, Sequence[str]],
    config: TrainingConfig,
    chance: Random,
) -> dict[str, Source]:
    """The notes that each peer of a row leaves; missing peers are left out.

    All peers are missing with the probability `drop_all`, else each with `drop_peer`. With `wrong_peer`, one of those
    that are left has the notes of another row, or those of another member on this row: either as likely, where both can
    be had.

    Args:
        n_rows: rows to take wrong notes from.
        peers: those that leave notes on this row.
        alike: for each peer, the other members whose notes have the same shape.
    """
    if chance.random() < config.drop_all:
        return {}
    found = {peer: Source(peer, row) for peer in peers if chance.random() >= config.drop_peer}
    if found and chance.random() < config.wrong_peer:
        peer = chance.choice(list(found))
        others = [other for other in alike.get(peer, ()) if other in peers]
        found[peer] = _wrong(row, n_rows, peer, others, chance)
    return found


def _wrong(row: int, n_rows: int, peer: str, others: Sequence[str], chance: Random) -> Source:
    if others and (n_rows < 2 or chance.random() < 0.5):
        return Source(chance.choice(others), row)
    if n_rows < 2:
        return Source(peer, row)
    other = chance.randrange(n_rows - 1)
    return Source(peer, other + (other >= row))
