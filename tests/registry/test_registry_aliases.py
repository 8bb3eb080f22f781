"""Aliases and what is stated of experts: data of the registry, moved and checked in its transactions."""

from __future__ import annotations

import pickle
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from registry import aliases
from registry.errors import RegistryError, StaleChange, UnknownExpert
from registry.snapshot import as_version, of_version
from registry.spec import ExpertSpec, Kind
from registry.store import Registry


def spec(name: str, source: str = "fake://echo", kind: Kind = Kind.MODEL, **fields: Any) -> ExpertSpec:
    return ExpertSpec(name=name, kind=kind, source=source, **fields)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.db'}")
    registry.change([spec("sql"), spec("legal")])
    registry.add(spec("sql", "fake://upper"))
    return registry


def point(registry: Registry, target: str, name: str = "prod", **options: Any) -> str:
    return registry.point_alias(name, target, **{"by": "me", "now": 5.0, **options}).ref


def test_an_alias_names_a_version_and_keeps_it_while_a_newer_one_is_registered(registry: Registry) -> None:
    assert point(registry, "sql@2") == "sql@2" and registry.snapshot().resolve("prod") == "sql"
    registry.add(spec("sql", "fake://reverse"))
    snapshot = registry.snapshot()
    assert [*snapshot.experts] == ["legal", "sql"], "the experts of the registry are the current ones"
    assert snapshot.resolve("prod") == "sql@2" and snapshot.versions["sql@2"].source == "fake://upper"
    served = snapshot.with_versions()
    assert served.get("sql@2").ref == "sql@2" and served.get("sql@3").name == "sql" == served.get("sql").name
    with pytest.raises(UnknownExpert):
        served.get("sql@1")
    assert of_version(served.get("sql@2")) == registry.get("sql@2")
    assert as_version(registry.get("sql@2")) == served.get("sql@2")
    again = pickle.loads(pickle.dumps(snapshot))
    assert (again.aliases, again.versions) == (snapshot.aliases, snapshot.versions)


def test_a_rollback_goes_back_one_move_and_again_one_more(registry: Registry) -> None:
    for now, target in enumerate(("sql@1", "2", "legal")):
        point(registry, target, now=float(now), by=f"key{now}")
    back = [registry.roll_back_alias("prod", by="other", now=9.0).ref for _ in range(2)]
    assert back == ["sql@2", "sql@1"]
    with pytest.raises(RegistryError, match="'prod' has no earlier target than sql@1"):
        registry.roll_back_alias("prod", by="other", now=9.0)
    assert point(registry, "legal", now=10.0) == "legal@1", "a move after rollbacks goes on from there"
    assert registry.roll_back_alias("prod", by="me", now=11.0).ref == "sql@1"
    moves = registry.alias_moves("prod")
    assert [(m.alias.ref, m.alias.moved_at, m.alias.moved_by, m.undone_at, m.undone_by) for m in moves] == [
        ("sql@1", 0.0, "key0", None, None),
        ("sql@2", 1.0, "key1", 9.0, "other"),
        ("legal@1", 2.0, "key2", 9.0, "other"),
        ("legal@1", 10.0, "me", 11.0, "me"),
    ]


def test_only_what_changes_counts_as_a_change(registry: Registry) -> None:
    point(registry, "sql")
    version = registry.snapshot().version
    assert point(registry, "sql@2") == "sql@2" and registry.snapshot().version == version
    assert len(registry.alias_moves("prod")) == 1
    registry.state_experts(["sql"], by="me", now=1.0, drained="why")
    registry.state_experts(["sql"], by="other", now=2.0, drained="why")
    registry.state_experts(["legal"], by="me", now=2.0, drained=None)
    assert registry.snapshot().version == version + 1 and registry.expert_states()["sql"].changed_by == "me"


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("prod", "sq", "'sq' is not in the registry; did you mean 'sql'"),
        ("prod", "sql@9", r"'sql@9' is not in the registry; did you mean"),
        ("prod", "sql@", "names no version"),
        ("prod", "sql@one", "'sql@one' is not in"),
        ("prod", "sql@99999999999999999999", "is not in"),
        ("prod", "2", "'2' is not in the registry"),
        ("legal", "sql", "'legal' is an expert"),
        ("auto", "sql", "'auto' is reserved"),
        ("coe/x", "sql", "'coe/x' is reserved"),
        ("a@1", "sql", "'a@1' is not a name"),
        ("x" * 500, "sql", "is not a name"),
    ],
)
def test_a_wrong_alias_changes_nothing(registry: Registry, name: str, target: str, words: str) -> None:
    version = registry.snapshot().version
    with pytest.raises(RegistryError, match=words) as caught:
        point(registry, target, name)
    assert len(str(caught.value)) < 600
    assert registry.snapshot().version == version and not registry.snapshot().aliases


