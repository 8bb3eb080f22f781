"""Profiles: which counts add up, which replace others, and which belong to which version of an expert."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.digest import identity
from registry.errors import RegistryError, UnknownExpert
from registry.profiles import Measure, ProfileRow, Profiles
from registry.spec import ExpertSpec, Kind
from registry.store import Registry
from registry.strengths import interval, strengths, wilson


def spec(name: str, digest: str = "1", **fields: Any) -> ExpertSpec:
    return ExpertSpec(
        **{"name": name, "kind": Kind.MODEL, "source": "fake://echo", "digest": f"sha256:{digest}"} | fields
    )


def row(expert: str, skill: str, score: float, n: int, **fields: Any) -> ProfileRow:
    tokens, seconds = fields.pop("tokens", None), fields.pop("seconds", None)
    given = {"identity": "sha256:1", "source": "table", "digest": "sha256:t"} | fields
    return ProfileRow(expert, skill=skill, measure=Measure(score, n, tokens, seconds), **given)


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as opened:
        opened.change([spec("a"), spec("b")])
        yield opened


def test_another_source_adds(registry: Registry) -> None:
    registry.record([row("a", "sql", 3, 4, tokens=40.0), row("a", "dates", 1, 2), row("b", "sql", 0.5, 1)])
    registry.record([row("a", "sql", 2, 6, source="task", digest="sha256:u", tokens=10.0)])
    found = registry.profiles()
    assert found.experts == ("a", "b") and found.skills == ("dates", "sql")
    assert found.of("a") == {"dates": Measure(1, 2), "sql": Measure(5, 10, 50.0)}
    assert found.of("b") == {"sql": Measure(0.5, 1)} and found.of("c") == {}
    assert found.total("a") == Measure(6, 12) and found.total("c") is None
    assert found.cells["a", "sql"].accuracy == 0.5


def test_a_snapshot_has_the_measured_speed_of_the_current_content(registry: Registry) -> None:
    assert registry.snapshot().tokens_per_s == {}
    registry.record([row("a", "sql", 3, 4, tokens=40.0, seconds=8.0), row("b", "sql", 1, 4, tokens=5.0)])
    found = registry.snapshot()
    assert found.tokens_per_s == {"a": 5.0} and pickle.loads(pickle.dumps(found)) == found
    registry.change([spec("a", "2")])
    assert registry.snapshot().tokens_per_s == {}


def test_the_same_source_counts_once(registry: Registry) -> None:
    registry.record([row("a", "sql", 3, 4), row("a", "dates", 1, 2), row("b", "sql", 1, 4)])
    registry.record([row("a", "sql", 4, 5, digest="sha256:longer")])
    assert registry.profiles().of("a") == {"sql": Measure(4, 5)}, "skills that it no longer has are gone"
    assert registry.profiles().of("b") == {"sql": Measure(1, 4)}, "of other experts nothing was said"


def test_the_same_content_under_another_name_counts_once(registry: Registry) -> None:
    registry.record([row("a", "sql", 3, 4)])
    registry.record([row("a", "sql", 3, 4, source="renamed")])
    assert registry.profiles().of("a") == {"sql": Measure(3, 4)}
    assert [found.source for found in registry.recorded("a")] == ["renamed"]


def test_a_changed_expert_starts_from_zero_and_the_old_rows_stay(registry: Registry) -> None:
    registry.record([row("a", "sql", 3, 4)])
    registry.add(spec("a", description="described better"))
    assert registry.profiles().of("a") == {"sql": Measure(3, 4)}, "the weights are the same"
    registry.add(spec("a", "2"))
    assert registry.profiles().of("a") == {}
    registry.record([row("a", "sql", 1, 1, identity="sha256:2")])
    assert registry.profiles().of("a") == {"sql": Measure(1, 1)}
    assert [(found.identity, found.measure.n) for found in registry.recorded("a")] == [("sha256:1", 4), ("sha256:2", 1)]
    registry.add(spec("a", "1"))
    assert registry.profiles().of("a") == {"sql": Measure(3, 4)}


def test_an_adapter_on_another_base_is_another_expert(registry: Registry) -> None:
    lora = registry.add(spec("lora", "l", kind=Kind.ADAPTER, base="a"))
    first = identity(lora, registry.snapshot().experts)
    assert first == "sha256:l on sha256:1"
    registry.record([row("lora", "sql", 1, 1, identity=first)])
    assert registry.profiles().of("lora")
    registry.add(spec("a", "2"))
    assert registry.profiles().of("lora") == {}


def test_identities_are_content() -> None:
    remote = {"kind": Kind.REMOTE, "source": "https://host/v1", "digest": None}
    known = {one.name: one for one in (spec("a"), spec("b", "2"), spec("r", **remote), spec("s", model="r", **remote))}
    assert identity(known["r"], known) == identity(known["s"], known) != identity(known["a"], known)
    pair = spec("pair", "p", kind=Kind.COMPOSED, source="", members=("a", "b"))
    assert identity(pair, known) != identity(pair, known | {"b": spec("b", "3")})
    with pytest.raises(UnknownExpert, match="'gone'"):
        identity(spec("x", kind=Kind.ADAPTER, base="gone"), known)


def test_trials_of_aggregators_are_kept_apart(registry: Registry) -> None:
    registry.record([row("a", "sql", 1, 2), row("a", "sql", 2, 2, source="aggregation/sql", digest="sha256:g")])
    assert registry.profiles().of("a") == {"sql": Measure(1, 2)}
    assert registry.profiles(aggregating=True).of("a") == {"sql": Measure(2, 2)}


def test_the_version_stays(registry: Registry) -> None:
    """Running services watch it, and nothing they use has changed."""
    registry.record([row("a", "sql", 1, 2)])
    assert registry.snapshot().version == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("aa", "sql", 1, 1)], "'aa' is not in the registry; did you mean 'a'"),
        ([row("a", "", 1, 1)], "a skill must have 1 to 256 characters, got 0"),
        ([row("a", "x" * 257, 1, 1)], "a skill must have 1 to 256 characters, got 257"),
        ([row("a", "sql", 1, 1), row("a", "sql", 0, 1)], "same expert, source and skill: add them up first"),
    ],
)
def test_rows_that_cannot_be(registry: Registry, rows: list[ProfileRow], message: str) -> None:
    registry.record([row("a", "old", 1, 1)])
    with pytest.raises(RegistryError, match=message):
        registry.record([row("b", "sql", 1, 1), *rows])
    assert registry.profiles().cells == {("a", "old"): Measure(1, 1)}


@pytest.mark.parametrize(("score", "n"), [(1.5, 1), (-0.1, 1), (0, 0)])
def test_measures_that_cannot_be(score: float, n: int) -> None:
    with pytest.raises(RegistryError, match="is impossible: each is in"):
        Measure(score, n)
    with pytest.raises(RegistryError, match="seconds must be finite"):
        Measure(1, 1, seconds=float("nan"))


def _measure(home: str, process: int, count: int) -> None:
    os.environ["COE_HOME"] = home
    with Registry() as registry:
        for number in range(count):
            own = {"source": f"{process}/{number}", "digest": f"sha256:{process}/{number}"}
            registry.record([row("a", "sql", 1, 2, **own)])
            registry.record([row("a", "sql", 5, 7, source="shared", digest="sha256:s")])


def test_many_writers_lose_nothing(registry: Registry, coe_home: Path) -> None:
    processes, count = 3, 4
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_measure, args=(str(coe_home), n, count)) for n in range(processes)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert registry.profiles().of("a") == {"sql": Measure(processes * count + 5, 2 * processes * count + 7)}


PROFILES = Profiles(
    {
        ("a", "sql"): Measure(36, 40, 400.0),
        ("a", "rare"): Measure(1, 1),
        ("a", "dates"): Measure(2, 37),
        ("b", "sql"): Measure(20, 40),
        ("c", "sql"): Measure(0, 8),
    }
)


def test_rare_skills_shrink_towards_the_experts_own_mean() -> None:
    found = {strength.skill: strength for strength in strengths(PROFILES, "a")}
    assert list(found) == ["sql", "rare", "dates"], "one right answer is no strength"
    mean = (36 + 1 + 2 + 1) / (40 + 1 + 37 + 2)  # 0.5
    assert found["sql"].accuracy == pytest.approx((36 + 10 * mean) / 50) == pytest.approx(0.82)
    assert found["rare"].accuracy == pytest.approx(6 / 11) and found["rare"].raw == 1.0
    assert found["dates"].accuracy == pytest.approx(7 / 47)
    assert (found["sql"].n, found["sql"].mean_tokens, found["rare"].mean_tokens) == (40, 10.0, None)


def test_others_are_those_measured_in_the_skill() -> None:
    found = {strength.skill: strength for strength in strengths(PROFILES, "a")}
    b, c = (20 + 10 * 21 / 42) / 50, (0 + 10 * 1 / 10) / 18
    assert found["sql"].others == pytest.approx((b + c) / 2)
    assert found["sql"].lead == pytest.approx(0.82 - (b + c) / 2)
    assert found["rare"].others is None and found["rare"].lead is None
    assert strengths(PROFILES, "nobody") == []


def test_intervals_are_wide_where_little_is_known() -> None:
    found = {strength.skill: strength for strength in strengths(PROFILES, "a")}
    for strength in found.values():
        assert 0 < strength.low < strength.accuracy < strength.high < 1
    assert found["rare"].high - found["rare"].low > 2 * (found["sql"].high - found["sql"].low)


def test_an_interval_by_hand() -> None:
    """n of n correct with a prior of one correct answer: Beta(n + 1, 1), by its distribution."""
    low, high = interval(Measure(9, 9), mean=0.5, shrinkage=2.0)
    assert low == pytest.approx(0.025**0.1) and high == pytest.approx(0.975**0.1)
    assert interval(Measure(0, 9), 0.5, 2.0) == pytest.approx((1 - high, 1 - low))


def test_wilsons_interval_by_hand() -> None:
    """4 of 10: the two p at which |0.4 - p| is 1.96 standard errors."""
    for bound in wilson(Measure(4, 10)):
        assert abs(0.4 - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / 10) ** 0.5, rel=1e-5)
    assert wilson(Measure(10, 10))[1] == 1.0 and wilson(Measure(0, 10))[0] == 0.0
