"""What a service starts with and changes to: read, checked as a whole, and refused if invalid."""

import os
import sqlite3
from pathlib import Path

import pytest

from coe.compose.option_prior import FEATURES, OptionPrior
from coe.errors import ConfigError
from coe.serve.cluster.source import Source
from registry.errors import InvalidSpec, StoreError
from registry.spec import ExpertSpec, Kind
from registry.store import Registry
from routers.errors import RouterError

EXPERTS = """
experts:
  - {{name: general, kind: model, source: "fake://echo"}}
  - {{name: loud, kind: model, source: "fake://{loud}"}}
"""
CONFIG = """
experts: [experts.yaml]
policies:
  default: {{expert: {expert}, fallback: general}}
{more}
"""


def write(path: Path, text: str) -> None:
    """Write, with a modification time that differs from all earlier ones."""
    later = path.stat().st_mtime_ns + 10**9 if path.exists() else 10**18
    path.write_text(text)
    os.utime(path, ns=(later, later))


@pytest.fixture
def service(tmp_path: Path) -> Path:
    write(tmp_path / "experts.yaml", EXPERTS.format(loud="upper"))
    write(tmp_path / "service.yaml", CONFIG.format(expert="loud", more=""))
    return tmp_path / "service.yaml"


def test_a_source_is_read_once_and_again_only_after_a_change(service: Path) -> None:
    with Source(service, port=9000, host=None) as source:
        assert (source.config.serve.port, source.config.serve.host) == (9000, "127.0.0.1")
        assert set(source.catalog.snapshot) == {"general", "loud"} and source.catalog.generation == 1
        assert not source.changed()
        write(service, CONFIG.format(expert="general", more=""))
        assert source.changed()
        catalog, fixed = source.reread()
        assert (catalog.generation, catalog.policies["default"].expert, fixed) == (2, "general", [])
        assert not source.changed() and source.catalog is catalog


def test_the_prior_of_a_vote_is_watched_as_routers_are(service: Path) -> None:
    prior = service.parent / "prior.json"
    OptionPrior(dict.fromkeys(FEATURES, 0.0)).write(prior)
    policy = "  vote: {expert: loud, composition: {kind: weighted-vote, prior: prior.json}}"
    write(service, CONFIG.format(expert="loud", more=policy))
    with Source(service) as source:
        assert not source.changed()
        write(prior, prior.read_text().replace('"length": 0.0', '"length": 0.5'))
        assert source.changed() and source.reread()[0].generation == 2


def test_an_expert_that_changes_in_its_file_gets_a_new_version_and_others_keep_theirs(service: Path) -> None:
    with Source(service) as source:
        write(service.parent / "experts.yaml", EXPERTS.format(loud="echo"))
        assert source.changed()
        snapshot = source.reread()[0].snapshot
        assert {name: spec.version for name, spec in snapshot.experts.items()} == {"general": 1, "loud": 2}


def test_an_expert_that_leaves_its_file_is_served_no_more(service: Path) -> None:
    with Source(service) as source:
        write(service, CONFIG.format(expert="general", more=""))
        write(service.parent / "experts.yaml", 'experts: [{name: general, kind: model, source: "fake://echo"}]')
        assert set(source.reread()[0].snapshot) == {"general"}


@pytest.mark.parametrize(
    ("file", "text", "error", "message"),
    [
        ("service.yaml", CONFIG.format(expert="luod", more=""), ConfigError, "policy 'default'.*did you mean 'loud'"),
        ("service.yaml", CONFIG.format(expert="loud", more="sreve: {}"), ConfigError, "service.yaml:5.*sreve"),
        ("experts.yaml", "experts: [{name: auto}]", InvalidSpec, "experts.yaml:1.*reserved"),
        ("experts.yaml", 'experts: [{name: loud, kind: model, source: "fake://echo"}]', ConfigError, "fallback"),
    ],
)
def test_a_change_that_is_wrong_is_refused_once_and_the_service_stays_as_it_was(
    service: Path, file: str, text: str, error: type[Exception], message: str
) -> None:
    with Source(service) as source:
        before = source.catalog
        write(service.parent / file, text)
        with pytest.raises(error, match=f"(?s){message}"):
            source.reread()
        assert source.catalog is before and not source.changed()
        write(service, CONFIG.format(expert="general", more=""))
        write(service.parent / "experts.yaml", EXPERTS.format(loud="upper"))
        assert source.changed() and source.reread()[0].generation == 2


