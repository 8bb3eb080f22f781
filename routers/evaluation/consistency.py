"""Whether a router decides alike about the same request in other words and other languages.

A file of variants has a row per wording: `group` (rows of one request share it), `prompt`, and optionally `variant`, a
label such as `de`. The first row of a group is the reference of the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from routers.errors import InvalidOutcomes
from routers.evaluation.recorded_routing import Choosing, route
from routers.factory import TrainableRouter
from routers.outcomes.cells import texts
from routers.outcomes.files import read_frame
from routers.outcomes.table import OutcomeTable

_NEEDED = ("group", "prompt")


@dataclass(frozen=True, slots=True)
class Variants:
    """n wordings of fewer requests.

    Attributes:
        groups: the request of each wording; labels: its kind, empty if the file has none.

    Raises:
        InvalidOutcomes: a group or a prompt is empty, or a group has one wording only; lists all problems.
    """

    groups: tuple[str, ...]
    labels: tuple[str, ...]
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        problems = [
            f"column {name!r} is empty in {sum(not value for value in values)} rows"
            for name, values in (("group", self.groups), ("prompt", self.prompts))
            if not all(values)
        ]
        if alone := [group for group, n in Counter(self.groups).items() if n == 1]:
            problems.append(f"a group needs at least two rows, but {len(alone)} have one, such as {alone[0]!r}")
        if not self.groups:
            problems.append("there are no rows")
        if problems:
            raise InvalidOutcomes(*problems)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The rows of a `.jsonl`, `.csv` or `.parquet` file.

        Raises:
            InvalidOutcomes: the file cannot be read, lacks a column, or has wrong rows; names the file.
        """
        frame, problems = read_frame(path), list[str]()
        if missing := [name for name in _NEEDED if name not in frame.columns]:
            raise InvalidOutcomes(f"no column {' and no column '.join(map(repr, missing))}", source=str(path))
        groups, prompts = (texts(frame[name], name, problems) for name in _NEEDED)
        labels = texts(frame["variant"], "variant", problems) if "variant" in frame.columns else ("",) * len(groups)
        try:
            found = cls(groups, labels, prompts)
        except InvalidOutcomes as error:
            problems += error.problems
        if problems:
            raise InvalidOutcomes(*problems, source=str(path))
        return found

    def table(self, experts: Sequence[str]) -> OutcomeTable:
        """The wordings as rows of a table, to route them and to fill in signals; its scores mean nothing."""
        ids = tuple(f"{group}/{i}" for i, group in enumerate(self.groups))
        return OutcomeTable(ids, self.prompts, tuple(experts), np.zeros((len(ids), len(experts))))


@dataclass(frozen=True, slots=True)
class Consistency:
    """How often the first choice stays the same.

    Attributes:
        same: share of the other wordings that get the expert of their group's first one.
        whole: share of the groups in which all do.
        by_label: label -> share of its wordings.
    """

    same: float
    whole: float
    by_label: Mapping[str, float]


def consistency(
    router: TrainableRouter, variants: Variants, table: OutcomeTable, choosing: Choosing = Choosing()
) -> Consistency:
    """Route every wording and compare.

    Args:
        table: `variants.table(experts)`, with the features that the router requires.
        choosing: its utility and selector; a composition does not matter.
    """
    routing = route(router, table, Choosing(choosing.utility, choosing.select))
    picks = np.where(routing.refused, -1, routing.picks)
    first: dict[str, int] = {}
    for i, group in enumerate(variants.groups):
        first.setdefault(group, i)
    others = [i for i, group in enumerate(variants.groups) if first[group] != i]
    same = {i: bool(picks[i] == picks[first[variants.groups[i]]]) for i in others}
    differing = {variants.groups[i] for i in others if not same[i]}
    by_label: dict[str, list[bool]] = {}
    for i in others:
        by_label.setdefault(variants.labels[i], []).append(same[i])
    return Consistency(
        float(np.mean(list(same.values()))),
        1 - len(differing) / len(first),
        {label: float(np.mean(found)) for label, found in by_label.items() if label},
    )
