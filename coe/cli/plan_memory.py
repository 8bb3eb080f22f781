"""`coe plan --from-log`: how much memory the requests of a decision log need."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from coe.cli.output import console, stdout_console
from coe.cli.progress import progress

if TYPE_CHECKING:
    from coe.config import Config
    from coe.simulation.workload import Workload

MOST_REQUESTS = 200_000
"""Requests of a log that are read, those of the newest files first: each size simulates all of them."""


def plan_memory(
    config: Config,
    log: Path,
    *,
    load_bytes_per_s: float | None,
    tokens_per_s: float | None,
    ttft_limit_s: float,
    hosts: int | None = None,
) -> dict[str, Any]:
    """Simulate a host on the requests of a log, from the memory of its largest expert to that of all experts.

    Prompts are taken to be read ten times as fast as tokens are generated.

    Args:
        log: a file, or the folder of a service.
        hosts: also place the experts on so many hosts, with `host.budget` each.

    Raises:
        ConfigError: the log or the experts cannot be used, or a rate is neither given nor in the log.
    """
    from coe.errors import ConfigError
    from coe.experts import open_snapshot
    from coe.memory.eviction import POLICIES
    from coe.simulation.arrivals import by_name, read_decision_log
    from coe.simulation.compare import Comparison
    from coe.simulation.logged_speeds import PROMPT_TOKENS_PER_NEW, logged_speeds
    from coe.simulation.memory_sizes import memory_sizes, sizes_to_try
    from coe.simulation.registered import registered_experts
    from coe.simulation.workload import Machine

    snapshot = open_snapshot(config)
    residencies, bytes_of = registered_experts(snapshot)
    logged = read_decision_log(log, MOST_REQUESTS)
    arrivals = logged.of(residencies)
    left_out = sorted(set(logged.experts) - set(residencies))
    if not arrivals.at_s:
        raise ConfigError(
            f"{log}: no expert of this log has weights of a known size in the configuration: {', '.join(left_out[:5])}"
        )
    speeds = logged_speeds(log, residencies, bytes_of)
    load_rate = load_bytes_per_s or speeds.load_bytes_per_s
    token_rate = tokens_per_s or speeds.tokens_per_s
    for name, rate in (("--load-rate", load_rate), ("--tokens-per-s", token_rate)):
        if rate is None:
            raise ConfigError(f"{log}: no request of this log shows the rate of {name}: give it")
    workload = by_name(arrivals, residencies.__getitem__, bytes_of)
    token_rate = token_rate or 1.0
    machine = Machine(
        1,
        load_rate or 1.0,
        prompt_tokens_per_s=PROMPT_TOKENS_PER_NEW * token_rate,
        new_tokens_per_s=token_rate,
    )
    comparison = Comparison(machine, config.host.aging_s, POLICIES[config.host.eviction], ttft_limit_s)
    sizes = sizes_to_try(workload)
    budget = config.host.budget
    if budget is not None and sizes[0] <= int(budget) < sizes[-1]:
        sizes = sorted({*sizes, int(budget)})
    found = []
    with progress() as shown:
        task = shown.add("memory sizes", total=len(sizes))
        for size in memory_sizes(comparison, workload, sizes):
            found.append(size)
            task.update(completed=len(found))
    placed = None if hosts is None else _placed(config, workload, hosts)
    if placed is not None:
        placed["experts"] = experts_by_host(placed, residencies, snapshot.experts)
    least = next((size.device_bytes for size in found if size.ttft_p95_s <= ttft_limit_s), None)
    return {
        "requests": len(workload),
        "experts": len(set(arrivals.experts)),
        "left_out": {"requests": len(logged.at_s) - len(arrivals.at_s), "experts": left_out},
        "weights": len({name for index in workload.wants for name in workload.residencies[index]}),
        "load_bytes_per_s": load_rate,
        "tokens_per_s": token_rate,
        "ttft_limit_s": ttft_limit_s,
        "budget_bytes": None if budget is None else int(budget),
        "least_bytes": least,
        "sizes": [size.document() for size in found],
        "hosts": placed,
    }


def _placed(config: Config, workload: Workload, n_hosts: int) -> dict[str, Any]:
    """Weights by host, by the work of the requests."""
    from coe.errors import ConfigError
    from coe.simulation.host_plan import plan_hosts
    from coe.simulation.logged_speeds import work_of

    budget = config.host.budget
    if budget is None:
        raise ConfigError("--hosts needs `host.budget` in the configuration: the bytes that each host has for weights")
    wanted = map(workload.residencies.__getitem__, workload.wants)
    load = work_of(zip(wanted, workload.prompt_tokens, workload.new_tokens, strict=True))
    plan = plan_hosts(load, workload.bytes_of, n_hosts, int(budget))
    return {
        "weights": [list(names) for names in plan.hosts],
        "loads": list(plan.loads),
        "missing": plan.missing,
        "optimal": plan.optimal,
    }


def experts_by_host(
    placed: Mapping[str, Any],
    residencies: Mapping[str, Sequence[str]],
    names: Iterable[str],
    now: Sequence[Collection[str]] = (),
) -> list[list[str]]:
    """Experts by host: those whose weights are there. All others stay where they are now.

    Those that are nowhere yet are with the host that has the least work.
    """
    hosts = [set(weights) for weights in placed["weights"]]
    found = [[name for name, residency in sorted(residencies.items()) if host.issuperset(residency)] for host in hosts]
    lightest = min(range(len(hosts)), key=lambda number: (placed["loads"][number], number))
    for name in sorted(set(names).difference(*found)):
        for number in [n for n, host in enumerate(now) if name in host] or [lightest]:
            found[number].append(name)
    return found


def show_memory(record: Mapping[str, Any], *, to_stdout: bool) -> None:
    """Print the record as a table."""
    from rich import box
    from rich.table import Table

    out = stdout_console() if to_stdout else console
    table = Table(title="Memory for weights", box=box.SIMPLE_HEAD)
    for heading in ("bytes", "loads", "hits", "Belady hits", "TTFT p95 (s)", "longest wait (s)"):
        table.add_column(heading, justify="right")
    for size in record["sizes"]:
        mark = " (host.budget)" if size["device_bytes"] == record["budget_bytes"] else ""
        cells = [f"{size['hit_rate']:.1%}", f"{size['best_hit_rate']:.1%}"]
        cells += [f"{size['ttft_p95_s']:,.2f}", f"{size['longest_wait_s']:,.1f}"]
        table.add_row(f"{_mib(size['device_bytes'])}{mark}", f"{size['loads']:,}", *cells)
    out.print(table)
    for line in [*_summary(record), *(_pools(record["hosts"]) if record["hosts"] else ())]:
        out.print(line, highlight=False, soft_wrap=True, markup=False)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _summary(record: Mapping[str, Any]) -> Iterator[str]:
    if (count := record["left_out"]["requests"]) > 0:
        names = ", ".join(record["left_out"]["experts"][:5])
        yield f"Left out: {_counted(count, 'request')} to experts without weights in this configuration ({names})."
    yield (
        f"{_counted(record['requests'], 'request')} to {_counted(record['experts'], 'expert')} "
        f"({_counted(record['weights'], 'set')} of weights), at "
        f"{_mib(record['load_bytes_per_s'])} loaded and {record['tokens_per_s']:,.1f} tokens generated per second."
    )
    limit = f"95% of the first tokens within {record['ttft_limit_s']:g} s"
    if record["least_bytes"] is None:
        yield f"No size keeps {limit}: answers, not loads, take the time: more or faster hosts help."
        return
    saved = record["weights"] - 1
    machines = f"; one process for each set of weights would be {saved:,} more" if saved else ""
    yield f"{_mib(record['least_bytes'])} keep {limit}, in one process{machines}."


def _pools(placed: Mapping[str, Any]) -> Iterator[str]:
    """The hosts as pools of a configuration."""
    from json import dumps

    how = "" if placed["optimal"] else ", found greedily"
    yield f"{len(placed['weights'])} hosts{how}; {placed['missing']:.1%} of the work is of experts that load on demand:"
    yield "serve:"
    yield "  pools:"
    for number, (names, load) in enumerate(zip(placed["experts"], placed["loads"], strict=True)):
        if names:  # a pool serves at least one expert
            yield f"    - {{name: host-{number}, experts: {dumps(names)}}}  # {load:.1%} of the work"


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"


def one_of(source: str | None, log: Path | None) -> None:
    """Raises BadParameter unless exactly one of --input and --from-log is given."""
    if (source is None) == (log is None):
        raise typer.BadParameter("give one of --input, for a batch, and --from-log, for memory", param_hint="--input")
