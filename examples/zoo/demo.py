"""The demo: real experts, a router trained on their measured outcomes, and fresh queries answered by a service.

    python -m examples.zoo.demo --seed 7 --n 140

The queries are generated from the seed, with phrasings and words that no adapter and no router was trained on. The
official OpenAI client sends them to `coe serve`, every other one streamed; then `coe batch` answers the same queries
and must give the same answers. A few more queries need two experts, which the service composes.

The last line is JSON. `best_single_accuracy`: the expert with the best mean on the training outcomes answers all.
`task_oracle_accuracy`: each query goes to the best expert of its true family, which the router does not know.
`serve_p50_s`: median time of a request, 32 at a time. `two_skill_..._right`: right answers to the queries that need two
experts, of the best single expert and of the composition, by `text` or `latent`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before tokenizers are imported by anything below

from coe.cli.progress import progress, status
from coe.config import load_config
from coe.experts import open_snapshot
from coe.hosting import open_host
from examples.zoo.after import next_commands, register
from examples.zoo.families import FAMILIES
from examples.zoo.fetch import BASES, fetch
from examples.zoo.outcomes import measured_outcomes, shipped_outcomes
from examples.zoo.report import (
    AGGREGATE,
    Composed,
    Question,
    Result,
    Results,
    answer_line,
    as_lines,
    console,
    fresh_questions,
    fresh_two_skill_questions,
    show,
)
from examples.zoo.service import Batched, Served, Service, ask_service, run_batch
from registry.storage import atomic_path, coe_home
from registry.store import Snapshot
from routers.artifacts import save
from routers.encoders.build import CachedEncoder, build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable

ZOO = Path(__file__).parent
CONFIG = ZOO / "config.yaml"
SERVED = ZOO / "latent.yaml"
"""As CONFIG, with compositions: what the demo's service serves."""
COMPOSITION: Final = AGGREGATE
"""The policy of SERVED that is better on queries of two skills, of those that exchange text or latent states."""
N_TWO_SKILLS: Final = 8
GENERALIST = "smollm2"
EVERY_S: Final = 8.0
"""Seconds between two lines of progress where stdout is not a terminal."""


