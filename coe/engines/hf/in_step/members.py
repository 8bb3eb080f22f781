"""The members of a composed expert that run in step: resident models of the engine hf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from coe.engines.base import Adapter, Member
from coe.engines.hf.expert import HFExpert
from coe.errors import Unsupported
from registry.spec import ExpertSpec

MOST_MEMBERS: Final = 16
"""Most members that run in step: each has a key-value cache of its own for every request."""


@dataclass(frozen=True, slots=True)
class HFMember:
    """A resident model, with an adapter if the member is one."""

    name: str
    expert: HFExpert
    adapter: Adapter | None = None

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        stated = self.adapter.spec.context_length if self.adapter else None
        return min(self.expert.context_length, stated or self.expert.context_length)


def hf_members(spec: ExpertSpec, members: Mapping[str, Member]) -> tuple[HFMember, ...]:
    """The members in their order.

    Raises:
        Unsupported: there are too many, or one is served by another engine; with its name.
    """
    if len(members) > MOST_MEMBERS:
        raise Unsupported(f"{spec.name!r} has {len(members)} members in step; the most is {MOST_MEMBERS}")
    found = []
    for name, member in members.items():
        if not isinstance(member.expert, HFExpert):
            raise Unsupported(
                f"{spec.name!r} runs its members in step inside the engine hf, and {name!r} is served by "
                f"{type(member.expert).__name__}: serve it, or the base of an adapter, with `engine: hf`"
            )
        found.append(HFMember(name, member.expert, member.adapter))
    return tuple(found)
