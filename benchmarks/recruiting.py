"""The gain from recruiting experts by skills, on recorded answers: votes of 3 and 5 recruits against other selections.

    COE_DATA_DIR=... python benchmarks/recruiting.py [--pool nine|all] [--quality] [--json PATH]

Five given folds of mmlupro28: every router, order and prior is trained on the other four. `chosen` uses, in each
fold, the settings of a skill router whose weighted vote is best on inner folds of these four (each scored once by a
router that was trained on the remaining three). Everything else runs at the settings that its row names. `told` knows
the true domain of the query: a baseline, not a router. Differences are to the same vote of the k experts of highest kNN
competence, with paired bootstrap intervals of 95%. Votes are counted in numpy, since there are many of them; the first
queries of every fold are also replayed by the composition itself, and the run fails if one differs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from votes import NINE, read_table

from coe.compose import Vote, WeightedVote
from coe.compose.option_prior import OptionPrior
from coe.compose.weighted_vote import evidence
from coe.evaluation.recorded_answers import replay
from routers.base import Estimate, RoutingDecision
from routers.decision import decide
from routers.encoders.build import CachedEncoder, build_encoder
from routers.encoders.remembered import Remembered
from routers.evaluation.metrics import paired_bootstrap
from routers.factory import build
from routers.outcomes.table import OutcomeTable
from routers.selectors import Recruit, Selector, TopK

FOLDS = range(5)
SIZES = (3, 5)
TOLD = "told"
REFERENCE = "kNN 150, top-k"
ALIKE = 100.0
"""A temperature at which all experts are nearly equally competent, so that suitability alone decides."""
GRID = [
    {"skill_column": column, "temperature": temperature}
    for column, temperature in itertools.product((None, "src"), (0.5, ALIKE))
]
"""What `chosen` chooses from: whose labels are skills (domain, or source), and how much the overall level counts."""

WITH_PRIOR = (
    REFERENCE,
    "skills: domain",
    "skills: source, all alike",
    "skills: chosen",
    "fixed top-k",
    "quality router, top-k",
)
"""Ways that are also shown with the option prior, which knows nothing of experts."""

CHECKED = 40
"""Queries of each fold that the composition itself replays too."""
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, eq=False)
class Ballots:
    """The recorded answers of n queries: (n, m) letters as numbers from 1, 0 if none could be read."""

    table: OutcomeTable
    letters: np.ndarray

    @classmethod
    def of(cls, table: OutcomeTable) -> Ballots:
        assert table.answers is not None
        return cls(
            table, np.array([[LETTERS.find(a) + 1 if a else 0 for a in table.answers[m]] for m in table.experts]).T
        )

    def count(self, decisions: Sequence[RoutingDecision], composition: Vote | WeightedVote) -> np.ndarray:
        """(n,) score of the answer that a vote elects, as `Vote` and `WeightedVote` do."""
        table, n, width = self.table, len(decisions), max(len(decision.experts) for decision in decisions)
        column = {name: i for i, name in enumerate(table.experts)}
        experts, weights = np.zeros((n, width), dtype=int), np.zeros((n, width))
        utility, present = np.full((n, width), -np.inf), np.zeros((n, width), dtype=bool)
        for row, decision in enumerate(decisions):
            size = len(decision.experts)
            experts[row, :size] = [column[name] for name in decision.experts]
            weights[row, :size] = (
                evidence(decision, composition.options) if isinstance(composition, WeightedVote) else 1
            )
            utility[row, :size], present[row, :size] = decision.scores, True
        letters = np.where(present, np.take_along_axis(self.letters, experts, axis=1), 0)
        strength, named = self._ahead(composition), np.zeros((n, len(LETTERS) + 1), dtype=bool)
        for ballot in range(width):
            cast = (np.arange(n), letters[:, ballot])
            strength[cast] += weights[:, ballot]
            named[cast] = True
        named[:, 0] = ~named[:, 1:].any(axis=1)  # no readable answer: all are on one side
        strength = np.where(named, strength, -np.inf)
        ours = np.take_along_axis(strength, letters, axis=1) >= strength.max(axis=1, keepdims=True) - 1e-9
        best = np.where(ours & present, utility, -np.inf).argmax(axis=1)
        return np.asarray(table.scores[np.arange(n), experts[np.arange(n), best]])

    def _ahead(self, composition: Vote | WeightedVote) -> np.ndarray:
        """(n, letters) what each option begins with."""
        ahead = np.zeros((len(self.table), len(LETTERS) + 1))
        prior = getattr(composition, "prior", None)
        if isinstance(prior, OptionPrior):
            for row, prompt in enumerate(self.table.prompts):
                found = prior.log_prior(prompt)
                for letter, value in found.items():
                    ahead[row, LETTERS.index(letter) + 1] = value + np.log(len(found))
        return ahead


@dataclass(frozen=True)
class Pool:
    """A table in folds, and routers trained on all but some of them, each trained once."""

    table: OutcomeTable
    encoder: Remembered

    def without(self, *folds: int) -> OutcomeTable:
        return self.table.select(~np.isin(self.folds, folds))

    @cached_property
    def ballots(self) -> list[Ballots]:
        """Of each fold."""
        return [Ballots.of(self.table.select(self.folds == fold)) for fold in FOLDS]

    def fold(self, fold: int) -> OutcomeTable:
        return self.ballots[fold].table

    @property
    def folds(self) -> np.ndarray:
        assert self.table.folds is not None
        return self.table.folds

    def estimates(self, kind: str, settings: dict[str, Any], *, without: Sequence[int]) -> dict[int, Estimate]:
        """For the queries of the folds that a router was not trained on."""
        router = build(kind, self.encoder, settings).fit(self.without(*without))
        return {fold: router.estimate(self.fold(fold).queries()) for fold in without}

    def decisions(self, kind: str, settings: dict[str, Any], select: Selector) -> list[list[RoutingDecision]]:
        """Of each fold."""
        return [decide(self.estimates(kind, settings, without=[fold])[fold], select=select) for fold in FOLDS]


def skilled(k: int, **settings: Any) -> dict[str, Any]:
    """Settings of a skill router that trims by k recruits; 0 trims none."""
    return {**({"trim_k": k} if k else {"trim": 0.0}), **settings}


def chosen_settings(pool: Pool) -> dict[int, list[dict[str, Any]]]:
    """k -> for each fold, the settings of `GRID` whose weighted vote of k is best on inner folds, without trimming."""
    score: dict[tuple[int, int, int], list[float]] = {}
    for number, settings in enumerate(GRID):
        for one, other in itertools.combinations(FOLDS, 2):
            found = pool.estimates("skill", skilled(0, **settings), without=[one, other])
            for k, (outer, inner) in itertools.product(SIZES, ((one, other), (other, one))):
                scores = pool.ballots[inner].count(decide(found[inner], select=Recruit(k)), WeightedVote())
                score.setdefault((k, outer, number), []).append(float(scores.mean()))

    def best(k: int, fold: int) -> dict[str, Any]:
        return GRID[max(range(len(GRID)), key=lambda number: np.mean(score[k, fold, number]))]

    return {k: [best(k, fold) for fold in FOLDS] for k in SIZES}


Way = tuple[list[list[RoutingDecision]], Any]
"""The decisions of each fold, and what is to be noted of them."""


def ways(pool: Pool, k: int, picked: list[dict[str, Any]], with_quality: bool) -> dict[str, Way]:
    """name -> the experts it calls."""
    chosen = [
        decide(pool.estimates("skill", skilled(0, **own), without=[fold])[fold], select=Recruit(k))
        for fold, own in zip(FOLDS, picked, strict=True)
    ]
    drawn = Recruit(k, draw="replacement")
    found: dict[str, Way] = {
        REFERENCE: (pool.decisions("knn", {"k": 150}, TopK(k)), None),
        "skills: domain": (pool.decisions("skill", skilled(k), Recruit(k)), None),
        "skills: source": (pool.decisions("skill", skilled(k, skill_column="src"), Recruit(k)), None),
        "skills: source, all alike": (
            pool.decisions("skill", skilled(k, skill_column="src", temperature=ALIKE), Recruit(k)),
            None,
        ),
        "skills: chosen": (chosen, picked),
        "skills: domain, only the suitable": (pool.decisions("skill", skilled(k, reserve=False), Recruit(k)), None),
        "skills: domain, drawn (the source)": (pool.decisions("skill", skilled(k, reserve=False), drawn), None),
        "skills: domain, by quality": (pool.decisions("skill", skilled(k), TopK(k)), None),
        "fixed top-k": (pool.decisions("best-single", {}, TopK(k)), None),
        "random": (at_random(pool, k), None),
        "told the domain": (_told(pool).decisions("skill", skilled(k, skills=TOLD), Recruit(k)), None),
    }
    if with_quality:
        found["quality router, top-k"] = (pool.decisions("quality", {}, TopK(k)), None)
    return found


def at_random(pool: Pool, k: int) -> list[list[RoutingDecision]]:
    """k random experts for each query, whose votes are weighted by their training scores."""
    made = []
    for fold in FOLDS:
        means = pool.estimates("best-single", {}, without=[fold])[fold]
        tickets = pool.estimates("random", {"seed": fold}, without=[fold])[fold].quality
        made.append(decide(replace(means, weights=tickets), select=Recruit(k)))
    return made


def _told(pool: Pool) -> Pool:
    """The same pool with the true domain in each query."""
    words = [(label,) for label in pool.table.labels()]
    return replace(pool, table=replace(pool.table, features={TOLD: words}))


def measured(name: str, pool: Pool, with_quality: bool) -> dict[str, Any]:
    """Every row of a pool, printed when measured."""
    print(f"\n{name}: {len(pool.table)} questions, {len(pool.table.experts)} experts", flush=True)
    print(f"{'':60}{'accuracy %':>11}{'calls':>7}{'experts':>8}{'USD/1k':>8}  difference to kNN")
    priors = [OptionPrior.fit(pool.without(fold)) for fold in FOLDS]
    votes: dict[str, list[Vote] | list[WeightedVote]] = {
        "vote": [Vote() for _ in FOLDS],
        "weighted vote": [WeightedVote() for _ in FOLDS],
        "weighted vote with option prior": [WeightedVote(prior=prior) for prior in priors],
    }
    found: dict[str, Any] = {}
    for label, kind, settings in (
        ("best single", "best-single", {}),
        ("kNN 150, one", "knn", {"k": 150}),
        ("skills: domain, one", "skill", {}),
    ):
        decisions = pool.decisions(kind, settings, TopK(1))
        found[label] = _row(pool, decisions, counted(pool, decisions, votes["vote"]))
        _print(label, found[label])
    picked = chosen_settings(pool)
    for k in SIZES:
        decided = ways(pool, k, picked[k], with_quality)
        for vote, compositions in votes.items():
            reference = counted(pool, decided[REFERENCE][0], compositions)
            for way, (decisions, note) in decided.items():
                if "prior" in vote and way not in WITH_PRIOR:
                    continue
                label, scores = f"{vote} of {k}, {way}", counted(pool, decisions, compositions)
                found[label] = _row(pool, decisions, scores) | ({} if note is None else {"chosen": note})
                if way != REFERENCE:
                    found[label]["difference_ci95"] = paired_bootstrap(scores, reference)
                _print(label, found[label])
    return found


def counted(
    pool: Pool, decisions: Sequence[list[RoutingDecision]], compositions: Sequence[Vote | WeightedVote]
) -> np.ndarray:
    """(n,) scores in the order of the folds.

    Raises:
        RuntimeError: a composition elects a different answer.
    """
    parts = []
    for ballots, made, composition in zip(pool.ballots, decisions, compositions, strict=True):
        scores = ballots.count(made, composition)
        replayed = replay(ballots.table.select(np.arange(CHECKED)), made[:CHECKED], composition)
        if not np.array_equal(replayed.scores, scores[:CHECKED]):
            raise RuntimeError(f"{composition} elects other answers than were counted")
        parts.append(scores)
    return np.concatenate(parts)


def _row(pool: Pool, decisions: Sequence[list[RoutingDecision]], scores: np.ndarray) -> dict[str, Any]:
    every = [decision for made in decisions for decision in made]
    column = {name: i for i, name in enumerate(pool.table.experts)}
    costs = np.vstack([pool.fold(fold).costs_usd for fold in FOLDS])
    usd = [costs[row, [column[name] for name in one.experts]].sum() for row, one in enumerate(every)]
    return {
        "accuracy": float(scores.mean()),
        "calls": float(np.mean([len(decision.experts) for decision in every])),
        "experts_a_query": float(np.mean([len(set(decision.experts)) for decision in every])),
        "experts_in_all": len({name for decision in every for name in decision.experts}),
        "usd_per_1k": 1e3 * float(np.mean(usd)),
    }


def _print(label: str, row: dict[str, Any]) -> None:
    interval = row.get("difference_ci95")
    told = "" if interval is None else f"  {100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"
    numbers = f"{100 * row['accuracy']:11.2f}{row['calls']:7.2f}{row['experts_a_query']:8.2f}{row['usd_per_1k']:8.3f}"
    print(f"{label:60}{numbers}{told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay votes of recruited experts over recorded answers.")
    parser.add_argument("--pool", choices=("nine", "all"), action="append")
    parser.add_argument(
        "--quality", action="store_true", help="also the experts of highest quality by a quality router"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    given = parser.parse_args()
    table = read_table()
    encoder = Remembered(CachedEncoder(build_encoder("minilm")), table.prompts)
    results = {}
    for name in given.pool or ("nine", "all"):
        experts = table.with_experts(NINE) if name == "nine" else table
        results[name] = measured(name, Pool(experts, encoder), given.quality)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