def say(text: str) -> None:
    """A line of progress."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def train_routers(table: OutcomeTable, snapshot: Snapshot) -> Path:
    """Train the routers of SERVED on measured outcomes; returns the folder of the first.

    `category` finds one expert for each query, `knn` those that are composed.
    """
    encoder = CachedEncoder(build_encoder("minilm"))
    ood = [json.loads(line)["prompt"] for line in (ZOO / "ood.jsonl").read_text(encoding="utf-8").splitlines()]
    folder, digests = coe_home() / "zoo", {name: spec.digest for name, spec in snapshot.experts.items()}
    category = build("category", encoder, {"ood_prompts": ood, "general": GENERALIST}).fit(table)
    for router, name in ((category, "router"), (build("knn", encoder, {}).fit(table), "knn")):
        save(router, folder / name, table=table, encoder=encoder, digests=digests)
    return folder / "router"


def training_outcomes(snapshot: Snapshot) -> OutcomeTable:
    """The shipped outcomes if they were measured on exactly these experts; otherwise they are measured now."""
    table = shipped_outcomes(snapshot.experts)
    if table is None:
        say("the shipped outcomes were measured on other experts: measuring these now")
        table = asyncio.run(_measure(snapshot))
    return table


async def _measure(snapshot: Snapshot) -> OutcomeTable:
    async with open_host(load_config(CONFIG), snapshot) as host:
        with progress(to=console, every_s=EVERY_S, transient=True) as shown:
            tasks = {name: shown.add(name) for name in snapshot.experts}
            return await measured_outcomes(
                host, lambda state: tasks[state.expert].update(completed=state.done, total=state.total)
            )


async def answer(url: str, table: OutcomeTable, questions: Sequence[Question]) -> tuple[Results, Served]:
    """Answers with routing, of the best single expert, and of the best expert of each family; the first also timed."""
    best_single = best_expert(table)
    specialist = {name: best_expert(table, domain=name) for name in FAMILIES}
    served = await _routed(url, questions)
    # Decoding is greedy: an answer that an expert has given already is not generated again.
    known = {(q.id, result.expert): result for q, result in zip(questions, served.results, strict=True)}
    with progress(to=console, every_s=EVERY_S, transient=True) as shown:
        for expert in dict.fromkeys((best_single, *specialist.values())):
            wanted = [q for q in questions if expert in (best_single, specialist[q.family.name])]
            left = [q for q in wanted if (q.id, expert) not in known]
            task = shown.add(f"for comparison, {expert} answers", total=len(left))
            answers = await ask_service(url, left, expert, lambda *_, task=task: task.advance(), clients=len(questions))  # type: ignore[misc]
            known |= {(q.id, expert): result for q, result in zip(left, answers.results, strict=True)}
    results = Results(
        questions=questions,
        routed=served.results,
        best_single=[known[q.id, best_single] for q in questions],
        oracle=[known[q.id, specialist[q.family.name]] for q in questions],
    )
    return results, served


async def answer_two_skills(url: str, best_single: str, questions: Sequence[Question]) -> Composed:
    """Answers of the best single expert and of COMPOSITION to questions that need two experts, all at once."""
    with status("queries that need two experts", to=console, every_s=EVERY_S):
        single, composed = await asyncio.gather(
            *(ask_service(url, questions, model, lambda *_: None) for model in (best_single, f"coe/{COMPOSITION}"))
        )
    return Composed(COMPOSITION, questions, single.results, composed.results)


async def _routed(url: str, questions: Sequence[Question]) -> Served:
    """The answers of `model: auto`, each printed as it comes."""
    n = 0

    def print_answer(question: Question, result: Result) -> None:
        nonlocal n
        n += 1
        console.print(answer_line(question, result, n, len(questions)), highlight=False, no_wrap=True, crop=True)

    console.print(f"\n{len(questions)} questions to model auto: number, expert, right?, question, answer", markup=False)
    with status("waiting for answers", to=console, every_s=EVERY_S):
        return await ask_service(url, questions, "auto", print_answer)


def differences(results: Results, batched: Batched) -> list[str]:
    """The questions that the batch answered differently, one line each."""
    return [
        f"question {q.id}: the service answered {one.text!r} ({one.expert}), the batch {other.text!r} ({other.expert})"
        for q, one, other in zip(results.questions, results.routed, batched.results, strict=True)
        if (one.expert, one.text) != (other.expert, other.text)
    ]


def best_expert(table: OutcomeTable, domain: str | None = None) -> str:
    """The expert with the best mean score, over all rows or those of a domain."""
    rows = [i for i, label in enumerate(table.labels()) if domain in (None, label)]
    return table.experts[int(table.scores[rows].mean(axis=0).argmax())]


def prepare() -> tuple[OutcomeTable, Snapshot]:
    """The bases on disk, the experts described, a router trained on their outcomes."""
    with status("preparing the base models", to=console, every_s=EVERY_S):
        for base in BASES:
            fetch(base, progress=say)
    with status("reading the experts", to=console, every_s=EVERY_S):
        snapshot = open_snapshot(load_config(CONFIG))
    table = training_outcomes(snapshot)
    say(f"{len(snapshot.experts)} experts, {len(table)} training queries measured on each")
    with status("training the router", to=console, every_s=EVERY_S):
        say(f"category router trained: {train_routers(table, snapshot)}")
    return table, snapshot


def run(n: int, seed: int) -> tuple[dict[str, float | int], int]:
    """The whole demo; returns the figures of the last line, and how many answers of the batch differ."""
    started = time.perf_counter()
    folder = coe_home() / "zoo" / "demo"
    table, _ = prepare()
    questions = fresh_questions(n, seed)
    service = Service(SERVED, say)
    try:
        with status("starting the service", to=console, every_s=EVERY_S):
            say(register(ZOO / "experts.yaml"))
            url = service.wait_ready()
        results, served = asyncio.run(answer(url, table, questions))
        two_skills = fresh_two_skill_questions(N_TWO_SKILLS, seed)
        composed = asyncio.run(answer_two_skills(url, best_expert(table), two_skills))
        service.stop()
        show(results)
        say(composed.line())
        for name, lines in (("results", as_lines(results)), ("two_skills", composed.as_lines())):
            with atomic_path(folder / f"{name}.jsonl") as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        with status("coe batch answers the same questions", to=console, every_s=EVERY_S):
            batched = run_batch(CONFIG, questions, folder, say)
    finally:
        service.stop()
        service.wait_stopped()
    differing = differences(results, batched)
    say(f"coe batch gave the same answer as the service for {n - len(differing)} of {n} questions")
    for line in differing:
        console.print(line, style="red", markup=False)
    say(next_commands(CONFIG, folder))
    return results.summary() | composed.summary() | {
        "seconds_total": round(time.perf_counter() - started, 1),
        "tokens_per_s": round(sum(result.tokens for result in results.routed) / served.wall_s, 1),
        "serve_p50_s": round(served.p50_s, 3),
        "batch_rows_per_s": round(batched.rows_per_s, 2),
    }, len(differing)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the last line of stdout is the JSON."""
    parser = argparse.ArgumentParser(prog="examples.zoo.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=7, help="seed of the fresh queries")
    parser.add_argument("--n", type=int, default=140, help="number of queries")
    options = parser.parse_args(arguments)
    if options.n < len(FAMILIES):
        parser.error(f"--n must be at least {len(FAMILIES)}, one query for each family; got {options.n}")
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell ignores SIGINT for jobs in the background
        signal.signal(number, signal.default_int_handler)
    summary, n_differing = run(options.n, options.seed)
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if n_differing else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        console.print("interrupted; fetched models, measured outcomes and the trained router are kept")
        sys.exit(130)
