"""Rivals that exchange text: a LoRA by the zoo's trainer and recipe, on the bench's rows and for its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coe.compose import ExpertCall
from coe.compose.synthesis import synthesis
from coe.orchestrator import Orchestrator
from examples.zoo.aggregator import call_all
from examples.zoo.families import Family, Row, Split
from examples.zoo.latent.asking import request
from examples.zoo.latent.benches import Bench, base_of
from examples.zoo.latent.clock import Clock
from examples.zoo.latent.methods import Method
from examples.zoo.plan import Adapter
from examples.zoo.train import folder_of, round_to_bf16, save, trainable
from examples.zoo.training import Progress, Recipe, forget, held_out_loss, train
from registry.storage import atomic_directory

_GROUP = 64
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A training that is over: the folder it wrote, its seconds, what it trained, its loss on the validation rows."""

    folder: Path
    seconds: float
    parameters: int
    loss: float | None


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to train on and to validate with, as the model is to read them."""

    train: Sequence[Row]
    valid: Sequence[Row]


def rows_of(bench: Bench, seed: int) -> Rows:
    """The queries alone."""
    valid = [row for rows in bench.scored(Split.VALID).values() for row in rows]
    return Rows(bench.training(seed), valid)


def families_of(bench: Bench, rows: Rows) -> tuple[list[Family], list[Family]]:
    """The family of each training row, and of each validation row."""
    families = bench.families
    per_family = len(rows.valid) // len(families)
    train = [families[i % len(families)] for i in range(len(rows.train))]
    return train, [families[i // per_family] for i in range(len(rows.valid))]


async def with_answers(bench: Bench, rows: Rows, orchestrator: Orchestrator, clock: Clock, report: Report) -> Rows:
    """The rows with the peers' answers in the prompt, as `aggregate` shows them; no peer answers a query twice.

    Raises:
        OutOfTime: between two groups of calls; answers so far are kept.
    """
    train, valid = families_of(bench, rows)
    return Rows(
        await _shown(bench, rows.train, train, orchestrator, clock, report),
        await _shown(bench, rows.valid, valid, orchestrator, clock, report),
    )


async def _shown(
    bench: Bench,
    rows: Sequence[Row],
    families: Sequence[Family],
    orchestrator: Orchestrator,
    clock: Clock,
    report: Report,
) -> list[Row]:
    requests = [request(row, family) for row, family in zip(rows, families, strict=True)]
    peers = [bench.peers_of(family.name) for family in families]
    said: dict[str, str] = {}
    for start in range(0, len(rows), _GROUP):
        clock.check()
        part = range(start, min(start + _GROUP, len(rows)))
        said |= await call_all(
            [ExpertCall(f"{i}/{peer}", peer, requests[i]) for i in part for peer in peers[i]], orchestrator
        )
        report(f"peers' answers: {part.stop} of {len(rows)}")
    shown = [synthesis(asked, [said[f"{i}/{peer}"] for peer in peers[i]]) for i, asked in enumerate(requests)]
    return [replace(row, prompt=asked.messages[-1].content) for row, asked in zip(rows, shown, strict=True)]


def base_and_start(bench: Bench, method: Method) -> tuple[str, Path | None]:
    """The base of the adapter that a rival trains, and the adapter that it begins with, if any."""
    expert = bench.peers[0] if method.on_peer else bench.primary
    base = base_of(expert)
    return base, None if base == expert else folder_of(expert)


def fit(bench: Bench, method: Method, seed: int, rows: Rows, folder: Path, clock: Clock, report: Report) -> Fitted:
    """Train the adapter into `folder / "adapter"`; goes on from its last checkpoint.

    Raises:
        OutOfTime: between two steps.
    """
    base, start = base_and_start(bench, method)
    recipe = Recipe(bench.steps, seed, bench.batch)
    model, tokenizer = trainable(base, recipe, start=start)
    checkpoints = folder / "checkpoints"

    def after(progress: Progress) -> None:
        if progress.step % 10 == 0 or progress.step == progress.steps:
            report(f"step {progress.step} of {progress.steps}, loss {progress.loss:.3f}")
        if progress.step < progress.steps:
            clock.check()

    seconds = train(model, tokenizer, rows.train, recipe, checkpoints=checkpoints, report=after, checkpoint_every=5)
    round_to_bf16(model)
    parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    loss = held_out_loss(model, tokenizer, rows.valid)
    target = folder / "adapter"
    with atomic_directory(target) as out:
        save(model, Adapter(method.name, base, bench.steps, bench.families), out)
    forget(checkpoints)
    return Fitted(target, seconds, parameters, loss)
