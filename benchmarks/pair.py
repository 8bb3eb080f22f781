"""RouteLLM's pair on MMLU: APGR and CPT of kinds that route between a strong and a weak expert, by cross-validation.

    COE_DATA_DIR=... python benchmarks/pair.py [--router 'quality {"learners": ["category", "knn"]}'] ...

Reads routellm2, keeps the MMLU rows that RouteLLM evaluates on (`contaminated` ones are left out), trains on four of
the given folds and routes the fifth. The cost weight sweeps the share of strong calls over the pooled folds
(`routers.evaluation.pair`).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from routers.encoders.build import CachedEncoder, build_encoder
from routers.encoders.remembered import Remembered
from routers.evaluation.cross_validation import cross_validate
from routers.factory import build
from routers.outcomes.table import OutcomeTable

ROUTERS = (
    "knn",
    'knn {"weights": "distance"}',
    'category {"choice": "soft"}',
    "cluster",
    "factor",
    "quality",
    'quality {"learners": ["category", "ridge", "trees", "knn"]}',
    'quality {"learners": ["category", "logistic", "knn"]}',
)


def read() -> OutcomeTable:
    folder = os.environ.get("COE_DATA_DIR")
    if not folder:
        sys.exit("COE_DATA_DIR is not set: it names the folder that holds outcomes/routellm2.public.parquet")
    table = OutcomeTable.read(Path(folder) / "outcomes" / "routellm2.public.parquet")
    mmlu = np.array([domain.startswith("mmlu_") for domain in table.domains or ()])
    assert table.frame is not None
    return table.select(mmlu & ~table.frame["contaminated"].to_numpy(dtype=bool))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", action="append", help="a kind and its settings; may be repeated")
    table = read()
    print(f"{len(table):,} rows of {' and '.join(table.experts)}")
    encoder = Remembered(CachedEncoder(build_encoder()), table.prompts)
    assert table.folds is not None
    for router in parser.parse_args().router or ROUTERS:
        kind, _, settings = router.partition(" ")
        before = time.perf_counter()
        report = cross_validate(partial(build, kind, encoder, json.loads(settings or "{}")), table, table.folds)
        assert report.apgr is not None and report.cpt50 is not None and report.cpt80 is not None
        print(
            f"{router:65} APGR {report.apgr:.4f}  CPT50 {100 * report.cpt50:.1f}  CPT80 {100 * report.cpt80:.1f}  "
            f"{time.perf_counter() - before:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
