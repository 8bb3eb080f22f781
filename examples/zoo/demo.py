"""The demo: real experts registered, a router trained on what was measured of them, fresh queries answered.

    python -m examples.zoo.demo --seed 7 --n 140

The queries are generated anew from the seed, from phrasings and words that no adapter and no router was trained on.
They are asked through `coe serve` with the official OpenAI client, every other one streamed, then once more through
`coe batch`, which must give the same answers.

The last line is JSON. `best_single_accuracy`: the expert that did best on the training outcomes answers everything.
`task_oracle_accuracy`: each query goes to the expert that did best on its true family, which no router is told.
`serve_p50_s`: median time of a request, eight at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before tokenizers are imported by anything below

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from coe.config import load_config
from coe.host import open_host
from examples.zoo.families import FAMILIES
from examples.zoo.fetch import BASES, fetch
from examples.zoo.outcomes import measured_outcomes, shipped_outcomes
from examples.zoo.report import Question, Results, console, fresh_questions, show
from examples.zoo.service import CLIENTS, Batched, Served, ask_service, run_batch, serving
from registry.storage import coe_home
from registry.store import Snapshot
from routers.artifacts import save
from routers.encoders.build import CachedEncoder, build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable

ZOO = Path(__file__).parent
CONFIG = ZOO / "config.yaml"
GENERALIST = "smollm2"


def train_router(table: OutcomeTable, snapshot: Snapshot) -> Path:
    """Train the category router on measured outcomes, and save it where the config looks for it."""
    encoder = CachedEncoder(build_encoder("minilm"))
    foreign = [json.loads(line)["prompt"] for line in (ZOO / "ood.jsonl").read_text(encoding="utf-8").splitlines()]
    router = build("category", encoder, {"ood_prompts": foreign, "general": GENERALIST}).fit(table)
    folder = coe_home() / "zoo" / "router"
    save(router, folder, table=table, encoder=encoder, digests={n: s.digest for n, s in snapshot.experts.items()})
    return folder


async def training_outcomes() -> tuple[OutcomeTable, Snapshot]:
    """The shipped outcomes where they were measured on these very experts, else measured now."""
    async with open_host(load_config(CONFIG)) as host:
        table = shipped_outcomes(host.snapshot.experts)
        if table is None:
            console.print("the experts are not those that the shipped outcomes were measured on: measuring them now")
            with progress() as advance:
                table = await measured_outcomes(host, lambda state: advance(state.expert, state.done, state.total))
        return table, host.snapshot


async def ask(url: str, questions: Sequence[Question], model: str, title: str, clients: int = CLIENTS) -> Served:
    """The answers of one `model` ("auto" or an expert's name), with a bar."""
    with progress() as advance:
        return await ask_service(url, questions, model, lambda done: advance(title, done, len(questions)), clients)


async def answer(url: str, table: OutcomeTable, questions: Sequence[Question]) -> tuple[Results, Served]:
    """Answers with routing, of the best single expert, and of each family's own; the first with their times."""
    best_single = best_expert(table)
    specialist = {name: best_expert(table, domain=name) for name in FAMILIES}
    served = await ask(url, questions, "auto", "model auto")
    # Decoding is greedy: what an expert has answered already is not generated again.
    known = {(q.id, result.expert): result for q, result in zip(questions, served.results, strict=True)}
    for expert in dict.fromkeys((best_single, *specialist.values())):
        asked = [
            q for q in questions if expert in (best_single, specialist[q.family.name]) and (q.id, expert) not in known
        ]
        answers = await ask(url, asked, expert, f"for comparison: {expert}", clients=len(questions))
        known |= {(q.id, expert): result for q, result in zip(asked, answers.results, strict=True)}
    results = Results(
        questions=questions,
        routed=served.results,
        best_single=[known[q.id, best_single] for q in questions],
        oracle=[known[q.id, specialist[q.family.name]] for q in questions],
    )
    return results, served


def differences(results: Results, batched: Batched) -> list[str]:
    """The questions that the batch answered otherwise than the service, for people."""
    return [
        f"question {q.id}: {one.expert} said {one.text!r} to a client, {other.expert} said {other.text!r} in the batch"
        for q, one, other in zip(results.questions, results.routed, batched.results, strict=True)
        if (one.expert, one.text) != (other.expert, other.text)
    ]


def best_expert(table: OutcomeTable, domain: str | None = None) -> str:
    """The expert with the best mean score, over all rows or those of a domain."""
    rows = [i for i, label in enumerate(table.labels()) if domain in (None, label)]
    return table.experts[int(table.scores[rows].mean(axis=0).argmax())]


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each name, with the time that is left."""
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        known: dict[str, object] = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in known:
                known[name] = bars.add_task(name, total=total)
            bars.update(known[name], completed=done)  # type: ignore[arg-type]

        yield advance


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the last line of stdout is the JSON."""
    parser = argparse.ArgumentParser(prog="examples.zoo.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=7, help="of the fresh queries")
    parser.add_argument("--n", type=int, default=140, help="how many queries")
    options = parser.parse_args(arguments)
    if options.n < len(FAMILIES):
        parser.error(f"--n must be at least {len(FAMILIES)}, one query a family; got {options.n}")
    started = time.perf_counter()
    for base in BASES:
        fetch(base, progress=console.print)
    table, snapshot = asyncio.run(training_outcomes())
    console.print(f"{len(snapshot.experts)} experts registered, {len(table)} training queries measured on each")
    folder = train_router(table, snapshot)
    console.print(f"category router trained: {folder}")
    questions = fresh_questions(options.n, options.seed)
    with serving(CONFIG) as url:
        results, served = asyncio.run(answer(url, table, questions))
    show(results)
    with TemporaryDirectory() as scratch:
        batched = run_batch(CONFIG, questions, Path(scratch))
    differing = differences(results, batched)
    console.print(f"coe batch gave {len(questions) - len(differing)} of {len(questions)} answers as the service did")
    for line in differing:
        console.print(line, style="red", markup=False)
    summary = results.summary() | {
        "seconds_total": round(time.perf_counter() - started, 1),
        "tokens_per_s": round(sum(result.tokens for result in results.routed) / served.wall_s, 1),
        "serve_p50_s": round(served.p50_s, 3),
        "batch_rows_per_s": round(batched.rows_per_s, 2),
    }
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        console.print("interrupted; what was fetched, measured and trained is kept")
        sys.exit(130)
