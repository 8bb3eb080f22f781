"""Experts that are larger than the memory of every pool that serves them, from what their files state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from coe.config import Config
from coe.engines import engine_kind
from registry.documents import Loc
from registry.spec import ExpertSpec
from registry.spelling import listing
from registry.store import Snapshot

_ITEM_BYTES: Final = {"float32": 4, "auto": 2, "bfloat16": 2, "float16": 2}
"""Fewest bytes of a weight; `auto` may take more."""


def too_large(config: Config, snapshot: Snapshot) -> Iterator[tuple[Loc, str]]:
    """The place of each budget that experts exceed, and a text with their names, where no other pool has the memory.

    An expert counts the least that its weights can take in memory; without a budget in the configuration, nothing is
    known.
    """
    found: dict[tuple[int, Loc], dict[str, int]] = {}
    for name, spec in snapshot.experts.items():
        room = _room(config, name)
        needed = sum(_least_bytes(snapshot.experts[each], config) for each in spec.residency_keys(snapshot.experts))
        if room is not None and needed > room[0]:
            found.setdefault(room, {})[name] = needed
    for (budget, loc), experts in found.items():
        yield loc, _refused(experts, budget)


def _refused(experts: Mapping[str, int], budget: int) -> str:
    """Why requests for these experts are refused. experts: name -> the least bytes of its weights."""
    names, most = listing(map(repr, experts)), max(experts.values())
    if len(experts) == 1:
        text = f"{names} needs at least {_size(most)} in memory, the budget is {_size(budget)}"
        return f"{text}: requests for it are refused; raise the budget, or leave the expert out"
    text = f"{len(experts)} experts need more memory than the budget of {_size(budget)}, up to {_size(most)}: {names}"
    return f"{text}. Requests for them are refused; raise the budget, or leave them out"


def _room(config: Config, name: str) -> tuple[int, Loc] | None:
    """The largest budget of the pools that serve an expert, and its place; None if one of them states none."""
    found: list[tuple[int, Loc]] = []
    for number, pool in enumerate(config.serve.pools):
        if pool.experts is None or name in pool.experts:
            budget = config.host.budget if pool.budget is None else pool.budget
            if budget is None:
                return None
            loc: Loc = ("host", "budget") if pool.budget is None else ("serve", "pools", number, "budget")
            found.append((int(budget), loc))
    return max(found, key=lambda each: each[0], default=None)


def _least_bytes(spec: ExpertSpec, config: Config) -> int:
    if spec.parameters_total is None or spec.quantization is not None:
        return spec.size_bytes or 0
    kind = engine_kind(spec, on_cpu=config.engines.auto_on_cpu)
    dtype = config.engines.settings(kind).get("dtype", "auto")
    floats = spec.parameters_total * _ITEM_BYTES.get(str(dtype), 2)
    return floats if spec.size_bytes is None or dtype == "float32" else min(spec.size_bytes, floats)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB" if size_bytes >= 2**20 else f"{size_bytes:,} bytes"
