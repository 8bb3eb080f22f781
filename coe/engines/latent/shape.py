"""The sizes of a trained interaction, and at which layers of primary and peers it sits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

from coe.errors import ConfigError

Layers = Literal["deep", "same"]
MOST_INTERACTIONS: Final = 64
MOST_DEPTHS: Final = 64
MOST_PEERS: Final = 32
MOST_WIDTH: Final = 2**16
"""Most entries of a hidden state, and of a note."""
MOST_LAYERS: Final = 1024
_DEEP: Final = (6 / 6, 5 / 6, 4 / 6, 3 / 6)
"""Where the layers `deep` of a peer are, in the order in which they are added: 100, 83, 67, 50% of its depth."""


@dataclass(frozen=True, slots=True)
class InteractionShape:
    """What determines the tensors of `coe.engines.latent.interaction.Interactions`.

    Attributes:
        width: d, the width of the primary's hidden states.
        n_layers: L, decoder layers of the primary.
        peers: d_m, the width of the hidden states of each peer, by name.
        shared_width: d_s, the width of a note after projection; a multiple of `heads`.
        heads: H, heads of each cross-attention.
        interactions: Q, cross-attentions of the primary.
        depths: J, layers of a peer whose states are notes.
        layers: `deep`: every interaction reads the notes of all J depths; `same`: interaction q reads those of depth q
            only, as Mixture of Thoughts does, so that J = Q.
        null_note: whether a learned note with value 0 competes with the peers' notes.
        spans: whether a learned bias favours notes on the text that the primary's token is on.
        order: whether notes carry where they stand in the answer of their peer.
    """

    width: int
    n_layers: int
    peers: Mapping[str, int]
    shared_width: int = 256
    heads: int = 8
    interactions: int = 4
    depths: int = 1
    layers: Layers = "deep"
    null_note: bool = True
    spans: bool = True
    order: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError: a size is out of bounds, or the sizes do not go together."""
        for name, value, most in (
            ("width", self.width, MOST_WIDTH),
            ("n_layers", self.n_layers, MOST_LAYERS),
            ("shared_width", self.shared_width, MOST_WIDTH),
            ("heads", self.heads, self.shared_width),
            ("interactions", self.interactions, MOST_INTERACTIONS),
            ("depths", self.depths, MOST_DEPTHS),
            *((f"the width of peer {peer!r}", width, MOST_WIDTH) for peer, width in self.peers.items()),
        ):
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{name} must be an integer from 1 to {most}, got {value!r}")
        if not 1 <= len(self.peers) <= MOST_PEERS:
            raise ConfigError(f"a composition has 1 to {MOST_PEERS} peers, got {len(self.peers)}")
        if self.shared_width % self.heads:
            raise ConfigError(f"shared_width {self.shared_width} is not a multiple of heads {self.heads}")
        if self.layers not in get_args(Layers):
            raise ConfigError(f"layers must be one of {', '.join(get_args(Layers))}, got {self.layers!r}")
        if self.layers == "same" and self.depths != self.interactions:
            raise ConfigError(
                f"layers 'same' reads one layer of a peer per interaction: depths is {self.depths} and interactions "
                f"{self.interactions}"
            )
        self.where()

    def where(self) -> tuple[int, ...]:
        """(Q,) after which layer of the primary each interaction stands, counted from 1: round(q L / (Q + 1))."""
        return same_layers(self.n_layers, self.interactions)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The sizes of the matrices of `Interactions` by name: nearly all of its memory."""
        d, d_s = self.width, self.shared_width
        own = {"query": (d, d_s), "key": (d_s, d_s), "value": (d_s, d_s), "output": (d_s, d)}
        sizes = {f"peers.{i}.project": (width, d_s) for i, width in enumerate(self.peers.values())}
        return sizes | {
            f"interactions.{q}.{name}": each for q in range(self.interactions) for name, each in own.items()
        }

    def document(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"peers": dict(self.peers)}

    @classmethod
    def of(cls, document: Any) -> InteractionShape:
        """The shape of a `document`, which an artifact of unknown origin may state. Raises ConfigError."""
        names = [field.name for field in fields(cls)]
        if not isinstance(document, dict) or not isinstance(document.get("peers"), dict) or document.keys() - {*names}:
            raise ConfigError(f"the interaction is a mapping of {', '.join(names)}")
        for name in ("null_note", "spans", "order"):
            if type(document.get(name, True)) is not bool:
                raise ConfigError(f"{name} must be true or false, got {document[name]!r}")
        try:
            return cls(**document)
        except TypeError as error:
            raise ConfigError(f"the interaction lacks a field: {error}") from None


def same_layers(n_layers: int, interactions: int) -> tuple[int, ...]:
    """(Q,) layers from 1 that cut a model into Q + 1 parts: round(q L / (Q + 1)) for q = 1 .. Q.

    Raises:
        ConfigError: the model has too few layers for so many interactions.
    """
    layers = tuple(max(1, round(q * n_layers / (interactions + 1))) for q in range(1, interactions + 1))
    if len(set(layers)) < interactions:
        raise ConfigError(
            f"{interactions} interactions need different layers, and a model of {n_layers} layers has too few: "
            "lower interactions"
        )
    return layers


def deep_layers(n_layers: int, depths: int) -> tuple[int, ...]:
    """(J,) layers of a peer from 1, ascending: the last one, then those at 83, 67 and 50% of its depth.

    Raises:
        ConfigError: more than four depths, or the model has too few layers.
    """
    if depths > len(_DEEP):
        raise ConfigError(f"layers 'deep' has at most {len(_DEEP)} depths, got {depths}: state the layers of each peer")
    layers = sorted({max(1, round(share * n_layers)) for share in _DEEP[:depths]})
    if len(layers) < depths:
        raise ConfigError(f"{depths} depths need different layers, and a peer of {n_layers} layers has too few")
    return tuple(layers)
