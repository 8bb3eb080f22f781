"""A mixture of LoRA adapters of one base: several adapters that every token of a row uses, with weights of a gate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from coe.engines.base import Adapter

if TYPE_CHECKING:
    from torch import Tensor

    from coe.engines.hf.lora.gates.gate import Gate
    from coe.engines.hf.lora.gates.settings import MixSettings
    from registry.spec import ExpertSpec


@dataclass(frozen=True, slots=True)
class Mixture(Adapter):
    """What stands where an adapter does: rows with it mix its members. Its chat template is that of the first member.

    Attributes:
        spec: of the composed expert.
        path: folder of the first member.
        members: the adapters.
        settings: the gate and how it chooses.
        artifact: folder with the trained weights of the gate.
        identity: of members, settings and weights: `key`.
        query: (n,) embedding of the request's query, for a gate that reads it; not part of the identity.
    """

    members: tuple[Adapter, ...]
    settings: MixSettings
    artifact: Path | None
    identity: str
    query: Any = None

    @classmethod
    def of(cls, spec: ExpertSpec, members: Sequence[Adapter], settings: MixSettings, artifact: Path | None) -> Self:
        """A mixture of these adapters, without a query."""
        weights = Adapter(spec, artifact).key() if artifact else ""
        stated = [[member.key() for member in members], settings.model_dump(mode="json"), weights]
        identity = hashlib.sha256(json.dumps(stated).encode()).hexdigest()
        return cls(spec, members[0].path, tuple(members), settings, artifact, f"mixture:{identity}")

    def key(self) -> str:
        """Identity of members, settings and weights."""
        return self.identity


def adapters_of(adapter: Adapter | None) -> tuple[Adapter, ...]:
    """The adapters that a row uses: none, the one, or the members of a mixture."""
    if isinstance(adapter, Mixture):
        return adapter.members
    return () if adapter is None else (adapter,)


@dataclass(eq=False, frozen=True, slots=True)
class MixtureSlot:
    """A loaded mixture.

    Attributes:
        name: unique among mixtures and adapters of the base.
        members: the names of its adapters on the base.
        gate: weighs them.
    """

    name: str
    members: tuple[str, ...]
    gate: Gate


@dataclass(eq=False, frozen=True, slots=True)
class QueryMixture:
    """How a row names its mixture.

    Attributes:
        name: of the loaded mixture.
        query: (n_members,) what the row's query adds to the gate's logits, or None.
    """

    name: str
    query: Tensor | None = None


RowSlot = str | QueryMixture | None
"""What a row has: the name of an adapter on the base, a mixture, or the bare base."""


def name_of(slot: RowSlot) -> str | None:
    """The name by which rows with the same adapter or mixture share what is prepared for a batch."""
    return slot.name if isinstance(slot, QueryMixture) else slot
