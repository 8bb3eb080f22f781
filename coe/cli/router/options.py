"""Options that the router commands share: dataclasses that turn flags into the objects that the flags describe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coe.cli.output import console

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.base import RoutingDecision
    from routers.encoders.build import CachedEncoder, Encoder
    from routers.evaluation.cost_weight import Target
    from routers.evaluation.recorded_routing import Choosing, Compose
    from routers.outcomes.table import OutcomeTable

Experts = Annotated[
    str | None, typer.Option("--experts", metavar="A,B", help="Use only these experts; by default all.")
]
Prices = Annotated[
    Path | None,
    typer.Option(
        "--prices",
        metavar="FILE",
        help="JSON file with USD per million tokens of each expert; replaces recorded costs.",
    ),
]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", metavar="NAME", help="Column with the categories; by default `domain`.")
]
CostWeight = Annotated[
    float | None,
    typer.Option(
        "--cost-weight",
        metavar="W",
        min=0,
        help="Quality (0 to 1) given up per USD; by default the weight solved in training, or 0.",
    ),
]
Encoders = Annotated[str | None, typer.Option("--encoders", metavar="A,B", help="With --kind auto: encoders to try.")]

FEW_ROWS = 20
"""Tables of fewer rows get a warning: what is trained or measured on them is mostly chance."""

SELECTORS_HELP = "best, top-k, recruit, dynamic,p=0.9 or cascade,tolerance=0.1"
"""Values of --select."""


@dataclass(frozen=True)
class TableOptions:
    """An outcome table: its file, its experts, its prices."""

    outcomes: Annotated[
        Path, typer.Option("--outcomes", metavar="FILE", help="Outcome table: .parquet, .jsonl or .csv.")
    ]
    experts: Experts = None
    prices: Prices = None

    def read(self) -> OutcomeTable:
        """The table with these experts only, at these prices."""
        return table_of(self.outcomes, self.experts, self.prices)


@dataclass(frozen=True)
class LearningOptions:
    """What a router kind learns with: its settings and its encoder."""

    label_column: LabelColumn = None
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            metavar="NAME",
            help="Text encoder: `minilm`, `hashing[:dim]`, or a model folder; by default `minilm`.",
        ),
    ] = None
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a setting of the router. Repeatable.")
    ] = None
    budget_minutes: Annotated[
        float | None,
        typer.Option("--budget-minutes", metavar="MINUTES", min=0, help="With --kind auto: time limit for candidates."),
    ] = None
    encoders: Encoders = None

    @property
    def first_encoder(self) -> str | None:
        """The encoder that every kind uses: --encoder, or the first of --encoders."""
        return self.encoder or next(iter(names_of(self.encoders) or ()), None)

    def settings_of(self, kinds: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
        """kind -> settings. A setting goes to the kinds that have it; if none has it, all get it and reject it."""
        others = names_of(self.encoders)
        flags: dict[str, Any] = {
            "label_column": self.label_column,
            "budget_minutes": self.budget_minutes,
            "encoders": [name for name in others if name != self.first_encoder] if others else others,
        }
        stated = dict(map(_setting, self.settings or [])) | {
            n: value for n, value in flags.items() if value is not None
        }
        return _settings_of_kinds(kinds, stated, seed)


@dataclass(frozen=True)
class FoldOptions:
    """How a table is split into folds."""

    fold_column: Annotated[
        str,
        typer.Option(
            "--fold-column",
            metavar="NAME",
            help="Column with the folds; a table without `fold` gets --folds random folds.",
        ),
    ] = "fold"
    folds: Annotated[
        int, typer.Option("--folds", metavar="N", min=2, help="Number of random folds, stratified by domain.")
    ] = 5

    def of(self, table: OutcomeTable, seed: int) -> NDArray[np.int64]:
        """(n,) the folds of the column, or drawn ones if the table has no column `fold`."""
        import numpy as np

        from routers.evaluation.cross_validation import stratified_folds

        if self.fold_column != "fold":
            return np.unique(np.array(table.labels(self.fold_column)), return_inverse=True)[1].astype(np.int64)
        if table.folds is not None:
            return table.folds
        console.print(f"the table has no folds: drawing {self.folds}, stratified by domain, with seed {seed}")
        return stratified_folds(table.domains or ("",) * len(table), self.folds, seed=seed)


@dataclass(frozen=True)
class TargetOptions:
    """What the cost weight is solved for."""

    budget_usd: Annotated[
        float | None,
        typer.Option(
            "--budget-usd",
            metavar="USD",
            help="Solve the cost weight for at most this mean cost per query.",
        ),
    ] = None
    save_cost: Annotated[
        bool,
        typer.Option(
            "--save-cost", help="Solve the cost weight for the lowest cost at the accuracy of the best single expert."
        ),
    ] = False
    margin: Annotated[
        float | None,
        typer.Option(
            "--margin",
            metavar="X",
            help="With --save-cost: standard errors above the best single expert; by default 1.",
        ),
    ] = None

    @property
    def target(self) -> Target | None:
        """The target, or `None`.

        Raises:
            typer.BadParameter: two targets, or a margin without --save-cost.
        """
        from routers.evaluation.cost_weight import MeetBudget, SaveCost

        if self.save_cost and self.budget_usd is not None:
            raise typer.BadParameter("give either --budget-usd or --save-cost", param_hint="--budget-usd")
        if self.margin is not None and not self.save_cost:
            raise typer.BadParameter("needs --save-cost", param_hint="--margin")
        if self.save_cost:
            return SaveCost() if self.margin is None else SaveCost(self.margin)
        return None if self.budget_usd is None else MeetBudget(self.budget_usd)


@dataclass(frozen=True)
class AnswerOptions:
    """How estimates become answers: the cost weight, which experts are asked, how their answers are combined."""

    cost_weight: CostWeight = None
    top_k: Annotated[int, typer.Option("--top-k", "-k", metavar="K", min=1, help="Most experts asked per query.")] = 1
    select: Annotated[
        str | None,
        typer.Option(
            "--select",
            metavar="NAME[,KEY=VALUE...]",
            help=f"Selector of the experts asked, at most --top-k: {SELECTORS_HELP}; by default top-k.",
        ),
    ] = None
    compose: Annotated[
        str | None,
        typer.Option(
            "--compose",
            metavar="NAME[,KEY=VALUE...]",
            help="How recorded answers are combined: vote, weighted-vote,options=4, cascade, single, or "
            "`module:Class`; by default one answer is taken as it is.",
        ),
    ] = None

    def choosing(self) -> Choosing:
        """The choice and the composition, at --cost-weight or 0.

        Raises:
            typer.BadParameter: several experts are asked, but nothing combines their answers.
            InvalidSettings, ConfigError: no such selector or composition, or unusable settings.
        """
        from routers.decision import Utility
        from routers.evaluation.recorded_routing import Choosing
        from routers.selectors import build_selector

        kind, settings = kind_of(self.select or "top-k", "--select")
        if self.compose is None and self.top_k > 1:
            raise typer.BadParameter("several answers need --compose to combine them", param_hint="--top-k")
        return Choosing(
            Utility(cost_weight=self.cost_weight or 0.0),
            build_selector({"kind": kind, **settings}, k=self.top_k),
            None if self.compose is None else self._replayed(self.compose),
            self.compose or "single",
        )

    @staticmethod
    def _replayed(text: str) -> Compose:
        """A composition, replayed from recorded answers."""
        from coe.compose import build_composition
        from coe.evaluation.recorded_answers import replay
        from routers.evaluation.recorded_routing import Composed

        composition = build_composition(*kind_of(text, "--compose"))

        def compose(table: OutcomeTable, decisions: Sequence[RoutingDecision]) -> Composed:
            found = replay(table, decisions, composition)
            return Composed(found.scores, found.costs_usd, found.calls.astype(float))

        return compose


def table_of(path: Path, experts: str | None, prices: Path | None) -> OutcomeTable:
    """The outcome table of a file, with these experts only, at these prices."""
    from routers.outcomes.prices import read_prices
    from routers.outcomes.table import OutcomeTable

    table = OutcomeTable.read(path)
    names = names_of(experts)
    if names is not None:
        table = table.with_experts(names)
    return table if prices is None else table.with_prices(read_prices(prices))


def warn_of_few_rows(table: OutcomeTable) -> None:
    """Print a warning where a table is too small to learn from or to measure on."""
    if len(table) < FEW_ROWS:
        console.print(
            f"[yellow]warning:[/] {len(table)} rows are too few to train or compare routers on: the result is mostly "
            f"chance. Use {FEW_ROWS} rows or more",
            highlight=False,
        )


def names_of(text: str | None) -> list[str] | None:
    """The names of a comma-separated list."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def encoder_of(name: str | None, on_progress: Callable[[int, int], None]) -> CachedEncoder:
    """The encoder of that name, or the default one; its embeddings are cached on disk."""
    from routers.encoders.build import DEFAULT_ENCODER, CachedEncoder, build_encoder

    return CachedEncoder(build_encoder(name or DEFAULT_ENCODER), on_progress=on_progress)


def tell_of_truncation(encoder: Encoder, texts: Collection[str]) -> None:
    """Print how many prompts are longer than the encoder reads."""
    cut = int(encoder.truncated(list(texts)).sum())
    if cut:
        console.print(
            f"[yellow]note:[/] {cut:,} of {len(texts):,} prompts are longer than the {encoder.max_tokens} tokens that "
            f"encoder {encoder.name} reads; the router ignores the rest of these prompts"
        )


def _settings_of_kinds(kinds: Sequence[str], stated: dict[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    from routers.factory import settings_of

    known = {kind: settings_of(kind) for kind in kinds}
    nowhere = {name for name in stated if not any(name in settings for settings in known.values())}
    return {
        kind: {
            **({"seed": seed} if "seed" in settings else {}),
            **{name: value for name, value in stated.items() if name in settings or name in nowhere},
        }
        for kind, settings in known.items()
    }


def kind_of(text: str, flag: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings of `NAME,KEY=VALUE,...`."""
    kind, *settings = (part.strip() for part in text.split(","))
    return kind, dict(_setting(setting, flag) for setting in settings)


def _setting(text: str, flag: str = "--set") -> tuple[str, Any]:
    import json

    name, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=flag)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a bare word
