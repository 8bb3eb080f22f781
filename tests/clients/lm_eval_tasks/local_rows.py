"""Rows of the tasks beside this file: from the data folder that COE_DATA_DIR names, or from a short list."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset

N_ROWS = 200
"""Rows of each data set that a task takes: the first ones."""


def arc_challenge(**_: Any) -> dict[str, Dataset]:
    """ARC-Challenge, validation split."""
    rows = _lines("arc_challenge_val.jsonl")
    return _test([_row(r["question"], r["choices"], r["answerKey"]) for r in rows])


def commonsense(**_: Any) -> dict[str, Dataset]:
    """CommonsenseQA."""
    rows = [r for r in _lines("mmlu_csqa_obqa_llmrouter.jsonl") if r["task_name"] == "commonsense_qa"]
    return _test([_row(r["query"], ast.literal_eval(r["choices"]), r["ground_truth"]) for r in rows])


def capitals(**_: Any) -> dict[str, Dataset]:
    """Four countries, so that an endpoint can be tried without data."""
    answers = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima"}
    return _test([{"country": country, "capital": capital} for country, capital in answers.items()])


def _row(question: str, choices: dict[str, list[str]], key: str) -> dict[str, Any]:
    return {"question": question, "options": choices["text"], "answer": choices["label"].index(key)}


def _lines(name: str) -> list[dict[str, Any]]:
    folder = os.environ.get("COE_DATA_DIR")
    if not folder:
        raise RuntimeError(f"set COE_DATA_DIR to the folder that has sets/{name}")
    return [json.loads(line) for line in (Path(folder) / "sets" / name).read_text().splitlines()]


def _test(rows: list[dict[str, Any]]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(rows[:N_ROWS])}
