"""`coe latent train`: train a composition of frozen experts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from coe.cli.interrupts import interrupted
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.progress import Progress, Task, progress

if TYPE_CHECKING:
    from coe.latent.config import TrainFile
    from coe.latent.training.run import Trained


def train(
    config: Annotated[
        Path, typer.Option("--config", "-c", metavar="FILE", help="What to train (YAML, docs/latent.md).")
    ],
    json: JsonTarget = None,
) -> None:
    """Train a composition of frozen experts, and write its folder.

    The peers are asked about every row once, and their notes are kept under $COE_HOME/latent/notes. Checkpoints and
    metrics.jsonl are in OUT.training beside the folder: after an interruption, the same command goes on and ends with
    the same weights. The best weights on the validation rows are written.
    """
    from coe.latent.config import read_train_file
    from coe.latent.training.run import train_composition

    file = read_train_file(config)
    with _resumable(config), TrainingBars.shown(file.config.training.steps) as bars:
        trained = train_composition(file, on_progress=bars.prepare, on_step=bars.step, on_loading=bars.load)
    _warn(trained)
    if json != "-":
        _show(trained)
    console.print(_how_to_register(file, trained), highlight=False, markup=False, soft_wrap=True)
    emit_json(_document(trained), json)


@contextmanager
def _resumable(config: Path) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, print the command that goes on, and exit."""
    try:
        yield
    except KeyboardInterrupt:
        resume = shlex.join(["coe", "latent", "train", "--config", str(config)])
        raise interrupted("notes and steps so far are kept.", resume) from None


class TrainingBars:
    """Progress on stderr: a bar for each peer's notes, then one for the steps, with the losses beside it."""

    def __init__(self, shown: Progress, steps: int) -> None:
        self._shown, self._steps = shown, steps
        self._tasks: dict[str, Task] = {}
        self._training: Task | None = None
        self._figures: dict[str, float] = {}

    @classmethod
    @contextmanager
    def shown(cls, steps: int) -> Iterator[TrainingBars]:
        """Show progress while the block runs."""
        with progress() as shown:
            yield cls(shown, steps)

    def prepare(self, what: str, done: int, total: int) -> None:
        """See `coe.latent.training.trainer.OnProgress`."""
        if what not in self._tasks:
            self._tasks[what] = self._shown.add(escape(what), total)
        self._tasks[what].update(completed=done)

    def load(self, member: str) -> None:
        """See `coe.latent.training.trainer.OnLoading`."""
        self._shown.line(f"loading {escape(member)}")

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """See `coe.latent.training.loop.OnStep`."""
        if self._training is None:
            self._training = self._shown.add("training", self._steps)
        self._figures |= figures
        self._training.update(completed=step, note=self._note())
        if "valid_loss" in figures:
            accuracy = f"{figures['valid_accuracy']:.1%} of the answers right"
            self._shown.line(f"step {step}: validation loss {figures['valid_loss']:.4f}, {accuracy}")

    def _note(self) -> str:
        names = {"loss": "loss", "valid_loss": "validation"}
        return ", ".join(f"{text} {self._figures[name]:.3f}" for name, text in names.items() if name in self._figures)


def _warn(trained: Trained) -> None:
    if trained.outcome.best_step == 0:
        console.print(
            "[yellow]warning:[/] the validation loss never fell below that of the untouched primary, whose answers the "
            "composition gives: train longer, with another learning rate, or ask `coe latent probe` whether the peers' "
            "states hold what the primary lacks",
            highlight=False,
            soft_wrap=True,
        )


def _show(trained: Trained) -> None:
    from rich.table import Table

    outcome = trained.outcome
    table = Table("validation", title=f"{trained.artifact.path.name}: {outcome.steps} steps, {outcome.seconds:.0f} s")
    for column in ("before", f"after step {outcome.best_step}"):
        table.add_column(column, justify="right")
    table.add_row("loss", f"{outcome.before.loss:.4f}", f"{outcome.after.loss:.4f}")
    table.add_row("right answers", f"{outcome.before.accuracy:.1%}", f"{outcome.after.accuracy:.1%}")
    stdout_console().print(table)


def _how_to_register(file: TrainFile, trained: Trained) -> str:
    """The lines that make an expert of the folder."""
    from coe.experts import how_to_register

    composed, path = trained.artifact.composed, trained.artifact.path.absolute()
    return (
        f"Written: {path}  ({trained.n_parameters:,} trained weights)\n"
        f"Metrics: {trained.metrics}\n"
        f"To use it as an expert, {how_to_register(trained.service)}:\n"
        f"  - name: {path.name}\n"
        "    kind: composed\n"
        f"    architecture: {composed.architecture}\n"
        f"    members: [{', '.join(file.config.members)}]\n"
        f"    source: {path}"
    )


def _document(trained: Trained) -> dict[str, object]:
    outcome = trained.outcome
    return {
        "out": trained.artifact.path,
        "architecture": trained.artifact.composed.architecture,
        "members": dict(trained.artifact.composed.members),
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "before": outcome.before,
        "after": outcome.after,
        "seconds": outcome.seconds,
        "trained_weights": trained.n_parameters,
        "metrics": trained.metrics,
    }
