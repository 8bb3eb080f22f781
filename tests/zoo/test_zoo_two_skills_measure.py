"""The methods on two-skill queries with experts that answer as expected: which calls are made, and what is counted."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from coe.compose.synthesis import synthesis
from coe.orchestrator import Orchestrator
from coe.policy import Always, Policy
from coe.types import Chunk, GenerateRequest, Usage
from examples.zoo.aggregator import request
from examples.zoo.families import PARTS, TWO_SKILLS, Row, Split, TwoSkills
from examples.zoo.two_skills import BETTER_OF_TWO, ROUTED, RULE, WAYS, answer, policies, recruits, references
from examples.zoo.two_skills_report import Answered, Method, contrasts, summary, table
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.selectors import TopK

NAMES = ("fields", "dates", "units", "sentiment", "intent", "smollm2", "aggregator", "direct")
MODELS = {name: ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo") for name in NAMES}
COMPOSED = ExpertSpec(
    name="cache",
    kind=Kind.COMPOSED,
    architecture="cache",
    source="latent_artifacts/cache",
    members=("smollm2", "fields", "dates", "units", "sentiment", "intent"),
)
SNAPSHOT = Snapshot(version=1, experts={**MODELS, "cache": COMPOSED})
PAIR = TWO_SKILLS["bookings"]
ROWS = PAIR.family.rows(Split.TEST, 4, seed=1)
every_pair = pytest.mark.parametrize("pair", TWO_SKILLS.values(), ids=TWO_SKILLS)


class Experts:
    """The two experts answer their part; `direct` is correct, and `aggregator` is if its prompt has both parts."""

    def __init__(self, rows: list[Row], pair: TwoSkills) -> None:
        self.rows, self.pair = {row.prompt: row for row in rows}, pair
        self.asked: list[tuple[str, str]] = []
        self.left: list[tuple[tuple[str, bytes], ...]] = []

    async def __call__(self, expert: str, asked: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        prompt = asked.messages[-1].content
        self.asked.append((expert, prompt))
        if expert == "cache":
            self.left.append(tuple((each.peer, each.data) for each in asked.notes or ()))
        value = f"entries of {expert}".encode() if asked.wants == "latent" else None
        yield Chunk(self.says(expert, prompt), "stop", Usage(100, 10), value=value)

    def says(self, expert: str, prompt: str) -> str:
        row = next(row for question, row in self.rows.items() if prompt.startswith(question))
        parts = row.extras[PARTS]
        if expert in self.pair.experts:
            return str(parts[self.pair.experts.index(expert)])
        helped = all(part in prompt for part in parts)
        return row.answer if expert in ("direct", "cache") or (expert == "aggregator" and helped) else "no idea"


async def asked(name: str, pair: TwoSkills = PAIR) -> tuple[list[Answered], list[tuple[str, str]]]:
    rows = pair.family.rows(Split.TEST, 4, seed=1)
    experts = Experts(rows, pair)
    routed = Policy(ROUTED, Always(pair.experts[0]), select=TopK(1))
    orchestrator = Orchestrator(SNAPSHOT, {ROUTED: routed}, ask=experts, default_policy=ROUTED)
    return await answer(name, pair, rows, orchestrator), experts.asked


@every_pair
async def test_an_aggregator_sees_both_answers_in_the_order_of_the_pair(pair: TwoSkills) -> None:
    found, calls = await asked("aggregate: trained", pair)
    assert [a.score for a in found] == [1.0] * 4
    assert {(a.experts, a.prompt_tokens, a.completion_tokens) for a in found} == {(pair.experts, 300, 30)}
    rows = pair.family.rows(Split.TEST, 4, seed=1)
    shown = [synthesis(request(row, pair), row.extras[PARTS]).messages[-1].content for row in rows]
    assert [prompt for expert, prompt in calls if expert == "aggregator"] == shown


@every_pair
async def test_the_composition_reads_what_both_experts_leave(pair: TwoSkills) -> None:
    rows = pair.family.rows(Split.TEST, 4, seed=1)
    experts = Experts(rows, pair)
    found = await answer("cache: trained", pair, rows, Orchestrator(SNAPSHOT, {}, ask=experts))
    assert [a.score for a in found] == [1.0] * 4
    assert {(a.experts, a.prompt_tokens, a.completion_tokens) for a in found} == {(pair.experts, 300, 30)}
    assert experts.left == [tuple((name, f"entries of {name}".encode()) for name in pair.experts)] * 4


@every_pair
async def test_without_a_trained_aggregator_two_right_parts_are_not_an_answer(pair: TwoSkills) -> None:
    for name in ("single: routed", "vote of the two", "chain: first, second", "aggregate: base"):
        found, _ = await asked(name, pair)
        assert [a.score for a in found] == [0.0] * 4, name


async def test_each_method_calls_its_experts() -> None:
    first, second = PAIR.experts
    for name, experts in {
        "single: routed": [first],
        "vote of the two": [first, second],
        "chain: first, second": [first, second],
        "chain: second, first": [second, first],
        "aggregate: base": [first, second, "smollm2"],
        "trained without answers": ["direct"],
    }.items():
        _, calls = await asked(name)
        prompts = [row.prompt for row in ROWS]
        assert [[e for e, p in calls if p.startswith(prompt)] for prompt in prompts] == [experts] * 4, name
        assert name in WAYS


async def test_references_are_the_better_of_the_two_and_the_rule() -> None:
    found = await references(PAIR, ROWS, Orchestrator(SNAPSHOT, {}, ask=Experts(ROWS, PAIR)))
    assert [a.score for a in found[RULE]] == [1.0] * 4
    assert [a.score for a in found[BETTER_OF_TWO]] == [0.0] * 4


async def test_a_rule_that_cannot_read_an_answer_is_wrong_and_says_why() -> None:
    experts = Experts(ROWS, PAIR)
    experts.rows[ROWS[0].prompt] = Row(ROWS[0].prompt, ROWS[0].answer, {PARTS: ("Anna, 4", "2031-05-12")})
    found = await references(PAIR, ROWS, Orchestrator(SNAPSHOT, {}, ask=experts))
    assert [a.score for a in found[RULE]] == [0.0, 1.0, 1.0, 1.0]
    assert found[RULE][0].text.startswith("(")


def test_who_is_recruited_is_counted_by_family() -> None:
    rows = {"bookings": ROWS}
    assert recruits(rows, Policy("one", Always("fields"))) == {"bookings": 0.0}


def test_figures_are_shares_intervals_and_paired_differences() -> None:
    def method(name: str, scores: list[float]) -> Method:
        return Method(name, {"bookings": [Answered("x", s, ("a", "b"), 50, 5) for s in scores]})

    methods = {"ours": method("ours", [1, 1, 1, 0]), "theirs": method("theirs", [0, 0, 1, 0])}
    share, low, high = methods["ours"].share()
    assert (share, round(low, 3), round(high, 3)) == (0.75, 0.301, 0.954)  # Wilson, by hand
    assert methods["ours"].tokens == (50, 5)
    [line] = contrasts(methods, "ours")
    assert line.startswith("ours less theirs: +50.0 points (")
    assert contrasts(methods, "another") == []
    assert table(methods).splitlines()[2] == "| ours | 75.0% | 75.0% (30.1%-95.4%) | 50 | 5.0 |  |"
    wrong = list(methods["ours"].wrong({"bookings": ROWS}, 9))
    assert wrong[0] == f"  bookings (a, b): {ROWS[3].prompt}"
    figures = summary(methods, {"bookings": ROWS})["ours"]
    assert figures["experts"] == {"bookings": {"a + b": 4}}
    assert figures["answers"]["bookings"][3]["right"] == ROWS[3].answer


@pytest.mark.integration
def test_routers_trained_on_the_zoo_s_outcomes_find_the_experts_of_two_skills() -> None:
    ways = policies(2)
    rows = {name: pair.family.rows(Split.VALID, 30, seed=2) for name, pair in TWO_SKILLS.items()}
    assert min(recruits(rows, ways["knn"]).values()) > 0.3
