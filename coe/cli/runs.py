"""Runs of experts on tasks, as the commands make them: in a folder, with progress on stderr."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.interrupts import interrupted
from coe.cli.output import console
from coe.cli.progress import Task, progress

if TYPE_CHECKING:
    from coe.config import Config
    from coe.evaluation.answer_folder import AnswerFolder
    from coe.evaluation.plan import EvaluationPlan
    from coe.evaluation.report import Report
    from coe.evaluation.runner import Progress
    from coe.policy import Policy
    from registry.store import Snapshot

Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue the run in the folder; without it, a folder with a run is refused."),
]


INCOMPLETE = 3
"""Exit status of a run that finished with fewer answers than --require."""


def require_option(text: str) -> Any:
    """The option --require. Its default is that of the parameter."""
    return typer.Option("--require", metavar="SHARE", min=0.0, max=1.0, help=text)


def check_required(answered: int, total: int, required: float, *, what: str, errors: str) -> None:
    """Print how many failed, as the last line of a command.

    Args:
        required: least share of `total` that must be answered, in [0, 1].
        what: is counted, in the plural. errors: where the errors are.

    Raises:
        typer.Exit: with status INCOMPLETE if fewer were answered.
    """
    if answered == total:
        return
    enough = answered >= required * total - 1e-9
    share = "all of them" if required == 1 else f"{required:.12g} of them"
    verdict = "" if enough else f"; --require needs {share}, so the exit status is {INCOMPLETE}"
    console.print(
        f"[{'yellow' if enough else 'bold red'}]{total - answered:,} of {total:,} {what} failed[/]{verdict}. "
        f"The errors: {errors}",
        highlight=False,
        soft_wrap=True,
    )
    if not enough:
        raise typer.Exit(INCOMPLETE)


@contextmanager
def resumable(context: typer.Context, command: str) -> Iterator[None]:
    """On Ctrl-C, SIGTERM or a full disk, print the command that continues the run, and exit.

    Raises:
        RunFolderError: no space left in the folder of the run (--out).
    """
    from coe.runs.errors import RunFolderError
    from registry.errors import DiskFull

    try:
        yield
    except KeyboardInterrupt:
        raise interrupted("the answers so far are kept.", _resuming(context, command)) from None
    except DiskFull as error:
        output = context.params.get("output")
        if output is None or not error.path.absolute().is_relative_to(Path(output).absolute()):
            raise
        raise RunFolderError(
            f"no space left to write {error.path.name!r} in {error.path.parent}; the answers so far are kept. Free "
            "some space, then continue the run (or start it again with --out on a larger disk):\n"
            f"  {_resuming(context, command)}"
        ) from error


def _resuming(context: typer.Context, command: str) -> str:
    """The command line as it was given, with --resume."""
    words = ["coe", command]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name == "resume" or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        for each in value if isinstance(value, list | tuple) else [value]:  # a repeatable option once for each value
            words += [parameter.opts[0]] if each is True else [parameter.opts[0], str(each)]
    return shlex.join([*words, "--resume"])


async def run_in(
    output: Path,
    plan: EvaluationPlan,
    config: Config,
    snapshot: Snapshot,
    *,
    resume: bool,
    concurrency: int,
    discard: bool = False,
    policies: Mapping[str, Policy] | None = None,
) -> Report:
    """Carry out a plan in a folder.

    Args:
        resume, discard: as in `coe.evaluation.answer_folder.open_answer_folder`.
        policies: those that the plan has columns of.

    Raises:
        RunFolderError: the folder holds another run, or this one without `resume`.
        CoeError: see `coe.evaluation.runner.run`; the answers so far are kept.
    """
    from coe.evaluation.answer_folder import open_answer_folder
    from coe.evaluation.policies import asking
    from coe.evaluation.runner import run
    from coe.hosting import open_host

    async with open_host(config, snapshot) as host, asking(host, policies or {}) as ask:
        opened = open_answer_folder(output, plan, resume=resume, discard=discard)
        with opened as folder, _bars(plan.n_rows) as on_progress:
            _show_resumed(folder)
            return await run(
                plan, folder, ask, concurrency=concurrency, on_progress=on_progress, loads=lambda: host.loads
            )


def _show_resumed(folder: AnswerFolder) -> None:
    if folder.was_cut:
        console.print(
            "[yellow]dropped a half-written answer at the end of answers.jsonl; its question is asked again[/]"
        )
    if folder.records:
        console.print(f"resuming: {len(folder.records)} answers are in the folder")


@contextmanager
def _bars(n_rows: int) -> Iterator[Callable[[Progress], None]]:
    """Progress on stderr: all experts together, and one bar for each."""
    tasks: dict[str, Task] = {}
    latest: dict[str, Progress] = {}
    with progress() as shown:
        overall = shown.add("[bold]all[/]")

        def on_progress(now: Progress) -> None:
            if now.expert not in tasks:
                tasks[now.expert] = shown.add(now.expert, now.total)
            latest[now.expert] = now
            if now.done:
                failed = f", {now.failures} failed" if now.failures else ""
                tasks[now.expert].update(completed=now.done, note=f"{now.mean_score:.1%}{failed}")
            done = sum(each.done for each in latest.values())
            overall.update(completed=done, total=n_rows * len(latest))

        yield on_progress
