"""The result of a run: one JSON file, and what the report reads of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from examples.zoo.families import Split
from examples.zoo.latent.plan import Run
from registry.storage import atomic_path

FILE: Final = "result.json"
KEPT: Final = Path(__file__).resolve().parent.parent / "latent_results"
"""Results that docs/results.md reports, as files of the project: runs take core-hours."""
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Training:
    """What was trained: seconds, number of trained weights, held-out loss in nats a token of the answer."""

    seconds: float
    parameters: int
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a run measured.

    Attributes:
        scores: split -> family -> score of each row, in [0, 1]; the rows are the same in every run of a bench.
        prompt_tokens, completion_tokens, flops: means per test query, over all expert calls.
        seconds: median of a query asked alone.
        training: None for a method that trains nothing.
        expert: the single expert that was chosen, if one was.
    """

    bench: str
    method: str
    seed: int
    scores: Mapping[str, Mapping[str, list[float]]]
    prompt_tokens: float
    completion_tokens: float
    flops: float
    seconds: float | None = None
    training: Training | None = None
    expert: str | None = None

    def accuracy(self, split: Split, family: str | None = None) -> float | None:
        """Share of right answers of a family, or of all; None if the split was not scored."""
        by_family = self.scores.get(str(split), {})
        rows = [score for name, found in by_family.items() if family in (None, name) for score in found]
        return fmean(rows) if rows else None


def write_result(folder: Path, result: Result) -> None:
    """Write the file of a run, with the accuracies beside the scores for readers."""
    shares = {split: {name: fmean(rows) for name, rows in found.items()} for split, found in result.scores.items()}
    document = {"format": _FORMAT, "accuracy": shares} | asdict(result)
    with atomic_path(folder / FILE) as path:
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items())
        path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def read_result(folder: Path) -> Result | None:
    """The result of a finished run, or None."""
    if not (file := folder / FILE).is_file():
        return None
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if document.pop("format") != _FORMAT:
        raise ValueError(f"{file} is of another version: delete it, and the run is made again")
    del document["accuracy"]
    training = document.pop("training")
    return Result(**document, training=None if training is None else Training(**training))


def keep(folder: Path, runs: Iterable[Run], into: Path = KEPT) -> list[Run]:
    """Write the results of the runs that are finished into the project; returns them."""
    kept = []
    for run in runs:
        if (result := read_result(folder / run.id)) is not None:
            (into / run.id).mkdir(parents=True, exist_ok=True)
            write_result(into / run.id, result)
            kept.append(run)
    return kept


def read_results(folder: Path, runs: Iterable[Run]) -> list[Result]:
    """The results of the runs that are finished."""
    return [found for run in runs if (found := read_result(folder / run.id)) is not None]
