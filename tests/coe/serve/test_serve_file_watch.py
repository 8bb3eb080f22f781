"""Files of served experts that change on disk: noticed, hashed only then, and said until they are as registered."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from coe.serve.cluster import file_watch
from coe.serve.cluster.file_watch import FileWatch
from registry.digest import digest_of, hash_files
from registry.spec import ExpertSpec, Kind


def expert(folder: Path, name: str = "m") -> ExpertSpec:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(name.encode() * 100)
    records = hash_files(folder)
    digest = digest_of(records)
    return ExpertSpec(name=name, kind=Kind.MODEL, source=str(folder), digest=digest, files=records, version=1)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The experts whose files were hashed."""
    done: list[str] = []
    check = file_watch.check_files

    def counted(spec: ExpertSpec, path: Path) -> None:
        done.append(spec.name)
        check(spec, path)

    monkeypatch.setattr(file_watch, "check_files", counted)
    return done


def problems(watch: FileWatch, *experts: ExpertSpec) -> list[str]:
    watch.look(experts)
    return [problem for _, problem in sorted(watch._problems.items())]


def truncate(weights: Path) -> None:
    os.truncate(weights, 7)


def overwrite(weights: Path) -> None:
    """Other content of the same size."""
    weights.write_bytes(b"x" * weights.stat().st_size)
    os.utime(weights, ns=(1, 1))


def new_file(weights: Path) -> None:
    weights.with_name("tokenizer.json").write_text("{}")


def replace(weights: Path) -> None:
    other = weights.with_name("other")
    other.write_bytes(b"y" * 200)
    other.replace(weights)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, "model.safetensors is truncated"),
        (overwrite, "model.safetensors differs"),
        (replace, "model.safetensors differs"),
        (new_file, "tokenizer.json is new"),
        (Path.unlink, "model.safetensors is missing"),
    ],
)
def test_a_change_is_noticed_and_named_until_the_files_are_back(
    tmp_path: Path, hashed: list[str], change: Callable[[Path], None], words: str
) -> None:
    one, other = expert(tmp_path / "m"), expert(tmp_path / "n", "n")
    whole = shutil.copytree(tmp_path / "m", tmp_path / "whole")
    watch = FileWatch()
    assert problems(watch, one, other) == [] and hashed == [], "the first look compares names and sizes"
    assert problems(watch, one, other) == [] and hashed == []
    change(tmp_path / "m" / "model.safetensors")
    [problem] = problems(watch, one, other)
    assert words in problem and "m@1" in problem and hashed == ["m"]
    assert problems(watch, one, other) == [problem] and hashed == ["m"], "hashed once per change"
    shutil.rmtree(tmp_path / "m")
    shutil.copytree(whole, tmp_path / "m", copy_function=shutil.copy)
    assert problems(watch, one, other) == [] and hashed == ["m", "m"]


def test_a_touched_file_is_hashed_once_and_no_problem(tmp_path: Path, hashed: list[str]) -> None:
    spec = expert(tmp_path / "m")
    watch = FileWatch()
    problems(watch, spec)
    os.utime(tmp_path / "m" / "config.json", ns=(5, 5))
    assert problems(watch, spec) == [] and problems(watch, spec) == [] and hashed == ["m"]


def test_files_that_were_wrong_from_the_start_are_found_by_their_sizes(tmp_path: Path, hashed: list[str]) -> None:
    spec = expert(tmp_path / "m")
    truncate(tmp_path / "m" / "model.safetensors")
    [problem] = problems(FileWatch(), spec)
    assert "truncated" in problem


def test_a_folder_that_is_gone_is_a_problem_until_it_is_back_or_the_expert_is_not_served(tmp_path: Path) -> None:
    spec = expert(tmp_path / "m")
    watch = FileWatch()
    assert problems(watch, spec) == []
    (tmp_path / "m").rename(tmp_path / "aside")
    assert problems(watch, spec) == [f"the files of 'm' are missing: {tmp_path / 'm'}"]
    assert problems(watch) == []
    (tmp_path / "aside").rename(tmp_path / "m")
    assert problems(watch, spec) == []


def test_an_expert_registered_again_with_its_new_files_is_no_problem(tmp_path: Path) -> None:
    spec = expert(tmp_path / "m")
    watch = FileWatch()
    problems(watch, spec)
    overwrite(tmp_path / "m" / "model.safetensors")
    assert len(problems(watch, spec)) == 1
    records = hash_files(tmp_path / "m")
    again = spec.model_copy(update={"version": 2, "files": records, "digest": digest_of(records)})
    assert problems(watch, again) == []


def test_experts_without_files_and_repositories_that_are_not_here_are_left_alone(hashed: list[str]) -> None:
    fake = ExpertSpec(name="f", kind=Kind.MODEL, source="fake://echo", digest="sha256:1")
    hub = ExpertSpec(name="h", kind=Kind.MODEL, source="hf://nobody/nothing", digest="sha256:2", revision="0" * 40)
    watch = FileWatch()
    assert problems(watch, fake, hub) == [] and problems(watch, fake, hub) == [] and hashed == []


def test_looks_run_beside_the_caller_one_at_a_time_and_not_more_often_than_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, looks, go_on = 0.0, 0, threading.Event()
    spec = expert(tmp_path / "m")

    def slow(spec: ExpertSpec) -> None:
        nonlocal looks
        looks += 1
        go_on.wait(10)

    monkeypatch.setattr(file_watch, "_stamp", slow)
    watch = FileWatch(period_s=10, clock=lambda: now)
    assert watch.problems([spec]) == []
    now = 25.0
    assert watch.problems([spec]) == [] and looks == 1, "the first look still runs"
    go_on.set()
    assert watch._thread is not None
    watch._thread.join()
    assert len(watch.problems([spec])) == 1
    assert watch._thread is not None
    watch._thread.join()
    watch.problems([spec])
    assert looks == 2, "it is not time for a third"
