"""What the router commands share: their flags, and how a table, settings and an encoder are read from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.output import console

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.base import RoutingDecision
    from routers.encoders.build import Encoder
    from routers.evaluation.cost_weight import Target
    from routers.evaluation.recorded_routing import Compose as ComposeRecorded
    from routers.outcomes.table import OutcomeTable
    from routers.selectors import Selector

Outcomes = Annotated[Path, typer.Option("--outcomes", help="Outcome table: .parquet, .jsonl or .csv.")]
Experts = Annotated[str | None, typer.Option("--experts", metavar="A,B,C", help="Only these experts.")]
Prices = Annotated[Path | None, typer.Option("--prices", help="JSON with USD per million tokens of each expert.")]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", help="Column that holds the categories; by default `domain`.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]
EncoderName = Annotated[
    str | None, typer.Option("--encoder", help="`minilm` (the default), `hashing[:dim]`, or the folder of a model.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the router; may be repeated.")
]
Require = Annotated[
    list[str] | None,
    typer.Option("--require", metavar="FIGURE:LOW", help="Exit with 1 unless FIGURE >= LOW; may be repeated."),
]
CostWeight = Annotated[
    float | None,
    typer.Option(
        "--cost-weight", min=0, help="Quality (0 to 1) given up per USD; by default what training solved, or 0."
    ),
]
BudgetUsd = Annotated[
    float | None,
    typer.Option(
        "--budget-usd", metavar="USD", help="Solve the cost weight for this mean cost a query, on training folds."
    ),
]
SaveCostFlag = Annotated[
    bool,
    typer.Option(
        "--save-cost", help="Solve the cost weight for the lowest cost at the accuracy of the best single expert."
    ),
]
Margin = Annotated[
    float | None,
    typer.Option("--margin", help="With --save-cost: standard errors above the best single expert; by default 1."),
]
FoldColumn = Annotated[
    str, typer.Option("--fold-column", help="Column of folds; where it is missing, --folds are drawn.")
]
Folds = Annotated[int, typer.Option("--folds", min=2, help="How many folds to draw, stratified by domain.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="Most experts to ask for an answer.")]
Compose = Annotated[
    str | None,
    typer.Option(
        "--compose",
        metavar="NAME[,KEY=VALUE...]",
        help="What is made of their recorded answers: vote, weighted-vote,options=4, cascade, single.",
    ),
]
Select = Annotated[
    str | None,
    typer.Option(
        "--select",
        metavar="NAME[,KEY=VALUE...]",
        help="Who is asked: top-k, recruit, dynamic,p=0.9 or cascade,tolerance=0.1, with --top-k as most.",
    ),
]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="OUT.png", help="Draw curves, domains and calibration to this file.")
]
WithPicks = Annotated[
    bool, typer.Option("--with-picks", help="In the JSON, also the expert of every query, for `coe router compare`.")
]
BudgetMinutes = Annotated[
    float | None, typer.Option("--budget-minutes", min=0, help="With --kind auto: how long it may try candidates.")
]
Encoders = Annotated[str | None, typer.Option("--encoders", metavar="A,B", help="With --kind auto: encoders to try.")]


def table_of(path: Path, experts: str | None, prices: Path | None) -> OutcomeTable:
    """The outcome table of a file: these experts only, at these prices."""
    from routers.outcomes.prices import read_prices
    from routers.outcomes.table import OutcomeTable

    table = OutcomeTable.read(path)
    names = names_of(experts)
    if names is not None:
        table = table.with_experts(names)
    return table if prices is None else table.with_prices(read_prices(prices))


def names_of(text: str | None) -> list[str] | None:
    """The names in a list that is separated by commas."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def first_and_further(encoder: str | None, encoders: str | None) -> tuple[str | None, list[str] | None]:
    """The encoder that is used first, and the further ones that `auto` tries, of --encoder and --encoders."""
    names = names_of(encoders)
    if not names:
        return encoder, names
    first = encoder or names[0]
    return first, [name for name in names if name != first]


