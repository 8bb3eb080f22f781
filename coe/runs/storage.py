"""Files by URL: local paths and everything that fsspec supports. Files are written whole or not at all.

A local file is synced and renamed. Elsewhere a file is written under another name and moved; stores without a rename
(S3) copy it on the server. A process that is killed meanwhile leaves no half-written file under the final name.
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
"""Part of the names of files that are being written."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder at a URL. Plain data, which other processes can open."""

    url: str

    @classmethod
    def of(cls, url: str) -> Folder:
        """The folder at a local path or URL. Relative paths are made absolute, since workers run in other folders."""
        return cls(absolute(url))

    @property
    def local(self) -> Path | None:
        """The path of a folder on a mounted disk; None for other file systems."""
        fs, path = open_url(self.url)
        return Path(path) if isinstance(fs, LocalFileSystem) else None

    def at(self, name: str) -> str:
        """The URL of a file or folder in this folder."""
        return f"{self.url}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file or folder exists."""
        fs, path = open_url(self.at(name))
        fs.invalidate_cache()
        return bool(fs.exists(path))

    def names(self, folder: str) -> frozenset[str]:
        """Names of the complete files under a folder in this folder; none if it does not exist."""
        fs, path = open_url(self.at(folder))
        fs.invalidate_cache()
        return frozenset(name for file in fs.find(path) if STAGED not in (name := file.rpartition("/")[2]))

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for reading, with seek."""
        with open_file(self.at(name)) as file:
            yield file

    @contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing. It exists when the block ends, and does not if the block fails."""
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
        """Remove a file, or a folder with its content, if it exists."""
        fs, path = open_url(self.at(name))
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)


def absolute(url: str) -> str:
    """The URL, or the absolute path of a local one."""
    fs, path = open_url(url)
    return path if isinstance(fs, LocalFileSystem) else url.rstrip("/")


def open_url(url: str) -> tuple[Any, str]:
    """The file system of a URL or local path, and the path on it. Raises StorageError if fsspec supports none."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise StorageError(f"{url}: cannot be opened: {error}") from error
    return fs, str(path).rstrip("/")


@contextmanager
def open_file(url: str) -> Iterator[IO[bytes]]:
    """Open the file at a URL for reading, with seek."""
    fs, path = open_url(url)
    # Object stores read ahead, 50 MiB by default: too much for each of the many files that a merge has open.
    with fs.open(path, "rb", block_size=_READ_AHEAD_BYTES) as file:
        yield cast(IO[bytes], file)
