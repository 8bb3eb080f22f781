"""`coe simulate`: many experts on little memory, under a virtual clock, beside other policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.flags import Seed, bytes_of_text, rate_of_text
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.progress import Progress, progress

if TYPE_CHECKING:
    from coe.simulation.compare import Comparison
    from coe.simulation.workload import Workload

_COLUMNS = (
    ("loads", "loads", ",d"),
    ("loads\nbound", "loads_bound", ",d"),
    ("TTFT\np50 (s)", "ttft_p50_s", ",.2f"),
    ("TTFT\np95 (s)", "ttft_p95_s", ",.2f"),
    ("longest\nwait (s)", "longest_wait_s", ",.1f"),
    ("makespan\n(s)", "makespan_s", ",.0f"),
    ("good\nper s", "goodput_per_s", ",.3f"),
)
"""Heading, field and format of each column."""
_DEVICE_BYTES = 80 * 10**9
"""Bytes for weights where neither an option nor a configuration states them."""


def simulate(
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Arrivals: CSV with TIMESTAMP, ContextTokens, GeneratedTokens."),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="PATH", help="Arrivals: a decision log of `coe serve`, a file or its folder."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="Take the experts of this configuration, with their sizes, and the defaults of other options.",
        ),
    ] = None,
    experts: Annotated[
        str, typer.Option("--experts", metavar="N,...", help="Numbers of synthetic experts, e.g. 150 or 10,100,1000.")
    ] = "150",
    expert_bytes: Annotated[
        str, typer.Option("--expert-bytes", metavar="SIZE", help="Bytes of a synthetic expert, e.g. 13.5GB.")
    ] = "13.5GB",
    device_bytes: Annotated[
        str | None,
        typer.Option(
            "--device-bytes",
            metavar="SIZE",
            help="Bytes for weights on the device; by default the budget of --config, without one 80GB.",
        ),
    ] = None,
    bandwidth: Annotated[
        str, typer.Option("--bandwidth", metavar="SIZE/s", help="Bytes of weights loaded per second, e.g. 55GB/s.")
    ] = "55GB/s",
    host_bytes: Annotated[
        str | None,
        typer.Option("--host-bytes", metavar="SIZE", help="Bytes for weights in host memory; by default all fit."),
    ] = None,
    disk_bandwidth: Annotated[
        str,
        typer.Option(
            "--disk-bandwidth", metavar="SIZE/s", help="Bytes of weights read per second into host memory, e.g. 3GB/s."
        ),
    ] = "3GB/s",
    load_fixed_s: Annotated[
        float, typer.Option("--load-fixed-s", metavar="S", help="Seconds of each load beside its bytes.")
    ] = 0.05,
    requests: Annotated[
        int | None, typer.Option("--requests", metavar="N", min=1, help="Most requests; without a trace, their number.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", metavar="N", help="Requests per second; by default those of the trace, without one 1."),
    ] = None,
    load: Annotated[
        float | None,
        typer.Option("--load", metavar="X", help="Rate as a share of the capacity, which is found first, e.g. 0.8."),
    ] = None,
    zipf: Annotated[
        float,
        typer.Option(
            "--zipf", metavar="X", min=0.0, max=10.0, help="Exponent of the popularity of experts; 0 is even."
        ),
    ] = 1.0,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Mean prompt tokens, without a trace.")
    ] = 1000,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", min=1, help="Mean new tokens, without a trace.")
    ] = 200,
    prompt_rate: Annotated[
        float, typer.Option("--prompt-tokens-per-s", metavar="N", help="Prompt tokens that an expert reads per second.")
    ] = 10_000.0,
    new_rate: Annotated[
        float, typer.Option("--tokens-per-s", metavar="N", help="New tokens that a request generates per second.")
    ] = 100.0,
    prefill_tokens: Annotated[
        int,
        typer.Option(
            "--prefill-tokens",
            metavar="N",
            help="Prompt tokens that an expert reads between two new tokens of its batch.",
        ),
    ] = 256,
    places: Annotated[
        int, typer.Option("--batch-size", metavar="N", help="Requests that one expert runs at once.")
    ] = 32,
    separate: Annotated[
        bool, typer.Option("--separate", help="Experts at work at the same time do not slow each other down.")
    ] = False,
    aging_s: Annotated[
        float | None,
        typer.Option(
            "--aging-s",
            metavar="S",
            min=0.0,
            help="`host.aging_s` of our scheduler; by default that of --config, without one 10.",
        ),
    ] = None,
    eviction: Annotated[
        str | None,
        typer.Option(
            "--eviction",
            metavar="NAME",
            help="`host.eviction` of our scheduler: look-ahead, gdsf or lru; by default as --aging-s.",
        ),
    ] = None,
    ttft_limit_s: Annotated[
        float, typer.Option("--ttft-limit", metavar="S", min=0.0, help="Seconds to the first token that count as good.")
    ] = 10.0,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME",
            help="Only this policy: fcfs-lru, coserve, ours, belady-arrival or belady-ours. Repeatable.",
        ),
    ] = None,
    devices: Annotated[
        bool, typer.Option("--devices", help="Find the fewest devices that keep the limit for 95% of the requests.")
    ] = False,
    seed: Seed = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the policies over the numbers of experts (PNG).")
    ] = None,
    json: JsonTarget = None,
) -> None:
    """Simulate many experts on one device: loads, waiting and goodput of our scheduler and of others.

    No weights are needed. The scheduler, the plans for room and the eviction policies are those of a host. Others are
    first come first served with LRU, CoServe's rule, and Belady's policy, which knows the future. TTFT is the time to
    the first token. `loads bound` is the fewest loads for the order in which a policy served its requests. `good per s`
    counts requests whose first token came within --ttft-limit. Speeds are those of the options.
    """
    from coe.cli.simulated_workload import largest_budget, registered_workload, synthetic_workload
    from coe.config import Config, load_config
    from coe.memory.eviction import POLICIES as EVICTION
    from coe.simulation.arrivals import poisson, read_azure, read_decision_log
    from coe.simulation.compare import POLICIES, Comparison
    from coe.simulation.workload import MOST_REQUESTS, Machine

    if trace is not None and log is not None:
        raise typer.BadParameter("give one of --trace and --log")
    if rate is not None and load is not None:
        raise typer.BadParameter("give one of --rate and --load")
    for name, value in (("--rate", rate), ("--load", load)):
        if value is not None and not 1e-6 <= value <= 1e6:
            raise typer.BadParameter(f"{value:g} is not between 0.000001 and 1,000,000", param_hint=name)
    if seed < 0:
        raise typer.BadParameter(f"{seed} is negative", param_hint="--seed")
    if eviction is not None and eviction not in EVICTION:
        raise typer.BadParameter(f"{eviction!r} is none of {', '.join(EVICTION)}", param_hint="--eviction")
    if requests is not None and requests > MOST_REQUESTS:
        raise typer.BadParameter(f"{requests:,} is more than {MOST_REQUESTS:,}", param_hint="--requests")
    service = Config() if config is None else load_config(config)
    room = largest_budget(service) if device_bytes is None else int(bytes_of_text(device_bytes, "--device-bytes"))
    machine = Machine(
        _DEVICE_BYTES if room is None else room,
        rate_of_text(bandwidth, "--bandwidth"),
        load_fixed_s,
        prompt_rate,
        new_rate,
        places,
        shared=not separate,
        prefill_tokens=prefill_tokens,
        host_bytes=None if host_bytes is None else int(bytes_of_text(host_bytes, "--host-bytes")),
        disk_bytes_per_s=rate_of_text(disk_bandwidth, "--disk-bandwidth"),
    )
    aging_s = service.host.aging_s if aging_s is None else aging_s
    comparison = Comparison(machine, aging_s, EVICTION[eviction or service.host.eviction], ttft_limit_s)
    if trace is not None:
        arrivals = read_azure(trace, requests or MOST_REQUESTS)
    elif log is not None:
        arrivals = read_decision_log(log, requests or MOST_REQUESTS)
    else:
        arrivals = poisson(requests or 10_000, rate or 1.0, prompt_tokens, new_tokens, seed)
    if config is None:
        counts, size_bytes = _counts(experts), int(bytes_of_text(expert_bytes, "--expert-bytes"))
        workloads = [synthetic_workload(arrivals, count, size_bytes, zipf, seed) for count in counts]
    else:
        workloads = [registered_workload(arrivals, service, config, zipf, seed)]
    records: list[dict[str, Any]] = []
    with progress() as shown:
        for workload in workloads:
            workload = _at(workload, comparison, rate, load, shown)
            records += _records(workload, comparison, policy or list(POLICIES), shown, with_devices=devices)
    if json != "-":
        _show(records)
    emit_json(records, json)
    if plot is not None:
        from coe.simulation.plots import draw

        draw(records, plot)
        console.print(f"drew {plot}", highlight=False, markup=False)


def _counts(text: str) -> list[int]:
    from coe.simulation.workload import MOST_EXPERTS

    parts = text.split(",")
    if len(parts) > 50 or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise typer.BadParameter(
            f"{text[:60]!r} is no number such as 150, or list such as 10,100", param_hint="--experts"
        )
    counts = [int(part) for part in parts]
    if not all(1 <= count <= MOST_EXPERTS for count in counts):
        raise typer.BadParameter(f"numbers from 1 to {MOST_EXPERTS:,}", param_hint="--experts")
    return counts


def _at(
    workload: Workload, comparison: Comparison, rate: float | None, load: float | None, shown: Progress
) -> Workload:
    """The workload at the rate of the command line."""
    if load is None:
        return workload if rate is None else workload.at_rate(rate)
    from coe.simulation.sizing import capacity_per_s

    task = shown.add("capacity")
    per_s = capacity_per_s(comparison, workload, lambda tried: task.update(note=f"trying {tried:.3g} requests/s"))
    task.remove()
    shown.line(f"capacity with {len(workload.residencies):,} experts: {per_s:.3g} requests per second")
    return workload.at_rate(load * per_s)


def _records(
    workload: Workload, comparison: Comparison, policies: Sequence[str], shown: Progress, *, with_devices: bool
) -> Iterator[dict[str, Any]]:
    """A JSON object for each policy."""
    from coe.simulation.sizing import devices_needed

    count = len(workload.residencies)
    span_s = workload.at_s[-1] - workload.at_s[0]
    facts: dict[str, Any] = {"experts": count, "rate_per_s": len(workload) / span_s if span_s > 0 else None}
    if with_devices:
        task = shown.add(f"devices for {count:,} experts")
        facts["devices"] = devices_needed(comparison, workload, lambda tried: task.update(note=f"trying {tried:,}"))
        task.remove()
    tasks = {name: shown.add(f"{name}, {count:,} experts", total=len(workload)) for name in policies}
    for row in comparison.rows(workload, policies, lambda name, done: tasks[name].update(completed=done)):
        tasks[row.policy].remove()
        yield row.document() | facts


def _show(records: Sequence[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    out = stdout_console()
    for count in dict.fromkeys(record["experts"] for record in records):
        table = Table(title=f"{count:,} experts", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("policy", no_wrap=True)
        for heading, _, _ in _COLUMNS:
            table.add_column(heading, justify="right")
        for record in records:
            if record["experts"] == count:
                table.add_row(record["policy"], *(format(record[name], form) for _, name, form in _COLUMNS))
        out.print(table)
    for count, needed in {record["experts"]: record["devices"] for record in records if "devices" in record}.items():
        enough = f"{needed:,} devices" if needed else f"more than {count:,} devices"
        out.print(f"{count:,} experts: {enough}; one expert on each takes {count:,}", highlight=False)
