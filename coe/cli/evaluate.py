"""`coe eval`: experts x tasks -> an outcome table that routers train on."""

from __future__ import annotations

import shlex
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coe.cli.flags import (
    SERVICE_CONFIG,
    TASKS_HELP,
    Concurrency,
    Limit,
    Seed,
    ServiceConfig,
    Temperature,
    out_option,
)
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.router.options import names_of
from coe.cli.runs import Resume, check_required, require_option, resumable, run_in

if TYPE_CHECKING:
    from rich.table import Table

    from coe.config import Config, PolicyConfig
    from coe.evaluation.report import Report

TASK_FOLDER = Path("configs/tasks")


def evaluate(
    context: typer.Context,
    tasks: Annotated[str, typer.Option("--tasks", metavar="A,B", help=f"Tasks: {TASKS_HELP}")],
    output: Annotated[Path, out_option("Folder of the run.")],
    config: ServiceConfig = SERVICE_CONFIG,
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts",
            metavar="A,B",
            help="Use only these experts, or policies as coe/POLICY; by default all experts.",
        ),
    ] = None,
    limit: Limit = None,
    resume: Resume = False,
    concurrency: Concurrency = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    require: Annotated[
        float,
        require_option(
            "Share of the answers that must not fail, such as 0.95; exit status 3 if more fail. By default a failed "
            "answer only scores 0."
        ),
    ] = 0.0,
    json: JsonTarget = None,
) -> None:
    """Measure experts on tasks: write an outcome table of the answers, scores and costs of each expert.

    A policy (`coe/POLICY` in --experts) counts as one more expert. `coe router eval` measures routers.

    Writes OUT/outcomes.parquet (the outcome table), run.json (settings and figures) and answers.jsonl (answers in
    order of completion). After an interruption, the same command with --resume continues.
    """
    import asyncio

    from coe.config import load_config
    from coe.evaluation.answer_folder import ANSWERS
    from coe.evaluation.plan import Settings, plan_run
    from coe.evaluation.policies import columns
    from coe.evaluation.tasks import find_tasks
    from coe.experts import open_snapshot
    from coe.local import build_policies
    from coe.signals.features import Signals

    settings = Settings(temperature=temperature, seed=seed, limit=limit)
    loaded = load_config(config)
    found = find_tasks(tasks, [TASK_FOLDER, config.absolute().parent / "tasks"])
    snapshot = open_snapshot(loaded)
    names = names_of(experts)
    signals = Signals(snapshot, loaded.engines)
    policies = build_policies(_named_policies(loaded, names), snapshot, signals)
    plan = plan_run(snapshot.experts, found, names, settings, columns(loaded, policies, snapshot))
    running = run_in(output, plan, loaded, snapshot, resume=resume, concurrency=concurrency, policies=policies)
    with resumable(context, "eval"), closing(signals):
        report = asyncio.run(running)
    _show(report, output, to_stdout=json != "-")
    emit_json({"output": output, **report.summary}, json)
    if require:
        cells = report.cells.values()
        total, failed = sum(cell.n for cell in cells), sum(cell.failures for cell in cells)
        where = f"field `error` of {output}/{ANSWERS}"
        check_required(total - failed, total, require, what="answers", errors=where)


def _named_policies(config: Config, names: list[str] | None) -> dict[str, PolicyConfig]:
    """The policies that are named, as `coe/<policy>`.

    Raises:
        UnknownExpert: there is no such policy; with close matches.
    """
    from registry.errors import UnknownExpert
    from registry.spec import RESERVED_PREFIX

    wanted = [name.removeprefix(RESERVED_PREFIX) for name in names or () if name.startswith(RESERVED_PREFIX)]
    for name in wanted:
        if name not in config.policies:
            raise UnknownExpert(name, config.policies, where="the configured policies")
    return {name: config.policies[name] for name in wanted}


def _show(report: Report, output: Path, *, to_stdout: bool) -> None:
    from coe.evaluation.answer_folder import OUTCOMES

    screen = stdout_console() if to_stdout else console
    screen.print(_table(report))
    failures = sum(cell.failures for cell in report.cells.values())
    if failures:
        console.print(f"[yellow]{failures} answers failed (score 0); see run.json[/]")
    outcomes = output / OUTCOMES
    command = shlex.join(
        ["coe", "router", "train", "--outcomes", str(outcomes), "--kind", "category", "--out", "router"]
    )
    console.print(f"Outcomes: {outcomes}", highlight=False, soft_wrap=True)
    console.print(f"Train a router on them: {command}", highlight=False, soft_wrap=True, markup=False)


def _table(report: Report) -> Table:
    """Experts x tasks: mean scores in percent, the best of each task in bold; and the share of refusals."""
    from rich.table import Table

    tasks = [task.name for task in report.plan.tasks]
    table = Table("expert", title="Mean score, %")
    for task in report.plan.tasks:
        table.add_column(f"{task.name}\nn = {len(task.rows)}", justify="right")
    refused = {spec.name: sum(report.cells[spec.name, task].refusals for task in tasks) for spec in report.plan.experts}
    if any(refused.values()):
        table.add_column("refusals", justify="right")
    n = max(1, sum(len(task.rows) for task in report.plan.tasks))
    best = {task: max(cell.mean_score or 0.0 for (_, of), cell in report.cells.items() if of == task) for task in tasks}
    for spec in report.plan.experts:
        scores = [(report.cells[spec.name, task].mean_score or 0.0, best[task]) for task in tasks]
        cells = [f"[bold]{s:.1%}[/]" if s == top > 0 else f"{s:.1%}" for s, top in scores]
        share = [f"{refused[spec.name] / n:.1%}"] if any(refused.values()) else []
        table.add_row(spec.name, *cells, *share)
    return table
