from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from registry import storage
from registry.errors import DiskFull, RegistryError, TargetError
from registry.storage import (
    atomic_directory,
    atomic_path,
    coe_home,
    remove_leftovers,
    require_free,
    scratch_directory,
    sha256_file,
)

DEAD_PID = 2**22 + 1  # above Linux's largest process id


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftover(folder: Path, target: str, host: str = "", pid: int = DEAD_PID) -> Path:
    return folder / f".{target}.part-{host or storage._host()}-{pid}-0123abcd"


def test_home_is_the_stated_folder_or_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COE_HOME", str(tmp_path))
    assert coe_home() == tmp_path
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("COE_HOME", "~/coe")
    assert coe_home() == Path("/home/someone/coe")
    monkeypatch.setenv("COE_HOME", " ")
    assert coe_home() == Path("/home/someone/.cache/coe")


def test_hash_tells_its_progress(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    path = tmp_path / "file"
    path.write_bytes(content)
    read: list[int] = []
    assert sha256_file(path, read.append) == sha256_file(path) == hashlib.sha256(content).hexdigest()
    assert sum(read) == len(content) and len(read) == 3


def test_path_appears_whole_with_missing_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "x.json"
    with atomic_path(target) as staged:
        assert staged.parent == target.parent and staged.suffix == ".json"
        staged.write_text("new")
        assert not target.exists()
    assert names(target.parent) == ["x.json"] and target.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(type(error)), atomic_path(target) as staged:
        staged.write_text("half")
        raise error
    assert names(tmp_path) == ["x"] and target.read_text() == "old"


def test_very_long_names_fit(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 250)
    with atomic_path(target) as staged:
        staged.write_text("x")
    assert names(tmp_path) == [target.name]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_full_disk_is_said_clearly_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "x"
    said = r"no space left to write 'x' in .*MB are free.*COE_HOME"
    with pytest.raises(DiskFull, match=said) as caught, atomic_path(target) as staged:
        staged.write_text("half")
        raise error
    assert isinstance(caught.value, RegistryError) and caught.value.__cause__ is error
    assert caught.value.free_bytes is not None
    with pytest.raises(DiskFull), atomic_directory(target) as folder:
        (folder / "half").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_full_disk_at_sync_is_translated_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFull), atomic_path(tmp_path / "x") as staged:
        staged.write_text("x")
    assert names(tmp_path) == []


def test_disk_full_passes_through_outer_writers_once(tmp_path: Path) -> None:
    inner = pytest.raises(DiskFull, match="'inner'")
    with inner, atomic_directory(tmp_path / "outer") as folder, atomic_path(folder / "inner"):
        raise OSError(errno.ENOSPC, "full")


def test_other_os_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_path(tmp_path / "x"):
        raise PermissionError("no")


def test_what_cannot_fit_is_refused_before_writing(tmp_path: Path) -> None:
    require_free(tmp_path / "not" / "yet" / "x", 1)
    with pytest.raises(DiskFull, match=r"1,000,000,000,000\.0 MB are needed and"):
        require_free(tmp_path / "x", 10**18)


def test_unknown_free_space_does_not_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(path: object) -> None:
        raise OSError("no statvfs here")

    monkeypatch.setattr("shutil.disk_usage", usage)
    require_free(tmp_path / "x", 10**18)


def test_directory_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("first", "second"):
        with atomic_directory(target) as staged:
            (staged / "deep").mkdir()
            (staged / "deep" / name).write_text(name)
    assert names(tmp_path) == ["model"] and names(target / "deep") == ["second"]


def test_failed_directory_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(ValueError), atomic_directory(target) as staged:
        (staged / "new").touch()
        raise ValueError
    assert names(tmp_path) == ["model"] and names(target) == ["old"]


def test_directory_replacement_that_never_wins_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"

    def replace(self: Path, other: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "not empty")

    with pytest.raises(OSError, match="not empty"), atomic_directory(target):  # moving the old one aside fails
        monkeypatch.setattr(Path, "replace", replace)

    def missing_or_full(self: Path, other: Path) -> None:
        raise FileNotFoundError if self == target else OSError(errno.ENOTEMPTY, "not empty")

    monkeypatch.setattr(Path, "replace", missing_or_full)
    with pytest.raises(OSError, match="other processes keep replacing"), atomic_directory(target):
        pass
    assert names(tmp_path) == []

    def denied(self: Path, other: Path) -> None:
        raise FileNotFoundError if self == target else PermissionError("denied")

    monkeypatch.setattr(Path, "replace", denied)
    with pytest.raises(PermissionError), atomic_directory(target):
        pass
    assert names(tmp_path) == []


