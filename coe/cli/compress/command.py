"""`coe registry compress`: compress, measure, register."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.evaluate import TASK_FOLDER
from coe.cli.flags import TASKS_HELP, Concurrency, Limit
from coe.cli.interrupts import interrupted
from coe.cli.output import JsonTarget, console, emit_json
from coe.cli.registry_url import RegistryUrl

if TYPE_CHECKING:
    from coe.cli.compress.search import Search, Trial
    from coe.cli.profile.place import Place
    from coe.evaluation.compression import Candidate
    from coe.evaluation.tasks import Task
    from registry.spec import ExpertSpec

METHODS = ("exact", "compeft")


def compress(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Model or adapter to compress.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="exact: lossless, the difference from --base. compeft: the largest differences, as signs.",
        ),
    ] = "exact",
    density: Annotated[
        str,
        typer.Option(
            "--density",
            metavar="PERCENT,...",
            help="Percent of the weights that compeft keeps; the smallest one within --max-loss is taken.",
        ),
    ] = "5,10,20,50",
    alpha: Annotated[
        str,
        typer.Option(
            "--alpha", metavar="A,B", help="Factors of compeft's scales; with several, a third of the rows chooses."
        ),
    ] = "1,1.5",
    base: Annotated[
        str | None, typer.Option("--base", metavar="NAME", help="Model that a model was fine-tuned from.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="A,B", help=f"Tasks that measure the loss, by default those of its profile: {TASKS_HELP}"
        ),
    ] = None,
    max_loss: Annotated[
        float,
        typer.Option(
            "--max-loss", metavar="POINTS", min=0.0, max=100.0, help="Most percentage points of the mean score to lose."
        ),
    ] = 1.0,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", metavar="FILE", help="Configuration (YAML): engines, and `registry` (not `experts`)."
        ),
    ] = None,
    registry: RegistryUrl = None,
    limit: Limit = None,
    concurrency: Concurrency = 32,
    json: JsonTarget = None,
) -> None:
    """Store an expert in fewer bytes, as a new version, if its quality on its own tasks stays.

    exact stores a model as its difference from --base, an adapter packed, and restores every bit; it is measured only
    with --tasks. compeft (arXiv 2311.13171) keeps the largest differences of a model, or weights of an adapter. The
    original files stay where they are. Nothing changes where no form is within --max-loss; exit status 1 if so.
    """
    from coe.cli.profile.place import Place

    densities, alphas = _numbers(density, "--density", 100.0), _numbers(alpha, "--alpha", 1000.0)
    if method not in METHODS:
        raise typer.BadParameter(f"{method!r} is not one of {', '.join(METHODS)}", param_hint="--method")
    place = Place.of(config, registry, with_output=False)
    spec = place.snapshot.get(name)
    try:
        result = _compress(
            place, spec, base, _tasks(place, spec, tasks, config, method, limit), max_loss, concurrency,
            densities=[each / 100 for each in densities] if method == "compeft" else None, alphas=alphas,
        )  # fmt: skip
    except KeyboardInterrupt:
        kept = "nothing was changed; the same command goes on from the answers so far."
        raise interrupted(kept, shlex.join(["coe", *sys.argv[1:]])) from None
    emit_json(result, json)
    if not result["stored"]:
        raise typer.Exit(1)


def _compress(
    place: Place,
    spec: ExpertSpec,
    base_name: str | None,
    tasks: Sequence[Task],
    max_loss: float,
    concurrency: int,
    *,
    densities: Sequence[float] | None,
    alphas: Sequence[float],
) -> dict[str, Any]:
    from coe.cli.compress.search import Search
    from coe.config import Config
    from coe.evaluation.compression import base_to_compress
    from registry.storage import coe_home, scratch_directory

    base = base_to_compress(spec, base_name, place.snapshot.experts)
    loaded = place.config or Config()
    unpinned = loaded.model_copy(update={"host": loaded.host.model_copy(update={"pins": ()})})
    before = sum(file.size_bytes for file in spec.files if file.name.endswith(".safetensors"))
    with scratch_directory(coe_home() / "deltas") as work:
        search = Search(spec, base, place.snapshot, unpinned, work, tasks, max_loss, concurrency)
        found = search.exact() if densities is None else search.compeft(densities, alphas)
        for trial in search.trials:
            _print_trial(trial, before)
        stored = None
        if found is None:
            console.print(f"[bold red]not stored[/]: more than {max_loss:g} points lost; nothing was changed")
        elif found.size_bytes >= before:
            console.print("[bold red]not stored[/]: it does not get smaller; nothing was changed")
        else:
            stored = _store(place, search, found)
            console.print(f"registered [bold]{stored.ref}[/], whose source is {stored.source}", soft_wrap=True)
    return {
        "expert": spec.ref,
        "stored": stored is not None,
        "registered": None if stored is None else stored.ref,
        "source": None if stored is None else stored.source,
        "base": None if base is None else base.name,
        "bytes_before": before,
        "bytes_after": None if stored is None else search.trials[-1].size_bytes,
        "max_loss_points": max_loss,
        "trials": [_document(trial) for trial in search.trials],
    }


def _store(place: Place, search: Search, found: Candidate) -> ExpertSpec:
    """Move the delta to its place, named by its content, and register it as the expert's next version."""
    from coe.errors import ConfigError
    from coe.evaluation.compression import registered_as
    from registry.storage import atomic_directory, coe_home

    assert found.spec.digest is not None  # it was described
    with place.open() as store:
        if store.get(search.spec.name).ref != search.spec.ref:
            raise ConfigError(
                f"{search.spec.ref} was registered again meanwhile; nothing was changed: compress it again"
            )
    folder = f"{search.spec.name.replace('/', '--')}-{found.spec.digest.removeprefix('sha256:')[:12]}"
    with atomic_directory(coe_home() / "deltas" / folder) as staged:
        for file in found.folder.iterdir():
            file.rename(staged / file.name)
    described = registered_as(search.spec, search.base, f"home://deltas/{folder}", place.snapshot.experts)
    with place.open() as store:
        return store.add(described)