def test_a_router_that_cannot_be_loaded_is_reported_once_and_watched_until_it_can(service: Path) -> None:
    with Source(service) as source:
        write(service, CONFIG.format(expert="loud", more="  other: {router: ./router}"))
        with pytest.raises(RouterError, match="is not a saved router"):
            source.reread()
        assert not source.changed()
        (service.parent / "router").mkdir()
        write(service.parent / "router" / "router.json", "{}")
        assert source.changed()


def test_what_needs_a_restart_is_named_and_left_as_it_is(service: Path) -> None:
    with Source(service) as source:
        write(service, CONFIG.format(expert="general", more="host: {aging_s: 1}\nserve: {port: 9999}"))
        catalog, fixed = source.reread()
        assert fixed == ["host", "serve"] and catalog.policies["default"].expert == "general"
        assert source.config.serve.port == 8000 and not source.changed()


POOLS = "serve: {{pools: [{{name: one, experts: [{one}]}}, {{name: two, experts: [{two}]}}]{more}}}"


def test_the_experts_of_pools_change_without_a_restart_and_nothing_else_of_them(service: Path) -> None:
    def pools(one: str, two: str, more: str = "") -> None:
        write(service, CONFIG.format(expert="loud", more=POOLS.format(one=one, two=two, more=more)))

    pools("general", "loud")
    with Source(service) as source:
        pools("loud", "loud, general")
        catalog, fixed = source.reread()
        assert fixed == [] and catalog.pools == {"one": ("loud",), "two": ("loud", "general")}
        pools("general", "loud", more=", port: 9999")
        catalog, fixed = source.reread()
        assert fixed == ["serve"] and catalog.pools["one"] == ("general",) and source.config.serve.port == 8000
        other = "serve: {pools: [{name: one, experts: [general]}, {name: three, experts: [loud]}]}"
        write(service, CONFIG.format(expert="loud", more=other))
        catalog, fixed = source.reread()
        assert fixed == ["serve"] and catalog.pools == {"one": ("general",), "two": ("loud",)}, "three has no process"
        pools("general", "general")
        with pytest.raises(ConfigError, match="policy 'default'"):  # loud would be served nowhere
            source.reread()
        assert source.catalog is catalog


def test_pins_change_with_the_experts_that_they_name(service: Path) -> None:
    def edit(one: str, two: str, host: str, pinned: str) -> None:
        pools = f"[{{name: one, experts: [{one}], pins: [{pinned}]}}, {{name: two, experts: [{two}]}}]"
        more = f"host: {{pins: [{host}]}}\nserve: {{pools: {pools}}}"
        write(service, CONFIG.format(expert="general", more=more))

    edit("loud", "general", "loud, general", "loud")
    with Source(service) as source:
        assert source.catalog.pins == {"one": ("loud",), "two": ("general",)}
        renamed = EXPERTS.format(loud="upper").replace("loud", "shouting")
        write(service.parent / "experts.yaml", renamed)
        edit("general", "shouting", "shouting", "general")
        catalog, fixed = source.reread()
        assert fixed == [] and catalog.pins == {"one": ("general",), "two": ("shouting",)}
        assert not source.changed()
        edit("general", "shouting", "loud", "general")
        with pytest.raises(ConfigError, match="host.pins: 'loud'"):
            source.reread()
        edit("general", "shouting", "shouting", "shouting")
        with pytest.raises(ConfigError, match="pins of serve.pools 'one': 'shouting'"):
            source.reread()
        assert source.catalog is catalog


