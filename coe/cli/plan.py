"""`coe plan`: the calls, loads and cost of a batch, before it runs; or the memory that logged requests need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.batch_budget import BudgetOptions, assignment_lines, points_table
from coe.cli.flags import SERVICE_CONFIG, ServiceConfig, rate_of_text
from coe.cli.known_rates import known_rates
from coe.cli.option_groups import with_option_groups
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.plan_memory import one_of
from registry.spelling import listing

if TYPE_CHECKING:
    from coe.batch.planning.plan import BatchPlan
    from coe.batch.run import Watcher
    from coe.config import Config

UNKNOWN = "unknown"


@with_option_groups
def plan(
    source: Annotated[
        str | None,
        typer.Option("--input", "-i", metavar="FILE", help="A batch, JSONL or Parquet: a path or any fsspec URL."),
    ] = None,
    config: ServiceConfig = SERVICE_CONFIG,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="NAME", help="For rows without a model: 'auto', 'coe/POLICY', or an expert."
        ),
    ] = "auto",
    like: Annotated[
        str | None,
        typer.Option(
            "--like", metavar="DIR", help="Folder of an earlier `coe batch`, for its rates and answer lengths."
        ),
    ] = None,
    load_rate: Annotated[
        str | None,
        typer.Option(
            "--load-rate",
            metavar="SIZE/s",
            help="Bytes of weights loaded per second, e.g. 500MB/s.",
        ),
    ] = None,
    tokens_per_s: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-s",
            metavar="N",
            min=0.0,
            help="New tokens that one host generates per second in full batches.",
        ),
    ] = None,
    from_log: Annotated[
        Path | None,
        typer.Option(
            "--from-log",
            metavar="PATH",
            help="Size the memory for the requests of this decision log: a file, or the folder `serve.log.folder`.",
        ),
    ] = None,
    ttft_limit_s: Annotated[
        float,
        typer.Option("--ttft-limit", metavar="S", min=0.0, help="With --from-log: most seconds to the first token."),
    ] = 10.0,
    hosts: Annotated[
        int | None,
        typer.Option(
            "--hosts",
            metavar="N",
            min=1,
            help="With --from-log: place the experts on N hosts, and print `serve.pools`.",
        ),
    ] = None,
    budget: BudgetOptions = BudgetOptions(),
    json: JsonTarget = None,
) -> None:
    """Show what `coe batch` would do: calls, loads, tokens, cost and time; exit status 1 if an expert fits no host.

    With --from-log, show how often weights are in memory and how long requests wait, by the bytes that a host has.

    The input is routed; no expert is loaded or called. Prompt tokens are estimates. New
    tokens are upper bounds from the limits of the requests; an expected number is shown where the registry's profiles
    or an earlier run (--like) have the answer lengths of an expert. Seconds need rates, from --like or from the flags;
    without them they are unknown.

    With --budget-usd, also show the joint assignment of all rows, its upper bound, each row on its own, and what other
    budgets and more memory would buy.
    """
    from coe.config import load_config

    one_of(source, from_log)
    loaded = load_config(config)
    if source is None:
        if budget.budget_usd is not None:
            raise typer.BadParameter("is for a batch: give --input", param_hint="--budget-usd")
        _plan_memory(loaded, from_log, load_rate, tokens_per_s, ttft_limit_s, hosts, json)
        return
    from coe.batch.planning.plan import plan_batch

    rates = known_rates(loaded, like, load_rate, tokens_per_s)
    within = budget.budget(rates.mean_tokens)
    with _routing() as watch:
        planned = plan_batch(loaded, source=source, model=model, watch=watch, rates=rates, budget=within)
    record = planned.record()
    _show(planned, record, to_stdout=json != "-")
    emit_json(record, json)
    if record["memory"]["too_large"]:
        raise typer.Exit(1)


def _plan_memory(
    config: Config,
    log: Path | None,
    load_rate: str | None,
    tokens_per_s: float | None,
    ttft_limit_s: float,
    hosts: int | None,
    json: str | None,
) -> None:
    from coe.cli.plan_memory import plan_memory, show_memory

    assert log is not None
    rate = None if load_rate is None else rate_of_text(load_rate, "--load-rate")
    record = plan_memory(
        config,
        log,
        load_bytes_per_s=rate,
        tokens_per_s=tokens_per_s or None,
        ttft_limit_s=ttft_limit_s,
        hosts=hosts,
    )
    show_memory(record, to_stdout=json != "-")
    emit_json(record, json)


@contextmanager
def _routing() -> Iterator[Watcher]:
    """Progress while the input is read and routed; the other phases are short."""
    from coe.batch.run import ROUTING
    from coe.cli.batch import BatchProgress

    class Routing:
        def __init__(self, bars: BatchProgress) -> None:
            self._bars, self._routes = bars, False

        def phase(self, name: str, totals: Mapping[str, int]) -> None:
            self._routes = name == ROUTING
            self._bars.phase(name if self._routes else "", totals if self._routes else {})

        def advance(self, name: str, done: int, failed: int = 0) -> None:
            if self._routes:
                self._bars.advance(name, done, failed)

    with BatchProgress.shown() as bars:
        yield Routing(bars)


def _show(planned: BatchPlan, record: Mapping[str, Any], *, to_stdout: bool) -> None:
    out = stdout_console() if to_stdout else console
    for number, stage in enumerate(record["stages"], start=1):
        out.print(_table(number, stage, record["memory"]["sizes"]))
    for line in [*_totals(record), *_notes(planned, record)]:
        out.print(line, highlight=False, soft_wrap=True)
    if record["joint"] is not None:
        for line in assignment_lines(record["joint"]):
            out.print(line, highlight=False, soft_wrap=True)
        out.print(points_table(record["joint"]))
    if too_large := record["memory"]["too_large"]:
        most = max(planned.memory.needed(residency) or 0 for residency in too_large)
        needs = f"needs {_size(most)}" if len(too_large) == 1 else f"need up to {_size(most)} each"
        budget = _size(record["memory"]["budget_bytes"])
        text = f"{listing(map(repr, too_large))} {needs}, pins included; a host's budget is {budget}"
        console.print(f"[bold red]error:[/] {text}: raise `host.budget`, or choose smaller experts", highlight=False)


def _table(number: int, stage: Mapping[str, Any], sizes: Mapping[str, int | None]) -> Any:
    from rich.table import Table

    table = Table("expert", "with", title=f"Stage {number}")
    for column in ("calls", "loads", "moved", "prompt tokens", "new tokens", "USD"):
        table.add_column(column, justify="right")
    for name, expert in sorted(stage["experts"].items(), key=lambda item: (item[1]["residency"], item[0])):
        residency = expert["residency"]
        # The loads of a base are shown once: in its own row, or in that of its first adapter.
        first = next(n for n in sorted(stage["experts"]) if stage["experts"][n]["residency"] == residency)
        own = name == residency or (residency not in stage["experts"] and name == first)
        loads = stage["loads"][residency] if own else 0
        moved = None if sizes[residency] is None else loads * (sizes[residency] or 0)
        table.add_row(
            name,
            "" if name == residency else residency,
            f"{expert['calls']:,}",
            str(loads) if own else "",
            _size(moved) if own else "",
            f"~{expert['prompt_tokens']:,}",
            _bounded(expert["tokens"], expert["tokens_at_most"], _whole),
            _bounded(expert["cost_usd"], expert["cost_usd_at_most"], _usd),
        )
    return table


def _totals(record: Mapping[str, Any]) -> Iterator[str]:
    totals = record["totals"]
    yield (
        f"Total: {totals['calls']:,} calls, {_loads(totals['loads'])}, {_size(totals['loaded_bytes'])} moved, "
        f"about {totals['prompt_tokens']:,} prompt tokens, "
        f"new tokens {_bounded(totals['tokens'], totals['tokens_at_most'], _whole)}, "
        f"USD {_bounded(totals['cost_usd'], totals['cost_usd_at_most'], _usd)}, "
        f"seconds {_bounded(totals['seconds'], totals['seconds_at_most'], _whole)}"
    )
    least = record["if_answers_agree"]
    if least is not None:
        yield (
            "The calls depend on answers: these are the most. If all experts agree: "
            f"{least['calls']:,} calls, {_loads(least['loads'])}, {_size(least['loaded_bytes'])} moved, "
            f"USD {_bounded(least['cost_usd'], least['cost_usd_at_most'], _usd)}, "
            f"seconds {_bounded(least['seconds'], least['seconds_at_most'], _whole)}"
        )


def _notes(planned: BatchPlan, record: Mapping[str, Any]) -> Iterator[str]:
    """Notes on the figures: failures, hosts, unknown rates."""
    for code, rows in sorted(record["errors"].items()):
        yield f"[yellow]{rows:,} rows will fail before any call: {code}[/]"
    if record["totals"]["too_long"]:
        text = f"[yellow]{record['totals']['too_long']:,} calls may not fit the context of their expert[/]"
        yield f"{text}, when the answers in their prompts are as long as allowed"
    budget = _size(record["memory"]["budget_bytes"])
    if record["hosts"] == 1:
        ahead = sum(stage["loads_ahead"] for stage in record["stages"])
        yield (
            f"One host with {budget} for weights: {ahead} of {record['totals']['loads']} loads fit beside the expert "
            "that works before them, and overlap with its work."
        )
    else:
        yield (
            f"{record['hosts']} hosts with {budget} for weights each; an expert that several share is loaded by each."
        )
    if (more := record["more_memory"]) is not None:
        ahead = "" if more["loads_ahead"] is None else f"{more['loads_ahead']} of {more['loads']} loads overlap, "
        seconds = _bounded(more["seconds"], more["seconds_at_most"], _whole)
        yield f"With {_size(more['more_bytes'])} more, room for one expert more: {ahead}seconds {seconds}."
    missing = list(_missing(planned, record))
    if missing:
        yield f"Unknown: {', '.join(missing)}; --like takes them from an earlier run."


def _missing(planned: BatchPlan, record: Mapping[str, Any]) -> Iterator[str]:
    rates, sizes = planned.rates, planned.memory.sizes
    if any(rates.load_s(size) is None for size in sizes.values()):
        yield "the rate of loading (--load-rate)"
    if any(rates.work_s(residency, 1) is None for residency in sizes):
        yield "the rate of generation (--tokens-per-s)"
    if record["totals"]["tokens"] is None:
        yield "the length of answers"


def _bounded(expected: float | None, at_most: float | None, form: Callable[[float], str]) -> str:
    """The expected value and the upper bound."""
    if at_most is None:
        return UNKNOWN
    bound = f"≤ {form(at_most)}"
    return bound if expected is None else f"~{form(expected)} ({bound})"


def _loads(count: int) -> str:
    return f"{count:,} load{'s' * (count != 1)}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _usd(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.2g}"  # answers of small experts cost millionths


def _size(size_bytes: float | None) -> str:
    if size_bytes is None:
        return UNKNOWN
    return f"{size_bytes / 2**20:,.0f} MiB" if size_bytes >= 2**20 else f"{size_bytes:,.0f} B"
