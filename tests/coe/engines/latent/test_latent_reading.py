"""Packed notes as tensors: several calls, spans in the primary's text, limits, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from coe.engines.latent.notes import Notes
from coe.engines.latent.reading import peer_states
from coe.errors import Rejected
from coe.types import PeerNotes


def left(
    peer: str = "a",
    n: int = 3,
    *,
    layers: tuple[int, ...] = (2, 4),
    span: tuple[int, int] | None = None,
    first: int = 0,
) -> PeerNotes:
    states = np.arange(first, first + len(layers or (1,)) * n * 5, dtype=np.float16).reshape(-1, n, 5)
    spans = np.array([[i, i + 1] for i in range(n)], np.int32)
    return PeerNotes(peer, Notes(peer, layers=layers, states=states, spans=spans).pack(), span)


def test_several_calls_of_a_peer_are_one_list_of_notes() -> None:
    found = peer_states([left(n=3), left("b", layers=()), left(n=2, first=50)], {"a": (2, 4), "b": ()})
    assert found["a"].states.shape == (2, 5, 5)
    assert found["b"].states.shape == (1, 3, 5)
    assert found["a"].states[1, 3, 0] == 60  # the second layer of the second call
    assert found["a"].spans is not None
    assert found["a"].spans.tolist() == [[0, 1], [1, 2], [2, 3], [0, 1], [1, 2]]


def test_spans_are_in_the_text_of_the_primary() -> None:
    layers = {"a": (2, 4)}
    about = peer_states([left(span=(7, 12))], layers, asked=("a",))["a"].spans
    assert about is not None
    assert about.tolist() == [[7, 12]] * 3
    other_words = peer_states([left()], layers, asked=("a",))["a"].spans
    assert other_words is not None
    assert other_words.tolist() == [[-1, -1]] * 3


def test_a_peer_that_the_composition_does_not_know_is_not_read() -> None:
    assert peer_states([left("z")], {"a": (2, 4)}) == {}


def test_too_many_places_are_cut_from_the_front_of_each_call() -> None:
    found = peer_states([left(n=5), left(n=2, first=100), left(n=5, first=200)], {"a": (2, 4)}, most=7)["a"]
    assert found.states.shape[1] == 7
    assert found.states[0, :, 0].tolist() == [15, 20, 100, 105, 210, 215, 220]
    assert peer_states([left(n=5), left(n=5)], {"a": (2, 4)}, most=1)["a"].states.shape[1] == 1


def test_other_layers_channels_and_damaged_notes_are_refused() -> None:
    with pytest.raises(Rejected, match="'a' hold states of layers .2, 4.; expected states of layers: what its head"):
        peer_states([left()], {"a": ()})
    entries = np.zeros((1, 1, 2, 4), np.float16)
    cache = Notes("a", keys=entries, values=entries, tokens=np.zeros(2, np.int32)).pack()
    with pytest.raises(Rejected, match="hold key-value entries"):
        peer_states([PeerNotes("a", cache)], {"a": ()})
    with pytest.raises(Rejected, match="notes of 'a' cannot be read"):
        peer_states([PeerNotes("a", b"x")], {"a": ()})
