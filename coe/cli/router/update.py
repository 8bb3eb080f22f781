"""`coe router update`: add outcomes, add or remove experts, without encoding earlier prompts again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coe.cli.flags import out_option
from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.registry_url import RegistryUrl
from coe.cli.router.options import Prices, encoder_of, table_of
from coe.cli.router.report import encoding_progress, warnings_on_console
from coe.cli.router.train import price_notes, registered_digests
from routers.kind_list import UPDATABLE

if TYPE_CHECKING:
    from routers.outcomes.table import OutcomeTable
    from routers.update import Updatable


def update(
    router: Annotated[
        Path,
        typer.Argument(metavar="ROUTER_DIR", help=f"Saved router: {', '.join(UPDATABLE)}."),
    ],
    out: Annotated[Path, out_option("Folder to write the router to; may be ROUTER_DIR.")],
    outcomes: Annotated[
        Path | None,
        typer.Option(
            "--outcomes",
            metavar="FILE",
            help="Table with new rows; with --add-expert, its scores on training queries.",
        ),
    ] = None,
    add_expert: Annotated[
        list[str] | None, typer.Option("--add-expert", metavar="NAME", help="Expert of --outcomes to add. Repeatable.")
    ] = None,
    remove_expert: Annotated[
        list[str] | None, typer.Option("--remove-expert", metavar="NAME", help="Expert to remove. Repeatable.")
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option("--experts", metavar="A,B", help="Use only these columns of --outcomes; by default all."),
    ] = None,
    prices: Prices = None,
    registry: RegistryUrl = None,
    json: JsonTarget = None,
) -> None:
    """Update a saved router with new rows or experts; only the prompts of new rows are encoded."""
    from routers.artifacts import load, save
    from routers.update import updatable

    if outcomes is None and not remove_expert:
        raise typer.BadParameter("give --outcomes, --remove-expert, or both: there is nothing to update")
    if add_expert and outcomes is None:
        raise typer.BadParameter("needs --outcomes with the expert's scores", param_hint="--add-expert")
    names = ",".join(add_expert) if add_expert else experts
    table = None if outcomes is None else table_of(outcomes, names, prices)
    with warnings_on_console(), encoding_progress() as on_progress:
        loaded = load(router, make_encoder=lambda name: encoder_of(name, on_progress))
        started = time.perf_counter()
        updated = _updated(updatable(loaded.router), table, bool(add_expert), remove_expert or [])
        seconds = time.perf_counter() - started
        digest = save(
            updated,
            out,
            table=updated.rows.reference(),
            encoder=updated.encoder,
            digests={**loaded.meta.experts, **registered_digests(registry, add_expert or [])},
            prices=price_notes(prices) or loaded.meta.prices,
        )
    console.print(
        f"updated a {updated.kind} router, now of {len(updated.rows):,} queries and {len(updated.experts)} experts, in "
        f"{seconds:.1f} s"
    )
    if loaded.meta.solved is not None:
        console.print(
            f"[yellow]note:[/] the cost weight {loaded.meta.cost_weight:.4g} was solved on the old outcomes and is not "
            "carried over: solve it again (`coe router train --save-cost` or `--budget-usd`), or set it in the policy"
        )
    if loaded.meta.policy is not None:
        console.print(
            f"[yellow]note:[/] {' and '.join(loaded.meta.policy)}, solved for a policy on the old outcomes, are not "
            "carried over: solve again (`coe router train --max-calls`)",
            highlight=False,
        )
    if json != "-":
        stdout_console().print(f"{out}  {digest}", highlight=False, soft_wrap=True)
    emit_json(
        {
            "router": str(out),
            "kind": updated.kind,
            "n_queries": len(updated.rows),
            "n_experts": len(updated.experts),
            "experts": list(updated.experts),
            "digest": digest,
            "seconds": seconds,
        },
        json,
    )


def _updated(router: Updatable, table: OutcomeTable | None, add: bool, remove: list[str]) -> Updatable:
    """Remove experts first, then add the table's experts or rows."""
    from routers.update import add_expert, add_rows, remove_expert

    for name in remove:
        router = remove_expert(router, name)
    if table is None:
        return router
    return add_expert(router, table) if add else add_rows(router, table)
