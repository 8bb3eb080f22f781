"""FileWatch: notices that the files of served experts are no longer the registered ones, before a load fails on them.

Files are compared by size and time; only changed ones are hashed. An expert whose weights are in memory continues with
them; what is reported here is refused at its next load (`coe.experts.locate`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from registry.command_files import check_command
from registry.digest import check_files, digest_files
from registry.errors import RegistryError
from registry.sources import has_files, resolve_here
from registry.spec import ExpertSpec

PERIOD_S: Final = 10.0
"""Seconds between two looks at the files of all experts."""
Stamp = tuple[tuple[str, int, int], ...]


class FileWatch:
    """Looks at the files in a thread of its own: hashing takes seconds per gigabyte.

    Args:
        period_s: seconds between two looks.
    """

    def __init__(self, period_s: float = PERIOD_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._period_s, self._clock = period_s, clock
        self._looked_s = float("-inf")
        self._thread: threading.Thread | None = None
        self._stamps: dict[str, Stamp] = {}
        self._problems: Mapping[str, str] = {}

    def problems(self, experts: Iterable[ExpertSpec]) -> list[str]:
        """What the last finished look found, by expert; starts another one if it is time."""
        due = self._clock() - self._looked_s >= self._period_s
        if due and (self._thread is None or not self._thread.is_alive()):
            self._looked_s = self._clock()
            self._thread = threading.Thread(target=self.look, args=(list(experts),), daemon=True)
            self._thread.start()
        return [problem for _, problem in sorted(self._problems.items())]

    def look(self, experts: Iterable[ExpertSpec]) -> None:
        """Compare the files of the experts with the registered ones; hashes those that changed since the last look."""
        problems: dict[str, str] = {}
        stamps: dict[str, Stamp] = {}
        for spec in experts:
            if spec.server is not None and (problem := _command_problem(spec)):
                problems[spec.name] = problem
            if not has_files(spec) or spec.digest is None:
                continue
            found = _stamp(spec)
            if found is None:
                if _registered(spec) or spec.ref in self._stamps:
                    problems[spec.name] = f"the files of {spec.name!r} are missing: {spec.source}"
                continue
            stamps[spec.ref] = found
            problem = self._problem(spec, found)
            if problem is not None:
                problems[spec.name] = problem
        self._stamps, self._problems = stamps, problems

    def _problem(self, spec: ExpertSpec, found: Stamp) -> str | None:
        """What is wrong with the files of an expert: as before if they have not changed, else by their hashes."""
        before, known = self._problems.get(spec.name), self._stamps.get(spec.ref)
        if found == known:
            return before
        if known is None and before is None and _has_sizes(spec, found):
            return None
        return _difference(spec)


def _command_problem(spec: ExpertSpec) -> str | None:
    """What is wrong with the files that an expert's command names; hashes of unchanged files are cached."""
    try:
        check_command(spec)
    except RegistryError as error:
        return str(error)
    return None


def _stamp(spec: ExpertSpec) -> Stamp | None:
    """Name, size and time of each file that matters; None if there is none on this machine."""
    try:
        if (root := resolve_here(spec)) is None:
            return None
        stats = [(file.relative_to(root if root.is_dir() else root.parent), file.stat()) for file in digest_files(root)]
    except (OSError, RegistryError):
        return None
    return tuple((name.as_posix(), stat.st_size, stat.st_mtime_ns) for name, stat in stats) or None


def _registered(spec: ExpertSpec) -> bool:
    """Whether the expert's files should be on this machine: a local path, not a repository that is loaded on demand."""
    return Path(spec.source).is_absolute() or spec.source.startswith("home://")


def _has_sizes(spec: ExpertSpec, found: Stamp) -> bool:
    """Whether the files have the registered names and sizes: the first look hashes only files that have not."""
    return {(record.name, record.size_bytes) for record in spec.files} == {(name, size) for name, size, _ in found}


def _difference(spec: ExpertSpec) -> str | None:
    """What differs from the registered files; None if nothing does."""
    try:
        root = resolve_here(spec)
        if root is not None:
            check_files(spec, root)
    except RegistryError as error:
        return str(error)
    return None
