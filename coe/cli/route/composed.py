"""The members of composed experts that a decision leads to, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from registry.spec import ExpertSpec, Kind

_ROLES: Final[Mapping[str, str]] = {
    "notes": "{first} answers, and reads the hidden states of {others}",
    "cache": "{first} answers, and reads the key-value entries of {others}",
    "mot": "one of {all} answers, and reads the hidden states of others",
    "lora-mix": "each token mixes the LoRA updates of {all}",
    "logits": "the scores of each next token of {all} are combined",
}
"""Architecture -> what its members do."""


def composed_lines(names: Iterable[str], experts: Mapping[str, ExpertSpec]) -> list[str]:
    """One line for each composed expert among the names: architecture, and what its members do."""
    specs = [experts[name] for name in dict.fromkeys(names) if name in experts]
    return [f"{spec.name}: {_composition(spec)}" for spec in specs if spec.kind is Kind.COMPOSED]


def _composition(spec: ExpertSpec) -> str:
    first, others = spec.members[0], ", ".join(spec.members[1:])
    role = _ROLES.get(spec.architecture or "", "members {all}")
    words = role.format(first=first, others=others or "no others", all=", ".join(spec.members))
    return f"{spec.architecture or 'composed'}, {words}"
