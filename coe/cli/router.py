"""`coe router train | cv | eval` and `coe route`: learn who answers what, measure it, ask it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.output import JsonTarget, console, emit_json, stdout_console
from coe.cli.registry import RegistryUrl
from coe.cli.router_report import (
    check_required,
    decision_document,
    encoding_progress,
    parse_required,
    print_explanation,
    print_reports,
    warnings_on_console,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.encoders import Encoder
    from routers.evaluate import Factory
    from routers.outcomes import OutcomeTable

app = typer.Typer(no_args_is_help=True)

Outcomes = Annotated[Path, typer.Option("--outcomes", help="Outcome table: .parquet, .jsonl or .csv.")]
Experts = Annotated[str | None, typer.Option("--experts", metavar="A,B,C", help="Only these experts.")]
Prices = Annotated[Path | None, typer.Option("--prices", help="JSON with USD per million tokens of each expert.")]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", help="Column that holds the categories; by default `domain`.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]
EncoderName = Annotated[str, typer.Option("--encoder", help="`minilm`, `hashing[:dim]`, or the folder of a model.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the router; may be repeated.")
]
Require = Annotated[
    list[str] | None,
    typer.Option("--require", metavar="FIGURE:LOW", help="Exit with 1 unless FIGURE >= LOW; may be repeated."),
]
Dial = Annotated[float, typer.Option("--dial", min=0, help="Quality (0 to 1) given up per USD.")]


@app.command()
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

    table = _table(outcomes, experts, prices)
    chosen = _settings([kind], settings or [], label_column, seed)[kind]
    with warnings_on_console(), encoding_progress() as on_progress:
        encodes = _encoder(encoder, on_progress) if reads_text(kind) else None
        started = time.perf_counter()
        router = build(kind, encodes, chosen).fit(table)
        seconds = time.perf_counter() - started
        digests = _registered_digests(registry, router.experts)
        digest = save(router, out, table=table, encoder=encodes, digests=digests, prices=_price_notes(prices))
        if encodes is not None:
            _tell_of_truncation(encodes, table.prompts)
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


@app.command()
def cv(
    outcomes: Outcomes,
    kind: Annotated[list[str], typer.Option("--kind", help="Router to cross-validate; may be repeated.")],
    fold_column: Annotated[
        str, typer.Option("--fold-column", help="Column of folds; where it is missing, --folds are drawn.")
    ] = "fold",
    folds: Annotated[int, typer.Option("--folds", min=2, help="How many folds to draw, stratified by domain.")] = 5,
    experts: Experts = None,
    prices: Prices = None,
    label_column: LabelColumn = None,
    seed: Seed = 0,
    encoder: EncoderName = "minilm",
    settings: Settings = None,
    dial: Dial = 0.0,
    require: Require = None,
    json: JsonTarget = None,
) -> None:
    """Cross-validate routers: train on all folds but one, score the one left out, pool them."""
    from routers.build import build, reads_text
    from routers.decide import Utility
    from routers.evaluate import cross_validate

    required = parse_required(require or [])
    chosen = _settings(kind, settings or [], label_column, seed)
    table = _table(outcomes, experts, prices)
    assigned = _folds(table, fold_column, folds, seed)
    with warnings_on_console(), encoding_progress() as on_progress:
        encodes = _encoder(encoder, on_progress) if any(map(reads_text, kind)) else None
        if encodes is not None:
            encodes.encode(table.prompts)  # all folds at once: one bar, and the cache serves every fold
            _tell_of_truncation(encodes, table.prompts)
        knn: dict[str, Factory] = {} if encodes is None else {"knn": partial(build, "knn", encodes)}
        reports = [
            cross_validate(
                partial(build, name, encodes, chosen[name]),
                table,
                assigned,
                baselines={} if name == "knn" else knn,
                utility=Utility(dial=dial),
                seed=seed,
            )
            for name in kind
        ]
    if json != "-":
        print_reports(reports, title=f"{outcomes.name}, {len(set(assigned.tolist()))} folds")
    emit_json([report.to_json() for report in reports], json)
    check_required(reports, required)


@app.command("eval")
def evaluate(
    router: Annotated[list[Path], typer.Argument(metavar="ROUTER_DIR...", help="Folders of saved routers.")],
    outcomes: Outcomes,
    experts: Experts = None,
    prices: Prices = None,
    train_outcomes: Annotated[
        Path | None, typer.Option("--train-outcomes", help="The training table: also shows a kNN trained on it.")
    ] = None,
    dial: Dial = 0.0,
    seed: Seed = 0,
    require: Require = None,
    json: JsonTarget = None,
) -> None:
    """Score saved routers on a table that they were not trained on."""
    from routers.artifacts import load
    from routers.build import build
    from routers.decide import Utility
    from routers.evaluate import evaluate
    from routers.outcomes import OutcomeTable

    required = parse_required(require or [])
    table = _table(outcomes, experts, prices)
    train_table = None if train_outcomes is None else OutcomeTable.read(train_outcomes)
    reports = []
    with warnings_on_console(), encoding_progress() as on_progress:
        for folder in router:
            loaded = load(folder, make_encoder=lambda name: _encoder(name, on_progress))
            encodes = getattr(loaded.router, "encoder", None)
            knn: dict[str, Factory] = {}
            if train_table is not None and encodes is not None and loaded.meta.kind != "knn":
                knn["knn"] = partial(build, "knn", encodes)
            report = evaluate(
                loaded.router,
                table,
                name=str(folder),
                reference=loaded.meta.reference,
                train_table=train_table,
                baselines=knn,
                experts=_names(experts),
                utility=Utility(dial=dial),
                seed=seed,
            )
            reports.append(report)
    if json != "-":
        print_reports(reports, title=outcomes.name)
    emit_json([report.to_json() for report in reports], json)
    check_required(reports, required)


def route(
    text: Annotated[str, typer.Argument(help="The query.")],
    router: Annotated[Path, typer.Option("--router", help="Folder of a saved router.")],
    explain: Annotated[bool, typer.Option("--explain", help="Show what the router thinks of every expert.")] = False,
    allowed: Annotated[str | None, typer.Option("--allowed", metavar="A,B", help="Only these may answer.")] = None,
    dial: Dial = 0.0,
    json: JsonTarget = None,
) -> None:
    """Say which expert a saved router gives a query to; no expert is loaded or asked."""
    from routers.artifacts import load
    from routers.base import Query
    from routers.decide import Utility, decide

    with warnings_on_console():
        loaded = load(router)
    estimate = loaded.router.estimate([Query.of(text)])
    (decision,) = decide(estimate, utility=Utility(dial=dial), allowed=_names(allowed), k=len(estimate.experts))
    encodes = getattr(loaded.router, "encoder", None)
    if encodes is not None:
        _tell_of_truncation(encodes, [text])
    if json != "-":
        stdout_console().print(decision.experts[0], highlight=False, markup=False)
        if explain:
            print_explanation(estimate, decision)
    emit_json(decision_document(estimate, decision), json)


def _table(path: Path, experts: str | None, prices: Path | None) -> OutcomeTable:
    from routers.outcomes import OutcomeTable
    from routers.prices import read_prices

    table = OutcomeTable.read(path)
    names = _names(experts)
    if names is not None:
        table = table.with_experts(names)
    return table if prices is None else table.with_prices(read_prices(prices))


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _settings(
    kinds: Sequence[str], given: Sequence[str], label_column: str | None, seed: int
) -> dict[str, dict[str, Any]]:
    """kind -> settings. A setting goes to the kinds that have it; where none has, all get it, and refuse it."""
    from routers.build import settings_of

    stated = dict(map(_setting, given))
    if label_column is not None:
        stated["label_column"] = label_column
    known = {kind: settings_of(kind) for kind in kinds}
    nowhere = {name for name in stated if not any(name in settings for settings in known.values())}
    return {
        kind: {
            **({"seed": seed} if "seed" in settings else {}),
            **{name: value for name, value in stated.items() if name in settings or name in nowhere},
        }
        for kind, settings in known.items()
    }


def _setting(text: str) -> tuple[str, Any]:
    import json

    name, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a bare word


def _encoder(name: str, on_progress: Any) -> Encoder:
    from routers.encoders import CachedEncoder, build_encoder

    return CachedEncoder(build_encoder(name), on_progress=on_progress)


def _folds(table: OutcomeTable, column: str, count: int, seed: int) -> NDArray[np.int64]:
    """The folds of a column, or drawn ones where the table has no column `fold`."""
    import numpy as np

    from routers.evaluate import stratified_folds

    if column == "fold" and table.folds is not None:
        return table.folds
    if column == "fold":
        console.print(f"the table has no folds: drawing {count}, stratified by domain, with seed {seed}")
        return stratified_folds(table.domains or ("",) * len(table), count, seed=seed)
    return np.unique(np.array(table.labels(column)), return_inverse=True)[1].astype(np.int64)


def _registered_digests(url: str | None, experts: Sequence[str]) -> dict[str, str | None]:
    """The digests of those experts that are registered; none where there is no registry."""
    from registry.files import coe_home
    from registry.store import Registry

    if url is None and not (coe_home() / "registry.db").exists():
        return {}
    with Registry(url) as store:
        registered = store.snapshot().experts
    return {name: registered[name].digest for name in experts if name in registered}


def _price_notes(path: Path | None) -> dict[str, Any] | None:
    from routers.prices import read_prices

    return None if path is None else {name: price.model_dump() for name, price in read_prices(path).items()}


def _tell_of_truncation(encoder: Encoder, texts: Sequence[str]) -> None:
    cut = int(encoder.truncated(texts).sum())
    if cut:
        console.print(
            f"[yellow]note:[/] {cut:,} of {len(texts):,} prompts are longer than the {encoder.max_tokens} tokens that "
            f"encoder {encoder.name} reads; the router does not see their end"
        )
