"""Hosts that die: whose work is done again, when the run ends, and what is left for the next stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from coe.batch import hosts
from coe.batch.answering import WorkReport
from coe.batch.errors import BatchError
from coe.batch.hosts import HostPool, is_death
from coe.batch.records import plain
from coe.errors import EngineError

Script = Callable[[int, int | None], Exception | None]
"""How a call ends: number of the host, and the number of the item or None as it opens; None: well."""
DEATHS = [
    RayActorError(),
    ActorDiedError(),
    ActorUnavailableError("gone", None),
    OutOfMemoryError("the node is short of memory"),
    NodeDiedError("gone"),
    WorkerCrashedError(),
]


def of_ours() -> Exception:
    """An error of a host's own code, as Ray raises it."""
    cause = EngineError("no such folder")
    return RayTaskError("open", "no such folder", cause).as_instanceof_cause()


class FakeRay:
    """Actors in this process, which answer by a script; their streams are ready in turns."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.started = self.waits = 0
        self.alive: set[int] = set()
        self.answered: list[tuple[int, Any]] = []

    def remote(self, actor: type) -> Any:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._start))

    def wait(self, streams: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        self.waits += 1
        at = self.waits % len(streams)
        return [streams[at]], streams[:at] + streams[at + 1 :]

    def get(self, value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    def kill(self, actor: Any) -> None:
        self.alive.remove(actor.number)

    def _start(self, job: object) -> Any:
        number, self.started = self.started, self.started + 1
        self.alive.add(number)
        return SimpleNamespace(
            number=number,
            open=SimpleNamespace(remote=lambda: self._stream(number, None)),
            answer=SimpleNamespace(remote=lambda stage, item, following: self._stream(number, item[0].number)),
        )

    def _stream(self, number: int, item: int | None) -> Iterator[Any]:
        end = self.script(number, item)
        if end is not None:
            yield end
        else:
            if item is not None:
                self.answered.append((number, item))
            yield {"work": None if item is None else plain(WorkReport()), "held": []}


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[HostPool, FakeRay]]:
    def build(script: Script, most: int = 2, most_deaths: int = 3) -> tuple[HostPool, FakeRay]:
        ray = FakeRay(script)
        monkeypatch.setattr(hosts, "ray", ray)
        return HostPool(None, {}, most, most_deaths), ray  # type: ignore[arg-type]

    return build


def items(count: int, first: int = 0) -> Any:
    """Work items, each of one unit."""
    return [(SimpleNamespace(residency=f"r{number}", number=number),) for number in range(first, first + count)]


@pytest.mark.parametrize("death", DEATHS, ids=lambda error: type(error).__name__)
def test_whatever_ray_calls_a_death_the_work_is_done_by_another_host(pool: Any, death: Exception) -> None:
    assert is_death(death)
    of, ray = pool(lambda host, item: death if (host, item) == (0, 1) else None, most=1)
    assert len(list(of.answer(0, items(3)))) == 3
    assert ray.answered == [(0, 0), (1, 1), (1, 2)] and ray.alive == {1}


def test_an_error_of_a_host_that_lives_ends_the_run_as_itself(pool: Any) -> None:
    assert not is_death(of_ours()) and not is_death(RayTaskError("f", "trace", ActorDiedError()))
    for at in (None, 0):
        of, ray = pool(lambda host, item, at=at: of_ours() if item == at else None, most=1)
        with pytest.raises(EngineError, match="no such folder"):
            list(of.answer(0, items(3)))
        assert ray.started == 1


def test_more_deaths_at_work_than_allowed_end_the_run_with_their_cause_in_each_stage_by_itself(pool: Any) -> None:
    killed = OutOfMemoryError("memory is\nlow " + "x" * 5000)
    left = {0: 3, 1: 4}

    def script(host: int, item: int | None) -> Exception | None:
        if item is None or not left[item]:
            return None
        left[item] -= 1
        return killed

    of, ray = pool(script)
    assert len(list(of.answer(0, items(1)))) == 1 and ray.started == 4
    with pytest.raises(
        BatchError, match="4 host processes died in stage 2, .*OutOfMemoryError: .*memory is low"
    ) as said:
        list(of.answer(1, items(1, first=1)))
    assert len(str(said.value)) < 600 and said.value.__cause__ is killed


def test_hosts_that_still_answer_as_a_stage_fails_do_no_work_in_the_next_call(pool: Any) -> None:
    """The numbers of their items mean others there."""
    of, ray = pool(lambda host, item: ActorDiedError() if item == 1 else None, most_deaths=0)
    with pytest.raises(BatchError, match="1 host processes died"):
        list(of.answer(0, items(2)))
    assert [item for _, item in ray.answered] == [0] and len(ray.alive) == 1
    [still_busy] = ray.alive
    assert len(list(of.answer(1, items(4, first=10)))) == 4
    assert sorted(item for _, item in ray.answered) == [0, 10, 11, 12, 13] and still_busy not in ray.alive


def test_the_hosts_of_a_call_that_was_left_early_do_no_work_in_the_next_one(pool: Any) -> None:
    of, ray = pool(lambda host, item: None, most=3)
    reports = of.answer(0, items(6))
    next(reports)
    reports.close()
    busy = {host.actor.number for host in of._hosts if host.item is not None}
    assert busy
    assert len(list(of.answer(1, items(4, first=10)))) == 4
    assert not busy & ray.alive
    assert sorted(item for _, item in ray.answered if item >= 10) == [10, 11, 12, 13]


def test_a_host_that_never_opens_does_not_end_the_stage_of_one_that_works(pool: Any) -> None:
    of, ray = pool(lambda host, item: OutOfMemoryError("low") if item is None and host != 0 else None)
    of._hosts.append(of._start())
    list(of._read(of._hosts[0], None, 0))  # the first is up
    assert len(list(of.answer(0, items(20)))) == 20
    assert {host for host, _ in ray.answered} == {0} and ray.started == 1 + 4  # no more restarts
    assert len(list(of.answer(1, items(20)))) == 20 and ray.started == 5


def test_where_no_host_opens_the_run_ends(pool: Any) -> None:
    of, ray = pool(lambda host, item: NodeDiedError("gone") if item is None else None)
    with pytest.raises(
        BatchError, match="4 host processes in a row died while they opened, the last with NodeDiedError"
    ):
        list(of.answer(0, items(5)))
    assert ray.started <= 5 and not ray.answered


def test_a_smaller_pool_replaces_the_host_that_is_left(pool: Any) -> None:
    """Memory has room for one host: a second one never opens, and the first one dies at work once."""
    fake: list[FakeRay] = []

    def script(host: int, item: int | None) -> Exception | None:
        if item is None:
            return OutOfMemoryError("low") if len(fake[0].alive) > 1 else None
        return ActorDiedError() if (host, item) == (0, 15) else None

    of, ray = pool(script)
    fake.append(ray)
    of._hosts.append(of._start())
    list(of._read(of._hosts[0], None, 0))
    assert len(list(of.answer(0, items(20)))) == 20
    assert len(ray.alive) == 1 and sorted(item for _, item in ray.answered) == list(range(20))
