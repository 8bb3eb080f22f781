"""Deltas of the zoo's experts: bytes, seconds to load, accuracy; as adapters, and merged into full weights.

    python -m benchmarks.deltas --lora sql,units,sentiment --merged sql,units --rows 60 --out runs/deltas

Each expert answers new rows of its own task (split `test`), greedily, on SmolLM2 in float32: as it is, and compressed
exactly and by ComPEFT with every density and alpha. Merged experts are the base plus their adapter in bfloat16. Results
are written after every expert; an expert whose results are there is not measured again.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from coe.config import Config, load_config
from coe.engines.hf.load import load_model
from coe.evaluation.answer_folder import open_answer_folder
from coe.evaluation.compression import Candidate, compress, mean_score
from coe.evaluation.plan import plan_run
from coe.evaluation.runner import run
from coe.evaluation.tasks import Task, load_task
from coe.experts import locate, open_snapshot
from coe.hosting import open_host
from examples.zoo.families import FAMILIES, Split
from examples.zoo.tasks import write_task
from registry.deltas.cache import forget
from registry.deltas.writing import Compression
from registry.describe import describe
from registry.spec import ExpertSpec, Kind
from registry.storage import atomic_path
from registry.store import Snapshot

ZOO = Path("examples/zoo")
BASE = "smollm2"


def merged(name: str, experts: dict[str, ExpertSpec], out: Path) -> ExpertSpec:
    """The adapter `name` merged into its base in bfloat16, as an expert of its own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (out / "config.json").exists():
        base = locate(experts[BASE])
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, str(locate(experts[name]))).merge_and_unload().save_pretrained(out)
        AutoTokenizer.from_pretrained(base).save_pretrained(out)
    draft = ExpertSpec(name=f"{name}-merged", kind=Kind.MODEL, source=str(out.absolute()))
    return describe(draft.stated())


def load_seconds(spec: ExpertSpec, experts: dict[str, ExpertSpec]) -> dict[str, float]:
    """Seconds to restore the files (of a delta, when nothing is restored yet), and to load them afterwards."""
    forget(spec)
    started = time.perf_counter()
    path = locate(spec, experts)
    restored = time.perf_counter()
    if spec.kind is Kind.MODEL:
        load_model(spec.name, path, "cpu", torch.float32)
    else:
        from safetensors.torch import load_file

        load_file(path / "adapter_model.safetensors")
    loaded = time.perf_counter()
    return {"restore_s": round(restored - started, 3), "load_s": round(loaded - restored, 3)}


async def scores(
    specs: Sequence[ExpertSpec], experts: dict[str, ExpertSpec], task: Task, config: Config, folder: Path
) -> dict[str, float]:
    """Mean score of each expert on the task's rows; an interrupted run resumes."""
    needed = {name for spec in specs for name in (spec.name, *spec.references)}
    snapshot = Snapshot(1, {name: spec for name, spec in experts.items() if name in needed})
    plan = plan_run(snapshot.experts, [task], [spec.name for spec in specs])
    async with open_host(config, snapshot) as host:
        with open_answer_folder(folder, plan, resume=True) as opened:
            report = await run(plan, opened, host.ask, concurrency=32)
    return {spec.name: mean_score(report, spec.name, [task]) for spec in specs}


def measure(
    spec: ExpertSpec, known: dict[str, ExpertSpec], task: Task, config: Config, out: Path, hows: Sequence[Compression]
) -> dict[str, Any]:
    """Bytes, seconds and scores of an expert and its compressed forms."""
    base = None if spec.base else known[BASE]
    experts = known | {spec.name: spec}
    shutil.rmtree(out / "deltas", ignore_errors=True)
    forms: list[tuple[Candidate, float]] = []
    for number, how in enumerate(hows):
        started = time.perf_counter()
        found = compress(spec, base, how, out / "deltas" / str(number), experts)
        forms.append((found, time.perf_counter() - started))
    experts |= {found.spec.name: found.spec for found, _ in forms}
    loads = {each.name: load_seconds(each, experts) for each in (spec, *(found.spec for found, _ in forms))}
    # An exact form is the expert by content: one of the two is asked.
    asked = [spec, *(found.spec for found, _ in forms if found.how.density is not None)]
    found_scores = asyncio.run(scores(asked, experts, task, config, out / "run"))
    for found, _ in forms:
        forget(found.spec)
    before = sum(file.size_bytes for file in spec.files if file.name.endswith(".safetensors"))
    rows = [{"form": "original", "bytes": before, "score": found_scores[spec.name], **loads[spec.name]}]
    for found, seconds in forms:
        score = found_scores.get(found.spec.name, found_scores[spec.name])
        alpha = None if found.how.density is None else found.how.alpha
        how = {"density": found.how.density, "alpha": alpha, "compress_s": round(seconds, 2)}
        sizes = {"bytes": found.size_bytes, "times_smaller": round(before / found.size_bytes, 1), "score": score}
        rows.append({"form": found.how.method, **how, **sizes, **loads[found.spec.name]})
    return {"expert": spec.name, "rows": len(task.rows), "forms": rows}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    lora: Annotated[str, typer.Option(help="Experts measured as adapters, with commas between.")] = "",
    merge: Annotated[str, typer.Option("--merged", help="Experts measured as full weights.")] = "",
    rows: Annotated[int, typer.Option(min=1, help="Rows of each expert's task.")] = 60,
    density: Annotated[str, typer.Option(help="Percent of the weights that are kept.")] = "5,10,20,50",
    alpha: Annotated[str, typer.Option(help="Factors of the scales.")] = "1,1.5",
    dtype: Annotated[str, typer.Option(help="Type in which the engine computes.")] = "float32",
) -> None:
    """Measure, and write `results.json` in the folder."""
    config = load_config(ZOO / "config.yaml")
    known = dict(open_snapshot(config).experts)
    hf = config.engines.hf.model_copy(update={"dtype": dtype})
    changes = {
        "host": config.host.model_copy(update={"pins": (), "budget": 2**32}),
        "engines": config.engines.model_copy(update={"hf": hf}),
    }
    config = config.model_copy(update=changes)
    hows = [
        Compression(),
        *(Compression(float(d) / 100, float(a)) for d in density.split(",") for a in alpha.split(",")),
    ]
    path = out / "results.json"
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    wanted = [(name, form) for form, names in (("lora", lora), ("merged", merge)) for name in names.split(",") if name]
    for name, form in wanted:
        spec = known[name] if form == "lora" else merged(name, known, out / f"{name}-merged")
        if any(each["expert"] == spec.name for each in results):
            continue
        family = FAMILIES[name]
        asked = {f"{Split.TEST}-{i}": row for i, row in enumerate(family.rows(Split.TEST, rows, seed=11))}
        (out / "tasks").mkdir(parents=True, exist_ok=True)
        task = replace(load_task(write_task(family, asked, out / "tasks")), name=name)
        results.append(measure(spec, known, task, config, out / spec.name, hows))
        with atomic_path(path) as staged:
            staged.write_text(json.dumps(results, indent=1) + "\n")
        for each in results[-1]["forms"]:
            typer.echo(json.dumps({"expert": spec.name, **each}))


if __name__ == "__main__":
    typer.run(main)
