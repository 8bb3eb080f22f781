"""Learning curves of router kinds: public tables cut to a few training rows, scored on rows outside the cut.

    COE_DATA_DIR=... python benchmarks/learning_curves.py --out runs [--tables llmrouter9] [--sizes 20 100] [--draws 5]

From each table a fixed pool is drawn, and from the pool for each draw an order: the first rows train, the last ones
test. Every kind sees the same rows. `ridge` is ridge regression of the scores on the embeddings with penalty 1, and
`ridge-gcv` with the penalty of least generalised cross-validation error; neither is a kind of the project. Every
(table, size, draw, kind) is a file under --out, so an interrupted run resumes, and `--only-report` prints what exists.
A size is left out where fewer than 200 rows would remain to test on.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np

from registry.storage import atomic_path
from routers.encoders.build import CachedEncoder, build_encoder
from routers.encoders.embed import embed
from routers.encoders.remembered import Remembered
from routers.evaluation import metrics
from routers.evaluation.recorded_routing import route
from routers.factory import build, reads_text
from routers.numeric.ridge import fit_ridge
from routers.outcomes.table import OutcomeTable

TABLES = ("llmrouter9", "mmlupro28", "routerbench3", "routerdc7", "routellm2")
SIZES = (20, 100, 500, 1000, 2000)
KINDS = ("best-single", "ridge", "ridge-gcv", "knn", "quality", "auto")
REFERENCES = ("best-single", "ridge", "ridge-gcv", "knn")
"""Kinds that `quality` and `auto` are compared with."""
LEAST_TEST = 200
POOL_SEED, DRAW_SEED = 0, 1000


def read(name: str, pool: int) -> OutcomeTable:
    table = OutcomeTable.read(Path(os.environ["COE_DATA_DIR"]) / "outcomes" / f"{name}.public.parquet")
    return table.select(np.sort(np.random.default_rng(POOL_SEED).permutation(len(table))[:pool]))


def picks(kind: str, train: OutcomeTable, test: OutcomeTable, encoder: Remembered, budget_minutes: float) -> np.ndarray:
    """(n,) columns of the experts that a kind chooses for the test rows."""
    if kind.startswith("ridge"):
        return linear_picks(embed(encoder, train.prompts), train.scores, embed(encoder, test.prompts), kind)
    settings = {"budget_minutes": budget_minutes} if kind == "auto" else {}
    router = build(kind, encoder if reads_text(kind) else None, settings)
    return route(router.fit(train), test).picks


def linear_picks(x: np.ndarray, y: np.ndarray, new: np.ndarray, kind: str) -> np.ndarray:
    if kind == "ridge-gcv":
        return fit_ridge(x, y).predict(new).argmax(axis=1)
    mean = x.mean(axis=0, dtype=np.float64)
    a = x - mean
    weights = np.linalg.solve(a.T @ a + np.eye(a.shape[1]), a.T @ (y - y.mean(axis=0)))
    return (y.mean(axis=0) + (new - mean) @ weights).argmax(axis=1)


def run(given: argparse.Namespace) -> None:
    for name in given.tables:
        table = read(name, given.pool)
        encoder = Remembered(CachedEncoder(build_encoder(given.encoder)), table.prompts)
        for draw in range(given.draws):
            order = np.random.default_rng(DRAW_SEED + draw).permutation(len(table))
            for size in given.sizes:
                if size > len(table) - LEAST_TEST:
                    continue
                train, test = table.select(order[:size]), table.select(order[size:][-given.test :])
                for kind in given.kinds:
                    path = given.out / name / str(size) / str(draw) / f"{kind}.json"
                    if path.exists():
                        continue
                    chosen = picks(kind, train, test, encoder, given.budget_minutes)
                    score = float(metrics.picked(test.scores, chosen).mean())
                    with atomic_path(path) as staged:
                        staged.write_text(json.dumps(score))
                    print(f"{name} {size} rows, draw {draw}, {kind}: {100 * score:.2f}", flush=True)


def report(out: Path) -> None:
    """Mean accuracy over draws, and how far `quality` and `auto` lie above the best reference on the same draws."""
    scores: dict[tuple[str, int], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(out.glob("*/*/*/*.json")):
        name, size, draw = path.parts[-4:-1]
        scores[name, int(size)][path.stem][draw] = 100 * json.loads(path.read_text())
    print(f"| table | rows | {' | '.join(KINDS)} | quality, auto over the best of the others (draws) |")
    print(f"|{'---|' * (len(KINDS) + 3)}")
    for (name, size), kinds in sorted(scores.items()):
        cells = (f"{np.mean(list(kinds[kind].values())):.2f}" if kind in kinds else "-" for kind in KINDS)
        over = ", ".join(_lead(kinds, kind) for kind in ("quality", "auto"))
        print(f"| {name} | {size} | {' | '.join(cells)} | {over} |")


def _lead(kinds: dict[str, dict[str, float]], kind: str) -> str:
    """Points of a kind above the best of the references, all as means over the draws that they share."""
    draws = sorted(set(kinds.get(kind, {})).intersection(*(kinds.get(reference, {}) for reference in REFERENCES)))
    if not draws:
        return "-"
    means = {one: float(np.mean([kinds[one][draw] for draw in draws])) for one in (kind, *REFERENCES)}
    return f"{means[kind] - max(means[one] for one in REFERENCES):+.2f} ({len(draws)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--pool", type=int, default=5000, help="rows of a table that are used at all")
    parser.add_argument("--test", type=int, default=3000, help="most rows to test on")
    parser.add_argument("--budget-minutes", type=float, default=3.0, help="of auto")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--only-report", action="store_true")
    given = parser.parse_args()
    if not given.only_report:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a cut of one domain has one category
            run(given)
    report(given.out)


if __name__ == "__main__":
    main()
