"""A batch assigned jointly within a budget, beside other ways to spend it, on recorded outcomes; and the time it takes.

    COE_DATA_DIR=... python benchmarks/joint_assignment.py answers [--tables nine-small mmlupro28] [--encoder minilm]
    python benchmarks/joint_assignment.py time [--rows 20000 1000000] [--experts 10]

`answers`: each fold of a table is one batch; with `--by-domain`, each domain of a fold. The router is trained on the
other folds. Prices are predicted as by `coe plan`, from estimated prompt tokens and each expert's mean answer
length on the other folds. Spend and right answers are recorded ones. Ways to spend a budget:

    joint       the experts of all rows together, within the predicted price
    tuned       each row on its own, with the cost weight that spends the budget on the training folds (out of fold)
    matched     the same, with the cost weight that spends what `joint` predicts on this batch: it must know the batch
    mix         each row at random to one of two experts: the pair and shares of the highest training score
    one expert  the expert of highest training score among those whose mean training cost is within the budget
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from cross_validation import read

from routers.assignment import lagrange
from routers.assignment.joint import assign
from routers.assignment.problem import Problem
from routers.base import Query
from routers.constraints import estimate_tokens
from routers.encoders.build import CachedEncoder, build_encoder
from routers.evaluation.cost_weight import inner_routings
from routers.evaluation.recorded_routing import route
from routers.factory import build
from routers.outcomes.table import OutcomeTable

BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.7)
"""Of the way from the price of the cheapest experts to that of the best ones, as predicted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers", "time"))
    parser.add_argument("--tables", nargs="+", default=["nine-small", "mmlupro28"])
    parser.add_argument("--encoder", default="hashing:1024")
    parser.add_argument("--by-domain", action="store_true", help="a batch for each fold and domain, in place of a fold")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rows", nargs="+", type=int, default=[20_000, 1_000_000])
    parser.add_argument("--experts", type=int, default=10)
    given = parser.parse_args()
    if given.what == "time":
        for rows in given.rows:
            times(rows, given.experts)
        return
    encoder = CachedEncoder(build_encoder(given.encoder))
    for name in given.tables:
        table = read(name)
        print(f"\n{name}: {len(table):,} rows, {len(table.experts)} experts, kNN {given.k} on {given.encoder}")
        answers(table, file_prices(table), lambda: build("knn", encoder, {"k": given.k}), given.by_domain)


def file_prices(table: OutcomeTable) -> np.ndarray:
    """(m, 2) USD per million tokens, in and out."""
    prices = json.loads((Path(os.environ["COE_DATA_DIR"]) / "outcomes" / "prices_used.json").read_text())
    return np.array([prices["mmlupro28"][name] for name in table.experts])


