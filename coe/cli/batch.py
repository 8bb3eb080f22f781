"""`coe batch`: a file of requests -> a file of answers, on Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.batch_budget import BudgetOptions, assignment_lines
from coe.cli.flags import SERVICE_CONFIG, ServiceConfig, out_option
from coe.cli.known_rates import known_rates
from coe.cli.option_groups import with_option_groups
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.progress import Progress, Task, progress
from coe.cli.runs import Resume, check_required, require_option, resumable

if TYPE_CHECKING:
    from coe.config import Config


@with_option_groups
def batch(
    context: typer.Context,
    source: Annotated[
        str, typer.Option("--input", "-i", metavar="FILE", help="JSONL or Parquet: a local path or any fsspec URL.")
    ],
    output: Annotated[str, out_option("Folder of the run: a local path or any fsspec URL.")],
    config: ServiceConfig = SERVICE_CONFIG,
    resume: Resume = False,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="NAME", help="For rows without a model: 'auto', 'coe/POLICY', or an expert."
        ),
    ] = "auto",
    budget: BudgetOptions = BudgetOptions(),
    like: Annotated[
        str | None,
        typer.Option(
            "--like", metavar="DIR", help="With --budget-usd: folder of an earlier `coe batch`, for its answer lengths."
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Address of a Ray cluster ('auto'); by default the configuration's, else a new Ray here.",
        ),
    ] = None,
    require: Annotated[
        float, require_option("Share of the rows that must be answered, such as 0.95; exit status 3 if fewer are.")
    ] = 1.0,
    json: JsonTarget = None,
) -> None:
    """Answer every row of a file: rows are routed, grouped by expert, and each expert is loaded once per stage.

    Rows are OpenAI batch lines (custom_id, method, url, body), or plain rows: an optional id, a prompt (one user
    message) or messages, and any other field of a chat request. Writes OUT/results.parquet, sorted by id, and
    run.json; for OpenAI batch lines also results.jsonl, in OpenAI's format. A row that fails is recorded with its
    error; exit status 3 if fewer rows than --require were answered. After an interruption, the same command with
    --resume continues and writes the same files.

    With --budget-usd the experts of all rows are chosen together, for a policy whose router scores every expert: the
    highest sum of predicted quality whose predicted price is within the budget. The assignment is kept with the run.
    """
    from coe.batch.run import run_batch
    from coe.batch.runner import ray_executor
    from coe.config import load_config

    loaded = _with_address(load_config(config), ray)
    if like is not None and budget.budget_usd is None:
        raise typer.BadParameter("needs --budget-usd", param_hint="--like")
    lengths = {} if budget.budget_usd is None else known_rates(loaded, like).mean_tokens
    with resumable(context, "batch"), BatchProgress.shown() as watcher:
        run = run_batch(
            loaded,
            source=source,
            output=output,
            executor=lambda: ray_executor(loaded.batch),
            watch=watcher,
            model=model,
            budget=budget.budget(lengths),
            resume=resume,
        )
    _show(run, output, to_stdout=json != "-")
    emit_json({"output": output, **run}, json)
    rows, failed = run["results"]["rows"], sum(run["results"]["errors"].values())
    where = f"column `error` of {output}/results.parquet"
    check_required(rows - failed, rows, require, what="rows", errors=where)


def _with_address(config: Config, address: str | None) -> Config:
    if address is None:
        return config
    return config.model_copy(update={"batch": config.batch.model_copy(update={"ray": address})})


class BatchProgress:
    """Progress on stderr: a line for each phase that is over, and a bar for each part of the current phase."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._phase = ""
        self._tasks: dict[str, Task] = {}
        self._failed: dict[str, int] = {}

    @classmethod
    @contextmanager
    def shown(cls) -> Iterator[BatchProgress]:
        """Show progress while the block runs."""
        with progress() as shown:
            yield (bars := cls(shown))
            bars._finish()

    def phase(self, name: str, totals: Mapping[str, int]) -> None:
        """See `run.Watcher`."""
        self._finish()
        self._phase, self._failed = name, dict.fromkeys(totals, 0)
        self._tasks = {each: self._shown.add(f"{name}: {each}", total) for each, total in totals.items()}

    def advance(self, name: str, done: int, failed: int = 0) -> None:
        """See `run.Watcher`."""
        self._failed[name] += failed
        self._tasks[name].advance(done)
        self._tasks[name].update(note=self._failures(name))

    def _finish(self) -> None:
        """Turn the bars of the phase into a line."""
        if self._tasks:
            counts = (
                f"{task.completed:,.0f} {name} {self._failures(name)}".rstrip() for name, task in self._tasks.items()
            )
            self._shown.line(f"{self._phase}: {', '.join(counts)}")
        for task in self._tasks.values():
            task.remove()
        self._tasks = {}

    def _failures(self, name: str) -> str:
        return f"[yellow]({self._failed[name]:,} failed)[/]" if self._failed[name] else ""


def _show(run: Mapping[str, Any], output: str, *, to_stdout: bool) -> None:
    from rich.table import Table

    results, loads = run["results"], _loads(run)
    table = Table("expert", title="Answers")
    for column in ("rows", "loads"):
        table.add_column(column, justify="right")
    for expert in sorted(results["experts"].keys() | loads.keys()):
        table.add_row(expert, str(results["experts"].get(expert, 0)), str(loads.get(expert, 0)))
    (stdout_console() if to_stdout else console).print(table)
    for line in assignment_lines(run["assignment"]) if "assignment" in run else ():
        console.print(line, highlight=False, soft_wrap=True)
    for code, rows in sorted(results["errors"].items()):
        console.print(f"[yellow]{rows} rows failed: {code}[/]; see their `error` column", highlight=False)
    for field, rows in sorted(run["ignored_fields"].items()):
        console.print(f"[yellow]{field} has no effect[/]; {rows} rows have it", highlight=False)
    console.print(f"Results: {output}/results.parquet", highlight=False, soft_wrap=True)


def _loads(run: Mapping[str, Any]) -> dict[str, int]:
    """How often each expert was loaded, all sessions together."""
    loads: dict[str, int] = {}
    for session in run["sessions"]:
        for expert, count in session["loads"].items():
            loads[expert] = loads.get(expert, 0) + count
    return loads
