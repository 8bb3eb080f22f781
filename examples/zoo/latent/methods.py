"""The methods that a bench compares: what is trained, if anything, and who is called then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from examples.zoo.latent.benches import Bench, base_of

_ARCHITECTURES: Final = {"notes-prompt": "notes"}
"""preset of `coe latent train` -> architecture of the composed expert, where they differ."""


class Trains(StrEnum):
    """What a method trains."""

    NOTHING = "nothing"
    LORA = "lora"  # an adapter, by the zoo's trainer; experts exchange text
    LATENT = "latent"  # a composition, by `coe latent train`


@dataclass(frozen=True, slots=True)
class Method:
    """A way to answer the queries of a bench.

    Attributes:
        about: one line for tables.
        preset: of `coe latent train`; of a method that trains nothing, the architecture of a composed expert.
        settings: of the composition.
        training: fields of `training` in the file of `coe latent train`, over the bench's.
        shows_answers: the adapter is trained, and asked, with the peers' answers in its prompt.
        on_peer: the adapter is that of the first peer, trained further; else it is on the primary.
        one_base: members must be one base model and adapters of it.
        adapters: members that are no adapters are left out; two must remain.
        own_rows: it is trained on the rows of its members' own families, in turns, and not on the bench's.
        peers: in place of the bench's.
    """

    name: str
    about: str
    trains: Trains = Trains.NOTHING
    preset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    shows_answers: bool = False
    on_peer: bool = False
    one_base: bool = False
    adapters: bool = False
    own_rows: bool = False
    peers: tuple[str, ...] | None = None

    @property
    def architecture(self) -> str | None:
        """The architecture of its composed expert, if it has one."""
        return _ARCHITECTURES.get(self.preset, self.preset) if self.preset else None

    def members(self, bench: Bench) -> tuple[str, ...]:
        """The members of its composed expert on a bench, the primary first."""
        members = bench.members if self.peers is None else (bench.primary, *self.peers)
        return tuple(name for name in members if base_of(name) != name) if self.adapters else members

    def suits(self, bench: Bench) -> bool:
        """Whether the method can be run on a bench."""
        members = self.members(bench)
        if len(members) < 2 or (self.on_peer and bench.right):
            return False
        return not (self.one_base and len({base_of(name) for name in members}) > 1)


PRIMARY, BEST, ROUTED, VOTE, CHAIN = "primary", "best-single", "routed", "vote", "chain"
AGGREGATE, AGGREGATE_TRAINED, DIRECT, KNOWING = "aggregate", "aggregate-trained", "direct", "knowing-lora"

_LATENT: Final = Trains.LATENT


def _mix(name: str, about: str, gate: str, *, own_rows: bool = False) -> Method:
    settings = {"gate": gate}
    return Method(name, about, _LATENT, "lora-mix", settings, one_base=True, adapters=True, own_rows=own_rows)


METHODS: Final[Mapping[str, Method]] = {
    method.name: method
    for method in (
        Method(PRIMARY, "the primary alone"),
        Method(BEST, "the member that is best on the validation rows"),
        Method(ROUTED, "one expert of the zoo, chosen by a router of the demo's kind"),
        Method(VOTE, "a vote of all members"),
        Method(CHAIN, "the peers, then the primary, each with the answers before"),
        Method(
            "logit-mean",
            "the mean of all members' next-token probabilities",
            preset="logits",
            settings={"mode": "mean"},
            one_base=True,
        ),
        Method(
            "token-gate",
            "the members' next-token probabilities, weighed by a trained gate",
            Trains.LATENT,
            "logits",
            one_base=True,
        ),
        Method(AGGREGATE, "the primary, shown the peers' answers", shows_answers=True),
        Method(AGGREGATE_TRAINED, "the same, with a LoRA trained on such prompts", Trains.LORA, shows_answers=True),
        Method(DIRECT, "a LoRA on the primary, without peers", Trains.LORA),
        Method(KNOWING, "the adapter of the first peer, trained further", Trains.LORA, on_peer=True),
        Method("notes", "states of the peers' answers, read by cross-attention", _LATENT, "notes"),
        Method("notes-lora", "the same, with a LoRA on the primary", _LATENT, "notes", {"lora": {}}),
        Method("notes-prompt", "states of the prompt alone", _LATENT, "notes-prompt"),
        Method("cache", "key-value entries of the peers' answers, and a LoRA", _LATENT, "cache", one_base=True),
        Method("mot", "Mixture of Thoughts: members read each other's states while they write", _LATENT, "mot"),
        Method(
            "arrow",
            "adapters mixed token by token, by a gate that needs no training",
            preset="lora-mix",
            settings={"gate": "arrow"},
            one_base=True,
            adapters=True,
        ),
        _mix("phatgoose", "the same, by gates that each adapter trained on its own rows", "phatgoose", own_rows=True),
        _mix("glider", "the same, with a query's likeness to what an adapter is for", "glider", own_rows=True),
        _mix("lora-mix", "the same, by a gate trained on the bench's rows", "trained"),
    )
}
"""Methods by name, rivals first."""


SELF: Final = "smollm2-again"
"""Another name of the base of the codes, for notes of the primary itself."""
_WORDS: Final = r"\b[bdfgklmnprstvz][aeiou][bdfgklmnprstvz][aeiou][bdgklmnprstxz]\b"
"""Matches every invented word, and words such as "total"."""


def _notes(
    name: str,
    about: str,
    settings: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    peers: tuple[str, ...] | None = None,
) -> Method:
    return Method(name, about, _LATENT, "notes", settings or {}, training or {}, peers=peers)


ABLATIONS: Final[Mapping[str, Method]] = {
    method.name: method
    for method in (
        METHODS["notes"],
        METHODS["notes-prompt"],
        METHODS["mot"],
        _notes("places-all", "notes of all tokens of the peer's prompt", {"places": "all"}),
        _notes(
            "asks-words",
            "a call to the peer for each word",
            {"asks": {"codes": {"template": "What is {match}?", "pattern": _WORDS}}},
        ),
        _notes("layers-same", "the peer's layers at the depths of the interactions", {"layers": "same"}),
        _notes("depths-2", "two layers of the peer", {"depths": 2}),
        _notes("depths-4", "four layers of the peer", {"depths": 4}),
        _notes("q-1", "one interaction", {"interactions": 1}),
        _notes("q-2", "two interactions", {"interactions": 2}),
        _notes("width-64", "notes of 64 numbers", {"shared_width": 64}),
        _notes("spans-off", "no bias for notes on the same characters", {"spans": False}),
        _notes("null-off", "no null note", {"null_note": False}),
        _notes("order-off", "notes are a set", {"order": False}),
        _notes(
            "wrong-peers",
            "in 15% of the rows a peer leaves the notes of another row",
            training={"wrong_peer": 0.15},
        ),
        _notes("keep-off", "no loss that keeps the primary's right answers", training={"keep": 0.0}),
        _notes(
            "exposure-off",
            "peers are never left out nor replaced in training",
            training={"drop_peer": 0.0, "drop_all": 0.0, "wrong_peer": 0.0},
        ),
        _notes("three-members", "one more peer, which knows nothing", peers=("codes", "dates")),
        _notes("random-peer", "a peer that knows nothing in place of the right one", peers=("dates",)),
        _notes("self-notes", "the primary's own notes: weights without knowledge", peers=(SELF,)),
    )
}
"""Changes of `notes` on the codes; the first is the reference. Output matrices that stay 0 are the method `primary`."""
