"""`coe profile`: what experts are good at, measured or read from a table, kept in the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.evaluate import TASK_FOLDER
from coe.cli.flags import TASKS_HELP, Concurrency, Limit, Seed, out_option
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.profile.place import Asking, Place
from coe.cli.profile.report import print_aggregators, print_profiles
from coe.cli.registry_url import RegistryUrl
from coe.cli.router.options import Experts, LabelColumn, names_of
from coe.cli.runs import Resume, resumable

if TYPE_CHECKING:
    from coe.evaluation.aggregators import Trial
    from coe.evaluation.report import Report
    from registry.profiles import ProfileRow


def profile(
    context: typer.Context,
    outcomes: Annotated[
        Path | None, typer.Option("--outcomes", metavar="FILE", help="Outcome table to read: .parquet, .jsonl or .csv.")
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", metavar="A,B", help=f"Tasks to run: {TASKS_HELP}")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="Configuration of the service (YAML): the experts to run, and the registry that keeps the counts.",
        ),
    ] = None,
    registry: RegistryUrl = None,
    experts: Experts = None,
    label_column: LabelColumn = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", metavar="NAME", help="Name of the table in the registry; by default its folder and name."
        ),
    ] = None,
    aggregators: Annotated[
        bool,
        typer.Option(
            "--aggregators",
            help="Find the expert that best picks the right one of three answers, two of them wrong.",
        ),
    ] = False,
    grader: Annotated[
        str | None,
        typer.Option(
            "--grader",
            metavar="NAME",
            help="Grader for --aggregators with --outcomes alone: exact, contains, number, choice, json, sql, or "
            "`module:Class`.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        out_option("Folder of the answers; by default one under $COE_HOME/profiles."),
    ] = None,
    limit: Limit = None,
    resume: Resume = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Run everything, also where the registry has counts; discards earlier answers."),
    ] = False,
    concurrency: Concurrency = 32,
    seed: Seed = 0,
    json: JsonTarget = None,
) -> None:
    """Measure experts by skill, or read the counts from an outcome table, and store them in the registry.

    Experts that already have counts for a task are not measured again. After an interruption, the same command with
    --resume continues.
    """
    _check_flags(outcomes, tasks, config, aggregators=aggregators, grader=grader)
    if tasks is not None and (label_column or source):
        raise typer.BadParameter("--label-column and --source are of a table; a task has its own", param_hint="--tasks")
    if config is not None and _is_typed(context, "registry"):
        raise typer.BadParameter("the configuration says which registry: give one of the two", param_hint="--registry")
    place = Place.of(
        config,
        registry,
        with_output=json is not None or output is not None,
        otherwise=", or say with --json or --out where the result goes",
    )
    folders = (TASK_FOLDER, *([config.absolute().parent / "tasks"] if config else []))
    asking = Asking(place, output, folders, resume=resume, fresh=fresh, concurrency=concurrency)
    with resumable(context, "profile"):
        if aggregators:
            trials = _trials(asking, outcomes, tasks, grader, label_column, source, limit=limit, seed=seed)
            document, rows, show = _try_aggregators(asking, trials, names_of(experts))
        elif tasks is not None:
            document, rows, show = _ask_tasks(asking, tasks, names_of(experts), limit)
        else:
            assert outcomes is not None  # _check_flags
            document, rows, show = _read_outcomes(place, outcomes, names_of(experts), label_column, source, limit)
    stored_in = place.store(rows)
    if json != "-":
        show()
    document = {"stored_in": stored_in, **document, "rows": rows}
    if output is not None:
        emit_json(document, str(output / ("aggregators.json" if aggregators else "profile.json")))
    emit_json(document, json)


Done = tuple[dict[str, Any], "Sequence[ProfileRow]", Callable[[], None]]
"""The result for machines, what is to be stored, and how it is shown to people."""


def _is_typed(context: typer.Context, name: str) -> bool:
    """Whether a flag was given, and is not from the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_flags(
    outcomes: Path | None, tasks: str | None, config: Path | None, *, aggregators: bool, grader: str | None
) -> None:
    if outcomes is None and tasks is None:
        raise typer.BadParameter("give --outcomes FILE to read a table, or --tasks NAMES to run the experts")
    if outcomes is not None and tasks is not None and not aggregators:
        raise typer.BadParameter("give either --outcomes or --tasks; both are for --aggregators")
    if config is None and (aggregators or tasks is not None):
        raise typer.BadParameter("experts are called: give the configuration of the service", param_hint="--config")
    if (grader is not None) != (aggregators and tasks is None):
        hint = "it grades the answers of a table, for --aggregators with --outcomes and without --tasks"
        raise typer.BadParameter(hint if grader else f"needed: {hint}", param_hint="--grader")


