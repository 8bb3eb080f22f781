"""Options of `coe batch` and `coe plan` for a budget that all rows share, and how its assignment is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from coe.batch.budget import Budget


@dataclass(frozen=True)
class BudgetOptions:
    """A budget for the whole batch."""

    budget_usd: Annotated[
        float | None,
        typer.Option(
            "--budget-usd",
            metavar="USD",
            min=0.0,
            help="USD for all rows together. Their experts are chosen jointly, for the highest predicted quality.",
        ),
    ] = None
    capacity: Annotated[
        list[str] | None,
        typer.Option(
            "--capacity", metavar="EXPERT=ROWS", help="With --budget-usd: most rows of an expert; repeatable."
        ),
    ] = None
    load_weight: Annotated[
        float | None,
        typer.Option(
            "--load-weight",
            metavar="W",
            min=0.0,
            help="With --budget-usd: predicted right answers that a GiB of loaded weights must be worth; by default 0.",
        ),
    ] = None

    def budget(self, mean_tokens: Mapping[str, float]) -> Budget | None:
        """The budget; None without --budget-usd.

        Raises:
            typer.BadParameter: an option that needs --budget-usd, or a wrong capacity.
        """
        from coe.batch.budget import Budget

        if self.budget_usd is None:
            for option, value in (("--capacity", self.capacity), ("--load-weight", self.load_weight)):
                if value:
                    raise typer.BadParameter("needs --budget-usd", param_hint=option)
            return None
        capacity = dict(_capacity(text) for text in self.capacity or ())
        return Budget(self.budget_usd, capacity, self.load_weight or 0.0, mean_tokens)


def _capacity(text: str) -> tuple[str, int]:
    name, _, rows = text.rpartition("=")
    if not name or not rows.isascii() or not rows.isdigit() or len(rows) > 12:
        raise typer.BadParameter(f"{text[:60]!r} is not EXPERT=ROWS, such as small=5000", param_hint="--capacity")
    return name, int(rows)


def assignment_lines(joint: Mapping[str, Any]) -> Iterator[str]:
    """What the joint assignment is worth, beside each row on its own."""
    own, rows, load_cost = joint["own"], max(1, joint["rows"]), joint["load_cost"]
    worth = f" that count {load_cost:,.1f} right answers" if load_cost else ""
    net = f", {joint['quality'] - load_cost:,.1f} less the cost of loads" if load_cost else ""
    yield (
        f"Assigned jointly within {joint['budget_usd']:g} USD ({joint['method']}): predicted price "
        f"{joint['price_usd']:.4g} USD, {joint['quality']:,.1f} right answers ({joint['quality'] / rows:.1%} of "
        f"{joint['rows']:,} rows), {_loads(joint['loads'])}{worth}{net}. No assignment reaches more than "
        f"{joint['upper_bound']:,.1f}{' less that cost' if load_cost else ''}: the gap is {joint['gap']:.2g} right "
        "answers."
    )
    yield (
        f"Each row on its own, by the weights of its policy: {own['price_usd']:.4g} USD, {own['quality']:,.1f} right "
        f"answers, {_loads(own['loads'])}."
    )
    if joint["quality_per_usd"]:
        yield (
            f"The next USD buys {joint['quality_per_usd']:,.4g} right answers: as `cost_weight` of a policy this value "
            "spends the same without a budget."
        )
    else:
        yield "The budget does not bind: another USD buys nothing."
    for expert, gain in joint["quality_per_row_of_capacity"].items():
        yield f"One more row of capacity of {expert} buys {gain:.3g} right answers."
    if joint["priced_by_limit"]:
        names = ", ".join(joint["priced_by_limit"])
        yield (
            f"Priced at the most tokens that the requests allow, since the length of their answers is unknown: {names} "
            "(--like, or coe profile)."
        )


def points_table(joint: Mapping[str, Any]) -> Any:
    """What other budgets buy."""
    from rich.table import Table

    table = Table("budget, USD", title="What budgets buy")
    for column in ("price, USD", "right answers", "of the rows", "the next USD buys"):
        table.add_column(column, justify="right")
    for point in joint["points"]:
        table.add_row(
            f"{point['budget_usd']:.4g}",
            f"{point['price_usd']:.4g}",
            f"{point['quality']:,.1f}",
            f"{point['quality'] / max(1, joint['rows']):.1%}",
            f"{point['quality_per_usd']:,.4g}",
        )
    return table


def _loads(count: int) -> str:
    return f"{count:,} load{'s' * (count != 1)}"
