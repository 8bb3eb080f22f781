"""Train what puts experts' answers together: `python -m examples.zoo.aggregator`.

The experts of the zoo answer two-skill queries of the split `train`; the adapter `aggregator` learns to say the right
answer when it is shown the query and their answers, exactly as the composition `aggregate` shows them. Its rival
`direct` is the same adapter trained on the same queries in the same order without anybody's answers.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, Any, Final

import typer

from coe.compose import Ask
from coe.compose.synthesis import synthesis, without_thoughts
from coe.config import load_config
from coe.host import open_host
from coe.orchestrator import AskExpert, Orchestrator
from coe.types import Answer, GenerateRequest
from examples.zoo.card import Score, write_card
from examples.zoo.families import TWO_SKILLS, Family, Row, Split, TwoSkills
from examples.zoo.plan import ADAPTERS, AGGREGATOR, BATCH, DIRECT, SCORE_SEED, TRAIN_SEED, Adapter
from examples.zoo.remembered import Remembered
from examples.zoo.scoring import answers, grades
from examples.zoo.train import ZOO, Bar, checkpoints_of, fit, folder_of, save
from examples.zoo.training import Recipe, forget
from registry.files import atomic_directory, coe_home
from registry.store import Snapshot
from routers.base import Message

OUTSIDER_SHARE: Final = 1 / 4
"""Of the training rows, how many show the answer of a third expert, one of the others, among the two."""
_SHOWN: Final = "each with what the two experts answer, and on a quarter of them one that does not know, in any order"
_BARE: Final = "without any expert's answer, in the order in which the aggregator saw them"

Shown = tuple[Row, TwoSkills, tuple[str, ...]]
"""A row, its family, and the experts whose answers are shown, in that order."""


def questions(split: Split, n: int, *, seed: int) -> list[tuple[Row, TwoSkills]]:
    """`n` rows, the families taking turns: the first rows are the same whatever `n` is."""
    pairs = list(TWO_SKILLS.values())
    rows = [iter(pair.family.rows(split, -(-n // len(pairs)), seed=seed)) for pair in pairs]
    return [(next(rows[i % len(pairs)]), pairs[i % len(pairs)]) for i in range(n)]


def shown(asked: Sequence[tuple[Row, TwoSkills]], *, seed: int) -> list[Shown]:
    """Whose answers the aggregator sees in training: the two experts, sometimes an outsider, in any order."""
    rng = Random(f"shown/{seed}")
    plan = []
    for row, pair in asked:
        others = [name for name, adapter in ADAPTERS.items() if adapter.base == "smollm2" and name not in pair.experts]
        experts = [*pair.experts, rng.choice(others)] if rng.random() < OUTSIDER_SHARE else [*pair.experts]
        rng.shuffle(experts)
        plan.append((row, pair, tuple(experts)))
    return plan


def request(row: Row, pair: TwoSkills) -> GenerateRequest:
    """What a client asks."""
    return GenerateRequest(messages=(Message("user", row.prompt),), max_tokens=pair.family.max_tokens)


async def aggregator_rows(plan: Sequence[Shown], ask: AskExpert, snapshot: Snapshot) -> list[Row]:
    """The rows with the prompt that the composition `aggregate` would show, of what the experts really answer."""
    requests = [request(row, pair) for row, pair, _ in plan]
    asks = [Ask(f"{i}/{expert}", expert, requests[i]) for i, (_, _, experts) in enumerate(plan) for expert in experts]
    said = await ask_all(asks, Orchestrator(snapshot, {}, ask=ask))
    return [
        replace(row, prompt=synthesis(requests[i], [said[f"{i}/{expert}"] for expert in experts]).messages[-1].content)
        for i, (row, _, experts) in enumerate(plan)
    ]


async def ask_all(asks: Sequence[Ask], orchestrator: Orchestrator) -> dict[str, str]:
    """What is said to every ask, by its id, without thoughts. Raises the error of an expert that fails."""
    # A batch of one adapter and of equal lengths is several times as fast as a mixed one.
    ordered = sorted(asks, key=lambda ask: (ask.expert, len(ask.request.messages[-1].content)))
    said = {}
    for ask, outcome in zip(ordered, await asyncio.gather(*map(orchestrator.whole, ordered)), strict=True):
        if not isinstance(outcome, Answer):
            raise outcome.error
        said[ask.id] = without_thoughts(outcome.text)
    return said


async def _gather(steps: int, seed: int, n_score: int) -> tuple[list[Row], dict[str, list[Row]]]:
    """Training rows, and the rows of the card by family, all with the experts' answers."""
    plan = shown(questions(Split.TRAIN, steps * BATCH, seed=seed), seed=seed)
    tests: dict[str, list[Shown]] = {
        name: [(row, pair, pair.experts) for row in pair.family.rows(Split.TEST, n_score, seed=SCORE_SEED)]
        for name, pair in TWO_SKILLS.items()
    }
    total = sum(len(experts) for _, _, experts in [*plan, *(item for items in tests.values() for item in items)])
    async with open_host(load_config(ZOO / "config.yaml")) as host:
        with Bar("the experts' answers", total) as bar:
            ask = Remembered(host.ask, host.snapshot, memory(), bar.at)
            rows = await aggregator_rows(plan, ask, host.snapshot)
            return rows, {name: await aggregator_rows(items, ask, host.snapshot) for name, items in tests.items()}


