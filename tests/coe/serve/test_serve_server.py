"""`Server.watch` without Ray: what it pushes, prints once, and shows in the health of the gateways."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from coe.errors import ConfigError
from coe.serve.cluster import deployed, server
from coe.serve.cluster.server import Server
from coe.serve.cluster.source import Source
from registry.digest import digest_of, hash_files
from registry.spec import ExpertSpec, Kind
from registry.store import Registry


class Watched:
    """A server over real files, whose deployed processes are a list of what they were told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "service.yaml").write_text(f"registry: sqlite:///{folder}/registry.db\nserve: {{watch_s: 0.001}}\n")
        self.source = Source(folder / "service.yaml")
        self.said: list[tuple[str, str]] = []
        self.shown: list[list[str]] = []
        self.server = Server(self.source, lambda part, what: self.said.append((part, what)))
        monkeypatch.setattr(self.server, "_tell_health", lambda before: before)
        monkeypatch.setattr(self.server, "_run", lambda: None)
        monkeypatch.setattr(self.server, "_await_running", lambda tell, otherwise: None)
        monkeypatch.setattr(deployed, "behind", lambda generation: 0)
        monkeypatch.setattr(deployed, "show_warnings", self.shown.append)

    def look(self, times: int = 1) -> list[tuple[str, str]]:
        """Look at the inputs so many times, with finished looks at the files; returns what was printed."""
        self.said.clear()
        for _ in range(times):
            self.server._files.look(self.source.catalog.snapshot.experts.values())
            self.server.watch(Rounds(1))  # type: ignore[arg-type]
        return self.said


class Rounds:
    """A stop event that is set after so many waits."""

    def __init__(self, left: int) -> None:
        self.left = left

    def wait(self, timeout: float) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"weights")
    made(tmp_path / "registry.db", tmp_path / "m", "a")
    return Watched(tmp_path, monkeypatch)


def made(path: Path, model: Path, *names: str) -> Path:
    records = hash_files(model)
    local: dict[str, Any] = {"source": str(model), "digest": digest_of(records), "files": records}
    specs = [ExpertSpec(name=name, kind=Kind.MODEL, source="fake://echo") for name in names]
    with Registry(f"sqlite:///{path}") as registry:
        registry.change([*specs, ExpertSpec(name="m", kind=Kind.MODEL, **local)])
    return path


def test_nothing_changes_and_nothing_is_said(watched: Watched) -> None:
    assert watched.look(3) == [] and watched.shown == []


def test_a_registry_that_is_removed_is_said_once_and_shown_until_it_is_back(watched: Watched, tmp_path: Path) -> None:
    (tmp_path / "registry.db").rename(tmp_path / "aside.db")
    [(part, what)] = watched.look(3)
    assert part == "not reloaded" and "registry.db" in what and "continues unchanged" in what
    assert len(watched.shown) == 3 and all("not reloaded: the registry" in shown[0] for shown in watched.shown)
    (tmp_path / "aside.db").rename(tmp_path / "registry.db")
    assert [part for part, _ in watched.look(2)] == ["reloaded"] and watched.shown[3:] == [[]]


def test_another_registry_in_its_place_is_pushed(watched: Watched, tmp_path: Path) -> None:
    made(tmp_path / "other.db", tmp_path / "m", "b").replace(tmp_path / "registry.db")
    [(place, replaced), (part, what)] = watched.look(2)
    assert place == "registry" and "another database file" in replaced
    assert part == "reloaded" and "added b" in what and "removed a" in what
    with Registry(f"sqlite:///{tmp_path}/registry.db") as registry:
        registry.add(ExpertSpec(name="c", kind=Kind.MODEL, source="fake://echo"))
    assert [part for part, _ in watched.look(2)] == ["reloaded"], "the same file, changed"