def _write_directory(target: Path, mark: str, turns: int) -> None:
    for _ in range(turns):
        with atomic_directory(target) as staged:
            for name in "abc":
                (staged / name).write_text(mark)


def test_concurrent_writers_of_one_directory_leave_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_directory, args=(target, str(n), 20)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert names(tmp_path) == ["model"]
    assert len({(target / name).read_text() for name in "abc"}) == 1


def test_leftovers_of_a_killed_process_are_removed_by_the_next_writer(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom registry.storage import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as staged:\n    staged.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    target = tmp_path / "x.json"
    assert subprocess.run([sys.executable, "-c", script, str(target)]).returncode == -9
    assert len(names(tmp_path)) == 1 and not target.exists()
    with atomic_path(target) as staged:
        staged.write_text("whole")
    assert names(tmp_path) == ["x.json"]


def test_only_abandoned_staging_is_removed(tmp_path: Path) -> None:
    live = leftover(tmp_path, "x", pid=os.getpid())
    dead = leftover(tmp_path, "x")
    other_target = leftover(tmp_path, "y")
    other_user = leftover(tmp_path, "x", pid=1)
    other_host = leftover(tmp_path, "x", host="00000000")
    foreign_old = leftover(tmp_path, "x", host="00000001")
    users_file = tmp_path / ".x.part-mine"
    for path in (live, other_user, other_host, users_file):
        path.touch()
    for path in (dead, other_target, foreign_old):
        path.mkdir()
    yesterday = time.time() - 25 * 3600
    os.utime(foreign_old, (yesterday, yesterday))
    assert set(remove_leftovers(tmp_path, "x")) == {dead, foreign_old}
    assert remove_leftovers(tmp_path) == [other_target]
    assert set(tmp_path.iterdir()) == {live, other_user, other_host, users_file}
    assert remove_leftovers(tmp_path / "absent") == []


def test_a_process_of_another_user_counts_as_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, signal: int) -> None:
        raise PermissionError

    staged = leftover(tmp_path, "x")
    staged.touch()
    monkeypatch.setattr(os, "kill", kill)
    assert remove_leftovers(tmp_path) == []


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    real, link = tmp_path / "data" / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    with atomic_path(link) as temporary:
        assert temporary.parent == real.parent, "the rename stays on the file system of the target"
        temporary.write_text("new")
    assert link.is_symlink() and real.read_text() == "new"
    assert names(real.parent) == ["real.json"]


def test_a_dangling_link_gets_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("missing")
    with atomic_path(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "missing").read_text() == "new"


def test_what_is_not_a_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to_fifo").symlink_to("fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, problem in (("fifo", "a FIFO"), ("to_fifo", "a FIFO"), ("loop", "form a loop")):
        with pytest.raises(TargetError, match=problem), atomic_path(tmp_path / name):
            raise AssertionError("nothing may be written")
    assert (tmp_path / "fifo").is_fifo() and (tmp_path / "loop").is_symlink()
    assert names(tmp_path) == ["fifo", "loop", "to_fifo"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_a_folder_can_be_read_by_whom_the_umask_lets(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors writes for its owner alone."""
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "artifact") as staged:
            (staged / "deep").mkdir()
            save_file({"weights": np.zeros(2)}, staged / "deep" / "weights.safetensors")
            assert stat.S_IMODE((staged / "deep" / "weights.safetensors").stat().st_mode) == 0o600
            (staged / "run.sh").touch(0o700)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "artifact" / "deep" / "weights.safetensors").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "artifact" / "run.sh").stat().st_mode) == 0o700 & ~umask | mode & 0o444


def test_a_scratch_folder_goes_with_what_it_holds_and_with_killed_writers(tmp_path: Path) -> None:
    parent = tmp_path / "new" / "deltas"
    with pytest.raises(KeyError), scratch_directory(parent) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("x")
        raise KeyError
    assert list(parent.iterdir()) == []
    leftover(parent, "scratch").mkdir()
    with scratch_directory(parent) as folder:
        assert names(parent) == [folder.name]
