"""Files by URL, on this machine and elsewhere; the folder of a run and whose it is."""

import json
from pathlib import Path

import fsspec
import pytest
from batch_runs import MIXED, Quiet, run, service, write_lines

from coe.batch.errors import BatchError, BatchFolderError
from coe.batch.storage import Folder


@pytest.fixture(params=["path", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    urls = {"path": str(tmp_path / "f"), "file": (tmp_path / "f").as_uri(), "memory": f"memory://{tmp_path}"}
    return Folder.of(urls[request.param])


def test_what_is_written_is_there_whole_and_can_be_sought(folder: Folder) -> None:
    assert not folder.exists("a/b.bin") and folder.names("a") == frozenset()
    for content in (b"first", b"second"):
        with folder.write("a/b.bin") as file:
            file.write(content)
    with folder.open("a/b.bin") as file:
        file.seek(3)
        assert file.read() == b"ond"
    with folder.write("a/deeper/c.bin") as file:
        file.write(b"")
    assert folder.names("a") == {"b.bin", "c.bin"} and folder.exists("a/b.bin")
    folder.remove("a")
    folder.remove("a")
    assert not folder.exists("a/b.bin")


def test_a_write_that_fails_leaves_what_was_there(folder: Folder) -> None:
    with folder.write("a.bin") as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), folder.write("a.bin") as file:
        file.write(b"half")
        raise RuntimeError
    with folder.open("a.bin") as file:
        assert file.read() == b"old"
    assert folder.names("") == {"a.bin"}


def test_what_a_killed_writer_left_is_not_among_the_names(tmp_path: Path) -> None:
    (tmp_path / ".a.bin.part-0123").write_bytes(b"half")
    assert Folder.of(str(tmp_path)).names("") == frozenset()


def test_relative_paths_are_made_absolute_and_unknown_protocols_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Folder.of("out") == Folder.of(str(tmp_path / "out"))
    assert Folder.of("out").local == tmp_path / "out" and Folder.of("memory://out").local is None
    with pytest.raises(BatchError, match="nonsense://x: cannot be opened"):
        Folder.of("nonsense://x")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    service(tmp_path)
    write_lines(tmp_path / "in.jsonl", MIXED[:12])
    return tmp_path


def again(place: Path, resume: bool = True, model: str = "auto") -> dict[str, object]:
    return run(place / "service.yaml", place / "in.jsonl", place / "out", resume=resume, model=model)


def test_a_folder_that_holds_a_run_wants_resume_and_then_has_nothing_to_do(place: Path) -> None:
    first = again(place, resume=False)
    with pytest.raises(BatchFolderError, match=r"holds a run already \(complete\): add --resume .*another --output"):
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
    with pytest.raises(BatchFolderError, match=rf"holds another run \(.*{difference}.*another --output"):
        again(place)


def test_another_default_model_is_another_run(place: Path) -> None:
    again(place, resume=False)
    with pytest.raises(BatchFolderError, match=r"\(model: auto -> base\)"):
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
                with pytest.raises(BatchFolderError, match="in use by another"):
                    again(place)
                seen.append(name)

        def advance(self, name: str, done: int, failed: int = 0) -> None:
            pass

    seen: list[str] = []
    run(place / "service.yaml", place / "in.jsonl", place / "out", watch=Second())
    assert seen == ["routing"]
    (place / "out" / "run.json").write_text('{"status": "mine"}')
    with pytest.raises(BatchFolderError, match="was not written by `coe batch`"):
        again(place)
    (place / "out" / "run.json").unlink()
    (place / "out" / "parts").mkdir()
    (place / "out" / "parts" / "x").write_text("")
    with pytest.raises(BatchFolderError, match="parts but no run.json"):
        again(place)
    with pytest.raises(BatchFolderError, match="is a file"):
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
