"""`serve.placement`: pools by the work of a decision log, evenly without one, and never beside `serve.pools`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Semaphore

import pytest

from coe.cli import placement_process
from coe.cli.log_placer import LogPlacer
from coe.cli.placed_pools import place_pools
from coe.cli.placement_process import PlacementProcess
from coe.config import Config, load_config
from coe.errors import ConfigError
from coe.serve.cluster.pool_placement import RETRY_S, Compute, PlacedPools, in_thread
from coe.serve.cluster.source import Source

EXPERTS = """experts:
  - {name: a, kind: model, source: 'fake://echo', size_bytes: 8}
  - {name: b, kind: model, source: 'fake://echo', size_bytes: 4}
  - {name: c, kind: adapter, base: b, source: 'fake://echo', size_bytes: 1}
  - {name: d, kind: model, source: 'fake://echo', size_bytes: 4}
  - {name: far, kind: remote, source: 'https://example.com/v1', context_length: 4096}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "experts.yaml").write_text(EXPERTS)
    (tmp_path / "log").mkdir()
    return tmp_path


def config(place: Path, serve: str = "placement: {hosts: 2, log: log, threads: 3}", budget: str = "9") -> Config:
    path = place / "coe.yaml"
    path.write_text(
        f"experts: [experts.yaml]\nhost: {{budget: {budget}}}\nserve: {{{serve}}}\n"
        "policies: {default: {expert: b}}\n"
    )
    return load_config(path)


def log(place: Path, number: int = 1, requests: int = 100, **tokens: int) -> None:
    """Write a log in which each expert has so many requests, with so many new tokens each."""
    lines = [
        json.dumps(
            {
                "format": "coe-decision/1",
                "time": "2026-01-01T00:00:00",
                "expert": expert,
                "usage": {"prompt_tokens": 10, "completion_tokens": count},
            }
        )
        for expert, count in tokens.items()
        for _ in range(requests)
    ]
    (place / "log" / f"decisions-{number}.jsonl").write_text("\n".join(lines) + "\n")


def at_once(compute: Compute) -> Future[PlacedPools]:
    """Compute without a thread."""
    future: Future[PlacedPools] = Future()
    try:
        future.set_result(compute())
    except ConfigError as error:
        future.set_exception(error)
    return future


def opened(place: Path, said: list[str] | None = None, clock: Callable[[], float] = lambda: 0.0) -> Source:
    """The source of a service that computes its placements in this thread."""
    placer = LogPlacer([].append if said is None else said.append, place_pools)
    return Source(place / "coe.yaml", placer, clock=clock, start=at_once)


def reload(source: Source) -> list[str]:
    """Read the files again, and what is computed after that; the sections that need a restart."""
    _, fixed = source.reread()
    if source.changed():
        assert source.reread()[1] == []
    assert not source.changed()
    return fixed


def test_experts_are_placed_by_the_work_that_the_log_shows(place: Path) -> None:
    log(place, a=100, b=60, c=50, d=10)
    placed = place_pools(config(place))
    by_name = {pool.name: set(pool.experts or ()) for pool in placed.pools}
    assert sorted(map(sorted, by_name.values())) == [["a", "far"], ["b", "c", "d"]]
    assert all(pool.threads == 3 for pool in placed.pools)  # settings of each process
    assert placed.lines[0].startswith("by the work in ") and "0.0% of it fits no host" in placed.lines[0]
    assert any("a, far (4" in line for line in placed.lines)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no file"),
        ("", "no request to an expert with weights was answered"),
        ("{oops\n", "no file of it can be used"),
    ],
)
def test_without_a_usable_log_bytes_are_spread_evenly_with_a_note(place: Path, content: str | None, why: str) -> None:
    if content is not None:
        (place / "log" / "decisions-1.jsonl").write_text(content)
    placed = place_pools(config(place))
    assert {frozenset(pool.experts or ()) - {"far"} for pool in placed.pools} == {frozenset("a"), frozenset("bcd")}
    assert placed.lines[0].startswith("bytes spread evenly, since ") and f"shows no work: {why}" in placed.lines[0]


