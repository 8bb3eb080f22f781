"""Compare ways to answer queries that need two experts: `python -m examples.zoo.two_skills`.

Each method answers the same held-out rows through the orchestrator and its compositions: one routed expert, a vote of
two, chains, an untrained aggregator, one trained on the experts' answers, and the trained composition `cache`, which
reads their key-value entries, with the two right experts given and with experts that a router recruits. For comparison:
the rival `direct`, trained on the same queries without experts, and a rule written by hand over the two answers. An
interrupted run resumes.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from coe.compose import Aggregate, Chain, Composition, ExpertCall, Latent, Single, Vote
from coe.config import load_config
from coe.hosting import open_host
from coe.orchestrator import AskExpert, Orchestrator
from coe.policy import Policy
from coe.routing import Routed
from coe.types import GenerateRequest
from examples.zoo.aggregator import CONFIG, call_all, memory, request
from examples.zoo.families import TWO_SKILLS, Row, Split, TwoSkills
from examples.zoo.outcomes import SHIPPED
from examples.zoo.plan import AGGREGATOR, DIRECT, SCORE_SEED
from examples.zoo.remembered import Remembered, dtype_of
from examples.zoo.scoring import grades
from examples.zoo.two_skills_report import Answered, Method, contrasts, summary, table
from routers.base import Query, RoutingDecision
from routers.decision import decide
from routers.encoders.build import CachedEncoder, build_encoder
from routers.factory import build
from routers.outcomes.table import OutcomeTable
from routers.selectors import Recruit, TopK

BASE: Final = "smollm2"
ROUTED, SKILLED, NEAREST = "category", "skill", "knn"
CACHE, NEAREST_CACHE = "cache", "knn-cache"
"""Policies, by the kind of their router; all learned from the zoo's outcomes, where a query takes one expert."""


Given = Callable[[TwoSkills], tuple[tuple[str, ...], Composition]]
"""The experts of a family that a method is given, and what it does with them."""

WAYS: Final[Mapping[str, str | Given]] = {
    "single: routed": ROUTED,
    "vote of the two": lambda pair: (pair.experts, Vote()),
    "chain: first, second": lambda pair: (pair.experts, Chain(experts=pair.experts)),
    "chain: second, first": lambda pair: (pair.experts, Chain(experts=pair.experts[::-1])),
    "aggregate: base": lambda pair: (pair.experts, Aggregate(BASE)),
    "aggregate: trained": lambda pair: (pair.experts, Aggregate(AGGREGATOR.name)),
    "aggregate: trained, knn recruits": NEAREST,
    "aggregate: trained, skill recruits": SKILLED,
    "cache: trained": lambda pair: (pair.experts, Latent(CACHE)),
    "cache: trained, knn recruits": NEAREST_CACHE,
    "trained without answers": lambda _: ((DIRECT.name,), Single()),
}
"""Methods by name: a policy, or experts that are given. "the two" and "first, second": of `TwoSkills.experts`."""
AGGREGATED: Final = "aggregate: trained"
RULE: Final = "rule by hand"
BETTER_OF_TWO: Final = "single: better of the two"


def policies(k: int) -> dict[str, Policy]:
    """One expert by the demo's kind of router, or `k` of them for the trained aggregator or composition."""
    outcomes, encoder = OutcomeTable.read(SHIPPED), CachedEncoder(build_encoder("minilm"))
    routers = {kind: build(kind, encoder, {}).fit(outcomes) for kind in (ROUTED, SKILLED, NEAREST)}
    together = Aggregate(AGGREGATOR.name)
    return {
        ROUTED: Policy(ROUTED, routers[ROUTED]),
        SKILLED: Policy(SKILLED, routers[SKILLED], together, select=Recruit(k)),
        NEAREST: Policy(NEAREST, routers[NEAREST], together, select=TopK(k)),
        NEAREST_CACHE: Policy(NEAREST_CACHE, routers[NEAREST], Latent(CACHE), select=TopK(k)),
    }


def recruits(rows: Mapping[str, Sequence[Row]], policy: Policy) -> dict[str, float]:
    """Number of rows in each family for which both experts are recruited."""
    shares = {}
    for family, asked in rows.items():
        estimate = policy.router.estimate([Query.of(row.prompt) for row in asked])
        decisions = decide(estimate, utility=policy.utility, select=policy.select)
        both = [set(TWO_SKILLS[family].experts) <= set(decision.experts) for decision in decisions]
        shares[family] = sum(both) / len(both)
    return shares


async def answer(name: str, pair: TwoSkills, rows: Sequence[Row], orchestrator: Orchestrator) -> list[Answered]:
    """A method's answers to rows of one family."""
    requests = [request(row, pair) for row in rows]
    way = WAYS[name]
    if isinstance(way, str):
        replies = orchestrator.answers(requests, model=f"coe/{way}")
    else:
        replies = [orchestrator.reply(asked, given(asked, *way(pair))) for asked in requests]
    texts = await asyncio.gather(*(reply.text() for reply in replies))
    found = []
    for reply, text, score in zip(replies, texts, grades(pair.family, rows, texts), strict=True):
        assert reply.answer is not None  # the chunks were read to their end
        usage = reply.answer.usage
        found.append(Answered(text, score, reply.decision.experts, usage.prompt_tokens, usage.completion_tokens))
    return found


