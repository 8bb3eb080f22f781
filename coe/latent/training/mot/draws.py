"""Which notes each row of a step is trained with: those of the drawn peers, some of which are missing or wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from torch import Tensor

from coe.engines.latent.mot_router import Draw
from coe.latent.config import TrainingConfig


@dataclass(frozen=True, eq=False, slots=True)
class Noted:
    """Notes in a row: of which member (position), on which row's text, and w_m, 1 if None."""

    member: int
    row: int
    weight: Tensor | None = None


def drawn(draw: Draw, place: int, row: int) -> list[Noted]:
    """The notes of all peers that were drawn for a row. place: of the row in the micro-batch."""
    return [Noted(peer, row, draw.weights[place, peer]) for peer in draw.order[place, 1:].tolist()]


def exposed(
    notes: Sequence[Noted], active: Sequence[int], n_members: int, n_rows: int, config: TrainingConfig, chance: Random
) -> list[Noted]:
    """The notes of a row with the chances of `coe.latent.training.exposure`.

    What takes the place of a peer's notes are those of a member that was not chosen; where all were, the peer's own
    notes on another row.

    Args:
        active: positions of the row's primary and peers.
    """
    if chance.random() < config.drop_all:
        return []
    left = [each for each in notes if chance.random() >= config.drop_peer]
    if left and chance.random() < config.wrong_peer:
        place = chance.randrange(len(left))
        left[place] = _wrong(left[place], active, n_members, n_rows, chance)
    return left


def other_peers(second: Draw, place: int, row: int, notes: Sequence[Noted]) -> list[Noted]:
    """The notes of a second draw; none if the first one had the same peers, or was not kept as it was.

    Args:
        notes: with which the row is trained.
    """
    others = drawn(second, place, row)
    kept = {each.member for each in notes if each.row == row and each.weight is not None}
    differs = len(kept) == len(others) and kept != {each.member for each in others}
    return others if differs else []


def by_primary(order: Tensor) -> Iterator[tuple[int, list[int]]]:
    """Each primary of an order (B, K) with the places of its rows."""
    primaries = order[:, 0].tolist()
    for primary in sorted(set(primaries)):
        yield primary, [place for place, each in enumerate(primaries) if each == primary]


def _wrong(noted: Noted, active: Sequence[int], n_members: int, n_rows: int, chance: Random) -> Noted:
    others = [member for member in range(n_members) if member not in active]
    if others:
        return Noted(chance.choice(others), noted.row)
    return Noted(noted.member, (noted.row + chance.randrange(1, max(2, n_rows))) % n_rows)
