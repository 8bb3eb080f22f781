"""`coe router train`: learn from an outcome table who answers what, and save it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.registry import RegistryUrl
from coe.cli.router.auto_report import auto_document, print_choice, telling
from coe.cli.router.options import (
    BudgetMinutes,
    BudgetUsd,
    EncoderName,
    Encoders,
    Experts,
    FoldColumn,
    Folds,
    LabelColumn,
    Margin,
    Outcomes,
    Prices,
    SaveCostFlag,
    Seed,
    Settings,
    encoder_of,
    first_and_further,
    folds_of,
    settings_of_kinds,
    table_of,
    target_of,
    tell_of_truncation,
)
from coe.cli.router.report import encoding_progress, warnings_on_console
from coe.cli.router.signals import SignalConfig, with_signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.evaluation.cost_weight import Factory, Target
    from routers.outcomes.table import OutcomeTable


def train(
    outcomes: Outcomes,
    kind: Annotated[str, typer.Option("--kind", help="auto, quality, category, cluster, knn ...: see `docs/routers`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the router to.")],
    experts: Experts = None,
    prices: Prices = None,
    label_column: LabelColumn = None,
    seed: Seed = 0,
    encoder: EncoderName = None,
    settings: Settings = None,
    budget_usd: BudgetUsd = None,
    save_cost: SaveCostFlag = False,
    margin: Margin = None,
    fold_column: FoldColumn = "fold",
    folds: Folds = 5,
    budget_minutes: BudgetMinutes = None,
    encoders: Encoders = None,
    config: SignalConfig = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Train a router on an outcome table and save it; with a target, also solve its cost weight on the folds."""
    from routers.artifacts import save
    from routers.factory import build, reads_text

    target = target_of(budget_usd, save_cost, margin)
    table = table_of(outcomes, experts, prices)
    encoder, further = first_and_further(encoder, encoders)
    flags = {"label_column": label_column, "budget_minutes": budget_minutes, "encoders": further}
    chosen = settings_of_kinds([kind], settings or [], seed, **flags)[kind]
    with warnings_on_console(), encoding_progress() as on_progress:
        encodes = encoder_of(encoder, on_progress) if reads_text(kind) else None
        started = time.perf_counter()
        make = telling(partial(build, kind, encodes, chosen))
        table = with_signals(table, make().requires, on_progress, config=config, url=registry)
        solved = None
        if target is not None:
            solved = _solved(make, table, folds_of(table, fold_column, folds, seed), target)
        router = make().fit(table)
        seconds = time.perf_counter() - started
        digests = registered_digests(registry, router.experts)
        _tell_of_strangers(registry, router.experts, digests)
        notes = price_notes(prices)
        digest = save(router, out, table=table, encoder=encodes, digests=digests, prices=notes, solved=solved)
        if encodes is not None:
            tell_of_truncation(encodes, table.prompts)
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
            **auto_document(router),
            "unregistered": [name for name in router.experts if name not in digests],
        },
        json,
    )


def _solved(make: Factory, table: OutcomeTable, folds: NDArray[np.int64], target: Target) -> dict[str, Any]:
    """The cost weight for a target, from routers that had not seen the rows that they are judged by."""
    from routers.evaluation.cost_weight import MeetBudget, out_of_fold, solve_on

    found = solve_on(out_of_fold(make, table, folds), table, target)
    saved = 1 - found.mean_cost / found.best_single_cost if found.best_single_cost else 0.0
    console.print(
        f"cost weight {found.cost_weight:.4g}: out of fold {100 * found.accuracy:.2f}% at {1e3 * found.mean_cost:.4f} "
        f"USD per 1k queries, {100 * saved:.1f}% less than the best single expert ({100 * found.best_single:.2f}%)",
        highlight=False,
    )
    if not found.met:
        missed = "this budget" if isinstance(target, MeetBudget) else "the accuracy of the best single expert"
        console.print(
            f"[yellow]warning:[/] no cost weight reaches {missed} on the training folds; this one comes nearest"
        )
    return found.to_json(target)


def _tell_of_strangers(url: str | None, experts: Sequence[str], digests: Mapping[str, str | None]) -> None:
    """Warn of experts that a registry, where there is one, does not know: nothing could serve them."""
    strangers = [name for name in experts if name not in digests]
    if strangers and (url is not None or digests):
        console.print(
            f"[yellow]warning:[/] not registered: {escape(', '.join(strangers))}; register them before this router is "
            "served (`coe registry apply`), or train it without them (`--experts`)",
            highlight=False,
        )


def registered_digests(url: str | None, experts: Sequence[str]) -> dict[str, str | None]:
    """The digests of those experts that are registered; none where there is no registry."""
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
