"""The notes that a row leaves: hidden states of its tokens, or key-value entries of its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from coe.engines.latent.decoders import Decoder
from coe.engines.latent.notes import MOST_BYTES, Notes, narrowed
from coe.engines.latent.spans import no_spans
from coe.errors import Rejected
from coe.types import NotesWanted

if TYPE_CHECKING:
    from torch import Tensor

HEAD: Final = 0
"""The number that stands for what the head reads, among layers that are counted from 1."""


@dataclass(eq=False, slots=True)
class Capture:
    """What a row keeps of its forwards for its notes. Only the worker thread calls it, once the row is in a batch.

    The states of a token are there once a forward has read it. The row is read to the last token of its answer for
    that, unless an end token stops it: one of these is never read, and is no place of the notes.

    Args:
        wanted: which notes.
        peer, digest: the expert, and its identity by content.
        n_prompt: tokens of the prompt.
        spans: (n_prompt, 2) of the prompt's tokens; `None` if none has a span.

    Attributes:
        tokens: ids of the answer so far.
        entries: finds the key-value entries of the last n tokens that the row has read; set before the row ends.
    """

    wanted: NotesWanted
    peer: str
    digest: str | None
    n_prompt: int
    spans: NDArray[np.int32] | None = None
    tokens: list[int] = field(default_factory=list)
    entries: Callable[[int], tuple[Tensor, Tensor]] | None = None
    _states: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers to see, without repetition; HEAD is the final norm."""
        if self.wanted.channel == "cache":
            return ()
        return tuple(dict.fromkeys(self.wanted.layers)) or (HEAD,)

    @property
    def first(self) -> int:
        """The first token of the prompt whose states are kept."""
        return 0 if self.wanted.places == "all" else self.n_prompt - 1

    def see(self, layer: int, states: Tensor) -> None:
        """Keep the states (n, d) of the next tokens, of which the first ones may be none of the notes' places."""
        # Off the device at once: the states of a long prompt would take its memory until the answer ends.
        self._states.setdefault(layer, []).append(states.to("cpu", copy=True))

    def packed(self) -> bytes:
        """The notes, once the answer has ended."""
        about: dict[str, Any] = {"peer": self.peer, "digest": self.digest, "n_prompt": self.n_prompt}
        tokens = np.array(self.tokens, np.int32)
        if self.wanted.channel == "cache":
            assert self.entries is not None
            keys, values = map(_array, self.entries(len(tokens)))
            return Notes(**about, keys=keys, values=values, first=self.n_prompt, tokens=tokens).pack()
        import torch

        layers = [torch.cat(self._states[layer]) for layer in self.wanted.layers or (HEAD,)]
        states = _array(torch.stack(layers))
        spans = no_spans(states.shape[1])
        if self.spans is not None:
            of_prompt = self.spans[self.first :]
            spans[: len(of_prompt)] = of_prompt
        return Notes(**about, layers=self.wanted.layers, states=states, spans=spans, tokens=tokens).pack()


def _array(tensor: Tensor) -> NDArray[Any]:
    import torch

    return narrowed(tensor.to("cpu", torch.float32).numpy())


def check_wanted(wanted: NotesWanted, decoder: Decoder, n_prompt: int, max_tokens: int, *, expert: str) -> None:
    """Raises Rejected for layers that the model does not have, and for notes above the limit of their size."""
    if beyond := [layer for layer in wanted.layers if layer > decoder.n_layers]:
        raise Rejected(f"{expert!r} has {decoder.n_layers} layers; notes are wanted of layer {beyond[0]}")
    if wanted.channel == "cache":
        n_bytes = 4 * max_tokens * decoder.n_layers * decoder.n_kv_heads * decoder.head_dim
    else:
        n_places = (n_prompt if wanted.places == "all" else 1) + max_tokens
        n_bytes = 2 * n_places * max(1, len(wanted.layers)) * decoder.width
    if n_bytes > MOST_BYTES:
        raise Rejected(
            f"the notes of {expert!r} may take {n_bytes:,} bytes, and the most is {MOST_BYTES:,}: shorten the prompt, "
            "lower max_tokens, or want fewer layers"
        )
