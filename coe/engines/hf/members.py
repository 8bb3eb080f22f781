"""Members of composed experts in the engine hf, and what compositions need of them: one set of checks and errors.

Registration has refused members that are composed of others (`registry.references.check_references`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

from coe.engines.base import Adapter, Member
from coe.engines.hf.expert import HFExpert
from coe.errors import Unsupported, WeightsError
from registry.spec import ExpertSpec

MOST_MEMBERS: Final = 16
"""Most members that run in step: each has a key-value cache of its own for every request."""

_DIGESTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class HFMember:
    """A resident model, with an adapter if the member is one."""

    name: str
    expert: HFExpert
    adapter: Adapter | None = None

    @property
    def spec(self) -> ExpertSpec:
        """The adapter's, if the member is one, or the model's."""
        return self.adapter.spec if self.adapter else self.expert.spec

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        stated = self.adapter.spec.context_length if self.adapter else None
        return min(self.expert.context_length, stated or self.expert.context_length)


def hf_member(spec: ExpertSpec, name: str, member: Member) -> HFMember:
    """A member of the composed expert `spec`. Raises Unsupported if another engine serves it."""
    if not isinstance(member.expert, HFExpert):
        raise Unsupported(
            f"{spec.name!r} combines experts inside the engine hf, and its member {name!r} is served by "
            f"{type(member.expert).__name__}: serve it, or the base of an adapter, with `engine: hf`"
        )
    return HFMember(name, member.expert, member.adapter)


def hf_members(spec: ExpertSpec, members: Mapping[str, Member]) -> tuple[HFMember, ...]:
    """Members that run in step, in their order. Raises Unsupported as `hf_member`, and if there are too many."""
    if len(members) > MOST_MEMBERS:
        raise Unsupported(f"{spec.name!r} has {len(members)} members in step; the most is {MOST_MEMBERS}")
    return tuple(hf_member(spec, name, member) for name, member in members.items())


def adapters_of_one_base(spec: ExpertSpec, members: Mapping[str, Member]) -> tuple[HFExpert, list[Adapter]]:
    """The base of members that are adapters, and these.

    Raises:
        Unsupported: as `hf_member`; a member is not an adapter, or on another base.
    """
    found = [hf_member(spec, name, member) for name, member in members.items()]
    adapters = [member.adapter for member in found if member.adapter is not None]
    if strange := [member.name for member in found if member.adapter is None]:
        raise Unsupported(f"{spec.name!r} combines adapters of one base, and {_listed(strange)} is not an adapter")
    base, first = found[0].expert, found[0].name
    if strange := [member.name for member in found if member.expert is not base]:
        raise Unsupported(
            f"{spec.name!r} combines adapters of one base: {_listed(strange)} and {first!r} have other bases"
        )
    return base, adapters


def check_same_vocabulary(name: str, tokenizers: Mapping[str, Any]) -> None:
    """Compare the token ids of all members with those of the first. Takes 0.1 s for the first request to a model.

    Args:
        name: of the composed expert.
        tokenizers: of transformers, by the names of the members.

    Raises:
        Unsupported: they differ; with the names of the members.
    """
    first, *others = tokenizers
    own = vocabulary_digest(tokenizers[first])
    strange = [each for each in others if vocabulary_digest(tokenizers[each]) != own]
    if strange:
        sizes = ", ".join(f"{each!r} ({len(tokenizers[each]):,} tokens)" for each in strange)
        raise Unsupported(
            f"{name!r} combines the scores of tokens, so its members need one vocabulary: that of {first!r} "
            f"({len(tokenizers[first]):,} tokens) is not that of {sizes}. Combine these by text (`aggregate`) or notes"
        )


def vocabulary_digest(tokenizer: Any) -> str:
    """A digest of the pairs of token and id; equal for tokenizers whose ids mean the same."""
    if (digest := _DIGESTS.get(tokenizer)) is None:
        pairs = json.dumps(sorted(tokenizer.get_vocab().items()), separators=(",", ":"))
        digest = _DIGESTS[tokenizer] = hashlib.sha256(pairs.encode()).hexdigest()
    return digest


def artifact_folder(spec: ExpertSpec, path: Path | None) -> Path:
    """The folder of the artifact of a trained composition. Raises WeightsError if there is none."""
    if path is None:
        raise WeightsError(
            f"{spec.name!r} has no artifact: it needs `source`, the folder that `coe latent train` wrote"
        )
    return path


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))