def predicted(table: OutcomeTable, rows: np.ndarray, train: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """(n, m) predicted USD of some rows. The mean answer length of an expert is what its training costs imply."""
    prompt = np.array([estimate_tokens(Query.of(text)) for text in table.prompts])
    paid = table.costs_usd[train].mean(axis=0) * 1e6 - prompt[train].mean() * prices[:, 0]
    length = np.maximum(paid / prices[:, 1], 1.0)
    return (prompt[rows][:, None] * prices[:, 0] + length * prices[:, 1]) / 1e6


def answers(table: OutcomeTable, prices: np.ndarray, make: Callable, by_domain: bool) -> None:
    found: dict[tuple[float, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    ratios: dict[float, list[float]] = {}
    for fold, train, routing in inner_routings(make, table, table.folds):
        rows, others = np.flatnonzero(table.folds == fold), np.flatnonzero(table.folds != fold)
        batch = table.select(table.folds == fold)
        tested = route(make().fit(train), batch)
        usd, train_usd = (predicted(table, each, others, prices) for each in (rows, others))
        domains = np.array(batch.labels()) if by_domain else np.zeros(len(rows))
        for domain in np.unique(domains):
            mine = np.flatnonzero(domains == domain)
            each = ways(tested.quality[mine], usd[mine], routing.quality, train_usd, train, fold)
            for share, way, picks, ratio in each:
                index = mine, picks
                found.setdefault((share, way), []).append((batch.scores[index], batch.costs_usd[index]))
                ratios.setdefault(share, []).append(ratio)
    print(f"{'budget':>8} {'way':12} {'USD per 1,000':>14} {'right, %':>9} {'joint - it':>18}")
    for (share, way), parts in sorted(found.items(), key=lambda item: item[0][0]):
        won, spent = (np.concatenate(each) for each in zip(*parts, strict=True))
        joint = np.concatenate([part[0] for part in found[share, "joint"]])
        gain = joint - won
        error = 1.96 * gain.std() / np.sqrt(len(gain))
        print(f"{share:8} {way:12} {1e3 * spent.mean():14.4f} {100 * won.mean():9.2f} "
              f"{100 * gain.mean():+8.2f} ± {100 * error:.2f}")  # fmt: skip
    for share, each in sorted(ratios.items()):
        print(f"{share:8} spend predicted for the tuned weight, of the budget: {min(each):.3f} to {max(each):.3f}")


def ways(
    quality: np.ndarray,
    usd: np.ndarray,
    train_quality: np.ndarray,
    train_usd: np.ndarray,
    train: OutcomeTable,
    fold: int,
) -> Iterator[tuple[float, str, np.ndarray, float]]:
    """(budget, way, picks of the batch, spend of the tuned weight by the budget)."""
    rng = np.random.default_rng(fold)
    n, every = len(quality), np.ones(quality.shape, dtype=bool)
    free = Problem(quality, usd, every)
    least, most = usd.min(axis=1).sum(), free.price_of(lagrange.best_quality(free))
    for share in BUDGETS:
        budget = least + share * (most - least)
        found = assign(free.with_budget(budget))
        trained = Problem(train_quality, train_usd, np.ones(train_quality.shape, bool), budget / n * len(train))
        _, prices = lagrange.solve(trained)
        tuned = (quality - prices.usd * usd).argmax(axis=1)
        matched = (quality - found.prices.usd * usd).argmax(axis=1)
        mixed = mix(train.scores.mean(axis=0), usd.mean(axis=0), budget / n, rng.random(n))
        affordable = np.where(train_usd.mean(axis=0) <= budget / n, train.scores.mean(axis=0), -1.0).argmax()
        ratio = free.price_of(tuned) / budget
        for way, picks in (
            ("joint", found.chosen), ("tuned", tuned), ("matched", matched), ("mix", mixed),
            ("one expert", np.full(n, affordable)),
        ):  # fmt: skip
            yield share, way, picks, ratio


def mix(scores: np.ndarray, usd: np.ndarray, budget: float, drawn: np.ndarray) -> np.ndarray:
    """Picks from two experts by (n,) uniform draws: a point of the convex hull of single experts' cost and score."""
    low, high = np.meshgrid(np.arange(len(usd)), np.arange(len(usd)), indexing="ij")
    share = np.clip((budget - usd[low]) / np.where(usd[high] > usd[low], usd[high] - usd[low], np.inf), 0.0, 1.0)
    value = np.where(usd[low] <= budget, scores[low] + share * (scores[high] - scores[low]), -1.0)
    pair = np.unravel_index(value.argmax(), value.shape)
    return np.where(drawn < share[pair], pair[1], pair[0])


def times(rows: int, experts: int) -> None:
    """Seconds of CPU of assignments at 20% of the way, with and without capacities and loads."""
    rng = np.random.default_rng(0)
    price = np.sort(rng.lognormal(-8, 1.2, experts))[None] * rng.lognormal(0, 0.5, (rows, 1))
    quality = (np.linspace(0.3, 0.8, experts)[None] + rng.normal(0, 0.12, (rows, experts))).clip(0, 1)
    every = np.ones(quality.shape, dtype=bool)
    least, most = price.min(axis=1).sum(), price[np.arange(rows), quality.argmax(axis=1)].sum()
    budget = least + 0.2 * (most - least)
    half = np.full(experts, rows * 1.5 / experts)
    cases = {
        "budget": {},
        "budget and loads": {"load_cost": np.full(experts, rows / 200)},
        "budget and capacities": {"capacity": half},
    }
    for name, options in cases.items():
        for most_linear in (10**9, 0) if rows <= 20_000 else (0,):
            problem = Problem(quality, price, every, budget, **options)
            began = time.process_time()
            found = assign(problem, most_linear=most_linear)
            print(f"{rows:9,} x {experts} {name:22} {found.method:17} {time.process_time() - began:7.2f} s CPU  "
                  f"quality {found.quality:,.1f}  gap {found.gap:.4f} ({found.gap / found.quality:.2e})  "
                  f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024:,} MiB peak  "
                f"{found.loaded.sum()} loads  spent {found.price_usd / budget:.6f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
