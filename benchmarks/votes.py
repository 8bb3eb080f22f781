"""Votes and cascades of several experts on recorded answers: accuracy, calls and cost.

    COE_DATA_DIR=... python benchmarks/votes.py [--kind knn] [--set k=150] [--pool nine|all] [--json PATH]

Five given folds of mmlupro28: routers, priors and thresholds see only the other four. A threshold is solved on one of
these four, with a router (and a prior) that was trained on the remaining three. Differences are to the weighted vote of
the same size, with paired bootstrap intervals of 95%.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coe.compose import Cascade, Composition, Single, Vote, WeightedVote
from coe.compose.option_prior import OptionPrior
from coe.evaluation.recorded_answers import CompositionResults, confidence_for_calls, replay
from routers.base import Estimate, Router, RoutingDecision
from routers.decision import decide
from routers.encoders.build import CachedEncoder, build_encoder
from routers.evaluation.metrics import paired_bootstrap
from routers.evaluation.thresholds import dynamic_for_calls
from routers.factory import build
from routers.outcomes.table import OutcomeTable
from routers.selectors import Selector, TopK

NINE = (
    "mathstral-7B",
    "Meta-Llama-3_1-8B-Instruct",
    "Phi-3-mini-4k-instruct",
    "gemma-7b",
    "Qwen1.5-7B-Chat",
    "Yi-34B",
    "c4ai-command-r-v01",
    "Mixtral-8x7B-Instruct-v0.1",
    "Mistral-7B-Instruct-v0.2",
)
FEWER = 3.75
"""Calls a query where 5 are 25% more."""


@dataclass(frozen=True)
class Fold:
    """A fold that is scored, and one of the others that thresholds are solved on."""

    test: OutcomeTable
    estimate: Estimate
    prior: OptionPrior
    tuning: OutcomeTable
    tuning_estimate: Estimate
    tuning_prior: OptionPrior

    @classmethod
    def of(cls, table: OutcomeTable, fold: int, make: Callable[[], Any]) -> Fold:
        assert table.folds is not None
        inner = (fold + 1) % 5
        test, tuning = table.select(table.folds == fold), table.select(table.folds == inner)
        train, fewer = table.select(table.folds != fold), table.select((table.folds != fold) & (table.folds != inner))
        return cls(
            test,
            _estimate(make().fit(train), test),
            OptionPrior.fit(train),
            tuning,
            _estimate(make().fit(fewer), tuning),
            OptionPrior.fit(fewer),
        )

    def tuned(self, k: int) -> list[RoutingDecision]:
        return decide(self.tuning_estimate, k=k)


Choice = tuple[Selector, Composition]
"""What a way of answering does in one fold."""


def ways(pool: str) -> dict[str, Callable[[Fold], Choice]]:
    """name -> its setup in a fold."""
    found: dict[str, Callable[[Fold], Choice]] = {"single": lambda f: (TopK(1), Single())}
    for k in (3, 5):
        found[f"vote of {k}"] = lambda f, k=k: (TopK(k), Vote())
        found[f"weighted vote of {k}"] = lambda f, k=k: (TopK(k), WeightedVote())
        found[f"weighted vote of {k}, prior"] = lambda f, k=k: (TopK(k), WeightedVote(prior=f.prior))
        found[f"cascade of {k}, same answers"] = lambda f, k=k: (TopK(k), Cascade(1.0))
    found[f"dynamic, {FEWER} calls, weighted vote"] = lambda f: (
        dynamic_for_calls(f.tuning_estimate, FEWER, k=5),
        WeightedVote(),
    )
    for k, calls in ((5, FEWER), (9, 5.0), (5, 3.0)) if pool == "nine" else ((3, 2.0), (5, 2.0)):
        found[f"cascade of {k}, {calls} calls"] = lambda f, k=k, calls=calls: (TopK(k), _cascade(f, k, calls, False))
        found[f"cascade of {k}, {calls} calls, prior"] = lambda f, k=k, calls=calls: (
            TopK(k),
            _cascade(f, k, calls, True),
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay votes and cascades over recorded answers.")
    parser.add_argument("--kind", default="knn", help="of the router that estimates each expert")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the router")
    parser.add_argument("--pool", choices=("nine", "all"), action="append")
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    stated = dict(text.split("=", 1) for text in given.set) or ({"k": "150"} if given.kind == "knn" else {})
    settings = {name: json.loads(value) for name, value in stated.items()}
    table, encoder = read_table(), CachedEncoder(build_encoder("minilm"))
    encoder.encode(table.prompts)
    results: dict[str, Any] = {"kind": given.kind, "settings": settings}
    for pool in given.pool or ("nine", "all"):
        experts = table.with_experts(NINE) if pool == "nine" else table
        folds = [Fold.of(experts, fold, lambda: build(given.kind, encoder, settings)) for fold in range(5)]
        results[pool] = measured(pool, folds)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


def measured(pool: str, folds: Sequence[Fold]) -> dict[str, Any]:
    print(f"\n{pool}: {sum(len(fold.test) for fold in folds)} questions")
    print(f"{'':44}{'accuracy %':>11}{'calls':>7}{'rounds':>8}{'USD/1k':>8}  difference")
    scores: dict[str, np.ndarray] = {}
    alone, even = without_experts(folds)
    print(f"{'the prior alone, no expert call':44}{100 * alone:11.2f}{0:7.2f}  ({100 * even:.2f} by chance)")
    found: dict[str, Any] = {"prior alone": {"accuracy": alone, "by_chance": even, "calls": 0}}
    for name, way in ways(pool).items():
        chosen = [way(fold) for fold in folds]
        runs = [
            replay(fold.test, decide(fold.estimate, select=select), composition)
            for fold, (select, composition) in zip(folds, chosen, strict=True)
        ]
        scores[name] = np.concatenate([run.scores for run in runs])
        found[name] = _row(runs) | {"chosen": [_described(*choice) for choice in chosen]}
        reference = next((f"weighted vote of {k}" for k in (3, 5, 2) if f"of {k}" in name), "weighted vote of 5")
        if reference in scores and reference != name:
            found[name]["difference_ci95"] = paired_bootstrap(scores[name], scores[reference])
        _print(name, found[name], reference)
    return found


def without_experts(folds: Sequence[Fold]) -> tuple[float, float]:
    """Accuracy of the likeliest option by the prior, and of a random option: what the wording of questions reveals."""
    right, chance = [], []
    for fold in folds:
        for prompt, answer in zip(fold.test.prompts, fold.test.labels("answer"), strict=True):
            options = fold.prior.log_prior(prompt)
            right.append(bool(options) and max(options, key=lambda letter: options[letter]) == answer)
            chance.append(1 / len(options) if options else 0.0)
    return float(np.mean(right)), float(np.mean(chance))


def read_table() -> OutcomeTable:
    folder = os.environ.get("COE_DATA_DIR")
    if not folder:
        sys.exit("COE_DATA_DIR names the folder with outcomes/mmlupro28.public.parquet; it is not set")
    return OutcomeTable.read(Path(folder) / "outcomes" / "mmlupro28.public.parquet")


def _estimate(router: Router, table: OutcomeTable) -> Estimate:
    return router.estimate(table.queries())


def _cascade(fold: Fold, k: int, calls: float, with_prior: bool) -> Cascade:
    """A cascade with the confidence that takes so many calls on the tuning fold."""
    tuning_prior, prior = (fold.tuning_prior, fold.prior) if with_prior else (None, None)
    confidence = confidence_for_calls(fold.tuning, fold.tuned(k), lambda c: Cascade(c, prior=tuning_prior), calls)
    return Cascade(confidence, prior=prior)


def _row(runs: Sequence[CompositionResults]) -> dict[str, Any]:
    def mean(values: Callable[[CompositionResults], Any]) -> float:
        return float(np.concatenate([values(run) for run in runs]).mean())

    return {
        "accuracy": mean(lambda run: run.scores),
        "calls": mean(lambda run: run.calls),
        "most_calls": max(int(run.calls.max()) for run in runs),
        "rounds": mean(lambda run: run.rounds),
        "usd_per_1k": 1e3 * mean(lambda run: run.costs_usd),
    }


def _described(select: Selector, composition: Composition) -> str:
    threshold = getattr(composition, "confidence", None)
    return f"{select}" + (f", confidence {threshold:.4f}" if threshold is not None else "")


def _print(name: str, row: dict[str, Any], reference: str) -> None:
    interval = row.get("difference_ci95")
    told = "" if interval is None else f"  {100 * interval[0]:+.2f} to {100 * interval[1]:+.2f} ({reference})"
    print(
        f"{name:44}{100 * row['accuracy']:11.2f}{row['calls']:7.2f}{row['rounds']:8.2f}{row['usd_per_1k']:8.3f}{told}"
    )


if __name__ == "__main__":
    main()