def _tasks(
    place: Place, spec: ExpertSpec, stated: str | None, config: Path | None, method: str, limit: int | None
) -> list[Task]:
    """The stated tasks, or those of the expert's profile; none for the exact method, unless they are stated."""
    from coe.errors import ConfigError
    from coe.evaluation.tasks import find_tasks
    from registry.digest import identity

    if stated is None and method == "exact":
        return []
    if stated is None:
        now = identity(spec, place.snapshot.experts)
        mine = [row for row in place.recorded() if row.expert == spec.name and row.identity == now]
        names = dict.fromkeys(row.source.removeprefix("task/") for row in mine if row.source.startswith("task/"))
        if not names:
            raise ConfigError(
                f"{spec.name!r} has no profile on tasks that would measure the loss: name its tasks with --tasks, or "
                "measure it first (`coe profile`)"
            )
        stated = ",".join(names)
    folders = [TASK_FOLDER, *([config.absolute().parent / "tasks"] if config else [])]
    return [task.head(limit) for task in find_tasks(stated, folders)]


def _numbers(text: str, option: str, most: float) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number <= most for number in numbers):
        raise typer.BadParameter(f"{text!r} is not a list of numbers above 0, up to {most:g}", param_hint=option)
    return list(dict.fromkeys(numbers))


def _print_trial(trial: Trial, before: int) -> None:
    what = trial.method if trial.density is None else f"compeft {trial.density:.3%}, alpha {trial.alpha:g}"
    size = f"{before:,} bytes to {trial.size_bytes:,} ({before / trial.size_bytes:.1f} times smaller)"
    quality = "restores every bit; not measured"
    if trial.score_before is not None and trial.score_after is not None:
        quality = (
            f"{trial.score_before:.1%} before, {trial.score_after:.1%} after on {trial.rows} rows "
            f"({0.0 - trial.loss_points:+.1f} points)"
        )
    console.print(f"{what}: {size}; {quality}", highlight=False, soft_wrap=True)


def _document(trial: Trial) -> dict[str, Any]:
    return {field: getattr(trial, field) for field in trial.__dataclass_fields__} | {"loss_points": trial.loss_points}