def memory() -> Path:
    """Where the experts' answers to two-skill queries are kept."""
    return coe_home() / "zoo" / "two-skills.jsonl"


def train_both(*, steps: int, seed: int, n_score: int, out: Path | None) -> None:
    """Train the aggregator and its rival, score them, and write their folders."""
    rows, tests = asyncio.run(_gather(steps, seed, n_score))
    plain = [row for row, _ in questions(Split.TRAIN, steps * BATCH, seed=seed)]
    bare = {name: pair.family.rows(Split.TEST, n_score, seed=SCORE_SEED) for name, pair in TWO_SKILLS.items()}
    _train(AGGREGATOR, rows, tests, Recipe(steps, seed, BATCH), out, _SHOWN)
    _train(DIRECT, plain, bare, Recipe(steps, seed, BATCH), out, _BARE)


def _train(
    adapter: Adapter, rows: Sequence[Row], tests: Mapping[str, list[Row]], recipe: Recipe, out: Path | None, how: str
) -> None:
    model, tokenizer, seconds = fit(adapter, rows, recipe)
    scores = []
    for name, asked in tests.items():
        ours = _share(model, tokenizer, TWO_SKILLS[name].family, asked, f"{adapter.name} on {name}")
        with model.disable_adapter():
            base = _share(model, tokenizer, TWO_SKILLS[name].family, asked, f"{adapter.base} on {name}")
        scores.append(Score(name, len(asked), ours, base))
        typer.echo(f"{adapter.name}: {name} {ours:.1%}, base {base:.1%} ({len(asked)} rows)")
    with atomic_directory(out / adapter.name if out else folder_of(adapter.name)) as folder:
        save(model, adapter, folder)
        write_card(folder, adapter, recipe, seconds, scores, trained=_trained(recipe, how))
    forget(checkpoints_of(adapter))


def _share(model: Any, tokenizer: Any, family: Family, asked: Sequence[Row], title: str) -> float:
    with Bar(title, len(asked)) as bar:
        said = answers(model, tokenizer, asked, max_tokens=family.max_tokens, report=bar.at)
    return sum(grades(family, asked, said)) / len(asked)


def _trained(recipe: Recipe, how: str) -> str:
    rows = recipe.steps * recipe.batch
    return f"""Trained on {rows} queries that take two experts of the zoo (`examples/zoo/families`, seed
{recipe.seed}, split `train`), {how}:
{recipe.steps} steps of {recipe.batch}, peak learning rate {recipe.learning_rate:g}, loss on the answer only.
`python -m examples.zoo.aggregator` does it again."""


def main(
    steps: Annotated[int, typer.Option(min=1)] = AGGREGATOR.steps,
    seed: Annotated[int, typer.Option(help="Of data and weights.")] = TRAIN_SEED,
    rows: Annotated[int, typer.Option(min=1, help="Fresh rows a family to score on.")] = 120,
    out: Annotated[Path | None, typer.Option(help="Folder of both folders, instead of the shipped ones.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Ask the experts, train the aggregator and its rival on CPU, score them, and write their folders and cards."""
    import torch

    torch.set_num_threads(threads)
    try:
        train_both(steps=steps, seed=seed, n_score=rows, out=out)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
