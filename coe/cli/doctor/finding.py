"""Findings of checks, and how checks are run so that none of them can hang the command."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

Check = Callable[[], Iterable["Finding"]]


class Level(StrEnum):
    """How bad a finding is; the command fails on `BROKEN` only."""

    OK = "ok"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found.

    Attributes:
        area: of the machine or the service, in a word. text: what is so. fix: what to do; empty where nothing is.
    """

    area: str
    level: Level
    text: str
    fix: str = ""


def run_checks(checks: Mapping[str, Check], *, timeout_s: float) -> list[Finding]:
    """The findings of all checks in order; they run side by side, and one that takes too long is left behind."""
    results = {area: _started(area, check) for area, check in checks.items()}
    found: list[Finding] = []
    for area, result in results.items():
        try:
            found += result.get(timeout=timeout_s)
        except queue.Empty:
            text = f"this check did not finish within {timeout_s:g} s"
            found.append(Finding(area, Level.WARNING, text, "a disk, a driver or a network may hang: look there first"))
    return found


def _started(area: str, check: Check) -> queue.Queue[list[Finding]]:
    """Run a check in a thread that does not hold the process."""
    result: queue.Queue[list[Finding]] = queue.Queue(maxsize=1)

    def run() -> None:
        try:
            result.put(list(check()))
        except Exception as error:  # a check that fails is a finding, not the end of the others
            result.put([Finding(area, Level.BROKEN, f"the check failed: {type(error).__name__}: {error}")])

    threading.Thread(target=run, name=f"doctor-{area}", daemon=True).start()
    return result