def test_a_registry_is_watched_by_its_version(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    (tmp_path / "service.yaml").write_text(f"registry: {url}\n")
    with pytest.raises(ConfigError, match="no expert is registered"):
        Source(tmp_path / "service.yaml")
    with Registry(url) as registry:
        registry.add(ExpertSpec(name="a", kind=Kind.MODEL, source="fake://echo"))
        with Source(tmp_path / "service.yaml") as source:
            assert not source.changed()
            registry.add(ExpertSpec(name="b", kind=Kind.MODEL, source="fake://echo"))
            assert source.changed() and set(source.reread()[0].snapshot) == {"a", "b"}
            assert not source.changed()


@pytest.fixture
def registered(tmp_path: Path) -> Path:
    """A configuration with a registry that holds `a`."""
    (tmp_path / "service.yaml").write_text(f"registry: sqlite:///{tmp_path}/registry.db\n")
    made(tmp_path / "registry.db", "a")
    return tmp_path / "service.yaml"


def made(path: Path, *names: str) -> Path:
    with Registry(f"sqlite:///{path}") as registry:
        registry.change([ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo") for name in names])
    return path


def test_a_registry_file_in_place_of_another_is_read_even_if_its_version_is_the_same(registered: Path) -> None:
    with Source(registered) as source:
        assert not source.changed()
        made(registered.parent / "other.db", "b").replace(registered.parent / "registry.db")
        assert source.changed() and set(source.reread()[0].snapshot) == {"b"}
        assert not source.changed()


@pytest.mark.parametrize("damage", ["removed", "garbage", "overwritten", "newer"])
def test_a_registry_that_cannot_be_read_is_reported_once_and_read_when_it_is_back(
    registered: Path, damage: str
) -> None:
    path = registered.parent / "registry.db"
    with Source(registered) as source:
        before = source.catalog
        if damage == "newer":
            newer = made(registered.parent / "newer.db", "a")
            connection = sqlite3.connect(newer)
            with connection:
                connection.execute("UPDATE registry_state SET schema = 99")
            connection.close()
            newer.replace(path)
        elif damage == "overwritten":
            path.write_text("not a database " * 1000)
        else:
            path.rename(registered.parent / "aside.db")
            if damage == "garbage":
                path.write_text("not a database " * 1000)
        assert source.changed()
        with pytest.raises(StoreError, match="registry.db"):
            source.reread()
        assert source.catalog is before and not source.changed(), "reported once"
        made(registered.parent / "back.db", "a", "b").replace(path)
        assert source.changed() and set(source.reread()[0].snapshot) == {"a", "b"}


@pytest.mark.parametrize("damage", ["removed", "invalid"])
def test_an_experts_file_that_is_gone_or_invalid_changes_nothing_until_it_is_back(service: Path, damage: str) -> None:
    experts = service.parent / "experts.yaml"
    with Source(service) as source:
        before = source.catalog
        if damage == "removed":
            experts.unlink()
        else:
            write(experts, "experts: [")
        assert source.changed()
        with pytest.raises(InvalidSpec, match="experts.yaml"):
            source.reread()
        assert source.catalog is before and not source.changed()
        write(experts, EXPERTS.format(loud="upper"))
        assert source.changed() and source.reread()[0].generation == 2


def test_a_file_that_cannot_be_looked_at_is_a_change_and_not_an_exception(service: Path, tmp_path: Path) -> None:
    with Source(service) as source:
        folder = service.parent / "experts.yaml"
        folder.unlink()
        folder.symlink_to(folder)  # a loop
        assert source.changed()
        with pytest.raises(InvalidSpec, match="experts.yaml"):
            source.reread()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("host: {pins: [laud]}", "host.pins: 'laud'.*did you mean 'loud'"),
        ("serve: {pools: [{name: big, experts: [generl]}]}", "serve.pools 'big'.*did you mean 'general'"),
        ("serve: {pools: [{name: big, pins: [loud], experts: [general]}]}", "pins of serve.pools 'big'"),
        ("serve: {pools: [{name: one, experts: [general]}]}", "policy 'default'"),
        ("serve: {pools: [{}, {}]}", "pools need names of their own"),
        ("serve: {pools: []}", "there must be one"),
        ("serve: {gateway: {replicas: {min: 3, max: 2}}}", "min 3 is more than max 2"),
        ("serve: {gateway: {replicas: 0}}", "greater than or equal to 1"),
        ("serve: {port: 99999}", "port"),
    ],
)
def test_a_service_does_not_start_on_what_it_could_not_answer_with(service: Path, more: str, message: str) -> None:
    write(service, CONFIG.format(expert="loud", more=more))
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        Source(service)


def test_replicas_are_a_number_or_bounds(service: Path) -> None:
    bounds = "serve: {gateway: {replicas: 3}, pools: [{replicas: {max: 4, target: 8}}]}"
    write(service, CONFIG.format(expert="loud", more=bounds))
    with Source(service) as source:
        gateway, host = source.config.serve.gateway.replicas, source.config.serve.pools[0].replicas
        assert (gateway.min, gateway.max) == (3, 3) and (host.min, host.max, host.target) == (1, 4, 8)
