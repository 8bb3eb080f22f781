"""Experts that are larger than the memory of every pool that serves them, from what their files state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from coe.config import Config
from coe.engines import engine_kind
from registry.documents import Loc
from registry.spec import ExpertSpec
from registry.store import Snapshot

_ITEM_BYTES: Final = {"float32": 4, "auto": 2, "bfloat16": 2, "float16": 2}
"""Fewest bytes of a weight; `auto` may take more."""


def too_large(config: Config, snapshot: Snapshot) -> Iterator[tuple[Loc, str]]:
    """The place in the configuration, and the text, for each expert that no pool has the memory for.

    An expert counts the least that its weights can take in memory; without a budget in the configuration, nothing is
    known.
    """
    for name, spec in snapshot.experts.items():
        room = _room(config, name)
        needed = sum(_least_bytes(snapshot.experts[each], config) for each in spec.residency_keys(snapshot.experts))
        if room is not None and needed > room[0]:
            text = f"{name!r} needs at least {_mib(needed)} in memory, the budget is {_mib(room[0])}"
            yield room[1], f"{text}: requests for it are refused; raise the budget, or leave the expert out"


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


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
