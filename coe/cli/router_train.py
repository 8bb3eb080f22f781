"""`coe router train`: learn from an outcome table who answers what, and save it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.registry import RegistryUrl
from coe.cli.router_options import (
    EncoderName,
    Experts,
    LabelColumn,
    Outcomes,
    Prices,
    Seed,
    Settings,
    encoder_of,
    settings_of_kinds,
    table_of,
    tell_of_truncation,
)
from coe.cli.router_report import encoding_progress, warnings_on_console


def train(
    outcomes: Outcomes,
    kind: Annotated[str, typer.Option("--kind", help="category, knn, fixed, random or best-single.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write the router to.")],
    experts: Experts = None,
    prices: Prices = None,
    label_column: LabelColumn = None,
    seed: Seed = 0,
    encoder: EncoderName = "minilm",
    settings: Settings = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Train a router on an outcome table and save it."""
    from routers.artifacts import save
    from routers.build import build, reads_text

    table = table_of(outcomes, experts, prices)
    chosen = settings_of_kinds([kind], settings or [], label_column, seed)[kind]
    with warnings_on_console(), encoding_progress() as on_progress:
        encodes = encoder_of(encoder, on_progress) if reads_text(kind) else None
        started = time.perf_counter()
        router = build(kind, encodes, chosen).fit(table)
        seconds = time.perf_counter() - started
        digests = registered_digests(registry, router.experts)
        digest = save(router, out, table=table, encoder=encodes, digests=digests, prices=price_notes(prices))
        if encodes is not None:
            tell_of_truncation(encodes, table.prompts)
    console.print(
        f"trained a {kind} router on {len(table):,} queries of {len(router.experts)} experts in {seconds:.1f} s"
    )
    if json != "-":
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
        },
        json,
    )


def registered_digests(url: str | None, experts: Sequence[str]) -> dict[str, str | None]:
    """The digests of those experts that are registered; none where there is no registry."""
    from registry.files import coe_home
    from registry.store import Registry

    if url is None and not (coe_home() / "registry.db").exists():
        return {}
    with Registry(url) as store:
        registered = store.snapshot().experts
    return {name: registered[name].digest for name in experts if name in registered}


def price_notes(path: Path | None) -> dict[str, Any] | None:
    """The prices of a file as an artifact keeps them."""
    from routers.prices import read_prices

    return None if path is None else {name: price.model_dump() for name, price in read_prices(path).items()}
