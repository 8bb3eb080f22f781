"""`coe router train`: train a router on an outcome table and save it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from coe.cli.flags import Seed, out_option
from coe.cli.option_groups import with_option_groups
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.router.auto_report import auto_document, print_choice, with_progress_lines
from coe.cli.router.options import (
    FoldOptions,
    LearningOptions,
    TableOptions,
    TargetOptions,
    encoder_of,
    tell_of_truncation,
    warn_of_few_rows,
)
from coe.cli.router.report import encoding_progress, warnings_on_console
from coe.cli.router.signals import SignalOptions
from coe.cli.router.solve import solve_cost_weight, solve_policy
from routers.kind_list import KINDS


@with_option_groups
def train(
    tables: TableOptions,
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="KIND",
            help=f"{', '.join(KINDS)} (`docs/routers`), or `module:Class`.",
        ),
    ],
    out: Annotated[Path, out_option("Folder to write the router to.")],
    learning: LearningOptions,
    targets: TargetOptions,
    splits: FoldOptions,
    signals: SignalOptions,
    max_calls: Annotated[
        float | None,
        typer.Option(
            "--max-calls",
            metavar="X",
            min=1,
            help="Solve a dynamic selector that asks at most this mean number of experts per query.",
        ),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option("--top-k", "-k", metavar="K", min=1, help="With --max-calls: most experts asked per query."),
    ] = 5,
    compose: Annotated[
        str | None,
        typer.Option(
            "--compose",
            metavar="NAME[,KEY=VALUE...]",
            help="With --max-calls: `cascade` solves the confidence of that composition instead of the selector.",
        ),
    ] = None,
    seed: Seed = 0,
    json: JsonTarget = None,
) -> None:
    """Train a router on an outcome table and save it.

    With --budget-usd or --save-cost, also solve its cost weight; with --max-calls, also solve the selector or the
    composition of a policy that asks several experts. Both are solved on the folds of the table, out of fold; the
    cost-quality curve found there is kept in the folder, as curve.json.
    """
    from routers.artifacts import save
    from routers.evaluation.cost_weight import out_of_fold
    from routers.evaluation.saved_curve import save_curve, saved_curve
    from routers.factory import build, reads_text

    target, table = targets.target, tables.read()
    warn_of_few_rows(table)
    chosen = learning.settings_of([kind], seed)[kind]
    with warnings_on_console(), encoding_progress() as on_progress:
        encoder = encoder_of(learning.first_encoder, on_progress) if reads_text(kind) else None
        started = time.perf_counter()
        make = with_progress_lines(partial(build, kind, encoder, chosen))
        table = signals.add_to(table, make().requires, on_progress)
        solved = policy = routing = None
        if target is not None or max_calls is not None:
            routing = out_of_fold(make, table, splits.of(table, seed))
            solved = None if target is None else solve_cost_weight(routing, table, target)
            if max_calls is not None:
                cost_weight = 0.0 if solved is None else solved["cost_weight"]
                policy = solve_policy(routing, table, max_calls, k=top_k, compose=compose, cost_weight=cost_weight)
        router = make().fit(table)
        seconds = time.perf_counter() - started
        digests = registered_digests(signals.registry, router.experts)
        _warn_of_unregistered(signals.registry, router.experts, digests)
        notes = price_notes(tables.prices)
        digest = save(
            router, out, table=table, encoder=encoder, digests=digests, prices=notes, solved=solved, policy=policy
        )
        if routing is not None and (curve := routing.sweep(table)) is not None:
            found = saved_curve(
                curve, table, router=digest, measured="out of fold", name=tables.outcomes.name, seed=seed
            )
            save_curve(found, out)
        if encoder is not None:
            tell_of_truncation(encoder, table.prompts)
    console.print(f"trained {kind} on {len(table):,} queries of {len(router.experts)} experts in {seconds:.1f} s")
    if json != "-":
        print_choice(router)
        stdout_console().print(f"{out}  {digest}", highlight=False, soft_wrap=True)
    emit_json(
        {
            "router": str(out),
            "kind": kind,
            "n_queries": len(table),
            "n_experts": len(router.experts),
            "experts": list(router.experts),
            "digest": digest,
            "seconds": seconds,
            "solved": solved,
            "policy": policy,
            **auto_document(router),
            "unregistered": [name for name in router.experts if name not in digests],
        },
        json,
    )


def _warn_of_unregistered(url: str | None, experts: Sequence[str], digests: Mapping[str, str | None]) -> None:
    """Warn of experts that are not in the registry, if there is one: they cannot be served."""
    unknown = [name for name in experts if name not in digests]
    if unknown and (url is not None or digests):
        console.print(
            f"[yellow]warning:[/] not registered: {escape(', '.join(unknown))}. To serve this router, name them "
            "in an `experts` file of the configuration or register them (`coe registry apply`), or train without them "
            "(`--experts`)",
            highlight=False,
        )


def registered_digests(url: str | None, experts: Sequence[str]) -> dict[str, str | None]:
    """expert -> digest, of the experts that are registered; empty without a registry."""
    from registry.storage import coe_home
    from registry.store import Registry

    if url is None and not (coe_home() / "registry.db").exists():
        return {}
    with Registry(url) as store:
        registered = store.snapshot().experts
    return {name: registered[name].digest for name in experts if name in registered}


def price_notes(path: Path | None) -> dict[str, Any] | None:
    """The prices of a file as an artifact keeps them."""
    from routers.outcomes.prices import read_prices

    return None if path is None else {name: price.model_dump() for name, price in read_prices(path).items()}
