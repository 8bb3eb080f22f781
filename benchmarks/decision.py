"""The cost of a routing decision: training, memory, p50 and p99 of each kind and its encoder, on one thread.

    COE_DATA_DIR=... python benchmarks/decision.py [--sets routerdc7 mmlupro28] [--kinds ...] [--encoders minilm ...]

Trains every kind on four folds of a table and routes prompts of the fifth. `encode` is the encoder alone; `decide` is
the rest, from the embedding to the RoutingDecision; `both` is the latency of a query, timed for every encoder except
the first, whose share is nearly all of it. `train_s` starts with the embeddings; `peak_mib` is the memory of training
beyond them; `artifact_mib` is the size that `save` writes.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from recorded import Recorded

from routers import artifacts
from routers.base import Query
from routers.decision import decide
from routers.encoders.build import CachedEncoder, Encoder, build_encoder
from routers.factory import TrainableRouter, build
from routers.outcomes.table import OutcomeTable

KINDS = ("knn", "cluster", "category", "factor", "contrastive", "quality")
BATCHES = {1: 300, 256: 12}
"""Batch size -> most repetitions."""
LONGEST_S = 10.0
"""Seconds after which repetition stops, after at least three."""
HELD_OUT_FOLD = 4
_MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["routerdc7", "mmlupro28"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--encoders", nargs="+", default=["minilm"], help="the first one trains the routers")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    rows = [row for name in options.sets for row in measure(name, options.kinds, options.encoders)]
    if options.json is not None:
        options.json.write_text(json.dumps({"threads": 1, "results": rows}, indent=2) + "\n")


def measure(name: str, kinds: Sequence[str], encoders: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a table: each encoder, each kind, and both together with each encoder."""
    table = read_table(name)
    train, test = table.select(table.folds != HELD_OUT_FOLD), table.select(table.folds == HELD_OUT_FOLD)
    print(f"{name}: {len(train):,} training rows, {len(table.experts)} experts")
    built = {encoder: build_encoder(encoder) for encoder in encoders}
    for encoder, encodes in built.items():
        yield row(name, f"encode: {encoder}", timings(encodes.encode, test.prompts))
    for encoder, encodes in built.items():
        recorded = Recorded(CachedEncoder(encodes, on_progress=progress), table.prompts)
        for kind in kinds:
            router, trained = train_measured(kind, recorded, train)
            if encoder == encoders[0]:
                yield row(name, f"decide: {kind}", trained | timings(routing(router), test.prompts))
                continue
            live = type(router).from_state(router.state(), encodes)
            yield row(name, f"both: {encoder} + {kind}", timings(routing(live), test.prompts))


def read_table(name: str) -> OutcomeTable:
    folder = os.environ.get("COE_DATA_DIR")
    if not folder:
        sys.exit("COE_DATA_DIR is not set: it names the folder that holds outcomes/<set>.public.parquet")
    return OutcomeTable.read(Path(folder) / "outcomes" / f"{name}.public.parquet")


def progress(done: int, n: int) -> None:
    print(f"\rencoding {done}/{n}", end="\n" if done == n else "", file=sys.stderr)


def train_measured(kind: str, encoder: Encoder, train: OutcomeTable) -> tuple[TrainableRouter, dict[str, float]]:
    """A fitted router, with seconds, MiB beyond the embeddings while training, and MiB on disk."""
    encoder.encode(train.prompts[:1])
    reset_peak()
    before_mib, before_s = peak_mib(), time.perf_counter()
    router = build(kind, encoder).fit(train)
    seconds = time.perf_counter() - before_s
    extra = peak_mib() - before_mib
    with tempfile.TemporaryDirectory() as folder:
        artifacts.save(router, Path(folder) / "router", table=train, encoder=encoder)
        size = sum(path.stat().st_size for path in (Path(folder) / "router").iterdir())
    return router, {"train_s": round(seconds, 2), "peak_mib": round(extra), "artifact_mib": round(size / _MIB, 1)}


def reset_peak() -> None:
    """Reset the peak memory that Linux records for this process."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory since `reset_peak`, in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0]) / 1024


def routing(router: TrainableRouter) -> Callable[[Sequence[str]], object]:
    return lambda texts: decide(router.estimate([Query.of(text) for text in texts]))


def timings(call: Callable[[Sequence[str]], object], prompts: Sequence[str]) -> dict[str, Any]:
    """Milliseconds per call at each batch size."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for size, repeats in BATCHES.items():
        batches = [[prompts[i] for i in rng.choice(len(prompts), size)] for _ in range(repeats)]
        call(batches[0])  # loads and warms up
        times: list[float] = []
        for batch in batches:
            before = time.perf_counter()
            call(batch)
            times.append(1e3 * (time.perf_counter() - before))
            if len(times) >= 3 and sum(times) > 1e3 * LONGEST_S:
                break
        found[f"p50_ms_{size}"] = round(float(np.median(times)), 3)
        found[f"p99_ms_{size}"] = round(float(np.quantile(times, 0.99)), 3)
    return found


def row(name: str, what: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of one row; also prints them."""
    small, large = BATCHES
    shown = " ".join(f"{figures[f'{q}_ms_{size}']:9.2f}" for size in (small, large) for q in ("p50", "p99"))
    rate = 1e3 * large / figures[f"p50_ms_{large}"]
    extra = ""
    if "train_s" in figures:
        extra = f"  train {figures['train_s']} s, {figures['peak_mib']} MiB, saved {figures['artifact_mib']} MiB"
    print(f"  {what:32}{shown}  {rate:9.0f}/s{extra}", flush=True)
    return {"set": name, "what": what, **figures}


if __name__ == "__main__":
    main()
