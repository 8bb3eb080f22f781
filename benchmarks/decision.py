"""What a routing decision costs beside encoding its prompt: p50 and p99 in milliseconds, on one thread.

    COE_DATA_DIR=... python benchmarks/decision.py [--json PATH]

Trains the category and the kNN router on four folds of llmrouter9 and routes prompts of the fifth. `encode` is the
encoder alone; `decide` is all else that `estimate` and `decide` do, from the embedding to the RoutingDecision.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from routers.base import Query, TrainableRouter
from routers.build import build
from routers.decide import decide
from routers.encoders import CachedEncoder, Encoder, build_encoder
from routers.outcomes import OutcomeTable

KINDS = ("category", "knn")
BATCHES = {1: 300, 256: 12}
"""Batch size -> how often it is timed."""
HELD_OUT_FOLD = 4


class Recorded:
    """An encoder that gives back embeddings made before: what is timed then is everything but encoding."""

    def __init__(self, inner: Encoder, texts: Sequence[str]) -> None:
        self.name, self.dim, self.digest, self.max_tokens = inner.name, inner.dim, inner.digest, inner.max_tokens
        self._vectors = dict(zip(texts, inner.encode(texts), strict=True))

    def encode(self, texts: Sequence[str]) -> Any:
        return np.stack([self._vectors[text] for text in texts])

    def truncated(self, texts: Sequence[str]) -> Any:
        return np.zeros(len(texts), dtype=bool)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time routing decisions beside their encoder.")
    parser.add_argument("--json", type=Path, help="also write the results here")
    target = parser.parse_args().json
    table = read_table()
    train, test = table.select(table.folds != HELD_OUT_FOLD), table.select(table.folds == HELD_OUT_FOLD)
    encoder = build_encoder()
    cached = CachedEncoder(
        encoder, on_progress=lambda done, n: print(f"\rencoding {done}/{n}", end="", file=sys.stderr)
    )
    trained = {kind: build(kind, cached).fit(train) for kind in KINDS}
    recorded = Recorded(cached, test.prompts)
    rows = [
        row
        for size, repeats in BATCHES.items()
        for row in measure(size, repeats, test.prompts, encoder, recorded, trained)
    ]
    show(rows)
    if target is not None:
        target.write_text(json.dumps({"n_training_rows": len(train), "threads": 1, "results": rows}, indent=2) + "\n")


def read_table() -> OutcomeTable:
    folder = os.environ.get("COE_DATA_DIR")
    if not folder:
        sys.exit("COE_DATA_DIR is not set: it names the folder that holds outcomes/llmrouter9.public.parquet")
    return OutcomeTable.read(Path(folder) / "outcomes" / "llmrouter9.public.parquet")


def measure(
    size: int,
    repeats: int,
    prompts: Sequence[str],
    encoder: Encoder,
    recorded: Encoder,
    trained: dict[str, TrainableRouter],
) -> list[dict[str, Any]]:
    """One row for the encoder and one for each router, at one batch size."""
    rng = np.random.default_rng(0)
    batches = [[prompts[i] for i in rng.choice(len(prompts), size)] for _ in range(repeats)]
    rows = [{"what": "encode", "batch": size, **timed(encoder.encode, batches)}]
    for kind, router in trained.items():
        router = type(router).from_state(router.state(), recorded)
        route = lambda texts, router=router: decide(router.estimate([Query.of(text) for text in texts]))  # noqa: E731
        rows.append({"what": f"decide: {kind}", "batch": size, **timed(route, batches)})
    return rows


def timed(call: Callable[[Sequence[str]], object], batches: Sequence[Sequence[str]]) -> dict[str, float]:
    """Milliseconds a call; the first call, which loads and warms up, does not count."""
    call(batches[0])
    times = []
    for batch in batches:
        before = time.perf_counter()
        call(batch)
        times.append(1e3 * (time.perf_counter() - before))
    return {"p50_ms": round(float(np.median(times)), 3), "p99_ms": round(float(np.quantile(times, 0.99)), 3)}


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'what':<18} {'batch':>5} {'p50 ms':>9} {'p99 ms':>9} {'p50 ms a query':>15}")
    for row in rows:
        print(
            f"{row['what']:<18} {row['batch']:>5} {row['p50_ms']:>9.2f} {row['p99_ms']:>9.2f} "
            f"{row['p50_ms'] / row['batch']:>15.3f}"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
