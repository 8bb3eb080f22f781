"""The format of notes: what was packed is unpacked, and hostile bytes are refused."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from coe.engines.latent import notes as module
from coe.engines.latent.notes import Notes, narrowed
from coe.errors import Rejected


def states(n: int = 5, layers: tuple[int, ...] = (2, 4)) -> Notes:
    rng = np.random.default_rng(0)
    spans = np.full((n, 2), -1, np.int32)
    for place, span in enumerate([(0, 2), (2, 3)][: max(0, n - 1)], start=1):
        spans[place] = span
    return Notes(
        "sql",
        digest="sha256:1",
        layers=layers,
        states=rng.standard_normal((max(1, len(layers)), n, 8)).astype(np.float16),
        spans=spans,
        tokens=np.array([3, 4], np.int32),
        n_prompt=7,
    )


def entries(n: int = 4) -> Notes:
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, 3, 2, n, 8)).astype(np.float16)
    return Notes("sql", keys=keys, values=values, first=7, tokens=np.arange(n, dtype=np.int32), n_prompt=7)


@pytest.mark.parametrize("notes", [states(), states(layers=()), entries(), entries(0), states(0)])
def test_unpacked_notes_are_those_packed(notes: Notes) -> None:
    again = Notes.unpack(notes.pack())
    for name in ("peer", "digest", "layers", "first", "n_prompt", "channel"):
        assert getattr(again, name) == getattr(notes, name)
    for name in ("states", "spans", "keys", "values", "tokens"):
        before, after = getattr(notes, name), getattr(again, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
    assert len(again) == len(notes)


def test_what_is_cut_is_the_front() -> None:
    some, kept = states(), states().last(2)
    assert kept.states is not None
    assert some.states is not None
    np.testing.assert_array_equal(kept.states, some.states[:, 3:])
    assert len(kept) == 2
    assert kept.spans is not None
    assert len(kept.spans) == 2
    cut, all_of_them = entries().last(3), entries()
    assert cut.keys is not None
    assert all_of_them.keys is not None
    assert (cut.first, cut.tokens.tolist()) == (8, [1, 2, 3])
    np.testing.assert_array_equal(cut.keys, all_of_them.keys[:, :, 1:])
    assert some.last(5) is some
    assert len(Notes.unpack(kept.pack())) == 2


def test_values_beyond_float16_stay_as_they_are() -> None:
    large = np.array([[[1e5, -2.0]]], np.float32)
    assert narrowed(large).dtype == np.float32
    assert narrowed(large / 10).dtype == np.float16
    notes = Notes("gemma", states=narrowed(large), spans=np.full((1, 2), -1, np.int32))
    np.testing.assert_array_equal(Notes.unpack(notes.pack()).states, large)


def _bytes(about: Any, **arrays: Any) -> bytes:
    return save(arrays, {"notes": about if isinstance(about, str) else json.dumps(about)})


def _changed(base: Notes, about: dict[str, Any] | None = None, **arrays: Any) -> bytes:
    """Packed notes with other metadata or arrays."""
    names = ("states", "spans", "tokens") if base.channel == "states" else ("keys", "values", "tokens")
    own = {name: getattr(base, name) for name in names} | arrays
    told = {name: getattr(base, name) for name in ("peer", "digest", "layers", "first", "n_prompt", "channel")}
    told |= {"format": "coe-notes/1"} | (about or {})
    return _bytes(told, **{name: array for name, array in own.items() if array is not None})


HALF = np.float16
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not safetensors"),
    "short": (b"\x01", "not safetensors"),
    "a huge header": ((2**40).to_bytes(8, "little") + b"{}", "not safetensors"),
    "a long header": ((2**17).to_bytes(8, "little") + b" " * 2**17, "not safetensors"),
    "no JSON": ((4).to_bytes(8, "little") + b"{{{{", "metadata is missing or not JSON"),
    "deep JSON": ((60_000).to_bytes(8, "little") + b"[" * 60_000, "metadata is missing or not JSON"),
    "no metadata": (save({"states": np.zeros((1, 1, 1), HALF)}), "metadata is missing"),
    "deep metadata": (_bytes("[" * 50_000, states=np.zeros((1, 1, 1), HALF)), "metadata is missing or not JSON"),
    "another format": (_changed(states(), {"format": "coe-notes/9"}), "format is not 'coe-notes/1'"),
    "another channel": (_changed(states(), {"channel": "thoughts"}), "unknown channel 'thoughts'"),
    "no channel": (_changed(states(), {"channel": None}), "unknown channel None"),
    "no peer": (_changed(states(), {"peer": ""}), "name no peer"),
    "a long peer": (_changed(states(), {"peer": "x" * 600}), "name no peer"),
    "a digest of another type": (_changed(states(), {"digest": 1}), "digest is no text"),
    "layers of text": (_changed(states(), {"layers": ["2", "4"]}), "layers are not numbers"),
    "layer 0": (_changed(states(), {"layers": [0, 4]}), "layers are not numbers"),
    "a negative position": (_changed(entries(), {"first": -1}), "position is not a number"),
    "a position that is true": (_changed(entries(), {"first": True}), "position is not a number"),
    "an endless position": (_changed(entries(), {"first": 10**12}), "position is not a number"),
    "too few layers": (_changed(states(), {"layers": [1, 2, 3]}), "do not hold 3 layers"),
    "a missing tensor": (_changed(states(), spans=None), "they hold states, tokens instead of"),
    "another tensor": (_changed(states(), more=np.zeros(3, HALF)), "they hold more, spans, states, tokens instead"),
    "doubles": (_changed(states(), states=np.zeros((2, 5, 8))), "states is of type F64 instead of F16 or F32"),
    "spans of floats": (_changed(states(), spans=np.zeros((5, 2), HALF)), "spans is of type F16 instead of I32"),
    "two axes": (_changed(states(), states=np.zeros((5, 8), HALF)), "states has 2 axes instead of 3"),
    "spans of other tokens": (_changed(states(), spans=np.full((4, 2), -1, np.int32)), "are not those of 5 places"),
    "no width": (_changed(states(), states=np.zeros((2, 5, 0), HALF)), "do not hold 2 layers"),
    "not a number": (_changed(states(), states=np.full((2, 5, 8), np.nan, HALF)), "a state is not finite"),
    "infinite": (_changed(entries(), keys=np.full((3, 2, 4, 8), np.inf, HALF)), "an entry is not finite"),
    "a large state": (
        _changed(states(), states=np.full((2, 5, 8), -3e38, np.float32)),
        "a state has the magnitude 3.0e",
    ),
    "a large entry": (_changed(entries(), values=np.full((3, 2, 4, 8), 1e9, np.float32)), "most that is read is 1e+08"),
    "a span that ends early": (_changed(states(), spans=np.full((5, 2), 3, np.int32)), "a span is not a range"),
    "half a span": (_changed(states(), spans=np.array([[-1, 3]] * 5, np.int32)), "a span is not a range"),
    "keys of other layers": (_changed(entries(), keys=np.zeros((2, 2, 4, 8), HALF)), "do not correspond"),
    "no heads": (
        _changed(entries(), keys=np.zeros((3, 0, 4, 8), HALF), values=np.zeros((3, 0, 4, 8), HALF)),
        "do not correspond",
    ),
    "other tokens": (_changed(entries(), tokens=np.zeros(9, np.int32)), "9 tokens are not those of 4 entries"),
    "a negative token": (_changed(entries(), tokens=np.full(4, -2, np.int32)), "a token id is negative"),
    "cut off": (states().pack()[:-1], "not safetensors"),
    "too long": (states().pack() + b"x", "not safetensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_refused(case: str) -> None:
    data, reason = HOSTILE[case]
    with pytest.raises(Rejected, match="the notes of 'sql' cannot be read: ") as caught:
        Notes.unpack(data, peer="sql")
    assert reason in str(caught.value)
    assert caught.value.code == "invalid_notes"


def test_notes_above_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = states().pack()
    monkeypatch.setattr(module, "MOST_BYTES", len(data))
    assert len(Notes.unpack(data)) == 5
    monkeypatch.setattr(module, "MOST_BYTES", len(data) - 1)
    with pytest.raises(Rejected, match=f"they have {len(data):,} bytes; the most is {len(data) - 1:,}"):
        Notes.unpack(data)


def test_damaged_bytes_never_raise_anything_else() -> None:
    rng, data = random.Random(0), entries().pack()
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            notes = Notes.unpack(bytes(damaged))
        except Rejected:
            continue
        assert notes.keys is not None
        assert np.isfinite(notes.keys).all()
