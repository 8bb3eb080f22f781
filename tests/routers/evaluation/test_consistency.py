"""Consistency: the share of rewordings and translations that get the same expert as the first wording."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from routers.base import Estimate, Query
from routers.errors import InvalidOutcomes
from routers.evaluation.consistency import Consistency, Variants, consistency

ZOO = Path(__file__).parents[3] / "examples" / "zoo"
EXPERTS = ("shell", "sql")


class ByWord:
    """`shell` answers what mentions a file, `sql` what mentions a table; an abstention refuses the rest."""

    kind, experts, requires = "by-word", EXPERTS, frozenset[str]()

    def estimate(self, queries: list[Query]) -> Estimate:
        quality = np.array([[float("file" in query.text.lower()), float("table" in query.text)] for query in queries])
        eligible = quality > 0
        return Estimate(EXPERTS, quality, eligible=eligible, abstained=~eligible.any(axis=1))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_group_is_compared_with_its_first_row(tmp_path: Path) -> None:
    rows = [
        {"group": "a", "variant": "en", "prompt": "delete the file"},
        {"group": "b", "variant": "en", "prompt": "count the table"},
        {"group": "a", "variant": "en-2", "prompt": "remove a file"},
        {"group": "a", "variant": "de", "prompt": "lösche die Datei"},
        {"group": "b", "variant": "de", "prompt": "table zählen"},
    ]
    variants = Variants.read(write(tmp_path / "v.jsonl", rows))
    found = consistency(ByWord(), variants, variants.table(EXPERTS))  # type: ignore[arg-type]
    assert found == Consistency(2 / 3, 1 / 2, {"en-2": 1.0, "de": 0.5}), "a refusal is another decision"


def test_without_labels_there_is_no_share_of_each(tmp_path: Path) -> None:
    rows = [{"group": 1, "prompt": "a file"}, {"group": 1, "prompt": "this file"}, {"group": 1, "prompt": "table"}]
    variants = Variants.read(write(tmp_path / "v.jsonl", rows))
    found = consistency(ByWord(), variants, variants.table(EXPERTS))  # type: ignore[arg-type]
    assert found == Consistency(0.5, 0.0, {})


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"prompt": "x"}], "no column 'group'"),
        ([{"group": "a", "text": "x"}], "no column 'prompt'"),
        ([{"group": "a", "prompt": "x"}], "a group needs at least two rows, but 1 have one, such as 'a'"),
        ([{"group": "a", "prompt": "x"}, {"group": "a", "prompt": ""}], "column 'prompt' is empty in 1 rows"),
        ([{"group": "", "prompt": "x"}, {"group": "", "prompt": "y"}], "column 'group' is empty in 2 rows"),
        ([{"group": "a", "prompt": ["x"]}, {"group": "a", "prompt": "y"}], "is not text or a number in 1 row: 1"),
    ],
)
def test_wrong_rows_are_refused_with_the_file(tmp_path: Path, rows: list[dict[str, Any]], problem: str) -> None:
    path = write(tmp_path / "v.jsonl", rows)
    with pytest.raises(InvalidOutcomes) as error:
        Variants.read(path)
    assert problem in str(error.value) and str(path) in str(error.value)


def test_the_variants_of_the_zoo_are_complete() -> None:
    rows = [json.loads(line) for line in (ZOO / "variants.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = ["en", "en-2", "en-3", "de", "fr", "es", "zh"]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    assert [row["variant"] for row in rows] == labels * len(groups) and len(groups) == 8 * 5
    assert {row["domain"] for row in rows} == {path.stem for path in (ZOO / "tasks").glob("*.jsonl")}
    assert all(row["group"].startswith(row["domain"]) for row in rows)
    assert len({row["prompt"] for row in rows}) == len(rows)
    trained = {
        json.loads(line)["prompt"]
        for path in (ZOO / "tasks").glob("*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    }
    assert len(Variants.read(ZOO / "variants.jsonl").prompts) == 280
    assert not trained & {row["prompt"] for row in rows if row["variant"] != "en"}
