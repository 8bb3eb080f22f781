"""Output of the recruiting explanation of a skill router: the skills of a query, and how each expert fits them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

if TYPE_CHECKING:
    from rich.console import Console

    from routers.base import RoutingDecision
    from routers.kinds.skill.recruiting import Explanation, QuerySkill, Standing

MOST_SKILLS = 5
"""The most skills in the table, those of the largest share; the JSON has all."""


def print_recruiting(out: Console, recruiting: Explanation, decision: RoutingDecision) -> None:
    """Print skills with their shares and matches, a table of experts x skills, and a reason per recruited expert."""
    for skill in recruiting.skills:
        out.print(f"{'skill':>19}: {skill.name} {skill.share:.0%}, {_found(skill)}", markup=False, highlight=False)
    if recruiting.unknown:
        words = ", ".join(recruiting.unknown)
        out.print(f"{'unknown':>19}: {words} (no similar skill)", markup=False, highlight=False)
    out.print(_table(recruiting, decision))
    for name in dict.fromkeys(decision.experts):
        standing = next(one for one in recruiting.experts if one.expert == name)
        out.print(f"{name}: {_why(standing, recruiting, decision.experts.count(name))}", markup=False, highlight=False)


def _found(skill: QuerySkill) -> str:
    if skill.found == "exact":
        return "named"
    if skill.found == "alias":
        return f"named {skill.word!r}, a synonym"
    if skill.found == "nearest":
        return f"named {skill.word!r}, the nearest skill, cosine {skill.cosine:.2f}"
    return "from similar training queries"


def _table(recruiting: Explanation, decision: RoutingDecision) -> object:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("expert", overflow="fold")
    for skill in recruiting.skills[:MOST_SKILLS]:
        table.add_column(escape(skill.name), justify="right", overflow="fold")
    for name in ("S", "gamma", "weight", "recruited"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in recruiting.experts:
        times = decision.experts.count(one.expert)
        recruited = "" if not times else "yes" if times == 1 else f"{times} times"
        table.add_row(
            escape(one.expert),
            *(f"{value:+.1f}" for value in one.profile[:MOST_SKILLS]),
            f"{one.suitability:+.2f}",
            f"{one.competency:.3f}",
            f"{one.weight:.3f}",
            "trimmed" if one.trimmed else recruited,
            style="bold" if times else "",
        )
    return table


def _why(standing: Standing, recruiting: Explanation, times: int) -> str:
    """One sentence: its weight, where that comes from, and its good skills."""
    drawn = "" if times == 1 else f", drawn {times} times"
    weight = f"weight {standing.weight:.3f}{drawn}"
    if not recruiting.skills:
        return f"{weight}; no known skill, so by competency {standing.competency:.3f}"
    pairs = zip(recruiting.skills, standing.profile, strict=True)
    good = [f"{skill.name} {value:+.1f}" for skill, value in pairs if value > 0][:MOST_SKILLS]
    if standing.suitability > 0:
        return (
            f"{weight}, from S {standing.suitability:+.2f} and gamma {standing.competency:.3f}; good at "
            + ", ".join(good)
        )
    if all(one.suitability <= 0 for one in recruiting.experts):
        return f"{weight}; no expert was right more often than wrong here, S {standing.suitability:+.2f}"
    return f"{weight}; S {standing.suitability:+.2f}: in reserve, since fewer experts are suitable than are asked"