def _read_outcomes(
    place: Place, path: Path, names: list[str] | None, column: str | None, source: str | None, limit: int | None
) -> Done:
    from coe.evaluation.profiling import default_source, measured_identities, table_rows
    from registry.digest import identity
    from registry.errors import RegistryError
    from routers.outcomes.table import OutcomeTable

    table = OutcomeTable.read(path)
    table = table if names is None else table.with_experts(names)
    table = table if limit is None else table.select(range(len(table))[:limit])
    known = place.snapshot.experts
    if unknown := [name for name in table.experts if name not in known]:
        some = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        both = ",".join(name for name in table.experts if name in known)
        hint = f"--experts {both} reads those that it does" if both else "register them first (`coe registry apply`)"
        raise RegistryError(f"{path} has experts that are not in the registry: {some}; {hint}")
    now = {name: identity(known[name], known) for name in table.experts}
    then = {name: value for name, value in measured_identities(path).items() if name in now}
    for name in then:
        if then[name] != now[name]:
            console.print(f"[yellow]{name} has changed since: the counts belong to its earlier version[/]")
    rows = table_rows(table, source or default_source(path), now | then, column=column or "domain")
    return {"asked": []}, rows, lambda: print_profiles(rows, kept=place.keeps)


def _ask_tasks(asking: Asking, tasks: str, names: list[str] | None, limit: int | None) -> Done:
    from coe.evaluation.plan import Settings, plan_run
    from coe.evaluation.profiling import run_rows, skills_of_tasks, source_of, unmeasured

    place, found = asking.place, asking.find(tasks)
    skills, settings = skills_of_tasks(found), Settings(limit=limit)
    whole = plan_run(place.snapshot.experts, found, names, settings)
    identities: Mapping[str, str] = whole.manifest()["experts"]
    recorded = () if asking.fresh else place.recorded()
    missing, left = unmeasured(whole, recorded)
    sources = {source_of(task) for task in found}
    rows = [row for row in recorded if identities.get(row.expert) == row.identity and row.source in sources]
    if missing:
        report = asking.run(plan_run(place.snapshot.experts, left, missing, settings))
        new = run_rows(report, identities, skills)
        replaced = {(row.expert, row.source) for row in new}
        rows = [row for row in rows if (row.expert, row.source) not in replaced] + new
        _tell_failures(report)
    already = [spec.name for spec in whole.experts if spec.name not in missing]
    if already:
        console.print(f"measured before, not run again: {', '.join(already)}", highlight=False)
    return {"asked": missing}, rows, lambda: print_profiles(rows, kept=place.keeps)


def _tell_failures(report: Report) -> None:
    failed = sum(not record.final for record in report.records.values())
    if failed:
        console.print(f"[yellow]{failed} answers failed and do not count; the same command with --resume asks again[/]")


def _trials(
    asking: Asking,
    outcomes: Path | None,
    tasks: str | None,
    grader: str | None,
    column: str | None,
    source: str | None,
    *,
    limit: int | None,
    seed: int,
) -> list[Trial]:
    """The validation sets: of a table, of tasks with a table's answers, or of tasks that all experts answer first."""
    from coe.evaluation.aggregators import recorded_answers, run_answers, task_of_table, trial_of_task
    from coe.evaluation.plan import Settings, plan_run
    from coe.evaluation.profiling import default_source
    from routers.outcomes.table import OutcomeTable

    if tasks is None:
        assert outcomes is not None and grader is not None  # _check_flags
        table = OutcomeTable.read(outcomes)
        answers = recorded_answers(table)
        task, labels = task_of_table(table, source or default_source(outcomes), grader, column=column or "domain")
        return [trial_of_task(task, answers, skills=labels, seed=seed, limit=limit)]
    found = asking.find(tasks)
    if outcomes is not None:
        table = OutcomeTable.read(outcomes)
        return [trial_of_task(task, recorded_answers(table, task), seed=seed, limit=limit) for task in found]
    report = asking.run(plan_run(asking.place.snapshot.experts, found, None, Settings(limit=limit)), "answers")
    return [trial_of_task(task, run_answers(report, task), seed=seed) for task in report.plan.tasks]


def _try_aggregators(asking: Asking, trials: Sequence[Trial], names: list[str] | None) -> Done:
    from coe.evaluation.aggregators import aggregator_scores, best_aggregators, trial_rows
    from coe.evaluation.plan import plan_run

    for trial in trials:
        text = f"{trial.task.name}: {len(trial.task.rows)} questions to aggregate"
        if trial.no_right or trial.few_wrong:
            text += f"; left out: {trial.no_right} without a right answer, {trial.few_wrong} with too few wrong ones"
        console.print(text, highlight=False, soft_wrap=True)
    plan = plan_run(asking.place.snapshot.experts, [trial.task for trial in trials], names)
    report = asking.run(plan, "trial")
    results = aggregator_scores(report, trials)
    best = best_aggregators(results)
    document = {
        "trials": [
            {
                "source": trial.source,
                "n": len(trial.task.rows),
                "no_right": trial.no_right,
                "few_wrong": trial.few_wrong,
            }
            for trial in trials
        ],
        "aggregators": results,
        "best": best.overall.expert,
        "beats_chance": best.beats_chance,
        "by_label": {label: one.expert for label, one in best.by_label.items()},
        "composition": best.composition(),
    }
    identities = plan.manifest()["experts"]
    return document, trial_rows(report, trials, identities), lambda: print_aggregators(results, best, stdout_console())
