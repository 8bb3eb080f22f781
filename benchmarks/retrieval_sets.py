"""Retrieval made from labelled sets: a query, a corpus, and what is relevant.

Of a set of intents or topics, a query is a text, and relevant are the other texts of its label. Of a set of questions,
a query is a question, and relevant is its right answer among the answers of all questions.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PER_LABEL = 60
"""Most texts of an intent."""
CLINC = ("travel", "kitchen_and_dining", "work")
"""Domains of clinc150 that are sets of their own."""
MOST_ITEMS = {"banking77": 1600, **{f"clinc {domain}": 800 for domain in CLINC}, "": 480}
"""Most items of a set; "" is any other. There are 77 intents in the first, 15 in each of clinc150's."""
NDCG_AT = 10
_OPTION = re.compile(r"\(([A-Z])\)")


@dataclass(frozen=True)
class Item:
    """A text, and what it is relevant for: texts of the same `group`. answer: what is retrieved; "" if texts are."""

    text: str
    group: str
    answer: str = ""


@dataclass(frozen=True)
class Part:
    """Items of one set whose texts occur in no other part.

    Attributes:
        queries: n texts. corpus: c texts. relevant: (n, c) bool; own: (n,) the query's place in the corpus, or -1.
    """

    queries: tuple[str, ...]
    corpus: tuple[str, ...]
    relevant: NDArray[np.bool_]
    own: NDArray[np.int64]


def read_sets(folder: Path) -> dict[str, list[Item]]:
    """Set -> items, without repeated texts; at most MOST_ITEMS each."""
    made = {
        "banking77": _banking(folder),
        **{f"clinc {domain}": _clinc(folder, domain) for domain in CLINC},
        "mmlu-pro topics": _topics(folder),
        "arc": _arc(folder),
        "medmcqa": _medmcqa(folder),
        "common sense": _common_sense(folder),
    }
    rng = np.random.default_rng(0)
    found = {}
    for name, items in made.items():
        kept = list({item.text.strip().lower(): item for item in items if item.text.strip()}.values())
        found[name] = [kept[i] for i in rng.permutation(len(kept))[: MOST_ITEMS.get(name, MOST_ITEMS[""])]]
    return found


def part_of(items: list[Item], n_queries: int) -> Part:
    """The corpus of all items, and the first queries among them that have something relevant."""
    answers = [item.answer for item in items]
    corpus = tuple(dict.fromkeys(answers)) if answers[0] else tuple(item.text for item in items)
    groups = np.array([item.group for item in items], dtype=object)
    queries, relevant, own = [], [], []
    place = {text: i for i, text in enumerate(corpus)}
    for i, item in enumerate(items):
        if item.answer:
            row = np.zeros(len(corpus), dtype=bool)
            row[place[item.answer]] = True
        else:
            row = groups == item.group
            row[i] = False
        if row.any() and len(queries) < n_queries:
            queries.append(item.text)
            relevant.append(row)
            own.append(-1 if item.answer else i)
    return Part(tuple(queries), corpus, np.array(relevant), np.array(own))


def ndcg(part: Part, queries: NDArray[np.floating], corpus: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n,) nDCG@10 with binary relevance: sum over ranks of rel / log2(rank + 1), over that of the best order.

    Args:
        queries: (n, dim). corpus: (c, dim); all of length 1.
    """
    similar = queries @ corpus.T
    has_own = part.own >= 0
    similar[np.flatnonzero(has_own), part.own[has_own]] = -np.inf
    ranked = np.argsort(-similar, axis=1, kind="stable")[:, :NDCG_AT]
    discount = 1.0 / np.log2(np.arange(2, NDCG_AT + 2))
    gained = np.take_along_axis(part.relevant, ranked, axis=1) @ discount[: ranked.shape[1]]
    best = np.cumsum(discount)[np.minimum(part.relevant.sum(axis=1), NDCG_AT) - 1]
    return np.asarray(gained / best)


def _banking(folder: Path) -> list[Item]:
    rows: list[Item] = []
    for name in ("banking77_train.csv", "banking77_test.csv"):
        with (folder / name).open(encoding="utf-8") as file:
            rows += [Item(row["text"], row["category"]) for row in csv.DictReader(file)]
    return _balanced(rows)


def _clinc(folder: Path, domain: str) -> list[Item]:
    intents = set(json.loads((folder / "clinc150_domains.json").read_text(encoding="utf-8"))[domain])
    data = json.loads((folder / "clinc150_full.json").read_text(encoding="utf-8"))
    rows = [Item(text, intent) for part in ("train", "val", "test") for text, intent in data[part] if intent in intents]
    return _balanced(rows)


def _topics(folder: Path) -> list[Item]:
    rows = _lines(folder / "mmlu_pro_categories_2520.jsonl")
    return [Item(row["prompt"].partition("\nA. ")[0], row["domain"]) for row in rows]  # without the options


def _arc(folder: Path) -> list[Item]:
    rows = [row for part in ("train", "val", "test") for row in _lines(folder / f"arc_challenge_{part}.jsonl")]
    return [Item(row["question"], row["id"], _chosen(row["choices"], row["answerKey"])) for row in rows]


def _common_sense(folder: Path) -> list[Item]:
    rows = (row for row in _lines(folder / "mmlu_csqa_obqa_llmrouter.jsonl") if row["task_name"] != "mmlu")
    made = ((row, ast.literal_eval(row["choices"])) for row in rows)  # written as Python, not JSON
    return [Item(row["query"], str(i), _chosen(choices, row["ground_truth"])) for i, (row, choices) in enumerate(made)]


def _medmcqa(folder: Path) -> list[Item]:
    found = []
    for i, row in enumerate(json.loads((folder / "medmcqa_symbolicmoe.json").read_text(encoding="utf-8"))):
        question, _, options = row["question"].partition(" The options are:")
        parts = _OPTION.split(options)
        answer = dict(zip(parts[1::2], parts[2::2], strict=False)).get(row["gold_answer"], "").strip()
        if answer:
            found.append(Item(question, str(i), answer))
    return found


def _chosen(choices: dict[str, list[str]], label: str) -> str:
    return choices["text"][choices["label"].index(label)]


def _balanced(items: list[Item]) -> list[Item]:
    counts: dict[str, int] = {}
    kept = []
    for item in items:
        counts[item.group] = counts.get(item.group, 0) + 1
        if counts[item.group] <= PER_LABEL:
            kept.append(item)
    return kept


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
