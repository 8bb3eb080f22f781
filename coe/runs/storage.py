"""Files by URL: local paths, and everything that fsspec knows. Written whole or not at all.

A local file is synced and renamed. Elsewhere a file is written under another name and moved, which stores without a
rename (S3) do on their side: a process that is killed on the way leaves no file that could be taken for a whole one.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from coe.runs.errors import StorageError
from registry.storage import atomic_path

_READ_AHEAD_BYTES = 2**20
STAGED = ".part-"
"""In the names of files that are still being written."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder at a URL. Plain data: it travels to other processes, which open it themselves."""

    url: str

    @classmethod
    def of(cls, url: str) -> Folder:
        """The folder at a local path or URL; relative paths are made absolute, since workers run elsewhere."""
        return cls(absolute(url))

    @property
    def local(self) -> Path | None:
        """The path, where the folder is on a mounted disk."""
        fs, path = open_url(self.url)
        return Path(path) if isinstance(fs, LocalFileSystem) else None

    def at(self, name: str) -> str:
        """The URL of a file or folder in here."""
        return f"{self.url}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file is there, whole."""
        fs, path = open_url(self.at(name))
        fs.invalidate_cache()
        return bool(fs.exists(path))

    def names(self, folder: str) -> frozenset[str]:
        """The names of the whole files under a folder in here, folders left out; none where it does not exist."""
        fs, path = open_url(self.at(folder))
        fs.invalidate_cache()
        return frozenset(name for file in fs.find(path) if STAGED not in (name := file.rpartition("/")[2]))

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Read a file; it can be sought in."""
        with open_file(self.at(name)) as file:
            yield file

    @contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """Write a file that is there when the block ends, and not there if it fails."""
        fs, path = open_url(self.at(name))
        if isinstance(fs, LocalFileSystem):
            with atomic_path(Path(path)) as staged, staged.open("wb") as file:
                yield file
            return
        folder, _, last = path.rpartition("/")
        fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{last}{STAGED}{uuid.uuid4().hex}"
        try:
            with fs.open(temporary, "wb") as file:
                yield cast(IO[bytes], file)
            fs.mv(temporary, path)
        finally:
            if fs.exists(temporary):
                fs.rm_file(temporary)

    def remove(self, name: str) -> None:
        """Remove a file or folder with all it holds, if it is there."""
        fs, path = open_url(self.at(name))
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)


def absolute(url: str) -> str:
    """The same URL, or the absolute path of a local one."""
    fs, path = open_url(url)
    return path if isinstance(fs, LocalFileSystem) else url.rstrip("/")


def open_url(url: str) -> tuple[Any, str]:
    """The file system of a URL or local path, and the path on it. Raises StorageError where fsspec knows none."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise StorageError(f"{url}: cannot be opened: {error}") from error
    return fs, str(path).rstrip("/")


@contextmanager
def open_file(url: str) -> Iterator[IO[bytes]]:
    """Read the file at a URL; it can be sought in."""
    fs, path = open_url(url)
    # Object stores read ahead, 50 MiB by default: too much for each of the many files that a merge has open.
    with fs.open(path, "rb", block_size=_READ_AHEAD_BYTES) as file:
        yield cast(IO[bytes], file)
