"""Accuracy of a static encoder against the model it is distilled from (kNN, category; given folds), and its speed.

    COE_DATA_DIR=... python benchmarks/encoders.py [--sets llmrouter9 ...] [--dims 256 384] [--kinds knn category]

`plain` averages token vectors; `fitted` is fitted to the prompts of the training folds only. `encode_ms` is the median
of single prompts, `per_s` prompts per second in batches of 256, both in CPU time on one thread.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from routers.decision import decide
from routers.encoders.build import CachedEncoder, Encoder, SentenceTransformerEncoder
from routers.encoders.distill import distill
from routers.factory import build
from routers.outcomes.table import OutcomeTable

SETS = ("routerdc7", "llmrouter9", "mmlupro28", "routerbench3", "routellm2")


class OnceRead(SentenceTransformerEncoder):
    """The tokens' vectors are the same for every fold."""

    vectors: NDArray[np.float32] | None = None

    def token_vectors(self, on_progress: object = None) -> NDArray[np.float32]:
        if self.vectors is None:
            self.vectors = super().token_vectors()
        return self.vectors.copy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--dims", nargs="+", type=int, default=[256])
    parser.add_argument("--kinds", nargs="+", default=["knn", "category"])
    options = parser.parse_args()
    folder = Path(os.environ["COE_DATA_DIR"]) / "outcomes"
    source = OnceRead()
    teacher = CachedEncoder(source)
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.sets:
            table = OutcomeTable.read(folder / f"{name}.public.parquet")
            show(name, "minilm", options.kinds, table, lambda train: teacher)
            for dim in options.dims:
                plain = distill(source, f"{scratch}/plain", dim=dim)
                show(name, f"plain {dim}", options.kinds, table, lambda train, plain=plain: plain)

                def fitted(train: OutcomeTable, dim: int = dim) -> Encoder:
                    return distill(source, f"{scratch}/fitted", dim=dim, texts=train.prompts, targets=teacher)

                show(name, f"fitted {dim}", options.kinds, table, fitted)
                print(f"{name:14} plain {dim}: " + speed(plain, table.prompts), flush=True)


def show(name: str, what: str, kinds: list[str], table: OutcomeTable, make: Callable[[OutcomeTable], Encoder]) -> None:
    """Mean score of each kind over the folds."""
    assert table.folds is not None
    scores: dict[str, list[float]] = {kind: [] for kind in kinds}
    for fold in np.unique(table.folds):
        train, test = table.select(table.folds != fold), table.select(table.folds == fold)
        encoder = make(train)
        for kind in kinds:
            decisions = decide(build(kind, encoder).fit(train).estimate(test.queries()))
            columns = [test.experts.index(decision.experts[0]) for decision in decisions]
            scores[kind] += test.scores[np.arange(len(test)), columns].tolist()
    print(f"{name:14} {what:14}" + "".join(f"{k:>10} {100 * np.mean(v):6.2f}" for k, v in scores.items()), flush=True)


def speed(encoder: Encoder, prompts: tuple[str, ...]) -> str:
    some = prompts[:2048]
    encoder.encode(some[:8])
    single = []
    for prompt in some[:200]:
        started = time.process_time()
        encoder.encode([prompt])
        single.append(time.process_time() - started)
    started = time.process_time()
    for start in range(0, len(some), 256):
        encoder.encode(some[start : start + 256])
    seconds = time.process_time() - started
    return f"encode_ms {1e3 * np.median(single):.2f}, per_s {len(some) / seconds:,.0f}"


if __name__ == "__main__":
    main()
