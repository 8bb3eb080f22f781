"""The keywords an expert gives, and their cost: first prompts of each zoo task, on one thread.

    python benchmarks/keywords.py EXPERT [--config examples/zoo/config.yaml] [--limit 5] [--json PATH]

All samples of all prompts run concurrently, as in training, without the cache. Seconds are given as wall time and as
CPU time, which other programs on the machine disturb less.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import json
import time
from pathlib import Path
from typing import Any

from coe.config import load_config
from coe.experts import open_snapshot
from coe.signals.features import KEYWORDS, Signals
from coe.signals.keywords import KeywordReader

TASKS = Path(__file__).parents[1] / "examples" / "zoo" / "tasks"


def main() -> None:
    """Read, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("expert")
    parser.add_argument("--config", type=Path, default=TASKS.parent / "config.yaml")
    parser.add_argument("--limit", type=int, default=5, help="prompts of each task")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    snapshot = open_snapshot(config)
    engines = config.engines.model_copy(update={"hf": config.engines.hf.model_copy(update={"threads": 1})})
    Signals(snapshot).check({f"{KEYWORDS}/{arguments.expert}"})
    reader = KeywordReader(arguments.expert, snapshot, engines)
    document = measure(reader, prompts_of_tasks(arguments.limit))
    reader.close()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def prompts_of_tasks(limit: int) -> list[str]:
    """The first prompts of each task."""
    files = [file.read_text(encoding="utf-8").splitlines()[:limit] for file in sorted(TASKS.glob("*.jsonl"))]
    return [json.loads(line)["prompt"] for lines in files for line in lines]


def measure(reader: KeywordReader, prompts: list[str]) -> dict[str, Any]:
    """Keywords and seconds per query, alone and all together."""
    reader.read(["Hello"])  # loads it
    alone, together = timed(reader, prompts[:1]), timed(reader, prompts)
    for prompt, words in together["keywords"].items():
        print(f"{prompt[:70]!r:<74} {', '.join(words) or '-'}")
    some = sum(map(bool, together["keywords"].values()))
    print(f"\n{some} of {len(prompts)} prompts have a keyword")
    for name, run in (("alone", alone), ("together", together)):
        print(f"{name}: {run['seconds']:.2f} s a query, {run['cpu_s']:.2f} s of CPU time")
    return {"alone": alone, "together": together, "prompts": len(prompts), "with_keywords": some}


def timed(reader: KeywordReader, prompts: list[str]) -> dict[str, Any]:
    """Read once."""
    began, worked = time.perf_counter(), time.process_time()
    words = reader.read(prompts)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - worked
    keywords = dict(zip(prompts, words, strict=True))
    return {"seconds": seconds / len(prompts), "cpu_s": cpu_s / len(prompts), "keywords": keywords}


if __name__ == "__main__":
    main()