def given(asked: GenerateRequest, experts: tuple[str, ...], composition: Composition) -> Routed:
    """A decision for the given experts, without a router."""
    shares = (1 / len(experts),) * len(experts)
    decision = RoutingDecision(experts, shares, (1.0,) * len(experts), confidence=1.0, reason="given")
    return Routed(Query(asked.messages), decision, None, None, composition)


async def references(pair: TwoSkills, rows: Sequence[Row], orchestrator: Orchestrator) -> dict[str, list[Answered]]:
    """References that need the right answer or a rule by hand: the better of the two experts, and the rule."""
    calls = [ExpertCall(f"{i}/{name}", name, request(row, pair)) for i, row in enumerate(rows) for name in pair.experts]
    said = await call_all(calls, orchestrator)
    first, second = ([said[f"{i}/{name}"] for i in range(len(rows))] for name in pair.experts)
    by_score = [grades(pair.family, rows, texts) for texts in (first, second)]
    better = [
        Answered(a if x >= y else b, max(x, y), pair.experts)
        for a, b, x, y in zip(first, second, *by_score, strict=True)
    ]
    composed = [_composed(pair, a, b) for a, b in zip(first, second, strict=True)]
    rule = [Answered(t, s, pair.experts) for t, s in zip(composed, grades(pair.family, rows, composed), strict=True)]
    return {BETTER_OF_TWO: better, RULE: rule}


def _composed(pair: TwoSkills, first: str, second: str) -> str:
    try:
        return pair.compose(first, second)
    except ValueError as error:
        return f"({error})"


async def seconds(name: str, rows: Mapping[str, Sequence[Row]], orchestrator: Orchestrator) -> float:
    """Median seconds of a query asked alone, with all experts resident."""
    times = []
    for family, asked in rows.items():
        for row in asked:
            began = time.perf_counter()
            await answer(name, TWO_SKILLS[family], [row], orchestrator)
            times.append(time.perf_counter() - began)
    return statistics.median(times)


async def measure(
    rows: Mapping[str, Sequence[Row]],
    names: Sequence[str],
    ways: Mapping[str, Policy],
    *,
    timed: int,
    report: Callable[[str], None],
) -> dict[str, Method]:
    """Run the named methods on rows of each family; the first `timed` rows again, one at a time, to measure seconds."""
    methods = {name: Method(name) for name in (BETTER_OF_TWO, *names, RULE)}
    config = load_config(CONFIG)
    async with open_host(config) as host:

        def over(ask: AskExpert) -> Orchestrator:
            return Orchestrator(host.snapshot, ways, ask=ask, default_policy=ROUTED)

        remembering = over(Remembered(host.ask, host.snapshot, dtype_of(config), memory()))
        for family, asked in rows.items():
            for name, answered in (await references(TWO_SKILLS[family], asked, remembering)).items():
                methods[name].by_family[family] = answered
        for name in names:
            for family, asked in rows.items():
                report(f"{name}: {family}")
                methods[name].by_family[family] = await answer(name, TWO_SKILLS[family], asked, remembering)
        for name in names if timed else ():
            report(f"{name}: seconds")
            first = {family: asked[:timed] for family, asked in rows.items()}
            methods[name].seconds = await seconds(name, first, over(host.ask))
    return methods


def main(
    split: Annotated[Split, typer.Option(help="Split of templates and words.")] = Split.TEST,
    n: Annotated[int, typer.Option("--rows", min=2, help="Rows per family.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the rows.")] = SCORE_SEED,
    k: Annotated[int, typer.Option(min=1, help="Experts to recruit.")] = 2,
    method: Annotated[list[str], typer.Option(help="Run only this method; repeatable.")] = [],  # noqa: B006
    timed: Annotated[int, typer.Option(min=0, help="Rows per family to time, one at a time.")] = 0,
    show: Annotated[int, typer.Option(min=0, help="Wrong answers to print per method and family.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write figures and answers as JSON.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure the methods, and print a markdown table."""
    import torch

    if unknown := [name for name in method if name not in WAYS]:
        raise typer.BadParameter(f"no method {', '.join(unknown)}; there are: {'; '.join(WAYS)}")
    torch.set_num_threads(threads)
    rows = {name: pair.family.rows(split, n, seed=seed) for name, pair in TWO_SKILLS.items()}
    ways = policies(k)
    methods = asyncio.run(
        measure(rows, method or [*WAYS], ways, timed=timed, report=lambda line: typer.echo(line, err=True))
    )
    both = {kind: recruits(rows, ways[kind]) for kind in (SKILLED, NEAREST)}
    typer.echo(f"{table(methods)}\n")
    for line in contrasts(methods, AGGREGATED):
        typer.echo(line)
    for kind, shares in both.items():
        parts = ", ".join(f"{family} {share:.0%}" for family, share in shares.items())
        typer.echo(f"{kind}: both experts among {k} recruited in {parts}")
    for found in methods.values() if show else ():
        typer.echo("\n".join([f"\n{found.name}", *found.wrong(rows, show)]))
    if json_file is not None:
        facts = {"split": split, "rows": n, "seed": seed, "k": k, "both_recruited": both}
        document = facts | {"methods": summary(methods, rows)}
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
