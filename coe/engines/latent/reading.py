"""Packed notes as tensors: what a composition over the channel `cross` reads, in serving and in training alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch

from coe.engines.latent.memory import PeerStates
from coe.engines.latent.notes import Notes
from coe.engines.latent.spans import no_spans
from coe.errors import Rejected
from coe.types import PeerNotes

MOST_NOTES: Final = 4096
"""Default of `max_notes`: most places of one peer; the front of the prompt is cut first."""


def peer_states(
    left: Iterable[PeerNotes],
    layers: Mapping[str, Sequence[int]],
    *,
    asked: Collection[str] = (),
    most: int = MOST_NOTES,
) -> dict[str, PeerStates]:
    """The notes of each peer, those of several calls one after the other.

    The places of a call that was about a span of the user's text have that span. Those of a call in another wording
    about all of the text have none: their characters are of another text.

    Args:
        left: what the peers have left; those of an unknown peer are not read.
        layers: of each peer, the layers that the composition was trained with; () is what the peer's head reads.
        asked: peers that are asked in a wording of their own (the setting `asks`).
        most: places of one peer.

    Raises:
        Rejected: damaged notes, or of another channel or other layers.
    """
    parts: dict[str, list[Notes]] = {}
    for each in left:
        if each.peer in layers:
            parts.setdefault(each.peer, []).append(_placed(each, layers[each.peer], each.peer in asked))
    return {peer: states_of(last_places(notes, most)) for peer, notes in parts.items()}


def _placed(left: PeerNotes, layers: Sequence[int], in_other_words: bool) -> Notes:
    """Unpacked, with spans in the text of the primary."""
    notes = Notes.unpack(left.data, peer=left.peer)
    if notes.states is None or notes.layers != tuple(layers):
        wanted = ", ".join(map(str, layers)) or "what its head reads"
        found = (
            "key-value entries" if notes.states is None else f"states of layers {list(notes.layers) or 'of its head'}"
        )
        raise Rejected(f"the notes of {left.peer!r} hold {found}; expected states of layers: {wanted}")
    return placed(notes, left.span, in_other_words=in_other_words)


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
    return PeerStates(torch.from_numpy(states.astype(np.float32)), torch.from_numpy(spans.astype(np.int64)))


def last_places(parts: Sequence[Notes], most: int) -> list[Notes]:
    """The notes of one peer without what exceeds `most` places: an equal share of each call, its last places."""
    if sum(map(len, parts)) <= most:
        return list(parts)
    kept, left = [], most
    for number, notes in enumerate(parts):
        kept.append(notes.last(min(len(notes), left // (len(parts) - number))))
        left -= len(kept[-1])
    return [notes for notes in kept if len(notes)] or [parts[-1].last(1)]
