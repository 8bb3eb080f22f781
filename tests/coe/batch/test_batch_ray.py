"""The same runs on Ray Data, in many processes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from batch_runs import MIXED, Quiet, Stop, records, results, run, service, write_lines

from coe.batch.errors import BatchError
from coe.batch.parts import Job
from coe.batch.run import run_batch
from coe.batch.runner import RayExecutor, _cause, ray_executor
from coe.config import BatchConfig, load_config
from registry.errors import DiskFull
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray Data warns about its own settings
    pytest.mark.filterwarnings("ignore::ResourceWarning:ray"),
]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """One small Ray for the module; a run joins it and leaves it running."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=6,
            num_gpus=2,  # declared: nothing here computes on one
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    service(tmp_path)
    write_lines(tmp_path / "in.jsonl", MIXED)
    return tmp_path


def on_ray(
    place: Path, output: str, watch: Quiet | None = None, batch: BatchConfig | None = None, **options: Any
) -> dict[str, Any]:
    config = load_config(place / "service.yaml")
    return run_batch(
        config,
        source=str(place / "in.jsonl"),
        output=str(place / output),
        executor=lambda: ray_executor(batch or config.batch),
        watch=watch or Quiet(),
        **options,
    )


def hosts_alive() -> list[psutil.Process]:
    """The processes of hosts."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "_HostActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


class StopWhen(Quiet):
    """Stops the run at the n-th advance of a phase, as Ctrl-C would."""

    def __init__(self, phase: str, advances: int) -> None:
        super().__init__()
        self.at, self.left = phase, advances

    def advance(self, name: str, done: int, failed: int = 0) -> None:
        if self.phases[-1][0] == self.at:
            self.left -= 1
            if self.left < 0:
                raise Stop


def test_on_ray_the_files_are_those_of_one_process(place: Path) -> None:
    run(place / "service.yaml", place / "in.jsonl", place / "one")
    watch = Quiet()
    found = on_ray(place, "ray", watch)
    assert results(place / "ray") == results(place / "one")
    [session] = found["sessions"]
    assert session["loads"] == {"base": 2, "loud": 1} and session["failures"]["broken"] == 100
    for name, totals in watch.phases:
        for each, total in totals.items():
            assert watch.done[name, each] == total
    assert ray.is_initialized()  # it ran before


def test_where_memory_holds_two_each_expert_is_loaded_once_in_all_stages(place: Path) -> None:
    run(place / "service.yaml", place / "in.jsonl", place / "one")
    path = service(place, more="engines: {fake: {load_delay_s: 0.2}}\n")
    path.write_text(path.read_text().replace("budget: 100", "budget: 200"))
    [session] = on_ray(place, "ray")["sessions"]
    assert results(place / "ray") == results(place / "one")
    assert session["loads"] == {"base": 1, "loud": 1} and session["loaded_bytes"] == 200
    assert session["load_s"] >= 0.4 and set(session["work_s"]) == {"base", "loud"}


def test_interrupted_and_resumed(place: Path) -> None:
    run(place / "service.yaml", place / "in.jsonl", place / "one")
    with pytest.raises(Stop):
        on_ray(place, "ray", StopWhen("answering, stage 1", 1))
    assert json.loads((place / "ray" / "run.json").read_text())["status"] == "interrupted"
    _, alive = psutil.wait_procs(hosts_alive(), timeout=20)
    assert not alive  # they end with the run, and what they hold
    on_ray(place, "ray", resume=True)
    assert results(place / "ray") == results(place / "one")


def test_hosts_side_by_side_on_shares_of_a_gpu_answer_the_same(place: Path) -> None:
    """They get the GPUs that they ask for."""
    run(place / "service.yaml", place / "in.jsonl", place / "one")
    service(place, more="batch: {hosts: {replicas: 2, num_cpus: 0.1, num_gpus: 0.5, threads: 2}}\n")
    found = on_ray(place, "ray")
    assert results(place / "ray") == results(place / "one")
    assert 2 <= sum(found["sessions"][0]["loads"].values()) <= 6


def test_a_host_that_is_killed_is_replaced_and_its_work_done_again(place: Path) -> None:
    run(place / "service.yaml", place / "in.jsonl", place / "one")
    service(place, more="engines: {fake: {token_delay_s: 0.02, capacity: 2}}\n")

    class Killing(Quiet):
        killed = False

        def advance(self, name: str, done: int, failed: int = 0) -> None:
            super().advance(name, done, failed)
            if self.phases[-1][0].startswith("answering") and not self.killed:
                self.killed = True
                for process in hosts_alive():
                    process.kill()

    watch = Killing()
    on_ray(place, "ray", watch)
    assert watch.killed and records(place / "ray") == records(place / "one")


def test_a_host_that_dies_repeatedly_ends_the_batch_with_an_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coe.batch.runner._DEATHS", 1)
    service(place, more="engines: {fake: {token_delay_s: 0.2, capacity: 1}}\n")
    write_lines(place / "in.jsonl", [{"prompt": f"some words {i}", "model": "loud"} for i in range(200)])
    deaths = 0

    class Deadly(Quiet):
        def advance(self, name: str, done: int, failed: int = 0) -> None:
            nonlocal deaths
            if self.phases[-1][0].startswith("answering"):
                for process in hosts_alive():
                    deaths += 1
                    process.kill()

    with pytest.raises(BatchError, match="2 host processes died in stage 1, the last with .*--resume"):
        on_ray(place, "ray", Deadly())
    assert deaths >= 2
    assert json.loads((place / "ray" / "run.json").read_text())["status"] == "stopped"


def test_an_error_of_ours_comes_through_ray_as_itself(place: Path) -> None:
    class Shrinks(Quiet):
        def phase(self, name: str, totals: Mapping[str, int]) -> None:
            super().phase(name, totals)
            if name == "routing":
                (place / "in.jsonl").write_text("gone\n")

    with pytest.raises(BatchError, match="changed while it was read"):
        on_ray(place, "ray", Shrinks())


def test_errors_are_found_in_what_ray_wraps_them_in() -> None:
    try:
        try:
            raise DiskFull(Path("/x"), free_bytes=0)
        except DiskFull as inner:
            raise RuntimeError("wrapped") from inner
    except RuntimeError as outer:
        assert isinstance(_cause(outer), DiskFull)
    assert "the batch stopped: odd" in str(_cause(ValueError("odd")))


def test_an_address_without_a_ray_cluster_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with (
        pytest.raises(BatchError, match="no Ray cluster at '10.0.0.1:6379': refused"),
        ray_executor(BatchConfig(ray="10.0.0.1:6379")),
    ):
        pass


def test_a_ray_of_its_own_has_room_for_every_host(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    ended: list[Sequence[object]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: given.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda *arguments: ended.append(arguments))
    config = BatchConfig.model_validate({"hosts": {"replicas": 8, "num_cpus": 0.5}})
    with ray_executor(config) as executor:
        assert executor.hosts == 8 and not ended
    assert len(ended) == 1 and given[0]["num_cpus"] >= 8 * 0.5 + 2
    assert given[0]["address"] == "local" and given[0]["include_dashboard"] is False


def hosts_with(num_gpus: float | None, replicas: int = 2) -> BatchConfig:
    return BatchConfig.model_validate({"hosts": {"replicas": replicas, "num_gpus": num_gpus}})


def test_more_gpus_than_the_ray_of_a_run_has_are_refused(place: Path) -> None:
    with pytest.raises(BatchError, match=r"asks for 3 GPUs \(`batch.hosts.num_gpus`\), and Ray has 2"):
        on_ray(place, "too-many", batch=hosts_with(3))


def test_hosts_that_compute_on_a_gpu_share_those_there_are(place: Path) -> None:
    config = load_config(place / "service.yaml")
    weights = ExpertSpec(name="m", kind=Kind.MODEL, source="/models/m")
    fake = ExpertSpec(name="f", kind=Kind.MODEL, source="fake://echo")

    def share(spec: ExpertSpec, replicas: int) -> float:
        job = Job(None, None, config, Snapshot(1, {spec.name: spec}), "auto")  # type: ignore[arg-type]
        return RayExecutor(hosts_with(None, replicas))._gpus(job)

    assert [share(weights, replicas) for replicas in (1, 2, 3)] == [1, 1, 0.5] and share(fake, 1) == 0