def test_a_line_that_is_being_written_hides_no_work_of_its_file(place: Path) -> None:
    log(place, number=1, a=10)
    log(place, number=2, d=1000, b=500)
    whole = place_pools(config(place))
    with (place / "log" / "decisions-2.jsonl").open("a") as file:
        file.write('{"format": "coe-decision/1", "time": "2026-')
    assert place_pools(config(place)) == whole


def test_damaged_files_are_left_out_by_name_and_many_are_counted(place: Path) -> None:
    log(place, a=100, b=60)
    whole = place_pools(config(place))
    for number in range(2, 7):
        (place / "log" / f"decisions-{number}.jsonl").write_text("{oops\n")
    placed = place_pools(config(place))
    first, *left_out = placed.lines[:5]
    assert placed.pools == whole.pools and (first, *placed.lines[5:]) == whole.lines
    for number, line in zip("654", left_out[:3], strict=True):
        assert f"decisions-{number}.jsonl:1: not a line of a decision log" in line
    assert all(line.startswith("left out of the log: ") for line in left_out) and left_out[3].endswith(" 2 more files")


def test_pools_and_placement_exclude_each_other_and_a_budget_is_needed(place: Path) -> None:
    with pytest.raises(ConfigError, match="give either `pools` or `placement`"):
        config(place, "placement: {hosts: 2}, pools: [{name: hosts}]")
    with pytest.raises(ConfigError, match=r"needs `host.budget`"):
        place_pools(config(place, budget="null"))


def test_a_service_takes_the_pools_and_at_a_reload_moves_what_must_and_no_more(place: Path) -> None:
    log(place, a=100, b=100, d=1)
    config(place, budget="11")
    said: list[str] = []
    with opened(place, said) as source:
        first = placed(source)
        of_a, of_b = (next(name for name in first if each in first[name]) for each in "ab")
        assert of_a != of_b and len(said) == 3
        assert source.catalog.snapshot.experts.keys() == {"a", "b", "c", "d", "far"}
        assert reload(source) == [] and len(said) == 3  # nothing changed
        log(place, a=104, b=100, d=3)
        assert reload(source) == [] and placed(source) == first and len(said) == 3  # not worth a load
        log(place, b=100, d=100)
        assert reload(source) == [] and len(said) == 6
        catalog = source.catalog
        assert catalog.pools == {pool.name: pool.experts for pool in source.config.serve.pools}
        parted = placed(source)
        assert "d" in parted[of_a] - parted[of_b] and "b" in parted[of_b] - parted[of_a], "the hot ones part"
        assert "a" in parted[of_a], "what nobody asks for stays"


def test_where_memory_holds_a_part_of_the_work_experts_move_for_a_gain_and_not_for_noise(place: Path) -> None:
    names = "abcdefgh"
    experts = [f"  - {{name: {name}, kind: model, source: 'fake://echo', size_bytes: 4}}\n" for name in names]
    (place / "experts.yaml").write_text("experts:\n" + "".join(experts))
    log(place, **dict.fromkeys(names, 1000))
    config(place, budget="8")
    said: list[str] = []
    with opened(place, said) as source:
        assert "50.0% of it fits no host" in said[0]
        before = placed(source)
        for number in range(3):
            log(place, **{name: 1000 + (index * 37 + number * 59) % 40 for index, name in enumerate(names)})
            reload(source)
            assert placed(source) == before
        one = next(experts for experts in before.values() if len(experts) >= 4)
        hot = sorted(one)[:4]  # together they do not fit their host
        log(place, **{name: 1000 if name in hot else 1 for name in names})
        reload(source)
        assert all(len(experts & {*hot}) == 2 for experts in placed(source).values())


def placed(source: Source) -> dict[str, set[str]]:
    """Pool -> its experts with weights."""
    return {pool.name: set(pool.experts or ()) - {"far"} for pool in source.config.serve.pools}


def test_an_expert_that_is_new_goes_to_the_lightest_host_and_one_that_is_gone_leaves_its_own(place: Path) -> None:
    log(place, a=100, b=50)
    config(place)
    with opened(place) as source:
        (of_b,) = (name for name, experts in placed(source).items() if "b" in experts)
        before = placed(source)
        added = EXPERTS.replace("  - {name: d,", "  - {name: n, kind: model, source: 'fake://echo', size_bytes: 1}\n#")
        (place / "experts.yaml").write_text(added)
        reload(source)
        assert placed(source) == before | {of_b: before[of_b] - {"d"} | {"n"}}