def test_an_alias_must_exist_to_be_promoted_rolled_back_or_deleted(registry: Registry) -> None:
    point(registry, "sql")
    for work in (
        lambda: point(registry, "sql", "pro", exists=True),
        lambda: registry.roll_back_alias("pro", by="", now=0.0),
        lambda: registry.delete_alias("pro"),
        lambda: registry.alias_moves("pro"),
    ):
        with pytest.raises(RegistryError, match="there is no alias 'pro'; did you mean 'prod'"):
            work()
    assert registry.delete_alias("prod").ref == "sql@2"
    assert not registry.snapshot().aliases


def test_an_expert_with_an_alias_stays_and_no_expert_takes_its_name(registry: Registry) -> None:
    point(registry, "sql@1")
    with pytest.raises(RegistryError, match=r"'sql' cannot be removed: the alias prod points to it"):
        registry.remove("sql")
    with pytest.raises(RegistryError, match=r"'prod' is an alias: choose another name"):
        registry.add(spec("prod"))
    point(registry, "legal")
    registry.remove("sql")
    with pytest.raises(RegistryError, match=r"cannot go back to sql@1: 'sql' is not registered any more"):
        registry.roll_back_alias("prod", by="", now=0.0)


def test_what_a_named_version_needs_stays_too(registry: Registry) -> None:
    registry.change([spec("one"), spec("two"), spec("x", kind=Kind.ADAPTER, base="one")])
    point(registry, "x")
    registry.add(spec("x", kind=Kind.ADAPTER, base="two"))
    with pytest.raises(RegistryError, match=r"'one' cannot be removed: x@1 need it"):
        registry.remove("one")
    with pytest.raises(RegistryError, match=r"'one' cannot be removed: x@1 need it"):
        registry.change([spec("x", "fake://upper")], ["one"])
    point(registry, "x")
    registry.remove("one")
    with pytest.raises(UnknownExpert, match="'one' is not in the registry"):
        registry.roll_back_alias("prod", by="", now=0.0)


def test_states_end_with_the_expert_and_are_checked(registry: Registry) -> None:
    snapshot = registry.state_experts(["sql", "legal"], by="me", now=1.0, pinned=True)
    assert snapshot.pinned == {"sql", "legal"} and not snapshot.drained
    snapshot = registry.state_experts(["sql"], by="me", now=1.0, drained="maintenance")
    assert snapshot.pinned == {"sql", "legal"} and dict(snapshot.drained) == {"sql": "maintenance"}
    for reason in ("x" * 201, "two\nlines"):
        with pytest.raises(RegistryError, match="a reason is one line of at most 200"):
            registry.state_experts(["sql"], by="me", now=1.0, drained=reason)
    with pytest.raises(UnknownExpert, match="'sq' is not in the registry"):
        registry.state_experts(["sql", "sq"], by="me", now=1.0, drained="x")
    registry.remove("sql")
    registry.add(spec("sql"))
    assert registry.snapshot().pinned == {"legal"} and not registry.snapshot().drained


def test_the_versions_of_a_drained_expert_are_drained(registry: Registry) -> None:
    point(registry, "sql@1")
    served = registry.state_experts(["sql"], by="me", now=1.0, drained="why").with_versions()
    assert served.drained == {"sql": "why", "sql@1": "why"}
    assert served.with_drained({}).drained == {}
    assert served.with_drained({"sql": "b"}).drained == {"sql": "b", "sql@1": "b"}


def test_a_change_planned_with_another_registry_is_refused(registry: Registry) -> None:
    version = registry.snapshot().version
    registry.change([spec("sql", "fake://reverse")], since=version)
    with pytest.raises(StaleChange, match="the registry changed meanwhile"):
        registry.change([spec("new")], since=version)
    assert "new" not in registry.snapshot()


def test_moves_at_once_are_all_kept_and_old_ones_go(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    point(registry, "legal")

    def mover(number: int) -> None:
        with Registry(registry.url) as own:
            for _ in range(5):
                own.point_alias("prod", "sql@1", by=str(number), now=1.0)
                own.point_alias("prod", "sql@2", by=str(number), now=1.0)

    movers = [threading.Thread(target=mover, args=(number,)) for number in range(3)]
    for each in movers:
        each.start()
    for each in movers:
        each.join()
    refs = [move.alias.ref for move in registry.alias_moves("prod")]
    assert all(one != other for one, other in pairwise(refs)), "each move starts where one ended"
    monkeypatch.setattr(aliases, "MOST_MOVES", 4)
    point(registry, "legal")
    assert len(registry.alias_moves("prod")) == 4
    monkeypatch.setattr(aliases, "MOST_ALIASES", 1)
    with pytest.raises(RegistryError, match="holds 1 aliases, and no more than 1"):
        point(registry, "legal", "other")
