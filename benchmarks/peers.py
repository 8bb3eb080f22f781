"""Our routers against others, on the same folds and vectors: accuracy, seconds to train, milliseconds to route.

    COE_DATA_DIR=... python benchmarks/peers.py --peer-python PATH [--sets llmrouter9 mmlupro28] [--folds 0 1]

The rivals: routers of llmrouter-lib 0.4.0 in a separate environment (PATH is its python; `pip install
llmrouter-lib==0.4.0 torch==2.13.0`), with its own trainers and the settings of its example configurations, on our
encoder's vectors instead of its Longformer's; and two scikit-learn pipelines as in a notebook: TF-IDF, then a
classifier of the best model, or a ridge on all scores. Five folds, one thread, interleaved. Encoding is not counted,
except TF-IDF, which is part of those pipelines.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from recorded import Recorded

from routers.base import Query
from routers.decision import decide
from routers.encoders.build import CachedEncoder, build_encoder
from routers.evaluation import metrics
from routers.factory import build
from routers.outcomes.table import OutcomeTable

OURS = ("best-single", "knn", "cluster", "category", "quality")
PEERS = ("knnrouter", "knnrouter-100", "svmrouter", "mlprouter", "mfrouter")
PIPELINES = ("tf-idf + logistic regression", "tf-idf + ridge")


class Result(NamedTuple):
    """One router on one fold."""

    picks: Any
    train_s: float
    route_ms_p50: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="python of the environment with llmrouter-lib")
    parser.add_argument("--sets", nargs="+", default=["llmrouter9", "mmlupro28"])
    parser.add_argument("--folds", nargs="+", type=int, help="only these; by default all five")
    parser.add_argument("--ours", nargs="+", default=list(OURS))
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    rows = [row for name in options.sets for row in compare(name, options.ours, options.peer_python, options.folds)]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def compare(
    name: str, ours: Sequence[str], peer_python: Path | None, folds: Sequence[int] | None
) -> Iterator[dict[str, Any]]:
    """One row per router, over the folds of a table."""
    table = read_table(name)
    vectors = Recorded(CachedEncoder(build_encoder()), table.prompts)
    results: dict[str, list[Result]] = {}
    order = []
    assert table.folds is not None
    for fold in folds or np.unique(table.folds):
        train, test = table.select(table.folds != fold), table.select(table.folds == fold)
        order.append(np.flatnonzero(table.folds == fold))
        for kind in ours:
            results.setdefault(f"ours: {kind}", []).append(our_router(kind, vectors, train, test))
        for pipeline in PIPELINES:
            results.setdefault(f"scikit-learn: {pipeline}", []).append(notebook(pipeline, train, test))
        if peer_python is not None:
            for kind, result in llmrouter_lib(peer_python, vectors, train, test):
                results.setdefault(f"llmrouter-lib: {kind}", []).append(result)
        print(f"{name}: fold {fold} is done", file=sys.stderr, flush=True)
    rows = np.concatenate(order)
    for router, parts in results.items():
        picks = np.concatenate([part.picks for part in parts])
        row = {
            "set": name,
            "router": router,
            "accuracy": float(metrics.picked(table.scores[rows], picks).mean()),
            "train_s": float(np.mean([part.train_s for part in parts])),
            "route_ms_p50": float(np.median([part.route_ms_p50 for part in parts])),
        }
        print(
            f"{name:12} {router:45} {100 * row['accuracy']:6.2f} {row['train_s']:8.2f} s {row['route_ms_p50']:8.3f} ms"
        )
        yield row


def read_table(name: str) -> OutcomeTable:
    folder = os.environ.get("COE_DATA_DIR")
    if not folder:
        sys.exit("COE_DATA_DIR is not set: it names the folder that holds outcomes/<set>.public.parquet")
    return OutcomeTable.read(Path(folder) / "outcomes" / f"{name}.public.parquet")


def our_router(kind: str, vectors: Recorded, train: OutcomeTable, test: OutcomeTable) -> Result:
    before = time.perf_counter()
    router = build(kind, vectors).fit(train)
    train_s = time.perf_counter() - before
    picks, times = [], []
    for prompt in test.prompts:
        before = time.perf_counter()
        (decision,) = decide(router.estimate([Query.of(prompt)]))
        times.append(time.perf_counter() - before)
        picks.append(test.experts.index(decision.experts[0]))
    return Result(np.array(picks), train_s, 1e3 * float(np.median(times)))


def notebook(pipeline: str, train: OutcomeTable, test: OutcomeTable) -> Result:
    """A router in a few lines of scikit-learn."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    classifies = pipeline.endswith("logistic regression")
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(max_iter=1000) if classifies else Ridge()
    )
    before = time.perf_counter()
    model.fit(train.prompts, train.scores.argmax(axis=1) if classifies else train.scores)
    train_s = time.perf_counter() - before
    picks, times = [], []
    for prompt in test.prompts:
        before = time.perf_counter()
        predicted = model.predict([prompt])[0]
        times.append(time.perf_counter() - before)
        picks.append(int(predicted if classifies else predicted.argmax()))
    return Result(np.array(picks), train_s, 1e3 * float(np.median(times)))


def llmrouter_lib(
    python: Path, vectors: Recorded, train: OutcomeTable, test: OutcomeTable
) -> Iterator[tuple[str, Result]]:
    """The routers of llmrouter-lib, each in its own process."""
    script = Path(__file__).with_name("peer_llmrouter.py")
    with tempfile.TemporaryDirectory() as folder:
        for part, rows in (("train", train), ("test", test)):
            np.savez(Path(folder) / f"{part}.npz", vectors=vectors.encode(rows.prompts), scores=rows.scores)
        for kind in PEERS:
            done = subprocess.run([python, script, folder, kind], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"llmrouter-lib's {kind} failed:\n{done.stderr[-2000:]}")
            document = json.loads((Path(folder) / f"{kind}.json").read_text())
            yield kind, Result(np.array(document["picks"]), document["train_s"], document["route_ms_p50"])


if __name__ == "__main__":
    main()