def settings_of_kinds(kinds: Sequence[str], given: Sequence[str], seed: int, **flags: Any) -> dict[str, dict[str, Any]]:
    """kind -> settings. A setting goes to the kinds that have it; where none has, all get it, and refuse it.

    Args:
        given: `KEY=VALUE` each.
        flags: settings that have a flag of their own; `None` where it was not given.
    """
    from routers.factory import settings_of

    stated = dict(map(_setting, given)) | {name: value for name, value in flags.items() if value is not None}
    known = {kind: settings_of(kind) for kind in kinds}
    nowhere = {name for name in stated if not any(name in settings for settings in known.values())}
    return {
        kind: {
            **({"seed": seed} if "seed" in settings else {}),
            **{name: value for name, value in stated.items() if name in settings or name in nowhere},
        }
        for kind, settings in known.items()
    }


def _setting(text: str, flag: str = "--set") -> tuple[str, Any]:
    import json

    name, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=flag)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a bare word


def target_of(budget_usd: float | None, save_cost: bool, margin: float | None) -> Target | None:
    """What the cost weight is solved for, if anything.

    Raises:
        typer.BadParameter: two targets at once, or a margin of none.
    """
    from routers.evaluation.cost_weight import MeetBudget, SaveCost

    if save_cost and budget_usd is not None:
        raise typer.BadParameter("give either --budget-usd or --save-cost", param_hint="--budget-usd")
    if margin is not None and not save_cost:
        raise typer.BadParameter("it needs --save-cost", param_hint="--margin")
    if save_cost:
        return SaveCost() if margin is None else SaveCost(margin)
    return None if budget_usd is None else MeetBudget(budget_usd)


def selector_of(select: str | None, top_k: int) -> Selector:
    """Who is asked."""
    from routers.selectors import build_selector

    kind, settings = _kind_of(select or "top-k", "--select")
    return build_selector({"kind": kind, **settings}, k=top_k)


def _kind_of(text: str, flag: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings of `NAME,KEY=VALUE,...`."""
    kind, *settings = (part.strip() for part in text.split(","))
    return kind, dict(_setting(setting, flag) for setting in settings)


def compose_of(name: str | None, top_k: int) -> ComposeRecorded | None:
    """A composition that is replayed from a table's recorded answers; `None` where one expert answers.

    Raises:
        typer.BadParameter: several experts are to be asked, and nothing is made of their answers.
    """
    if name is None:
        if top_k > 1:
            raise typer.BadParameter("say with --compose what is made of several answers", param_hint="--top-k")
        return None
    from coe.compose import build_composition
    from coe.evaluation.recorded_answers import replay
    from routers.evaluation.recorded_routing import Composed

    kind, settings = _kind_of(name, "--compose")
    composition = build_composition(kind, settings)

    def compose(table: OutcomeTable, decisions: Sequence[RoutingDecision]) -> Composed:
        replayed = replay(table, decisions, composition)
        return Composed(replayed.scores, replayed.costs_usd, replayed.calls.astype(float))

    return compose


def folds_of(table: OutcomeTable, column: str, count: int, seed: int) -> NDArray[np.int64]:
    """The folds of a column, or drawn ones where the table has no column `fold`."""
    import numpy as np

    from routers.evaluation.cross_validation import stratified_folds

    if column == "fold" and table.folds is not None:
        return table.folds
    if column == "fold":
        console.print(f"the table has no folds: drawing {count}, stratified by domain, with seed {seed}")
        return stratified_folds(table.domains or ("",) * len(table), count, seed=seed)
    return np.unique(np.array(table.labels(column)), return_inverse=True)[1].astype(np.int64)


def encoder_of(name: str | None, on_progress: Any) -> Encoder:
    """The encoder of that name, or the default one, its vectors kept on disk."""
    from routers.encoders.build import DEFAULT_ENCODER, CachedEncoder, build_encoder

    return CachedEncoder(build_encoder(name or DEFAULT_ENCODER), on_progress=on_progress)


def tell_of_truncation(encoder: Encoder, texts: Sequence[str]) -> None:
    """Say on the console how many prompts the encoder does not read to their end."""
    cut = int(encoder.truncated(texts).sum())
    if cut:
        console.print(
            f"[yellow]note:[/] {cut:,} of {len(texts):,} prompts are longer than the {encoder.max_tokens} tokens that "
            f"encoder {encoder.name} reads; the router does not see their end"
        )
