"""Rates of a service from its decision log: bytes loaded and tokens generated per second."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from coe.scheduler import Residency
from coe.simulation.arrivals import lines_of
from registry.json_text import loads

PROMPT_TOKENS_PER_NEW: Final = 10.0
"""Prompt tokens that take the time of a new one: a log does not show how fast prompts are read."""
_LEAST_LOAD_S: Final = 0.01
"""Requests that waited less for weights found them in memory."""
_MOST: Final = 100_000
"""Requests that are read: medians need no more."""


@dataclass(frozen=True, slots=True)
class LoggedSpeeds:
    """Medians over the requests of a log; None where it has none.

    Attributes:
        load_bytes_per_s: of the requests that waited for a load.
        tokens_per_s: new tokens of a request, with all that ran beside it.
    """

    load_bytes_per_s: float | None
    tokens_per_s: float | None


def work_of(requests: Iterable[tuple[Residency, int, int]]) -> dict[Residency, float]:
    """The work of each residency, in the time of a new token.

    Args:
        requests: residency, prompt tokens, new tokens.
    """
    work: dict[Residency, float] = {}
    for residency, prompt, new in requests:
        work[residency] = work.get(residency, 0.0) + prompt / PROMPT_TOKENS_PER_NEW + new
    return work


def logged_speeds(path: Path, residencies: Mapping[str, Residency], bytes_of: Mapping[str, int]) -> LoggedSpeeds:
    """The rates that the requests of a decision log to these experts show.

    A request whose load had begun before it came waited for a part of it, and counts as a faster load.

    Raises:
        ConfigError: the log cannot be read.
    """
    rates: list[float] = []
    tokens: list[float] = []
    for count, (expert, new_tokens, load_s, engine_s) in enumerate(_timed(path)):
        if count >= _MOST:
            break
        if engine_s > 0 and new_tokens > 1 and expert in residencies:
            tokens.append(new_tokens / engine_s)
        if load_s >= _LEAST_LOAD_S and expert in residencies:
            rates.append(sum(bytes_of[name] for name in residencies[expert]) / load_s)
    return LoggedSpeeds(median(rates) if rates else None, median(tokens) if tokens else None)


def _timed(path: Path) -> Iterator[tuple[str, int, float, float]]:
    """Expert, new tokens, seconds of load and of engine of each answered request."""
    for _, line in lines_of(path):
        try:
            document: Any = loads(line)
            usage, seconds, expert = document["usage"], document["latency_s"], document["expert"]
            if usage is None or not expert or seconds["engine"] is None:
                continue
            yield str(expert), int(usage["completion_tokens"]), float(seconds["load"] or 0), float(seconds["engine"])
        except (KeyError, TypeError, ValueError, RecursionError):
            continue  # `read_decision_log` names damaged lines
