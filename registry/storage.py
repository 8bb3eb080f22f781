"""Shared storage: the home folder (`coe_home`), atomic writes, content hashes.

A file is written next to its target under a staging name, synced, and renamed: readers never see a partial file. A
staging name contains host and process, so that the next writer of the same target recognises and removes the leftovers
of killed processes, but not the files of live ones.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.errors import DiskFull, TargetError

_STAGED = re.compile(r"\.(?P<target>.+)\.part-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}(\.\w+)?")
_FOREIGN_LEFTOVER_AGE_S = 24 * 3600.0
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_READ_BYTES = 1 << 20


def coe_home() -> Path:
    """The folder of registry, caches and downloaded models: `$COE_HOME`, or `~/.cache/coe`. It may not exist yet."""
    stated = os.environ.get("COE_HOME", "").strip()
    return Path(stated).expanduser().absolute() if stated else Path.home() / ".cache" / "coe"


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file's content; `on_bytes` is called with the bytes of each step (for a progress bar)."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path next to `target` to write to; on success it replaces `target`, on failure it is removed.

    The yielded path has the suffix of `target`, does not exist yet, and may be written by any library. Missing parent
    folders are created. If `target` is a symbolic link, the link stays and the file that it leads to is replaced.

    Raises:
        DiskFull: no space left; the target is unchanged.
        TargetError: the target is a device, a FIFO or a socket, or its links form a loop.
    """
    target = _replaceable(target)
    staged = _stage(target)
    try:
        with translate_disk_full(target):
            yield staged
            _sync(staged)
            staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)
    _sync(target.parent)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty folder next to `target`; on success it becomes `target`, on failure it is removed.

    An existing folder is replaced: for an instant `target` does not exist, but it is never partial. Its files can be
    read by whoever may read the folder: safetensors writes files for their owner alone, and a service often runs as
    another user than the training.

    Raises:
        DiskFull: no space left; the target is unchanged.
    """
    staged = _stage(target)
    try:
        with translate_disk_full(target):
            staged.mkdir()
            yield staged
            for folder, _, names in os.walk(staged):
                for name in names:
                    _share(Path(folder, name), like=staged)
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _replace_directory(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    _sync(target.parent)


@contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """Yield an empty folder in `parent`, which is created if missing; at the end it is removed with what it holds.

    Raises:
        DiskFull: no space left.
    """
    scratch = _stage(parent / "scratch")
    try:
        with translate_disk_full(scratch):
            scratch.mkdir()
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _share(path: Path, like: Path) -> None:
    """Let everyone read a file who may read the folder `like`, a new one: the umask decides."""
    if not path.is_symlink():
        path.chmod(stat.S_IMODE(path.stat().st_mode) | like.stat().st_mode & 0o444)


def remove_leftovers(folder: Path, target: str | None = None) -> list[Path]:
    """Remove the leftovers of killed writers in `folder` (only those of `target`, if given); return their paths.

    A leftover is a staging file or folder whose process no longer runs on this host or, if it is from another host (a
    shared disk), that was not modified for a day.
    """
    removed = []
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _STAGED.fullmatch(path.name)
        if found is None or (target is not None and found["target"] != _staging_stem(target)):
            continue
        with suppress(FileNotFoundError):  # another process may be cleaning too
            if _is_abandoned(path, found["host"], int(found["pid"])):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
    return removed


@contextmanager
def translate_disk_full(target: Path) -> Iterator[None]:
    """Translate "no space left" of any library to `DiskFull`, with the place and the free bytes."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise DiskFull(target, free_bytes=_free_bytes(target.parent)) from error


def require_free(target: Path, needed_bytes: int) -> None:
    """Raise `DiskFull` if `needed_bytes` do not fit next to `target`, before anything is written."""
    free = _free_bytes(target.parent)
    if free is not None and free < needed_bytes:
        raise DiskFull(target, free_bytes=free, needed_bytes=needed_bytes)


def _replaceable(target: Path) -> Path:
    """The path to replace: `target`, or what its symbolic links lead to.

    Raises:
        TargetError: it exists and is neither a file nor a folder (a folder fails in the caller, with its own error).
    """
    found = Path(os.path.realpath(target)) if target.is_symlink() else target
    if found.is_symlink():
        raise TargetError(f"{target} cannot be written: its symbolic links form a loop; name another file")
    with suppress(FileNotFoundError, NotADirectoryError):
        mode = found.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise TargetError(f"{target} is a device, a FIFO or a socket and is not replaced: name a regular file")
    return found


def _stage(target: Path) -> Path:
    """A new staging path next to `target`, after removing the leftovers of earlier writers."""
    with translate_disk_full(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    owner = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    suffix = target.suffix if re.fullmatch(r"\.\w+", target.suffix) else ""
    return target.with_name(f".{_staging_stem(target.name)}.part-{owner}{suffix}")


def _staging_stem(name: str) -> str:
    """The part of a staging name that identifies the target, short enough for file systems that allow 255 bytes."""
    return name if len(name.encode()) <= 120 else hashlib.sha256(name.encode()).hexdigest()


def _replace_directory(staged: Path, target: Path) -> None:
    for _ in range(100):  # each retry means that another writer of the same target was faster
        aside = _stage(target)
        with suppress(FileNotFoundError):
            target.replace(aside)
        try:
            staged.replace(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    raise OSError(errno.EBUSY, "other processes keep replacing this folder", str(target))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_abandoned(path: Path, host: str, pid: int) -> bool:
    if host != _host():
        return time.time() - path.stat().st_mtime > _FOREIGN_LEFTOVER_AGE_S
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # alive, owned by another user
    return False


def _is_disk_full(error: BaseException) -> bool:
    """Whether a disk is full; Rust libraries (safetensors) raise their own classes with the system's message."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    return "No space left on device" in str(error) and not isinstance(error, DiskFull)


def _free_bytes(folder: Path) -> int | None:
    for existing in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(existing).free
    return None
