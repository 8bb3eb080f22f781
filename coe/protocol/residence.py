"""The body that states whether an expert is in memory: the field `coe.residence` of `/v1/models`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Weights = Mapping[str, Mapping[str, Any]]
"""`name@version` of weights in memory or loading on a host -> their `state`, `size_bytes` and `unload_in_s`."""


def residence_body(needed: Iterable[str], hosts: Sequence[Weights]) -> dict[str, Any]:
    """Whether an expert is in memory on the hosts that serve it.

    Args:
        needed: `name@version` of all weights that it needs: an adapter its base's, a composed expert its members'.
        hosts: what each host has in memory.

    Returns:
        `state`: `resident` if a host has all of its weights, else `loading` if one has or loads all of them, else
        `absent`. `size_bytes`: bytes of these weights there, null if absent. `unload_in_s`: seconds until the last of
        these hosts unloads them if no request comes; null: no time is set. `hosts`: number of hosts that serve it, and
        on how many of them it is `resident` or `loading`.
    """
    names = tuple(needed)
    states = [_state(names, host) for host in hosts]
    state = next((state for state in ("resident", "loading") if state in states), "absent")
    there = [
        [host[name] for name in names] for host, own in zip(hosts, states, strict=True) if own == state != "absent"
    ]
    left = [_first(weights) for weights in there]
    return {
        "state": state,
        "size_bytes": max((sum(each["size_bytes"] for each in weights) for weights in there), default=None),
        "unload_in_s": None if None in left else max((each for each in left if each is not None), default=None),
        "hosts": {"all": len(hosts), "resident": states.count("resident"), "loading": states.count("loading")},
    }


def _state(names: Sequence[str], host: Weights) -> str:
    if not all(name in host for name in names):
        return "absent"
    return "resident" if all(host[name]["state"] == "resident" for name in names) else "loading"


def _first(weights: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds until the first of the weights that an expert needs is unloaded."""
    return min((each["unload_in_s"] for each in weights if each["unload_in_s"] is not None), default=None)