def test_it_is_computed_again_in_the_stated_time_and_only_moves_are_a_change(place: Path) -> None:
    log(place, a=100, b=100, d=1)
    config(place, "placement: {hosts: 2, log: log, every_s: 60}", budget="11")
    now = 0.0
    said: list[str] = []
    with opened(place, said, lambda: now) as source:
        before = placed(source)
        said.clear()
        now = 61
        assert not source.changed()  # nothing to move
        log(place, b=100, d=100)
        now = 100
        assert not source.changed()  # not due
        now = 122
        assert source.changed()
        source.reread()
        assert placed(source) != before and not source.changed()
        assert len(said) == 3, "it is computed and printed once"


def test_few_requests_move_nothing_and_place_nothing_by_their_work(place: Path) -> None:
    config(place, budget="30")  # each host could have them all
    with opened(place) as source:
        before = placed(source)
        log(place, requests=99, a=1000, b=1)
        reload(source)
        assert placed(source) == before
        evenly = place_pools(source.config)
        assert "198 answered requests to experts with weights, and 2 hosts need 200" in evenly.lines[0]
        assert evenly.lines[0].startswith("bytes spread evenly, since ") and "too little work" in evenly.lines[0]
        assert {pool.name: {*(pool.experts or ())} - {"far"} for pool in evenly.pools} == before
        log(place, requests=100, a=1000, b=1)
        reload(source)
        assert all("a" in experts for experts in placed(source).values()), "a copy of the hot one on each host"


def test_a_new_expert_without_any_work_goes_to_the_fewest_bytes_and_an_adapter_to_its_base(place: Path) -> None:
    config(place)
    with opened(place) as source:
        before = placed(source)
        (of_a,) = (name for name, experts in before.items() if "a" in experts)
        (of_b,) = (name for name, experts in before.items() if "b" in experts)
        assert "d" in before[of_b], "8 bytes each"
        new = "  - {name: n, kind: model, source: 'fake://echo', size_bytes: 1}\n"
        tuned = "  - {name: x, kind: adapter, base: a, source: 'fake://echo', size_bytes: 1}\n"
        (place / "experts.yaml").write_text(
            EXPERTS.replace("name: d, kind: model", "name: e, kind: model") + new + tuned
        )
        reload(source)
        after = placed(source)
        assert after[of_a] == before[of_a] | {"x"} and after[of_b] == before[of_b] - {"d"} | {"e", "n"}


def test_another_number_of_hosts_needs_a_restart_and_the_running_ones_keep_their_experts(place: Path) -> None:
    log(place, a=100, b=100)
    config(place)
    with opened(place) as source:
        before = source.config.serve
        config(place, "placement: {hosts: 3, log: log}")
        assert reload(source) == ["serve"] and source.config.serve == before


def test_another_log_counts_after_a_restart_and_until_then_no_expert_moves_by_it(place: Path) -> None:
    log(place, a=100, b=100, d=1)
    (place / "other").mkdir()
    config(place, "placement: {hosts: 2, log: log, every_s: 60}", budget="11")
    now = 0.0
    with opened(place, clock=lambda: now) as source:
        before = source.config.serve
        config(place, "placement: {hosts: 2, log: other, every_s: 60}", budget="11")
        lines = (place / "log" / "decisions-1.jsonl").read_text().replace('"a"', '"d"')
        (place / "other" / "decisions-1.jsonl").write_text(lines)
        assert reload(source) == ["serve"] and source.config.serve == before
        now = 61
        assert not source.changed()


