"""Catalogs of services whose aliases name older versions: which pool serves them, and what travels to the processes."""

from __future__ import annotations

import json

from coe.config import Config, HostConfig, HostPoolConfig, PolicyConfig, ServeConfig
from coe.serve.cluster.catalog import Catalog, pools_by_expert, serving
from registry.snapshot import Alias, Snapshot, as_version
from registry.spec import ExpertSpec, Kind


def spec(name: str, version: int, kind: Kind = Kind.MODEL, **fields: str) -> ExpertSpec:
    return ExpertSpec(name=name, kind=kind, source="fake://echo", version=version, **fields)


SMALL, LARGE = HostPoolConfig(name="small", experts=("sql",)), HostPoolConfig(name="large", experts=("legal", "x"))
CONFIG = Config(
    serve=ServeConfig(pools=(SMALL, LARGE)),
    host=HostConfig(pins=("legal",)),
    policies={"default": PolicyConfig(expert="sql")},
)
OLD = [as_version(spec("sql", 1)), as_version(spec("x", 1, Kind.ADAPTER, base="base"))]
SNAPSHOT = Snapshot(
    9,
    {
        each.name: each
        for each in (
            spec("sql", 2),
            spec("legal", 1),
            spec("base", 1),
            spec("x", 2, Kind.ADAPTER, base="legal"),
            spec("y", 1),
        )
    },
    aliases={
        name: Alias(name, expert, version, 1.5, "me")
        for name, expert, version in (("prod", "sql", 1), ("now", "sql", 2), ("ad", "x", 1), ("unserved", "y", 1))
    },
    versions={each.name: each for each in OLD},
    drained={"sql": "why", "y": ""},
    pinned=frozenset({"sql", "y"}),
    removed=frozenset({"gone"}),
)


def test_a_version_is_served_where_its_expert_is_with_what_it_needs() -> None:
    catalog = Catalog.of(CONFIG, SNAPSHOT)
    assert {*catalog.snapshot} == {"sql", "sql@1", "legal", "base", "x", "x@1"}
    assert {*serving(catalog.snapshot, LARGE)} == {"legal", "x", "x@1", "base"}
    assert pools_by_expert(catalog, CONFIG.serve.pools) == {
        "sql": ["small"], "sql@1": ["small"], "legal": ["large"], "base": ["large"], "x": ["large"], "x@1": ["large"],
    }  # fmt: skip
    assert {*catalog.snapshot.aliases} == {"prod", "now", "ad"}, "no pool serves the expert of the other one"
    assert catalog.snapshot.drained == {"sql": "why", "sql@1": "why"}
    assert [catalog.snapshot.resolve(name) for name in ("prod", "now", "ad", "sql")] == ["sql@1", "sql", "x@1", "sql"]
    assert catalog.pins == {"small": ("sql",), "large": ("legal",)}


def test_what_travels_is_the_same_at_its_end() -> None:
    catalog = Catalog.of(CONFIG, SNAPSHOT)
    again = Catalog.from_json(json.loads(json.dumps(catalog.to_json())))
    assert again == catalog and again.snapshot.get("sql@1").ref == "sql@1" and again.snapshot.get("sql").ref == "sql@2"


def test_pins_of_admin_calls_are_beside_those_of_a_pool() -> None:
    pool = HostPoolConfig(name="small", experts=("sql", "legal"), pins=("legal",))
    config = CONFIG.with_pools([pool, LARGE])
    assert Catalog.of(config, SNAPSHOT).pins["small"] == ("legal", "sql")
