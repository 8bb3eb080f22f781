"""Measure latent compositions beside their rivals: `python -m examples.zoo.latent run`, then `report`.

python -m examples.zoo.latent list                          # what would be run, and what is done
python -m examples.zoo.latent run --bench codes --seed 1    # goes on where it stopped
python -m examples.zoo.latent run --ablations --minutes 8
python -m examples.zoo.latent report                        # the tables, as markdown
python -m examples.zoo.latent keep                          # results into the project, for docs/results.md
python -m examples.zoo.latent report --folder examples/zoo/latent_results    # the tables of those
python -m examples.zoo.latent time --bench codes --method direct --method cache    # seconds, asked in turns
python -m examples.zoo.latent write bookings/cache/1 --out bookings    # rows and file of `coe latent train`
python -m examples.zoo.latent ship two-skills/cache/1 --as cache    # into the zoo, for latent.yaml
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from coe.errors import CoeError
from examples.zoo.fetch import BASES, fetch
from examples.zoo.latent.benches import ALL_BENCHES
from examples.zoo.latent.clock import Clock, OutOfTime
from examples.zoo.latent.latent_runs import write_train_file
from examples.zoo.latent.methods import ABLATIONS, METHODS
from examples.zoo.latent.plan import Run, plan, runs_folder
from examples.zoo.latent.real_sets import NoData
from examples.zoo.latent.report import report as tables
from examples.zoo.latent.results import keep as keep_results
from examples.zoo.latent.results import read_result, read_results
from examples.zoo.latent.runner import execute
from examples.zoo.latent.ship import SHIPPED, CannotShip, run_of, size_of
from examples.zoo.latent.ship import ship as ship_run
from examples.zoo.latent.text_rivals import rows_of
from examples.zoo.latent.timing import table, times_of
from registry.errors import RegistryError

app = typer.Typer(help="Latent compositions against their rivals.", no_args_is_help=True)

_Benches = Annotated[list[str], typer.Option("--bench", help="Only this bench; repeatable.")]
_Methods = Annotated[list[str], typer.Option("--method", help="Only this method; repeatable.")]
_Seeds = Annotated[list[int], typer.Option("--seed", min=0, help="Only this seed; repeatable.")]
_Ablations = Annotated[bool, typer.Option("--ablations", help="The ablations instead of the methods.")]
_Folder = Annotated[Path | None, typer.Option(help="Folder of the runs, instead of $COE_HOME/zoo/latent.")]


def _planned(bench: Sequence[str], method: Sequence[str], seed: Sequence[int], ablations: bool) -> list[Run]:
    known = ABLATIONS if ablations else METHODS
    for kind, names, all_ in (("bench", bench, ALL_BENCHES), ("method", method, known)):
        if unknown := [name for name in names if name not in all_]:
            raise typer.BadParameter(f"no {kind} {', '.join(unknown)}; there are: {', '.join(all_)}")
    return plan(bench, method, seed, ablations=ablations)


@app.command("list")
def list_runs(
    bench: _Benches = [],  # noqa: B006
    method: _Methods = [],  # noqa: B006
    seed: _Seeds = [],  # noqa: B006
    ablations: _Ablations = False,
    folder: _Folder = None,
) -> None:
    """List the runs in their order, and mark those that are done."""
    for run in _planned(bench, method, seed, ablations):
        done = read_result((folder or runs_folder()) / run.id) is not None
        typer.echo(f"{'done' if done else '    '}  {run.id}")


@app.command()
def run(
    bench: _Benches = [],  # noqa: B006
    method: _Methods = [],  # noqa: B006
    seed: _Seeds = [],  # noqa: B006
    ablations: _Ablations = False,
    folder: _Folder = None,
    minutes: Annotated[float, typer.Option(min=0, help="Stop after this time; 0: when all is done.")] = 0,
) -> None:
    """Make the runs that are not done, one after the other. Exit code 75: the time is over, the command goes on.

    The base models are fetched first, unless they are there.
    """
    import torch

    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    clock, root = Clock(60 * minutes if minutes else math.inf), folder or runs_folder()
    try:
        for each in _planned(bench, method, seed, ablations):
            _make(each, root, clock)
    except (OutOfTime, KeyboardInterrupt):
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(75) from None
    except (CoeError, RegistryError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _fetch_bases() -> None:
    """Fetch the bases of the zoo's experts, all of which a run's service lists."""
    for base in BASES:
        fetch(base, progress=lambda line: typer.echo(f"  {line}", err=True))


def _make(each: Run, root: Path, clock: Clock) -> None:
    if read_result(root / each.id) is not None:
        return
    clock.check()
    typer.echo(each.id)
    _fetch_bases()
    try:
        result = execute(each, root, clock, lambda line: typer.echo(f"  {line}", err=True))
    except NoData as error:
        typer.echo(f"  left out: {error}", err=True)
        return
    shares = {split: result.accuracy(split) for split in each.bench.rows}
    typer.echo("  " + ", ".join(f"{split} {share:.1%}" for split, share in shares.items() if share is not None))


@app.command("time")
def time_runs(
    bench: _Benches = [],  # noqa: B006
    method: _Methods = [],  # noqa: B006
    seed: _Seeds = [1],  # noqa: B006
    ablations: _Ablations = False,
    folder: _Folder = None,
    n: Annotated[int, typer.Option(min=1, max=1000, help="Queries, each asked by every method.")] = 12,
    against: Annotated[str | None, typer.Option(help="Method of the ratios; the first one by default.")] = None,
) -> None:
    """Print the seconds of a query by each method, for runs of one bench and seed that are done."""
    import torch

    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    root = folder or runs_folder()
    runs = [run for run in _planned(bench, method, seed[:1], ablations) if read_result(root / run.id) is not None]
    if not runs:
        typer.echo("no run is done yet: python -m examples.zoo.latent run", err=True)
        raise typer.Exit(1)
    names = [run.method.name for run in runs]
    if against is not None and against not in names:
        raise typer.BadParameter(f"--against {against}: no run that is done; there are: {', '.join(names)}")
    try:
        _fetch_bases()
        found = asyncio.run(times_of(runs, root, n, lambda line: typer.echo(f"  {line}", err=True)))
    except (CoeError, RegistryError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(table(found, against or names[0]))


@app.command()
def report(
    bench: _Benches = [],  # noqa: B006
    method: _Methods = [],  # noqa: B006
    seed: _Seeds = [],  # noqa: B006
    ablations: _Ablations = False,
    folder: _Folder = None,
    against: Annotated[str | None, typer.Option(help="Method to compare the others with, by paired bootstrap.")] = None,
) -> None:
    """Print the tables of the runs that are done, as markdown."""
    runs = _planned(bench, method, seed, ablations)
    results = read_results(folder or runs_folder(), runs)
    if not results:
        typer.echo("no run is done yet: python -m examples.zoo.latent run", err=True)
        raise typer.Exit(1)
    typer.echo(tables(results, against=against))


@app.command()
def keep(
    bench: _Benches = [],  # noqa: B006
    method: _Methods = [],  # noqa: B006
    seed: _Seeds = [],  # noqa: B006
    ablations: _Ablations = False,
    folder: _Folder = None,
) -> None:
    """Write the results of the runs that are done into examples/zoo/latent_results."""
    for run in keep_results(folder or runs_folder(), _planned(bench, method, seed, ablations)):
        typer.echo(run.id)


@app.command()
def write(
    run: Annotated[str, typer.Argument(help="BENCH/METHOD/SEED, as `list` prints it.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Write what `coe latent train` reads for a run, without training: rows, service and train.yaml."""
    try:
        found = run_of(run)
        file = write_train_file(found.bench, found.method, found.seed, rows_of(found.bench, found.seed), out)
    except (CannotShip, NoData) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"coe latent train --config {file}")


@app.command()
def ship(
    run: Annotated[str, typer.Argument(help="BENCH/METHOD/SEED, as `list` prints it.")],
    name: Annotated[str, typer.Option("--as", help="Name of the composed expert and of its folder.")],
    folder: _Folder = None,
    out: Annotated[Path, typer.Option(help="Folder of the shipped artifacts.")] = SHIPPED,
) -> None:
    """Copy the artifact of a finished run into the zoo, with a card, and list it in experts.yaml beside it."""
    try:
        written = ship_run(run_of(run), folder or runs_folder(), name, out)
    except CannotShip as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{written}: {size_of(written):,} bytes")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