def test_a_placement_that_failed_is_tried_again_so_that_its_error_does_not_stay(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(place, "placement: {hosts: 2, log: log, every_s: 600}")
    now, broken = 0.0, False
    computed = LogPlacer.compute

    def compute(self: LogPlacer, config: Config, running: Config | None) -> PlacedPools:
        if broken:
            raise ConfigError("the registry is locked")
        return computed(self, config, running)

    monkeypatch.setattr(LogPlacer, "compute", compute)
    said: list[str] = []
    with opened(place, said, lambda: now) as source:
        said.clear()
        now, broken = 601, True
        with pytest.raises(ConfigError, match="locked"):
            source.changed()
        assert not source.changed()  # not due
        now, broken = 601 + RETRY_S, False
        assert source.changed() and source.reread()[1] == []
        now += RETRY_S
        assert not source.changed() and said == []


def test_a_reload_does_not_wait_for_the_solver_and_drops_what_was_computed_for_the_catalog_before(place: Path) -> None:
    log(place, a=100, b=100, d=1)
    config(place, budget="11")
    begun, go_on = Semaphore(0), Semaphore(0)
    seen: list[Config] = []

    def compute(config: Config, running: Config) -> PlacedPools:
        seen.append(config)
        begun.release()
        assert go_on.acquire(timeout=30)
        return place_pools(config, running)

    def solved(source: Source) -> bool:
        """Let the solver end; whether that moves an expert."""
        go_on.release()
        computing = source._placement._running
        assert computing is not None
        computing[1].result(30)
        return source.changed()

    def add(name: str) -> None:
        with (place / "experts.yaml").open("a") as file:
            file.write(f"  - {{name: {name}, kind: model, source: 'fake://echo', size_bytes: 1}}\n")

    with Source(place / "coe.yaml", LogPlacer([].append, compute)) as source:
        before = placed(source)
        log(place, b=100, d=100)
        add("new")
        assert source.changed() and "new" in source.reread()[0].snapshot  # a first reload
        assert not source.changed() and begun.acquire(timeout=30), "its placement is being computed"
        add("newer")
        assert source.changed() and "newer" in source.reread()[0].snapshot
        assert {name: experts - {"new", "newer"} for name, experts in placed(source).items()} == before
        assert not solved(source), "it was computed for the catalog before"
        assert not source.changed() and begun.acquire(timeout=30)
        assert solved(source) and seen[-1] is source.config
        assert source.reread()[1] == []
        parted = placed(source)
        assert not any({"b", "d"} <= experts for experts in parted.values()), "the hot ones part"
        assert {"new", "newer"} <= set.union(*parted.values()) and not source.changed()


def test_an_error_of_the_solver_is_reported_and_ends_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(place)
    with opened(place) as source:
        monkeypatch.setattr(LogPlacer, "compute", lambda *_: 1 / 0)
        source.reread()
        source._placement._start = in_thread
        for _ in range(3000):
            try:
                assert not source.changed()
            except ConfigError as error:
                assert "serve.placement cannot be computed: ZeroDivisionError" in str(error)
                break
            time.sleep(0.01)
        else:
            pytest.fail("no error")
        assert not source.changed()


def test_a_process_computes_the_placement_of_a_running_service_and_ends_with_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(place, a=100, b=100, d=1)
    first = place_pools(config(place, budget="11")).pools
    swapped = [pool.model_copy(update={"experts": first[1 - number].experts}) for number, pool in enumerate(first)]
    running = config(place, budget="11").with_pools(swapped)
    process = PlacementProcess()
    placed = process.compute(running, running)
    assert placed == place_pools(running, running) and placed.pools == running.serve.pools != first
    (place / "experts.yaml").write_text("experts: [")
    with pytest.raises(ConfigError, match="experts.yaml"):
        process.compute(running, running)
    monkeypatch.setattr(placement_process, "LIMIT_S", 0.01)
    with pytest.raises(ConfigError, match="more than 0.01 s"):
        process.compute(running, running)
    process.close()
    with pytest.raises(ConfigError, match="exit code -9"):
        process.compute(running, running)


def test_explicit_pools_stay_as_they_are(place: Path) -> None:
    log(place, a=100, b=100)
    config(place, "pools: [{name: one, experts: [a]}, {name: two}]")
    said: list[str] = []
    with opened(place, said) as source:
        assert source.config == load_config(place / "coe.yaml") and said == []
        assert reload(source) == [] and source.config == load_config(place / "coe.yaml")
