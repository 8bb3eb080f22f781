"""Cross-validate kinds of routers on recorded outcome tables, by the folds that the tables carry.

    COE_DATA_DIR=... python benchmarks/cross_validation.py --out runs [--tables llmrouter9] [--kinds auto quality]

Every (table, kind, fold) is a file under --out. Existing files are not run again, so an interrupted run resumes, and
`--only-report` summarises the existing files. `auto` selects inside the training folds, so its figures are nested.
Training and selection see only the training folds; from the test fold a router reads only the prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

from registry.storage import atomic_directory
from routers.encoders.build import CachedEncoder, build_encoder
from routers.evaluation import metrics
from routers.evaluation.recorded_routing import route
from routers.factory import build, reads_text
from routers.outcomes.table import OutcomeTable

NINE = (
    "mathstral-7B", "Meta-Llama-3_1-8B-Instruct", "Phi-3-mini-4k-instruct", "gemma-7b", "Qwen1.5-7B-Chat", "Yi-34B",
    "c4ai-command-r-v01", "Mixtral-8x7B-Instruct-v0.1", "Mistral-7B-Instruct-v0.2",
)  # fmt: skip
TABLES = {
    "llmrouter9": ("llmrouter9", None),
    "routerbench3": ("routerbench3", None),
    "nine-small": ("mmlupro28", NINE),
    "mmlupro28": ("mmlupro28", None),
    "routerdc7": ("routerdc7", None),
}
"""name -> file of outcomes, experts (`None` for all)."""


def read(name: str) -> OutcomeTable:
    file, experts = TABLES[name]
    table = OutcomeTable.read(Path(os.environ["COE_DATA_DIR"]) / "outcomes" / f"{file}.public.parquet")
    return table if experts is None else table.with_experts(experts)


def run(kind: str, settings: dict[str, object], table: OutcomeTable, fold: int, encoder: CachedEncoder) -> dict:
    """Scores of the router and of the training folds' best single expert, and seconds of training, for one fold."""
    train, test = table.select(table.folds != fold), table.select(table.folds == fold)
    router = build(kind, encoder if reads_text(kind) else None, settings)
    wall, cpu = time.perf_counter(), time.process_time()
    router.fit(train)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    routing = route(router, test)
    best = metrics.best_single(train.scores.mean(axis=0))
    found = {
        "won": metrics.picked(test.scores, routing.picks).tolist(),
        "best_single": test.scores[:, best].tolist(),
        "expected": routing.expected.tolist(),
        "fit_s": wall,
        "fit_cpu_s": cpu,
    }
    if kind == "auto":
        model, selection = router.model, router.model.selection
        members = zip(selection.members, selection.weights, strict=True)
        found["chosen"] = {str(model.scoreboard[member].candidate): weight for member, weight in members}
        found["reason"] = selection.reason
        found["own_estimate"] = model.expected.gain
    return found


def summary(folds: list[dict]) -> dict:
    won, base, expected = (np.concatenate([f[key] for f in folds]) for key in ("won", "best_single", "expected"))
    low, high = metrics.paired_bootstrap(won, base)
    return {
        "folds": len(folds),
        "n_queries": len(won),
        "accuracy": won.mean(),
        "best_single": base.mean(),
        "gain": won.mean() - base.mean(),
        "gain_ci95_low": low,
        "gain_ci95_high": high,
        "ece": metrics.expected_calibration_error(expected, won),
        "fit_s": float(np.median([f["fit_s"] for f in folds])),
        "fit_cpu_s": float(np.median([f["fit_cpu_s"] for f in folds])),
        "own_estimate": [f["own_estimate"] for f in folds] if "own_estimate" in folds[0] else None,
        "chosen": [f["chosen"] for f in folds] if "chosen" in folds[0] else None,
    }


def report(out: Path) -> dict:
    """table -> kind -> summary of all existing files."""
    found: dict[str, dict] = {}
    for folder in sorted(out.glob("*/*/*")):
        table, kind = folder.parts[-3:-1]
        found.setdefault(table, {}).setdefault(kind, []).append(json.loads((folder / "fold.json").read_text()))
    return {table: {kind: summary(folds) for kind, folds in kinds.items()} for table, kinds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--kinds", nargs="+", default=["best-single", "category", "knn", "quality", "auto"])
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, for every kind that is named")
    parser.add_argument("--label", default="", help="set behind the kind's name, to tell settings apart")
    parser.add_argument("--only-report", action="store_true")
    given = parser.parse_args()
    if not given.only_report:
        encoder = CachedEncoder(build_encoder(given.encoder))
        for kind in given.kinds:
            for name in given.tables:
                table = read(name)
                for fold in np.unique(table.folds):
                    folder = given.out / name / f"{kind}{given.label}" / str(fold)
                    if folder.exists():
                        continue
                    found = run(kind, given.settings, table, int(fold), encoder)
                    with atomic_directory(folder) as staged:
                        (staged / "fold.json").write_text(json.dumps(found))
                    print(
                        f"{name} {kind} fold {fold}: {100 * np.mean(found['won']):.2f} in {found['fit_s']:.0f} s",
                        flush=True,
                    )
    found = report(given.out)
    (given.out / "report.json").write_text(json.dumps(found, indent=2))
    for name, kinds in found.items():
        for kind, line in kinds.items():
            gain = (
                f"{100 * line['gain']:+.2f} [{100 * line['gain_ci95_low']:+.2f}, {100 * line['gain_ci95_high']:+.2f}]"
            )
            print(
                f"{name:14} {kind:16} {line['folds']} folds  {100 * line['accuracy']:.2f}  {gain}  "
                f"ECE {line['ece']:.3f}  fit {line['fit_s']:.0f} s ({line['fit_cpu_s']:.0f} s CPU)"
            )


if __name__ == "__main__":
    main()
