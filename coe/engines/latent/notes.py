"""Notes: what a peer leaves for the expert that answers, as one value that travels between processes.

Notes are the raw states of the peer: they depend on the peer and its prompt alone, so compositions share them, and they
can be cached. Whatever a composition has learned (standardising, projecting) is applied where they are read.

Channel `states`: hidden states at places of prompt and answer. Channel `cache`: key-value entries of the answer. The
places of an answer are its tokens, without the one that ends it: an end token is never read by the peer. The bytes are
safetensors, whose metadata holds the rest as JSON:

    states        (J, T, d)    float16    J layers; float32 if a value exceeds the range of float16
    spans         (T, 2)       int32      characters [start, end) of the user's text; -1, -1 for a token without any
    tokens        (n,)         int32      ids of the answer's tokens
    keys, values  (L, H, n, D) float16    L layers, H key-value heads; keys are rotated to positions first .. first+n-1
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from coe.errors import Rejected

Channel = Literal["states", "cache"]
Array = NDArray[Any]

MOST_BYTES: Final = 256 * 2**20
"""Most bytes of packed notes."""
MOST_VALUE: Final = 1e8
"""Largest magnitude of a state or entry. Residual streams reach some 1e5; squares of larger values overflow where the
primary normalises what it has read."""
MOST_LAYERS: Final = 1024
_MOST_HEADER_BYTES: Final = 2**16
_MOST_NAME: Final = 512
_FORMAT: Final = "coe-notes/1"
_Types = Mapping[str, np.dtype[Any]]
_FLOATS: Final[_Types] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_INTEGERS: Final[_Types] = {"I32": np.dtype("<i4")}
_TENSORS: Final[Mapping[Channel, Mapping[str, tuple[int, _Types]]]] = {
    "states": {"states": (3, _FLOATS), "spans": (2, _INTEGERS), "tokens": (1, _INTEGERS)},
    "cache": {"keys": (4, _FLOATS), "values": (4, _FLOATS), "tokens": (1, _INTEGERS)},
}


def _no_tokens() -> Array:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False, slots=True)
class Notes:
    """The notes of one call of a peer.

    Attributes:
        peer: name of the expert that left them. digest: of its files, if known.
        layers: decoder layers of the states, counted from 1; () for what the head of the model reads.
        states: (J, T, d), J = 1 for `layers` (). spans: (T, 2).
        keys, values: (L, H, n, D) entries of the answer's tokens, the first of which stands at position `first`.
        tokens: (n,) ids of the answer's tokens, without the one that ends it.
        n_prompt: tokens of the peer's prompt.
    """

    peer: str
    digest: str | None = None
    layers: tuple[int, ...] = ()
    states: Array | None = None
    spans: Array | None = None
    keys: Array | None = None
    values: Array | None = None
    first: int = 0
    tokens: Array = field(default_factory=_no_tokens)
    n_prompt: int = 0

    @property
    def channel(self) -> Channel:
        """What they hold."""
        return "cache" if self.states is None else "states"

    def __len__(self) -> int:
        """Number of places, T or n."""
        array = self.keys if self.states is None else self.states
        return 0 if array is None else int(array.shape[-2])

    def last(self, n: int) -> Notes:
        """These notes without all but their last `n` places: the front of the prompt goes first."""
        if len(self) <= n:
            return self
        cut = len(self) - n
        if self.states is not None and self.spans is not None:
            return replace(self, states=self.states[:, cut:], spans=self.spans[cut:])
        assert self.keys is not None and self.values is not None
        keys, values = self.keys[:, :, cut:], self.values[:, :, cut:]
        return replace(self, keys=keys, values=values, first=self.first + cut, tokens=self.tokens[cut:])

    def pack(self) -> bytes:
        """The notes as bytes, which `unpack` reads."""
        from safetensors.numpy import save

        arrays = {name: getattr(self, name) for name in _TENSORS[self.channel]}
        about = {name: getattr(self, name) for name in ("peer", "digest", "layers", "first", "n_prompt")}
        about |= {"format": _FORMAT, "channel": self.channel}
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return save(contiguous, {"notes": json.dumps(about)})

    @classmethod
    def unpack(cls, data: bytes, *, peer: str = "a peer") -> Notes:
        """Read packed notes. They may come from another machine: every size, type and value is checked.

        Args:
            peer: whose notes these should be, for error messages.

        Raises:
            Rejected: they are no notes, damaged, or larger than MOST_BYTES.
        """
        try:
            about = _about(data)
            notes = cls(**_fields(about), **_arrays(data, about["channel"]))
            _check(notes)
        except _Wrong as error:
            raise Rejected(
                f"the notes of {peer!r} cannot be read: {error}; ask the peer for them again", code="invalid_notes"
            ) from None
        return notes


def narrowed(array: Array) -> Array:
    """The array as float16, or as float32 if a value exceeds the range of float16 (residual streams of Gemma do)."""
    largest = float(np.abs(array).max(initial=0.0))
    return array.astype(np.float16 if largest <= float(np.finfo(np.float16).max) else np.float32)


class _Wrong(Exception):
    """What is wrong with packed notes."""


def _about(data: bytes) -> Mapping[str, Any]:
    """The metadata of packed notes."""
    if len(data) > MOST_BYTES:
        raise _Wrong(f"they have {len(data):,} bytes; the most is {MOST_BYTES:,}")
    n_header = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if not 0 < n_header <= min(_MOST_HEADER_BYTES, len(data) - 8):
        raise _Wrong("they are not safetensors")
    try:
        header = json.loads(data[8 : 8 + n_header])
        about = json.loads(header["__metadata__"]["notes"])
    except (ValueError, RecursionError, KeyError, TypeError):
        raise _Wrong("their metadata is missing or not JSON") from None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise _Wrong(f"their format is not {_FORMAT!r}")
    if not isinstance(channel := about.get("channel"), str) or channel not in _TENSORS:
        raise _Wrong(f"unknown channel {channel!r:.40}")
    return about


def _fields(about: Mapping[str, Any]) -> dict[str, Any]:
    peer, digest, layers = about.get("peer"), about.get("digest"), about.get("layers")
    if not isinstance(peer, str) or not 0 < len(peer) <= _MOST_NAME:
        raise _Wrong("they name no peer")
    if digest is not None and not (isinstance(digest, str) and len(digest) <= _MOST_NAME):
        raise _Wrong("their digest is no text")
    if not isinstance(layers, list) or len(layers) > MOST_LAYERS or not all(_is_count(n, 1) for n in layers):
        raise _Wrong("their layers are not numbers from 1")
    counts = {name: about.get(name) for name in ("first", "n_prompt")}
    if not all(_is_count(n) for n in counts.values()):
        raise _Wrong("their position is not a number from 0")
    return {"peer": peer, "digest": digest, "layers": tuple(layers), **counts}


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**31


def _arrays(data: bytes, channel: Channel) -> dict[str, Any]:
    """The tensors of a channel, each of its own number of axes and one of its types."""
    import safetensors

    library: Any = safetensors  # its functions of Rust have no types
    try:
        found: dict[str, Any] = dict(library.deserialize(data))
    except library.SafetensorError as error:
        raise _Wrong(f"they are not safetensors ({error})") from None
    wanted = _TENSORS[channel]
    if found.keys() != wanted.keys():
        raise _Wrong(f"they hold {_names(found)} instead of {_names(wanted)}")
    return {name: _array(name, found[name], *wanted[name]) for name in wanted}


def _names(names: Mapping[str, Any]) -> str:
    return ", ".join(f"{name:.40}" for name in sorted(names)[:8]) or "nothing"


def _array(name: str, tensor: Mapping[str, Any], n_axes: int, types: _Types) -> Array:
    if tensor["dtype"] not in types:
        raise _Wrong(f"{name} is of type {tensor['dtype']} instead of {' or '.join(types)}")
    if len(tensor["shape"]) != n_axes:
        raise _Wrong(f"{name} has {len(tensor['shape'])} axes instead of {n_axes}")
    return np.frombuffer(tensor["data"], types[tensor["dtype"]]).reshape(tensor["shape"])


def _check(notes: Notes) -> None:
    """Raises _Wrong if the arrays contradict each other or hold values that no peer leaves."""
    checks: Mapping[Channel, Callable[[Notes], None]] = {"states": _check_states, "cache": _check_entries}
    checks[notes.channel](notes)
    if notes.tokens.min(initial=0) < 0:
        raise _Wrong("a token id is negative")


def _check_states(notes: Notes) -> None:
    states, spans = notes.states, notes.spans
    assert states is not None and spans is not None
    n_layers, n_places, width = states.shape
    if n_layers != max(1, len(notes.layers)) or not width:
        raise _Wrong(f"states {states.shape} do not hold {max(1, len(notes.layers))} layers")
    if spans.shape != (n_places, 2):
        raise _Wrong(f"spans {spans.shape} are not those of {n_places} places")
    _check_values("a state", states)
    start, end = spans[:, 0], spans[:, 1]
    if not (((start == -1) & (end == -1)) | ((start >= 0) & (start < end))).all():
        raise _Wrong("a span is not a range of characters")


def _check_entries(notes: Notes) -> None:
    keys, values = notes.keys, notes.values
    assert keys is not None and values is not None
    if keys.shape != values.shape or not 0 < keys.shape[0] <= MOST_LAYERS or 0 in (keys.shape[1], keys.shape[3]):
        raise _Wrong(f"keys {keys.shape} and values {values.shape} do not correspond")
    if notes.tokens.shape != (keys.shape[2],):
        raise _Wrong(f"{len(notes.tokens)} tokens are not those of {keys.shape[2]} entries")
    for array in (keys, values):
        _check_values("an entry", array)


def _check_values(what: str, array: Array) -> None:
    least, most = float(array.min(initial=0.0)), float(array.max(initial=0.0))  # NaN if any value is
    if not (math.isfinite(least) and math.isfinite(most)):
        raise _Wrong(f"{what} is not finite")
    if (largest := max(-least, most)) > MOST_VALUE:
        raise _Wrong(f"{what} has the magnitude {largest:.1e}; the most that is read is {MOST_VALUE:.0e}")
