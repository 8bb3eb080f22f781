"""Copies of routers for the restart of a gateway: whole, few, and never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coe.serve.cluster import last_good
from coe.serve.cluster.last_good import LastGood
from routers.artifacts import ARRAYS, META


def router(folder: Path, content: str = "one") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).write_text(content)
    (folder / ARRAYS).write_text(content)
    (folder / "notes.txt").write_text("not part of a router")
    return folder


def content(copy: Path | None) -> str | None:
    return None if copy is None else (copy / META).read_text() + (copy / ARRAYS).read_text()


def test_a_copy_has_the_content_that_was_kept_last(tmp_path: Path) -> None:
    kept, folder = LastGood(tmp_path / "kept"), router(tmp_path / "router")
    assert kept.copy_of(folder) is None
    kept.keep(folder)
    router(folder, "two")
    assert content(kept.copy_of(folder)) == "oneone", "a copy is made when a router has been loaded"
    kept.keep(folder)
    copy = kept.copy_of(folder)
    assert content(copy) == "twotwo" and copy is not None
    assert sorted(path.name for path in copy.iterdir()) == sorted((META, ARRAYS))
    assert kept.copy_of(tmp_path / "other") is None


def test_an_unchanged_router_is_not_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, folder = LastGood(tmp_path / "kept"), router(tmp_path / "router")
    kept.keep(folder)
    monkeypatch.setattr(last_good, "atomic_directory", None)
    kept.keep(folder)
    assert content(kept.copy_of(folder)) == "oneone"


def test_only_so_many_are_kept_the_ones_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_good, "KEPT", 3)
    kept = LastGood(tmp_path / "kept")
    folders = [router(tmp_path / f"r{i}") for i in range(4)]
    for i, folder in enumerate(folders[:3]):
        kept.keep(folder)
        copy = kept.copy_of(folder)
        assert copy is not None
        os.utime(copy, ns=(i, i))
    kept.keep(folders[0])  # used again
    kept.keep(folders[3])
    assert [kept.copy_of(folder) is not None for folder in folders] == [True, False, True, True]


@pytest.mark.parametrize("most", [5, 6])
def test_a_router_above_the_limit_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(last_good, "MOST_BYTES", most)
    kept, folder = LastGood(tmp_path / "kept"), router(tmp_path / "router")
    kept.keep(folder)
    assert (kept.copy_of(folder) is not None) == (most == 6), "it has six bytes"


def test_a_home_that_cannot_be_written_is_logged_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kept").write_text("a file")
    kept, folder = LastGood(tmp_path / "kept"), router(tmp_path / "router")
    kept.keep(folder)
    kept.keep(tmp_path / "gone")
    assert kept.copy_of(folder) is None and caplog.text.count("cannot be kept for a restart") == 2
