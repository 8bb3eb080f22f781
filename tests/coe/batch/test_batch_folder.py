"""The folder of a batch: resumed with --resume, refused with the differences, on local disks and remote storage."""

import json
from pathlib import Path

import fsspec
import pytest
from batch_runs import MIXED, Quiet, results, run, service, write_lines

from coe.batch.errors import InputError
from coe.runs.errors import RunFolderError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    service(tmp_path)
    write_lines(tmp_path / "in.jsonl", MIXED[:12])
    return tmp_path


def again(place: Path, resume: bool = True, model: str = "auto") -> dict[str, object]:
    return run(place / "service.yaml", place / "in.jsonl", place / "out", resume=resume, model=model)


def test_a_folder_that_holds_a_run_wants_resume_and_then_has_nothing_to_do(place: Path) -> None:
    first = again(place, resume=False)
    with pytest.raises(RunFolderError, match=r"holds this run already \(complete\): add --resume .*another --out"):
        again(place, resume=False)
    before = {path.name: path.stat().st_mtime_ns for path in (place / "out").iterdir() if path.name != ".lock"}
    assert again(place) == first
    assert before == {path.name: path.stat().st_mtime_ns for path in (place / "out").iterdir() if path.name != ".lock"}


@pytest.mark.parametrize(
    ("file", "old", "new", "difference"),
    [
        ("in.jsonl", "hello 0", "hello X", r"input: ~sha256 \w+ -> \w+"),
        ("service.yaml", "fallback: base", "fallback: loud", "policies: ~shaky"),
        ("service.yaml", "default: {expert: loud}", "default: {expert: base}", "policies: ~default"),
        ("service.yaml", "policies:", "engines: {fake: {capacity: 9}}\npolicies:", "engines: ~fake"),
        ("experts.yaml", 'fake://upper", context_length: 64, size_bytes: 100', 'fake://echo"', "experts: ~loud"),
    ],
)
def test_the_folder_of_another_run_is_refused_saying_what_differs(
    place: Path, file: str, old: str, new: str, difference: str
) -> None:
    again(place, resume=False)
    text = (place / file).read_text()
    assert old in text
    (place / file).write_text(text.replace(old, new, 1))
    with pytest.raises(RunFolderError, match=rf"holds another run \(.*{difference}.*another --out"):
        again(place)


def test_an_input_that_is_rewritten_during_the_run_stops_it_and_its_rows_join_no_other(place: Path) -> None:
    original = write_lines(place / "in.jsonl", MIXED[:200]).read_text()
    rewritten = original.replace("hello 1", "hullo 1")
    run(place / "service.yaml", place / "in.jsonl", place / "one")

    class Rewrites(Quiet):
        def advance(self, name: str, done: int, failed: int = 0) -> None:
            if self.phases[-1][0] == "routing":  # the first part was read
                (place / "in.jsonl").write_text(rewritten)

    with pytest.raises(InputError, match=r"in\.jsonl: changed while it was read"):
        run(place / "service.yaml", place / "in.jsonl", place / "out", watch=Rewrites())
    with pytest.raises(RunFolderError, match=r"holds another run \(input: ~sha256"):
        again(place)
    (place / "in.jsonl").write_text(original)
    again(place)
    assert results(place / "out") == results(place / "one") and len(rewritten) == len(original)


def test_another_default_model_is_another_run(place: Path) -> None:
    again(place, resume=False)
    with pytest.raises(RunFolderError, match=r"\(model: auto -> base\)"):
        again(place, model="base")


def test_what_does_not_change_answers_may_change(place: Path) -> None:
    again(place, resume=False)
    experts = place / "experts.yaml"
    experts.write_text(experts.read_text() + '  - {name: newer, kind: model, source: "fake://echo"}\n')
    config = place / "service.yaml"
    config.write_text(config.read_text().replace("budget: 100", "budget: 300") + "batch: {hosts: {replicas: 2}}\n")
    (place / "in.jsonl").rename(place / "moved.jsonl")
    assert run(config, place / "moved.jsonl", place / "out", resume=True)["status"] == "complete"


def test_a_folder_in_use_a_file_and_files_of_others_are_refused(place: Path) -> None:
    class Second(Quiet):
        def phase(self, name: str, totals: object) -> None:
            if name == "routing":
                with pytest.raises(RunFolderError, match="in use by another"):
                    again(place)
                seen.append(name)

        def advance(self, name: str, done: int, failed: int = 0) -> None:
            pass

    seen: list[str] = []
    run(place / "service.yaml", place / "in.jsonl", place / "out", watch=Second())
    assert seen == ["routing"]
    (place / "out" / "run.json").write_text('{"status": "mine"}')
    with pytest.raises(RunFolderError, match="was not written by `coe batch`"):
        again(place)
    (place / "out" / "run.json").unlink()
    (place / "out" / "parts").mkdir()
    (place / "out" / "parts" / "x").write_text("")
    with pytest.raises(RunFolderError, match="parts but no run.json"):
        again(place)
    with pytest.raises(RunFolderError, match="is a file"):
        run(place / "service.yaml", place / "in.jsonl", place / "in.jsonl")


def test_a_run_on_another_file_system_gives_the_same_files(place: Path) -> None:
    again(place, resume=False)
    memory = fsspec.filesystem("memory")
    memory.pipe(f"{place}/in.jsonl", (place / "in.jsonl").read_bytes())
    found = run(place / "service.yaml", f"memory://{place}/in.jsonl", f"memory://{place}/out")
    assert found["status"] == "complete"
    for name in ("results.parquet", "results.jsonl"):
        assert memory.cat(f"{place}/out/{name}") == (place / "out" / name).read_bytes()
    kept = {path.rpartition("/")[2] for path in memory.find(f"{place}/out")}
    assert kept == {"results.parquet", "results.jsonl", "run.json"}
    assert json.loads(memory.cat(f"{place}/out/run.json"))["status"] == "complete"