@pytest.mark.parametrize("failure", ["Ray", "a process", "a gateway"])
def test_a_change_that_does_not_reach_every_process_is_pushed_again(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    now, pushed, broken = 0.0, [], True  # type: ignore[var-annotated]

    def run() -> None:
        pushed.append(watched.source.catalog.generation)
        if failure == "Ray" and broken:
            raise RayActorError(error_msg="the controller died")

    def await_running(tell: Any, otherwise: str) -> None:
        if failure == "a process" and broken:
            raise ConfigError(f"{otherwise}: out of order")

    monkeypatch.setattr(watched.server, "_run", run)
    monkeypatch.setattr(watched.server, "_await_running", await_running)
    monkeypatch.setattr(deployed, "behind", lambda generation: int(failure == "a gateway" and broken))
    monkeypatch.setattr(server.time, "monotonic", lambda: now)
    with Registry(f"sqlite:///{tmp_path}/registry.db") as registry:
        registry.add(ExpertSpec(name="b", kind=Kind.MODEL, source="fake://echo"))
    [(part, what)] = watched.look(3)
    assert part == "not reloaded" and what.endswith("\nIt is tried again.") and pushed == [2]
    assert "the controller died" in what or "reached every process: out" in what or "1 gateways failed" in what
    assert [len(shown) for shown in watched.shown] == [1, 1, 1], "in /health until it is served"
    now = server.RETRY_S
    assert watched.look(3) == [] and pushed == [2, 3], "the same reason is not printed again"
    now += server.RETRY_S
    assert watched.look() == [] and pushed == [2, 3], "later each time"
    now, broken = now + server.RETRY_S, False
    [(part, what)] = watched.look(3)
    assert part == "reloaded" and what.startswith("added b;") and pushed == [2, 3, 4]
    assert watched.shown[-1] == []
    now += server.MOST_RETRY_S
    assert watched.look(3) == [] and pushed == [2, 3, 4]


def test_a_change_that_is_invalid_while_another_is_pushed_again_is_reported_and_both_are_served_in_the_end(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, behind = 0.0, 1
    monkeypatch.setattr(deployed, "behind", lambda generation: behind)
    monkeypatch.setattr(server.time, "monotonic", lambda: now)
    config = tmp_path / "service.yaml"
    valid = config.read_text()
    config.write_text(valid + "policies: {default: {expert: a}}\n")
    assert [part for part, _ in watched.look(2)] == ["not reloaded"]
    config.write_text(valid + "policies: {default: {expert: nobody}}\n")
    [(part, what)] = watched.look(2)
    assert part == "not reloaded" and "'nobody'" in what
    now = 10 * server.RETRY_S
    assert watched.look() == [], "the same reason"
    config.write_text(valid + "policies: {default: {expert: a}, more: {expert: m}}\n")
    behind = 0
    [(part, what)] = watched.look(2)
    assert part == "reloaded" and "policies default, more" in what


def test_changed_files_of_an_expert_are_said_once_and_shown_until_they_are_as_registered(
    watched: Watched, tmp_path: Path
) -> None:
    weights = tmp_path / "m" / "model.safetensors"
    watched.look()
    weights.write_bytes(b"others!")
    os.utime(weights, ns=(1, 1))
    [(part, what)] = watched.look(3)
    assert part == "files" and "model.safetensors differs" in what and "the next load is refused" in what
    assert [len(shown) for shown in watched.shown] == [1, 1, 1]
    weights.write_bytes(b"weights")
    [(part, what)] = watched.look(2)
    assert part == "files" and what.startswith("as registered again") and watched.shown[3:] == [[]]


def test_a_start_that_takes_long_shows_every_ten_seconds_what_it_waits_for(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def status(hosts: str) -> Any:
        deployments = {
            "gateway": SimpleNamespace(status="HEALTHY", message="", replica_states={"RUNNING": 1}),
            "hosts": SimpleNamespace(status=hosts, message="", replica_states={"RUNNING": 1}),
        }
        return SimpleNamespace(deployments=deployments)

    def await_running(tell: Any) -> None:
        nonlocal now
        for second in range(25):  # Serve is asked more often than something is printed
            now = float(second)
            tell(status("UPDATING"))
        tell(status("HEALTHY"))

    monkeypatch.setattr(server.time, "perf_counter", lambda: now)
    monkeypatch.setattr(watched.server, "_await_running", await_running)
    monkeypatch.setattr(deployed, "states", lambda pool: [])
    watched.server._deploy()
    progress = [what for part, what in watched.said if part == "starting"]
    assert progress == ["hosts, 11.0 s so far", "hosts, 22.0 s so far"]
    assert watched.said[-1] == ("hosts", "1 up in 24.0 s")
