"""nDCG@10 of embeddings that the router `pilot` routes over domain experts (RouterRetriever), beside single encoders.

    COE_DATA_DIR=... python benchmarks/router_retriever.py [--seeds 3] [--model minilm]

Retrieval is made from labelled sets (`benchmarks/retrieval_sets.py`). Every set is split at random: half trains its
expert, a quarter gives the router its outcomes, a quarter tests; each quarter is its own corpus. An expert is `--model`
with a linear map that is trained on its set alone, by the contrastive loss of sentence-transformers
(MultipleNegativesRankingLoss, texts of one group masked). `all sets` is one map that is trained on all halves together.
A query that goes to an expert is searched in that expert's index of the corpus. Nothing is chosen on the test quarter;
`best single` is chosen on the router's quarter.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from retrieval_sets import Item, Part, ndcg, part_of, read_sets

from routers.encoders.build import CachedEncoder, Encoder, build_encoder
from routers.encoders.remembered import Remembered
from routers.evaluation.metrics import paired_bootstrap
from routers.evaluation.recorded_routing import route
from routers.factory import build
from routers.outcomes.table import OutcomeTable

N_QUERIES = 120
"""Queries of a set that the router learns from, and that test."""
STEPS, BATCH, RATE, TEMPERATURE = 100, 128, 2e-3, 0.05
ROUTERS = {
    "pilot": ("pilot", {}),
    "pilot, least_queries=10": ("pilot", {"least_queries": 10}),
    "pilot, max": ("pilot", {"similarity": "max"}),
    "pilot, max, least_queries=10": ("pilot", {"similarity": "max", "least_queries": 10}),
    "knn": ("knn", {}),
    "cluster": ("cluster", {}),
    "category": ("category", {}),
    "category, soft": ("category", {"choice": "soft"}),
}
Maps = Mapping[str, NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="minilm", help="the model of all experts, and the encoder of the router")
    options = parser.parse_args()
    sets = read_sets(Path(os.environ["COE_DATA_DIR"]) / "sets")
    texts = list(dict.fromkeys(t for items in sets.values() for item in items for t in (item.text, item.answer) if t))
    base = Remembered(CachedEncoder(build_encoder(options.model)), texts)
    print({name: len(items) for name, items in sets.items()}, f"{len(texts)} texts", flush=True)
    runs = []
    for seed in range(options.seeds):
        started = time.process_time()
        halves, outcomes, tests = split(sets, seed)
        maps = train_all(halves, base, seed)
        train, test = table(outcomes, maps, base), table(tests, maps, base)
        print(f"seed {seed}: {time.process_time() - started:.0f} s of CPU time", flush=True)
        runs.append((test, scores_of(train, test, base)))
    report(runs)


def split(sets: Mapping[str, list[Item]], seed: int) -> tuple[dict[str, list[Item]], dict[str, Part], dict[str, Part]]:
    """Items to train experts on, and the parts that train and test the router."""
    halves, outcomes, tests = {}, {}, {}
    for i, (name, items) in enumerate(sets.items()):
        order = [items[j] for j in np.random.default_rng([seed, i]).permutation(len(items))]
        half, quarter = len(order) // 2, len(order) // 4
        halves[name] = order[:half]
        outcomes[name] = part_of(order[half : half + quarter], N_QUERIES)
        tests[name] = part_of(order[half + quarter :], N_QUERIES)
    return halves, outcomes, tests


def train_all(halves: Mapping[str, list[Item]], encoder: Encoder, seed: int) -> dict[str, NDArray[np.float32]]:
    """Expert -> (dim, dim) map. `base` is the model as it is; `all sets` is trained on all halves together."""
    maps = {"base": np.eye(encoder.dim, dtype=np.float32)}
    maps |= {name: train_map({name: items}, encoder, seed) for name, items in halves.items()}
    return maps | {"all sets": train_map(halves, encoder, seed)}


def train_map(halves: Mapping[str, list[Item]], encoder: Encoder, seed: int) -> NDArray[np.float32]:
    """The map x -> x W of the contrastive loss, from W = 1. A batch is of one set, in turn."""
    rng = np.random.default_rng(seed)
    weight = torch.eye(encoder.dim, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=RATE)
    pairs = [_Pairs(items, encoder) for items in halves.values()]
    for step in range(STEPS * min(3, len(pairs))):
        queries, positives, groups = pairs[step % len(pairs)].draw(rng)
        mapped = [torch.nn.functional.normalize(torch.from_numpy(x) @ weight, dim=1) for x in (queries, positives)]
        same = torch.from_numpy((groups[:, None] == groups) & ~np.eye(len(groups), dtype=bool))
        logits = (mapped[0] @ mapped[1].T / TEMPERATURE).masked_fill(same, -torch.inf)
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(groups)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach().numpy()


class _Pairs:
    """Draws a batch of texts with a relevant text each."""

    def __init__(self, items: list[Item], encoder: Encoder) -> None:
        names, self.group = np.unique(np.array([item.answer or item.group for item in items]), return_inverse=True)
        self.members = [np.flatnonzero(self.group == i) for i in range(len(names))]
        self.texts = encoder.encode([item.text for item in items])
        self.answers = encoder.encode([item.answer for item in items]) if items[0].answer else None

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.intp]]:
        rows = rng.permutation(len(self.texts))[:BATCH]
        if self.answers is not None:
            return self.texts[rows], self.answers[rows], self.group[rows]
        others = np.array([rng.choice(self.members[self.group[row]]) for row in rows])
        return self.texts[rows], self.texts[others], self.group[rows]


def table(parts: Mapping[str, Part], maps: Maps, encoder: Encoder) -> OutcomeTable:
    """nDCG@10 of every query and expert, with the set as its domain."""
    scores = []
    for part in parts.values():
        queries, corpus = encoder.encode(part.queries), encoder.encode(part.corpus)
        scores.append(np.stack([ndcg(part, _unit(queries @ w), _unit(corpus @ w)) for w in maps.values()], axis=1))
    domains = tuple(name for name, part in parts.items() for _ in part.queries)
    prompts = tuple(query for part in parts.values() for query in part.queries)
    ids = tuple(f"{name}-{i}" for name, part in parts.items() for i in range(len(part.queries)))
    return OutcomeTable(ids, prompts, tuple(maps), np.vstack(scores), domains=domains)


def scores_of(train: OutcomeTable, test: OutcomeTable, encoder: Encoder) -> dict[str, NDArray[np.float64]]:
    """Row of the report -> (n,) nDCG@10 of the test queries. `all sets` is a baseline and not among the experts."""
    pool = [name for name in train.experts if name != "all sets"]
    learnt, routed = train.with_experts(pool), test.with_experts(pool)
    found = {f"single: {name}": test.scores[:, i] for i, name in enumerate(test.experts)}
    best = pool[int(learnt.scores.mean(axis=0).argmax())]
    found["best single"] = routed.scores[:, pool.index(best)]
    found["mean of experts (random)"] = routed.scores.mean(axis=1)
    rows = np.arange(len(test))
    for name, (kind, settings) in ROUTERS.items():
        picks = route(build(kind, encoder, settings).fit(learnt), routed).picks
        found[name] = routed.scores[rows, picks]
        of = np.array(routed.domains)
        own = np.mean([pool[pick] == domain for pick, domain in zip(picks, of, strict=True)])
        print(f"  {name}: {100 * own:.0f}% to the expert of the query's set", flush=True)
    domains = np.array(test.domains)
    found["expert of the query's set (told the set)"] = routed.scores[rows, [pool.index(name) for name in domains]]
    found["dataset oracle"] = np.concatenate(
        [
            part[:, part.mean(axis=0).argmax()]
            for name in dict.fromkeys(domains)
            for part in [routed.scores[domains == name]]
        ]
    )
    found["oracle"] = routed.scores.max(axis=1)
    return found


def report(runs: list[tuple[OutcomeTable, dict[str, NDArray[np.float64]]]]) -> None:
    """Mean nDCG@10 over seeds by row and set; then differences, with paired bootstrap intervals over the queries."""
    sets = list(dict.fromkeys(runs[0][0].domains or ()))
    print(
        "\nnDCG@10, mean of the seeds: all sets, then each\n"
        + " " * 42
        + "  mean  "
        + "  ".join(f"{s[:12]:>12}" for s in sets)
    )
    for name in runs[0][1]:
        cells = [np.mean([s[name][np.array(t.domains) == each].mean() for t, s in runs]) for each in sets]
        print(f"{name:42} {100 * np.mean(cells):6.2f}  " + "  ".join(f"{100 * cell:12.1f}" for cell in cells))
    print("\ndifferences in nDCG@10 points, 95% paired bootstrap, by seed and of all seeds' queries together")
    others = ("best single", "single: base", "single: all sets", "mean of experts (random)", "knn", "category")
    for ours in (name for name in ROUTERS if name.startswith("pilot")):
        for other in others:
            each = [_interval(scores[ours], scores[other]) for _, scores in runs]
            both = [np.concatenate([scores[name] for _, scores in runs]) for name in (ours, other)]
            print(f"{ours} - {other}: {_interval(*both)}   by seed: {'; '.join(each)}")


def _interval(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> str:
    low, high = paired_bootstrap(ours, theirs)
    return f"{100 * (ours.mean() - theirs.mean()):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


if __name__ == "__main__":
    main()
