"""The notes that a composed expert is given with a request, read and checked against what it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from coe.engines.latent.memory import PeerStates
from coe.engines.latent.notes import Channel, Notes
from coe.engines.latent.reading import MOST_NOTES, last_places, placed, states_of
from coe.engines.latent.settings import CallSettings
from coe.errors import ConfigError, Rejected
from coe.types import PeerNotes
from registry.digest import shown
from registry.spec import ExpertSpec

_MOST_MAX_NOTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class Received:
    """The notes of the calls to the peers, in the order of the members.

    remarks: for the reader of the answer, such as which notes were cut.
    """

    notes: Mapping[str, Sequence[Notes]]
    remarks: tuple[str, ...]

    @classmethod
    def read(cls, spec: ExpertSpec, given: Sequence[PeerNotes], channel: Channel) -> Received:
        """Unpack and check the notes of a request. Peers without a note are left out.

        Raises:
            Rejected: damaged notes, or those of another expert, channel or layers, with what was expected.
            ConfigError: a setting of the expert is wrong.
        """
        settings, most = CallSettings.of(spec.settings, spec.name), max_notes(spec.settings, spec.name)
        peers = spec.members[1:]
        calls: dict[str, list[Notes]] = {peer: [] for peer in peers}
        for each in given:
            if each.peer not in peers:
                raise Rejected(f"{each.peer!r} is no peer of {spec.name!r}; its peers are {', '.join(peers)}")
            notes = Notes.unpack(each.data, peer=each.peer)
            _check(spec, notes, each.peer, channel, settings.layers.get(each.peer, ()))
            if channel == "states":
                notes = placed(notes, each.span, in_other_words=each.peer in settings.asks)
            if len(notes):
                calls[each.peer].append(notes)
        left = {peer: some for peer, some in calls.items() if some}
        counts = {peer: sum(map(len, some)) for peer, some in left.items()}
        remarks = [
            f"of {n} notes of {peer} the last {most} were read (max_notes)" for peer, n in counts.items() if n > most
        ]
        return cls({peer: last_places(some, most) for peer, some in left.items()}, tuple(remarks))

    def states(self) -> dict[str, PeerStates]:
        """For `Interactions.memory`."""
        return {peer: states_of(some) for peer, some in self.notes.items()}


def max_notes(settings: Mapping[str, Any], expert: str) -> int:
    """The setting `max_notes`: most notes of one peer; more lose the front of the prompt first.

    Raises:
        ConfigError: it is no number from 1 to 1,048,576.
    """
    most = settings.get("max_notes", MOST_NOTES)
    if type(most) is not int or not 1 <= most <= _MOST_MAX_NOTES:
        raise ConfigError(
            f"settings of {expert!r}: max_notes must be an integer from 1 to {_MOST_MAX_NOTES:,}, got {most!r:.80}"
        )
    return most


def _check(spec: ExpertSpec, notes: Notes, peer: str, channel: Channel, layers: tuple[int, ...]) -> None:
    about = f"the notes of {peer!r} for {spec.name!r}"
    if notes.peer != peer:
        raise Rejected(f"{about} are those of {notes.peer!r}")
    trained = spec.trained_with.get(peer)
    if trained is not None and notes.digest is not None and notes.digest != trained:
        raise Rejected(f"{about} are of another version of it: {shown(notes.digest)}; expected {shown(trained)}")
    if notes.channel != channel:
        raise Rejected(f"{about} are of the channel {notes.channel!r}; expected {channel!r}")
    if channel == "states" and notes.layers != layers:
        raise Rejected(f"{about} are of the layers {_named(notes.layers)}; expected {_named(layers)}")


def _named(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) or "that its head reads"
