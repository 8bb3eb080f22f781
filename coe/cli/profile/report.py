"""Profiles and trials of aggregators for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coe.cli.expert_profile import plain_table
from coe.cli.output import console, stdout_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from coe.evaluation.aggregators import AggregatorScore, BestAggregators
    from registry.profiles import ProfileRow


def print_profiles(rows: Sequence[ProfileRow], *, kept: bool) -> None:
    """One line per expert: number of questions, mean score, best and worst skill."""
    from rich.markup import escape

    from registry.profiles import Profiles
    from registry.strengths import strengths

    profiles = Profiles.of_rows(rows)
    table = plain_table("expert", "counts", "mean", "strongest", "weakest")
    for expert in profiles.experts:
        total, skills = profiles.total(expert), strengths(profiles, expert)
        assert total is not None  # it is one of those measured
        best, worst = skills[0], skills[-1]
        weakest = "" if best is worst else f"{escape(worst.skill)} {worst.accuracy:.1%}"
        strongest = f"{escape(best.skill)} {best.accuracy:.1%}"
        table.add_row(expert, f"{total.n:,}", f"{total.accuracy:.1%}", strongest, weakest)
    stdout_console().print(table)
    sources = ", ".join(sorted({row.source for row in rows}))
    text = "`coe registry show NAME` shows more" if kept else "not kept: the registry is in memory"
    console.print(f"read from {sources}; {text}", highlight=False, markup=False, soft_wrap=True)


def print_aggregators(results: Sequence[AggregatorScore], best: BestAggregators, out: Console) -> None:
    """How every expert aggregated, who did best on each label, and what a policy says to use them."""
    import yaml

    from coe.evaluation.aggregators import CHANCE

    table = plain_table("aggregator", "accuracy", "95%", "n", "USD / 1k", "tokens", "failed")
    for one in results:
        if one.label is None:
            table.add_row(
                f"[bold]{one.expert}[/]" if one.expert == best.overall.expert else one.expert,
                f"{one.accuracy:.1%}", f"{one.low:.1%} - {one.high:.1%}", str(one.n),
                "-" if one.mean_cost_usd is None else f"{1e3 * one.mean_cost_usd:.4f}",
                f"{one.mean_tokens:.1f}", str(one.failures),
            )  # fmt: skip
    out.print(table)
    out.print(f"taking one of the answers at random: {CHANCE:.1%}", highlight=False)
    if len(best.by_label) > 1:
        out.print(_label_table(best))
    if not best.beats_chance:
        console.print("[yellow]no expert is significantly better than that: a vote needs no aggregator[/]")
    text = yaml.safe_dump({"composition": best.composition()}, default_flow_style=None, sort_keys=False, width=110)
    out.print(f"in a policy of the configuration:\n{text}", highlight=False, markup=False, soft_wrap=True, end="")


def _label_table(best: BestAggregators) -> Table:
    from rich.markup import escape

    table = plain_table("label", "aggregator", "accuracy", "95%", "n")
    for label, one in best.by_label.items():
        table.add_row(escape(label), one.expert, f"{one.accuracy:.1%}", f"{one.low:.1%} - {one.high:.1%}", str(one.n))
    return table
