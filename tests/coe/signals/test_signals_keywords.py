"""Keywords: parsing the answers of a keyword expert, and calling it from plain threads."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coe.engine_config import EnginesConfig, FakeConfig
from coe.errors import ConfigError, ContextLengthExceeded, EngineError
from coe.policy import Policy
from coe.routing import Routed, route
from coe.signals.background import AskText, BackgroundExpert
from coe.signals.features import Filled, Signals
from coe.signals.keywords import LONGEST, SAMPLES, KeywordReader, keep, parse, request_of
from coe.types import GenerateRequest
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot
from routers.base import Estimate, Message, Query
from routers.outcomes.table import OutcomeTable

SCRIPT = "fake://script?Paris=Keywords: Geography., capitals&bake=keywords: cooking, chemistry&default=I do not know"


def snapshot_of(*specs: ExpertSpec) -> Snapshot:
    return Snapshot(1, {spec.name: spec for spec in specs})


def model(name: str, source: str, **fields: Any) -> ExpertSpec:
    return ExpertSpec(name=name, kind=Kind.MODEL, source=source, version=1, **fields)


SNAPSHOT = snapshot_of(
    model("skills", SCRIPT),
    model("broken", "fake://fail"),
    model("unloadable", "fake://fail?at=load"),
    model("small", SCRIPT, context_length=230),
    model("tiny", SCRIPT, context_length=195),
    model("base", "fake://echo", capabilities=frozenset({"completion"})),
    ExpertSpec(name="on-base", kind=Kind.ADAPTER, base="base", source="fake://script?Paris=Keywords: maps, maps"),
    ExpertSpec(name="vectors", kind=Kind.EMBEDDING, source="fake://echo", capabilities=frozenset({"embed"})),
    ExpertSpec(name="both", kind=Kind.COMPOSED, members=("skills", "base")),
)


def table(*prompts: str) -> OutcomeTable:
    return OutcomeTable(tuple(map(str, range(len(prompts)))), prompts, ("a",), np.ones((len(prompts), 1)))


def expert_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("expert:")}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    yield
    deadline = time.monotonic() + 5
    while expert_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not expert_threads()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("Keywords: algebra, Number Theory, calculus.", ["algebra", "number theory", "calculus"]),
        ("Sure! Here they are.\n\n**KEYWORDS:** *Law*, `tax`\nI hope this helps, bye", ["law", "tax"]),
        ("keyword : law", ["law"]),
        ("Keywords:\n- algebra\n- sets, logic\n\nAnything, else", ["algebra", "sets", "logic"]),
        ("Keywords:\n\n1. algebra\n2) 3d geometry", ["algebra", "3d geometry"]),
        ("Keywords: a, b\nNow again:\nKeywords: b, c", ["a", "b", "b", "c"]),
        ("<think>Keywords: wrong, wrong</think>Keywords: right", ["right"]),
        ("<think>Keywords: it never ends", []),
        ("Keywords: , ., ,law", ["law"]),
        ("Keywords: c++, c#, .net, U.S. history", ["c++", "c#", "net", "u.s. history"]),
        ("Keywords: 24, 1965, 3d", ["3d"]),
        ("The answer is 42, as everybody knows.", []),
        ("Keywords：数学, 法律", ["数学", "法律"]),
        ("", []),
    ],
)
def test_the_keywords_of_an_answer(answer: str, words: list[str]) -> None:
    assert parse(answer) == words


def test_kept_is_what_is_short_and_in_more_than_one_answer_those_of_most_first() -> None:
    long = "x" * (LONGEST + 1)
    answers = [["law", "tax", long], ["ethics", "tax", long], ["tax", "ethics", "once", "once"], ["law"], []]
    assert keep(answers) == ("tax", "law", "ethics")  # 3; 2 and named first; 2
    assert keep([["x" * LONGEST], ["x" * LONGEST]]) == ("x" * LONGEST,)
    assert keep([]) == keep([["law"], ["tax"]]) == ()


def test_every_sample_of_a_query_has_a_seed_of_its_own_and_the_same_one_again() -> None:
    seeds = [request_of(text, i).seed for text in ("a", "b", "a\ud800") for i in range(SAMPLES)]
    assert len(set(seeds)) == 3 * SAMPLES
    assert seeds == [request_of(text, i).seed for text in ("a", "b", "a\ud800") for i in range(SAMPLES)]
    asked = request_of("Where is {question}? \ud800", 0)
    assert (asked.temperature, [turn.role for turn in asked.messages]) == (0.7, ["user", "assistant"] * 3 + ["user"])
    assert "Where is {question}? ?" in asked.messages[-1].content


def test_an_expert_is_asked_from_any_thread_and_from_within_a_loop() -> None:
    reader = KeywordReader("skills", SNAPSHOT)
    texts = ["Where is Paris?", "How do I bake bread?", "Who?", "  "]
    expected = [("geography", "capitals"), ("cooking", "chemistry"), (), ()]
    try:
        assert reader.read(texts) == expected
        with ThreadPoolExecutor(4) as threads:
            assert [f.result() for f in [threads.submit(reader.read, texts[::-1]) for _ in range(4)]] == [
                expected[::-1]
            ] * 4

        async def inside() -> object:
            return reader.read(texts)

        assert asyncio.run(inside()) == expected
        assert expert_threads() == {"expert:skills"}
    finally:
        reader.close()
    assert not expert_threads()
    assert reader.read(texts[:1]) == expected[:1]  # closed, not ended: it opens again
    reader.close()
    reader.close()


def test_an_adapter_is_asked_on_its_base() -> None:
    with closing(KeywordReader("on-base", SNAPSHOT)) as reader:
        assert reader.read(["Paris"]) == [("maps",)]


def test_all_samples_of_all_texts_are_in_flight_together() -> None:
    expert = BackgroundExpert("skills", SNAPSHOT, EnginesConfig(fake=FakeConfig(token_delay_s=0.02, capacity=64)))

    async def work(ask: AskText) -> list[str]:
        return list(await asyncio.gather(*(ask(request_of("Paris", i)) for i in range(40))))

    started = time.perf_counter()
    assert expert.run(work) == ["Keywords: Geography., capitals"] * 40
    assert time.perf_counter() - started < 40 * 3 * 0.02 / 2  # one after the other: 3 tokens each
    expert.close()


def test_an_expert_that_is_dropped_unloads_by_itself() -> None:
    KeywordReader("skills", SNAPSHOT).read(["Paris"])  # the fixture waits for its thread to end


def test_closing_ends_what_is_being_asked() -> None:
    reader = KeywordReader("skills", SNAPSHOT, EnginesConfig(fake=FakeConfig(token_delay_s=30)))
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(reader.read, ["Paris"])
        while not expert_threads():
            time.sleep(0.01)
        time.sleep(0.1)
        reader.close()
        with pytest.raises(EngineError, match="'skills' was closed"):
            reading.result(timeout=5)


def test_an_interrupt_cancels_what_is_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    expert = BackgroundExpert("skills", SNAPSHOT)
    cancelled = threading.Event()

    async def work(ask: AskText) -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupted(self: Any, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    async def once(ask: AskText) -> str:
        return await ask(GenerateRequest(messages=(Message("user", "Paris"),)))

    assert expert.run(once)
    with monkeypatch.context() as patch:
        worker = expert._worker
        assert worker is not None
        submit = worker.submit

        def submitted(work: Any) -> Any:
            future = submit(work)
            time.sleep(0.05)  # it has started
            patch.setattr(type(future), "result", interrupted)
            return future

        patch.setattr(worker, "submit", submitted)
        with pytest.raises(KeyboardInterrupt):
            expert.run(work)
    assert cancelled.wait(5)
    expert.close()


def test_a_question_that_the_context_does_not_hold_is_shown_in_part() -> None:
    with closing(KeywordReader("small", SNAPSHOT)) as small:
        assert small.read(["Paris " * 300]) == [("geography", "capitals")]
    with closing(KeywordReader("tiny", SNAPSHOT)) as tiny, pytest.raises(ContextLengthExceeded):
        tiny.read(["Paris " * 300])


@pytest.mark.parametrize(("name", "why"), [("broken", "failed after|failed at"), ("unloadable", "failed to load")])
def test_an_expert_that_fails_stops_training_and_costs_a_query_only_its_keywords(
    name: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    feature = f"keywords/{name}"
    with Signals(SNAPSHOT) as signals:
        with pytest.raises(EngineError, match=why):
            signals.add_features(table("Where is Paris?"), [feature])
        [query] = signals.fill([Query.of("Where is Paris?")], [feature])
    assert query.features == {feature: ()}
    assert f"'{name}' could not name the keywords of 1 queries, which are routed without them; " in caplog.text


def test_a_key_that_is_missing_is_told() -> None:
    away = ExpertSpec(name="away", kind=Kind.REMOTE, source="https://host/v1", api_key_env="NOBODY_SETS_THIS")
    told = pytest.raises(ConfigError, match="set the environment variable NOBODY_SETS_THIS")
    with closing(KeywordReader("away", snapshot_of(away))) as reader, told:
        reader.read(["Paris"])


def test_what_others_were_named_is_kept_where_one_fails() -> None:
    asked: list[str] = []

    class Flaky(KeywordReader):
        def read_each(self, texts: Any) -> Any:
            asked.extend(texts)
            return [EngineError("lost") if text == "b" and len(asked) < 4 else (text,) for text in texts]

    with Signals(SNAPSHOT, keywords=Flaky) as signals:
        with pytest.raises(EngineError, match="lost"):
            signals.add_features(table("a", "b", "c"), ["keywords/skills"])
        whole = signals.add_features(table("a", "b", "c"), ["keywords/skills"])
    assert whole.features == {"keywords/skills": (("a",), ("b",), ("c",))}
    assert asked == ["a", "b", "c", "b"]


class Counting(KeywordReader):
    texts: list[str] = []  # noqa: RUF012

    def read_each(self, texts: Any) -> Any:
        Counting.texts += texts
        return super().read_each(texts)


@pytest.fixture
def counting() -> Any:
    Counting.texts = []
    with Signals(SNAPSHOT, keywords=Counting) as signals:
        yield signals


def test_keywords_are_read_once_and_an_interrupted_run_goes_on(counting: Signals) -> None:
    prompts = [f"Paris {i}" for i in range(50)]

    def stop(done: int, total: int) -> None:
        assert (done, total) == (32, 50)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        counting.add_features(table(*prompts), ["keywords/skills"], on_progress=stop)
    assert len(Counting.texts) == 32
    whole = counting.add_features(table(*prompts), ["keywords/skills"])
    assert whole.features == {"keywords/skills": (("geography", "capitals"),) * 50}
    assert len(Counting.texts) == 50
    queries = counting.fill([Query.of(prompts[0]), Query.of("bake"), Query.of("bake")], ["keywords/skills"])
    assert [query.features["keywords/skills"] for query in queries] == [
        ("geography", "capitals"),
        ("cooking", "chemistry"),
        ("cooking", "chemistry"),
    ]
    assert Counting.texts[50:] == ["bake"]
    assert [query.features for query in counting.fill([Query.of("bake")], ["keywords/skills"])] == [queries[1].features]
    assert Counting.texts[51:] == []


def test_what_is_kept_depends_on_who_is_asked_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def path(snapshot: Snapshot, name: str = "skills") -> Path:
        return KeywordReader(name, snapshot).store().path

    before = path(SNAPSHOT)
    assert before == path(SNAPSHOT) and before.parent.name == "signals"
    assert path(snapshot_of(model("skills", "fake://echo"))) != before
    assert path(snapshot_of(model("skills", SCRIPT, digest="sha256:1"))) == path(
        snapshot_of(model("other", "fake://echo", digest="sha256:1")), "other"
    )
    monkeypatch.setattr("coe.signals.keywords.TEMPERATURE", 0.5)
    assert path(SNAPSHOT) != before


def test_a_damaged_file_is_started_again(counting: Signals, caplog: pytest.LogCaptureFixture) -> None:
    counting.fill([Query.of("Paris")], ["keywords/skills"])
    KeywordReader("skills", SNAPSHOT).store().path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    [query] = counting.fill([Query.of("Paris")], ["keywords/skills"])
    assert query.features["keywords/skills"] == ("geography", "capitals")
    assert "is recreated" in caplog.text and Counting.texts == ["Paris"] * 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("keywords/", "no feature 'keywords/': .*keywords/<expert> of registered chat experts"),
        ("keyword/skills", "no feature 'keyword/skills'"),
        ("keywords/skils", "feature 'keywords/skils': .*did you mean 'skills'"),
        ("keywords/vectors", "'vectors' is not a chat expert .kind 'embedding'"),
        ("keywords/both", "'both' is not a chat expert .kind 'composed'"),
        ("keywords/base", "'base' is not a chat expert"),
    ],
)
def test_an_expert_that_cannot_name_keywords_is_refused(name: str, why: str) -> None:
    signals = Signals(SNAPSHOT)
    with pytest.raises(ConfigError, match=why):
        signals.check({name})
    signals.check({"keywords/skills", "keywords/on-base"})


class BySkill:
    requires = frozenset({"keywords/skills"})

    def estimate(self, queries: Any) -> Estimate:
        cooking = [["cooking" in query.features["keywords/skills"], 0.5] for query in queries]
        return Estimate(("skills", "broken"), np.array(cooking, dtype=float))


def test_a_policy_routes_by_the_keywords_of_a_query() -> None:
    with Signals(SNAPSHOT) as signals:
        policy = Policy("default", Filled(BySkill(), signals))
        routed = route([Query.of("How do I bake bread?"), Query.of("Where is Paris?")], policy, SNAPSHOT, {})
    assert [one.decision.experts for one in routed if isinstance(one, Routed)] == [("skills",), ("broken",)]


SCRIPTED = """
import sys
from coe.signals.keywords import KeywordReader
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

