"""How many out-of-distribution prompts a router abstains from, and at what loss: guarded routers against category.

    COE_DATA_DIR=... python benchmarks/ood.py [--set llmrouter9] [--seeds 3]

Trained on four folds of a table, tested on the fifth and on two sorts of other prompts: questions to a voice assistant
(CLINC-150, test), and questions that are out of scope for that assistant too (its out-of-scope test prompts).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from routers.base import Query
from routers.decision import decide
from routers.encoders.build import CachedEncoder, build_encoder
from routers.factory import TrainableRouter, build
from routers.outcomes.table import OutcomeTable

IN_SCOPE, OUT_OF_SCOPE = 600, 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="llmrouter9")
    parser.add_argument("--kind", default="category", help="of the router that is guarded")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    folder = Path(os.environ["COE_DATA_DIR"])
    table = OutcomeTable.read(folder / "outcomes" / f"{options.set}.public.parquet")
    encoder = CachedEncoder(build_encoder(options.encoder))
    ood_prompts = read_ood(folder / "sets" / "clinc150_full.json")
    print(f"{'router':44}{'accuracy':>9}{'answered':>9}{'lost':>7}" + "".join(f"{name:>14}" for name in ood_prompts))
    plain = {"kind": options.kind, "settings": {}}
    tried: list[tuple[str, dict[str, Any]]] = [(options.kind, {})]
    tried += [("guarded", {**plain, "method": "conformal", "alpha": alpha}) for alpha in (0.01, 0.05, 0.1)]
    tried += [("guarded", {**plain, "method": "risk", "alpha": alpha}) for alpha in (0.1, 0.2, 0.3)]
    for kind, settings in tried:
        runs = [
            run(build(kind, encoder, {**settings, "seed": seed}), table, ood_prompts) for seed in range(options.seeds)
        ]
        name = " ".join([kind, *(f"{key} {settings[key]}" for key in ("method", "alpha") if key in settings)])
        accuracy, answered, lost, *away = 100 * np.mean(runs, axis=0)
        print(f"{name:44}{accuracy:9.2f}{answered:9.1f}{lost:7.2f}" + "".join(f"{x:13.1f}%" for x in away), flush=True)


def run(router: TrainableRouter, table: OutcomeTable, ood_prompts: dict[str, Sequence[str]]) -> list[float]:
    """Accuracy including the generalist; shares answered and answered incorrectly; abstention rate of each sort."""
    parts = []
    for fold in np.unique(table.folds):
        test = table.select(table.folds == fold)
        router.fit(table.select(table.folds != fold))
        decisions = decide(router.estimate(test.queries()))
        scores = np.array([test.scores[i, test.experts.index(d.experts[0])] for i, d in enumerate(decisions)])
        own = np.array([not decision.abstained for decision in decisions])
        sent_away = [abstained(router, texts) for texts in ood_prompts.values()]
        parts.append([scores.mean(), own.mean(), (own * (1 - scores)).mean(), *sent_away])
    return [float(value) for value in np.mean(parts, axis=0)]


def abstained(router: TrainableRouter, texts: Sequence[str]) -> float:
    """Share of the texts that the router abstains on."""
    return float(np.mean(router.estimate([Query.of(text) for text in texts]).abstained))


def read_ood(path: Path) -> dict[str, Sequence[str]]:
    """Samples of both sorts."""
    rng, sets = np.random.default_rng(0), json.loads(path.read_text())
    wanted = {"in scope": ("test", IN_SCOPE), "out of scope": ("oos_test", OUT_OF_SCOPE)}
    samples = {}
    for name, (part, count) in wanted.items():
        texts = [text for text, _ in sets[part]]
        samples[name] = [texts[i] for i in rng.choice(len(texts), count, replace=False)]
    return samples


if __name__ == "__main__":
    main()
