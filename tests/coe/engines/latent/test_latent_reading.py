"""Packed notes as tensors: several calls, spans in the primary's text, limits, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coe.engines.latent.memory import PeerStates
from coe.engines.latent.notes import Notes
from coe.engines.latent.received import Received
from coe.errors import Rejected
from coe.types import PeerNotes
from registry.spec import ExpertSpec, Kind

LAYERS = {"a": [2, 4]}  # `b` leaves what its head reads


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


def read(*given: PeerNotes, **settings: Any) -> dict[str, PeerStates]:
    """The states of a composition whose peers are `a` and `b`."""
    spec = ExpertSpec(
        name="it",
        kind=Kind.COMPOSED,
        architecture="notes",
        members=("base", "a", "b"),
        source="folder",
        settings={"layers": LAYERS, **settings},
    )
    return Received.read(spec, given, "states").states()


def test_several_calls_of_a_peer_are_one_list_of_notes() -> None:
    found = read(left(n=3), left("b", layers=()), left(n=2, first=50))
    assert found["a"].states.shape == (2, 5, 5)
    assert found["b"].states.shape == (1, 3, 5)
    assert found["a"].states[1, 3, 0] == 60  # the second layer of the second call
    assert found["a"].spans is not None
    assert found["a"].spans.tolist() == [[0, 1], [1, 2], [2, 3], [0, 1], [1, 2]]


def test_places_are_numbered_from_the_first_token_of_each_answer() -> None:
    def answered(n_prompt: int, n_answer: int) -> PeerNotes:
        n = n_prompt + n_answer
        notes = Notes(
            "a",
            layers=(2, 4),
            states=np.zeros((2, n, 5), np.float16),
            spans=np.full((n, 2), -1, np.int32),
            tokens=np.arange(n_answer, dtype=np.int32),
        )
        return PeerNotes("a", notes.pack())

    order = read(answered(3, 2), answered(1, 3), answered(2, 0))["a"].order
    assert order is not None and order.tolist() == [-2, -1, 0, 1, 2, 0, 1, 2, 3, -1, 0]
    cut = read(answered(3, 2), answered(1, 3), max_notes=5)["a"].order
    assert cut is not None and cut.tolist() == [1, 2, 1, 2, 3], "what is cut from the front changes no number"


def test_spans_are_in_the_text_of_the_primary() -> None:
    asks = {"a": {"template": "What is {question}?"}}
    about = read(left(span=(7, 12)), asks=asks)["a"].spans
    assert about is not None
    assert about.tolist() == [[7, 12]] * 3
    other_words = read(left(), asks=asks)["a"].spans
    assert other_words is not None
    assert other_words.tolist() == [[-1, -1]] * 3


def test_a_peer_that_the_composition_does_not_know_is_not_read() -> None:
    with pytest.raises(Rejected, match="'z' is no peer of 'it'; its peers are a, b"):
        read(left("z"))


def test_too_many_places_are_cut_from_the_front_of_each_call() -> None:
    found = read(left(n=5), left(n=2, first=100), left(n=5, first=200), max_notes=7)["a"]
    assert found.states.shape[1] == 7
    assert found.states[0, :, 0].tolist() == [15, 20, 100, 105, 210, 215, 220]
    assert read(left(n=5), left(n=5), max_notes=1)["a"].states.shape[1] == 1


def test_other_layers_channels_and_damaged_notes_are_refused() -> None:
    with pytest.raises(Rejected, match="'b' for 'it' are of the layers 2, 4; expected that its head reads"):
        read(left("b"))
    entries = np.zeros((1, 1, 2, 4), np.float16)
    cache = Notes("a", keys=entries, values=entries, tokens=np.zeros(2, np.int32)).pack()
    with pytest.raises(Rejected, match="are of the channel 'cache'; expected 'states'"):
        read(PeerNotes("a", cache))
    with pytest.raises(Rejected, match="notes of 'a' cannot be read"):
        read(PeerNotes("a", b"x"))
    narrow = Notes("a", layers=(2, 4), states=np.zeros((2, 1, 4), np.float16), spans=np.array([[0, 1]], np.int32))
    with pytest.raises(Rejected, match="have states of several widths"):
        read(left(), PeerNotes("a", narrow.pack()))
