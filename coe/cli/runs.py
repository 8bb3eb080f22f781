"""Runs of experts on tasks, as the commands make them: in a folder, with progress on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from coe.cli.output import console
from coe.cli.progress import Task, progress

if TYPE_CHECKING:
    from coe.config import Config
    from coe.evaluation.plan import Plan
    from coe.evaluation.report import Report
    from coe.evaluation.run_folder import RunFolder
    from coe.evaluation.runner import Progress
    from coe.policy import Policy
    from registry.store import Snapshot


async def run_in(
    output: Path,
    plan: Plan,
    config: Config,
    snapshot: Snapshot,
    *,
    fresh: bool,
    concurrency: int,
    policies: Mapping[str, Policy] | None = None,
) -> Report:
    """Carry out a plan in a folder, which is resumed if it holds this run.

    Args:
        policies: those that the plan has columns of.

    Raises:
        RunFolderError: the folder holds another run, and it is not to be started afresh.
        CoeError: see `coe.evaluation.runner.run`; what was answered is kept.
    """
    from coe.evaluation.policies import asking
    from coe.evaluation.run_folder import open_run_folder
    from coe.evaluation.runner import run
    from coe.host import open_host

    async with open_host(config, snapshot) as host, asking(host, policies or {}) as ask:
        with open_run_folder(output, plan.manifest(), fresh=fresh) as folder, _bars(plan.n_rows) as on_progress:
            _tell_resumed(folder)
            return await run(
                plan, folder, ask, concurrency=concurrency, on_progress=on_progress, loads=lambda: host.loads
            )


def _tell_resumed(folder: RunFolder) -> None:
    if folder.was_cut:
        console.print("[yellow]a half-written answer at the end of answers.jsonl was dropped; it is asked again[/]")
    if folder.records:
        console.print(f"resuming: {len(folder.records)} answers are there already")


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