spec = ExpertSpec(name="skills", kind=Kind.MODEL, source=sys.argv[1], version=1)
reader = KeywordReader("skills", Snapshot(1, {"skills": spec}))
print(reader.read(["Where is Paris?"]))
"""


def test_a_script_that_closes_nothing_ends_in_silence() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", SCRIPTED, SCRIPT],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout == "[('geography', 'capitals')]\n"
    assert ended.stderr == ""


REAL = """
import sys
import coe.signals.keywords
from coe.engine_config import EnginesConfig, HFConfig
from coe.signals.keywords import KeywordReader
from registry.describe import describe
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

coe.signals.keywords.MAX_TOKENS, coe.signals.keywords.SAMPLES, coe.signals.keywords.OFTEN = 8, 1, 1
spec = describe(ExpertSpec(name="skills", kind=Kind.MODEL, source=sys.argv[1], version=1))
engines = EnginesConfig(hf=HFConfig(device="cpu", dtype="float32", threads=1))
reader = KeywordReader("skills", Snapshot(1, {"skills": spec}), engines)
texts = ["Why does bread dough rise in the oven?", "How much is 3 + 4?"]
both = reader.read(texts)
assert both == [reader.read([text])[0] for text in texts], both
print(both[0])
"""


@pytest.mark.integration
def test_a_real_small_model_names_the_same_keywords_alone_and_in_a_batch(zoo_bases: Path) -> None:
    """In a script that closes nothing and must still end cleanly."""
    ended = subprocess.run(
        [sys.executable, "-c", REAL, str(zoo_bases / "smollm2-135m-instruct")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    words = ast.literal_eval(ended.stdout)
    assert words and all(isinstance(word, str) and len(word) <= LONGEST for word in words)
