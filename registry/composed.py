"""The artifact of a composed expert: what training states of it, in `composed.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from registry.digest import identity, shown
from registry.errors import SourceError
from registry.headers import read_json
from registry.spec import ONE_BASE_ARCHITECTURES, ExpertSpec, Price

FILE: Final = "composed.json"
FORMAT: Final = 1
_MOST_BYTES: Final = 2**20
_MOST_MEMBERS: Final = 64


@dataclass(frozen=True, slots=True)
class Composed:
    """What `composed.json` states.

    Attributes:
        architecture: how the members are combined.
        members: name -> identity at training (`registry.digest.identity`), the one that answers first.
        settings: of the composition.
    """

    architecture: str
    members: Mapping[str, str]
    settings: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """The JSON object of the file."""
        members = [{"name": name, "digest": digest} for name, digest in self.members.items()]
        return {"format": FORMAT, "architecture": self.architecture, "members": members, "settings": {**self.settings}}


def read_composed(folder: Path) -> Composed:
    """Read the file of an artifact.

    Raises:
        SourceError: it is missing, too large, of another format, or lacks a field; with the path.
    """
    path = folder / FILE
    document = read_json(path, most_bytes=_MOST_BYTES)
    if document.get("format") != FORMAT:
        raise SourceError(f"{path}: format {document.get('format')!r}; this version reads {FORMAT}: train it again")
    members, architecture, settings = (document.get(name) for name in ("members", "architecture", "settings"))
    if not isinstance(architecture, str) or not isinstance(settings, dict) or not isinstance(members, list):
        raise SourceError(f"{path} needs `architecture` (a text), `members` (a list) and `settings` (an object)")
    if not 0 < len(members) <= _MOST_MEMBERS or not all(map(_is_member, members)):
        raise SourceError(f"{path}: members are 1 to {_MOST_MEMBERS} objects with `name` and `digest`")
    named = {member["name"]: member["digest"] for member in members}
    if len(named) < len(members):
        raise SourceError(f"{path}: a member is given twice")
    return Composed(architecture, named, settings)


def composed_facts(draft: ExpertSpec, folder: Path, experts: Mapping[str, ExpertSpec]) -> dict[str, Any]:
    """Facts of a composed expert from its artifact.

    Args:
        experts: by name; the members are among them.

    Raises:
        SourceError: the artifact is of another architecture or other members than the draft states, or was trained with
            other contents of them.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder: the source of a composed expert is what `coe latent train` wrote")
    found = read_composed(folder)
    if draft.architecture not in (None, found.architecture):
        raise SourceError(f"{folder} is of the architecture {found.architecture!r}, not {draft.architecture!r}")
    if draft.members != tuple(found.members):
        stated, trained = ", ".join(draft.members), ", ".join(found.members)
        raise SourceError(f"{folder} was trained with the members {trained}, in this order; the expert states {stated}")
    if draft.settings and dict(draft.settings) != dict(found.settings):
        raise SourceError(f"{folder} has the settings of the composition: leave `settings` out")
    if reason := changed_member(found.members, experts):
        raise SourceError(f"{folder} cannot be used: {reason}")
    return {"architecture": found.architecture, "settings": found.settings, "trained_with": found.members}


def changed_member(trained_with: Mapping[str, str], experts: Mapping[str, ExpertSpec]) -> str | None:
    """Why a composition cannot use these experts: the first member that is not what it was trained with."""
    for name, digest in trained_with.items():
        if (now := identity(experts[name], experts)) != digest:
            return (
                f"it was trained with another {name!r} ({shown(digest)}; now {shown(now)}): restore that version, "
                "or train the composition again"
            )
    return None


def composed_defaults(draft: ExpertSpec, experts: Mapping[str, ExpertSpec]) -> dict[str, Any]:
    """Size, context and price of a composed expert from those of its members.

    All members read the query, and most answer it: active parameters and sizes add up, a base that they share counts
    once in memory, and once in computation where one pass serves all members; the shortest context binds; usage counts
    the tokens of every member, and the price of each is the highest of theirs.
    """
    members = [experts[name] for name in draft.members]
    weights = {key: experts[key] for member in members for key in member.residency_keys(experts)}
    adapters = [member for member in members if member.base]
    parts = [*weights.values(), *adapters]
    prices = [member.price for member in members]
    active = [member.parameters_active for member in members]
    if draft.architecture in ONE_BASE_ARCHITECTURES:
        active = [*(each.parameters_active for each in weights.values()), *(each.parameters_total for each in adapters)]
    contexts = [member.context_length for member in members if member.context_length]
    return {
        "parameters_total": _total([part.parameters_total for part in parts]),
        "parameters_active": _total(active),
        "size_bytes": _total([part.size_bytes for part in parts]),
        "context_length": min(contexts, default=None),
        "price": _highest([price for price in prices if price]) if all(prices) else None,
    }


def _total(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _highest(prices: list[Price]) -> Price:
    inputs, outputs = ([getattr(p, f"{side}_usd_per_mtok") for p in prices] for side in ("input", "output"))
    return Price(input_usd_per_mtok=max(inputs), output_usd_per_mtok=max(outputs))


def _is_member(member: object) -> bool:
    return isinstance(member, dict) and all(isinstance(member.get(key), str) for key in ("name", "digest"))
