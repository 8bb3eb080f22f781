"""Notes as tensors: what a composition over the channel `cross` reads, in serving and in training alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch

from coe.engines.latent.memory import PeerStates
from coe.engines.latent.notes import Notes
from coe.engines.latent.spans import no_spans
from coe.errors import Rejected

MOST_NOTES: Final = 4096
"""Default of `max_notes`: most places of one peer; the front of the prompt is cut first."""


def placed(notes: Notes, span: tuple[int, int] | None, *, in_other_words: bool) -> Notes:
    """Notes of a call about a span of the user's text, with spans in the text of the primary."""
    if span is not None:
        return replace(notes, spans=np.full((len(notes), 2), span, np.int32))
    return replace(notes, spans=no_spans(len(notes))) if in_other_words else notes


def states_of(kept: Sequence[Notes]) -> PeerStates:
    """The notes of all calls of one peer. Raises Rejected if they have several widths."""
    if len({notes.states.shape[0::2] for notes in kept if notes.states is not None}) > 1:
        raise Rejected(f"the notes of {kept[0].peer!r} have states of several widths")
    states = np.concatenate([notes.states for notes in kept if notes.states is not None], axis=1)
    spans = np.concatenate([notes.spans for notes in kept if notes.spans is not None])
    order = np.concatenate([np.arange(1 - (len(notes) - len(notes.tokens)), 1 + len(notes.tokens)) for notes in kept])
    return PeerStates(
        torch.from_numpy(states.astype(np.float32)),
        torch.from_numpy(spans.astype(np.int64)),
        order=torch.from_numpy(order),
    )


def last_places(parts: Sequence[Notes], most: int) -> list[Notes]:
    """The notes of one peer without what exceeds `most` places: an equal share of each call, its last places."""
    if sum(map(len, parts)) <= most:
        return list(parts)
    kept, left = [], most
    for number, notes in enumerate(parts):
        kept.append(notes.last(min(len(notes), left // (len(parts) - number))))
        left -= len(kept[-1])
    return [notes for notes in kept if len(notes)] or [parts[-1].last(1)]
