"""Files by URL, local and remote."""

from pathlib import Path

import pytest

from coe.runs.errors import StorageError
from coe.runs.storage import Folder


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
    with pytest.raises(StorageError, match="nonsense://x: cannot be opened"):
        Folder.of("nonsense://x")
