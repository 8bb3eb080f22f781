"""Train the adapter that merges experts' answers: `python -m examples.zoo.aggregator`.

The experts of the zoo answer two-skill queries of the split `train`; the adapter `aggregator` learns to give the right
answer from the query and their answers, in the prompt format of the composition `aggregate`. Its rival
`direct` is the same adapter trained on the same queries in the same order without the experts' answers.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, Final

import typer

from coe.answers.thinking import without_thoughts
from coe.compose import ExpertCall
from coe.compose.synthesis import synthesis
from coe.config import load_config
from coe.experts import open_snapshot
from coe.hosting import open_host
from coe.orchestrator import AskExpert, Orchestrator
from coe.types import Answer, GenerateRequest
from examples.zoo.card import write_card
from examples.zoo.families import TWO_SKILLS, Row, Split, TwoSkills
from examples.zoo.plan import ADAPTERS, AGGREGATOR, BATCH, DIRECT, TRAIN_SEED, Adapter
from examples.zoo.remembered import Remembered, dtype_of
from examples.zoo.train import ZOO, Bar, checkpoints_of, fit, folder_of, save
from examples.zoo.training import Recipe, forget
from registry.storage import atomic_directory, coe_home
from registry.store import Snapshot
from routers.base import Message

CONFIG: Final = ZOO / "two_skills.yaml"
OUTSIDER_SHARE: Final = 1 / 4
"""Of the training rows, how many show the answer of a third expert, one of the others, among the two."""
_SHOWN: Final = "each with what the two experts answer, and on a quarter of them one that does not know, in any order"
_BARE: Final = "without any expert's answer, in the order in which the aggregator saw them"

Shown = tuple[Row, TwoSkills, tuple[str, ...]]
"""A row, its family, and the experts whose answers are shown, in that order."""


def questions(split: Split, n: int, *, seed: int) -> list[tuple[Row, TwoSkills]]:
    """`n` rows, families alternating: the first rows do not depend on `n`."""
    pairs = list(TWO_SKILLS.values())
    rows = [iter(pair.family.rows(split, -(-n // len(pairs)), seed=seed)) for pair in pairs]
    return [(next(rows[i % len(pairs)]), pairs[i % len(pairs)]) for i in range(n)]


def shown(asked: Sequence[tuple[Row, TwoSkills]], *, seed: int) -> list[Shown]:
    """The experts whose answers the aggregator sees in training: the two right ones, at times a third, shuffled."""
    rng = Random(f"shown/{seed}")
    plan = []
    for row, pair in asked:
        others = [name for name, adapter in ADAPTERS.items() if adapter.base == "smollm2" and name not in pair.experts]
        experts = [*pair.experts, rng.choice(others)] if rng.random() < OUTSIDER_SHARE else [*pair.experts]
        rng.shuffle(experts)
        plan.append((row, pair, tuple(experts)))
    return plan


def request(row: Row, pair: TwoSkills) -> GenerateRequest:
    """The query as a request."""
    return GenerateRequest(messages=(Message("user", row.prompt),), max_tokens=pair.family.max_tokens)


async def aggregator_rows(plan: Sequence[Shown], ask: AskExpert, snapshot: Snapshot) -> list[Row]:
    """The rows with the prompt that the composition `aggregate` builds from the experts' real answers."""
    requests = [request(row, pair) for row, pair, _ in plan]
    calls = [
        ExpertCall(f"{i}/{expert}", expert, requests[i]) for i, (_, _, experts) in enumerate(plan) for expert in experts
    ]
    said = await call_all(calls, Orchestrator(snapshot, {}, ask=ask))
    return [
        replace(row, prompt=synthesis(requests[i], [said[f"{i}/{expert}"] for expert in experts]).messages[-1].content)
        for i, (row, _, experts) in enumerate(plan)
    ]


async def call_all(calls: Sequence[ExpertCall], orchestrator: Orchestrator) -> dict[str, str]:
    """The answer to every call, by its id, without thoughts. Raises the error of an expert that fails."""
    # A batch of one adapter and of equal lengths is several times as fast as a mixed one.
    ordered = sorted(calls, key=lambda call: (call.expert, len(call.request.messages[-1].content)))
    said = {}
    for call, outcome in zip(ordered, await asyncio.gather(*map(orchestrator.whole, ordered)), strict=True):
        if not isinstance(outcome, Answer):
            raise outcome.error
        said[call.id] = without_thoughts(outcome.text)
    return said


async def training_rows(steps: int, seed: int) -> list[Row]:
    """The aggregator's rows; experts are called only for answers that are not cached yet."""
    plan = shown(questions(Split.TRAIN, steps * BATCH, seed=seed), seed=seed)
    experts = open_snapshot(load_config(ZOO / "config.yaml"))  # not the aggregator, which is yet to come
    config = load_config(CONFIG)
    async with open_host(config, experts) as host:
        with Bar("the experts' answers", sum(len(names) for _, _, names in plan)) as bar:
            ask = Remembered(host.ask, host.snapshot, dtype_of(config), memory(), bar.at)
            return await aggregator_rows(plan, ask, host.snapshot)


def memory() -> Path:
    """Where the experts' answers to two-skill queries are kept."""
    return coe_home() / "zoo" / "two-skills.jsonl"


def train_both(steps: int, seed: int, out: Path | None) -> None:
    """Train the aggregator and its rival, and write their folders."""
    recipe = Recipe(steps, seed, BATCH)
    _train(AGGREGATOR, asyncio.run(training_rows(steps, seed)), recipe, out, _SHOWN)
    _train(DIRECT, [row for row, _ in questions(Split.TRAIN, steps * BATCH, seed=seed)], recipe, out, _BARE)


def _train(adapter: Adapter, rows: Sequence[Row], recipe: Recipe, out: Path | None, how: str) -> None:
    model, _, seconds = fit(adapter, rows, recipe)
    with atomic_directory(out / adapter.name if out else folder_of(adapter.name)) as folder:
        save(model, adapter, folder)
        write_card(folder, adapter, recipe, seconds, [], trained=_trained(recipe, how))
    forget(checkpoints_of(adapter))
    typer.echo(f"{adapter.name}: {recipe.steps} steps in {seconds:.0f} s")


def _trained(recipe: Recipe, how: str) -> str:
    rows = recipe.steps * recipe.batch
    return f"""Trained on {rows} queries that take two experts of the zoo (`examples/zoo/families`, seed
{recipe.seed}, split `train`), {how}:
{recipe.steps} steps of {recipe.batch}, peak learning rate {recipe.learning_rate:g}, loss on the answer only.
`python -m examples.zoo.aggregator` does it again, and `python -m examples.zoo.two_skills` measures it beside other ways
to answer the same queries; `examples/zoo/README.md` has the figures."""


def main(
    steps: Annotated[int, typer.Option(min=1)] = AGGREGATOR.steps,
    seed: Annotated[int, typer.Option(help="Seed of data and weights.")] = TRAIN_SEED,
    out: Annotated[Path | None, typer.Option(help="Folder for both adapters, instead of the shipped ones.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Call the experts, train the aggregator and its rival on CPU, and write their folders and cards."""
    import torch

    torch.set_num_threads(threads)
    try:
        train_both(steps, seed, out)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
