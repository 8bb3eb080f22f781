"""Speeds of loading and generating, and lengths of answers: from an earlier run, from profiles, or given."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coe.runs.errors import RunFolderError
from coe.runs.folder import RUN
from coe.runs.storage import Folder
from registry.profiles import Profiles
from registry.store import Snapshot


@dataclass(frozen=True, slots=True)
class Rates:
    """Known speeds and lengths of answers; unknown ones are None or absent.

    Attributes:
        load_bytes_per_s: bytes of weights loaded into memory.
        tokens_per_s: new tokens of one host, the time for prompts included.
        by_residency: the same for single residencies; it takes precedence.
        mean_tokens: mean new tokens of each expert's answers.
    """

    load_bytes_per_s: float | None = None
    tokens_per_s: float | None = None
    by_residency: Mapping[str, float] = field(default_factory=dict)
    mean_tokens: Mapping[str, float] = field(default_factory=dict)

    def load_s(self, size_bytes: int | None) -> float | None:
        """Seconds to load weights of a size; 0 for a remote expert, which has none."""
        if size_bytes == 0:
            return 0.0
        return None if size_bytes is None or not self.load_bytes_per_s else size_bytes / self.load_bytes_per_s

    def work_s(self, residency: str, tokens: float | None) -> float | None:
        """Seconds to generate tokens with the experts of a residency."""
        rate = self.by_residency.get(residency, self.tokens_per_s)
        return None if tokens is None or not rate else tokens / rate


def rates_of_run(output: str, snapshot: Snapshot) -> Rates:
    """The rates that an earlier run measured, from the run.json in its folder.

    Tokens per second of a residency are those of its work items, from the moment its weights are in memory.

    Raises:
        RunFolderError: there is no run.json, or it lacks these figures.
    """
    folder = Folder.of(output)
    if not folder.exists(RUN):
        raise RunFolderError(f"{folder.at(RUN)} does not exist: name the --out of an earlier `coe batch`")
    try:
        with folder.open(RUN) as file:
            sessions: Sequence[Mapping[str, Any]] = json.loads(file.read())["sessions"]
        answers = _counted(sessions, "answers")
        answers.subtract(_counted(sessions, "failures"))
        tokens, work_s = _counted(sessions, "completion_tokens"), _counted(sessions, "work_s")
        loaded_bytes, load_s = (sum(each[name] for each in sessions) for name in ("loaded_bytes", "load_s"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{folder.at(RUN)} has no figures of loads and answers") from error
    residencies: Counter[str] = Counter()
    for name, count in tokens.items():
        if name in snapshot.experts:
            residencies[snapshot.residency(name)] += count
    return Rates(
        load_bytes_per_s=loaded_bytes / load_s if loaded_bytes and load_s else None,
        by_residency={
            residency: count / work_s[residency] for residency, count in residencies.items() if work_s[residency]
        },
        mean_tokens={name: count / answers[name] for name, count in tokens.items() if answers[name] > 0},
    )


def profiled_tokens(profiles: Profiles) -> dict[str, float]:
    """Mean tokens of each expert's answers, where recorded."""
    totals = ((expert, profiles.total(expert)) for expert in profiles.experts)
    return {
        expert: total.completion_tokens / total.n
        for expert, total in totals
        if total is not None and total.completion_tokens is not None
    }


def _counted(sessions: Iterable[Mapping[str, Any]], name: str) -> Counter[str]:
    whole: Counter[str] = Counter()
    for session in sessions:
        whole.update(session[name])
    return whole
