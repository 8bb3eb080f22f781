"""Run folders: which run a folder holds, what differs, and how a run ends."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from coe.runs.errors import RunFolderError
from coe.runs.folder import RUN, RunFolder, open_run_folder, status_after
from coe.runs.storage import Folder

MANIFEST = {"experts": {"a": "1", "b": "2"}, "settings": {"limit": None, "pair": (1, 2)}}


def opened(path: Path, manifest: Any = MANIFEST, *, resume: bool = False, **options: Any) -> RunFolder:
    folder = Folder.of(str(path))
    with open_run_folder(folder, manifest, command="coe try", data=["answers"], resume=resume, **options) as run:
        run.save("running", {"n": len(run.sessions)})
        return run


def test_each_process_adds_a_session(tmp_path: Path) -> None:
    assert opened(tmp_path).run["sessions"] == [{"n": 0}]
    assert opened(tmp_path, resume=True).run["sessions"] == [{"n": 0}, {"n": 1}]
    written = json.loads((tmp_path / RUN).read_text())
    assert written["manifest"]["settings"]["pair"] == [1, 2] and written["sessions"] == [{"n": 0}, {"n": 1}]


def test_resume_of_a_new_folder_starts_a_run(tmp_path: Path) -> None:
    assert opened(tmp_path / "new", resume=True).sessions == []


def test_new_names_count_unless_a_part_may_grow(tmp_path: Path) -> None:
    opened(tmp_path)
    grown = {**MANIFEST, "experts": {"a": "1", "b": "2", "c": "3"}}
    with pytest.raises(RunFolderError, match=r"holds another run \(experts: \+c\)"):
        opened(tmp_path, grown, resume=True)
    assert opened(tmp_path, grown, resume=True, may_grow=["experts"]).sessions == [{"n": 0}]
    changed = {**MANIFEST, "experts": {"a": "9", "c": "3"}}
    with pytest.raises(RunFolderError, match=r"experts: -b, ~a 1 -> 9\)"):
        opened(tmp_path, changed, resume=True, may_grow=["experts"])


def test_the_difference_is_named_without_resume_too(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(RunFolderError, match=r"settings: ~limit None -> 5") as refused:
        opened(tmp_path, {**MANIFEST, "settings": {"limit": 5, "pair": (1, 2)}})
    assert "--resume" not in str(refused.value), "it would be refused as well"


def test_a_discarded_run_is_replaced(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "answers").write_text("")
    other = {**MANIFEST, "experts": {}}
    assert opened(tmp_path, other, discard=["answers", RUN]).sessions == []
    assert not (tmp_path / "answers").exists()


def test_a_folder_in_use_is_not_discarded(tmp_path: Path) -> None:
    folder = Folder.of(str(tmp_path))
    with open_run_folder(folder, MANIFEST, command="coe try", data=[], resume=False) as run:
        run.save("running")
        with pytest.raises(RunFolderError, match="in use by another process"):
            opened(tmp_path, discard=[RUN])
        assert (tmp_path / RUN).exists()


def test_a_path_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(RunFolderError, match="is a file, or lies in one; name a folder"):
            opened(path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"manifest": [], "status": 1, "sessions": []}', "{}"])
def test_a_run_json_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN).write_text(content)
    with pytest.raises(RunFolderError, match="was not written by `coe try`"):
        opened(tmp_path, resume=True)


def test_a_run_ends_interrupted_or_stopped() -> None:
    ends = [status_after(error) for error in (KeyboardInterrupt(), asyncio.CancelledError(), ValueError())]
    assert ends == ["interrupted", "interrupted", "stopped"]


def test_a_folder_that_the_system_refuses_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunFolderError, match=r"run cannot be used: Permission denied; name another one with --out"):
        opened(tmp_path / "run")
