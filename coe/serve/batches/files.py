"""FileStore: uploaded files and the results of batches, on disk, for all gateways of a service.

    files/file-<id>.data    the content
    files/file-<id>.json    name, purpose, owner and times; the file exists while this does

An upload writes under a staging name and is renamed when it is whole. The owner is the id of an API key; None before
the service has keys. All methods block: call them in a thread.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

from coe.config import BatchesConfig
from coe.errors import Overloaded
from coe.serve.batches.errors import NoSuchFile, StorageFull
from coe.serve.batches.ids import is_id
from registry.storage import atomic_path, translate_disk_full

MOST_FILES: Final = 20_000
"""Most files of a folder: a list reads their names."""
ABANDONED_S: Final = 3600.0
"""Seconds without a write after which a staged upload is that of a gateway that has ended."""
COUNT_BYTES: Final = 8 * 2**20
"""Bytes of an upload between two looks at the bytes of all files."""
DAY_S: Final = 86_400.0
_DATA, _ABOUT, _STAGED = ".data", ".json", ".upload"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of a file. Times are in seconds since the epoch."""

    id: str
    owner: str | None
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The record in a file; None if it is gone, or not one."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def body(self) -> dict[str, Any]:
        """As OpenAI's file object."""
        about = asdict(self)
        del about["owner"]
        return {"object": "file", **about, "status": "processed", "status_details": None}


class FileStore:
    """The files in a folder.

    Args:
        wall: seconds since the epoch.
    """

    def __init__(self, settings: BatchesConfig, wall: Callable[[], float] = time.time) -> None:
        self._settings, self._wall = settings, wall
        self._folder = settings.folder / "files"
        self._known: dict[str, FileRecord] = {}  # records never change

    def upload(self) -> Upload:
        """Begin a file.

        Raises:
            StorageFull: there is no room for any.
            Overloaded: there are too many files.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if sum(1 for _ in self._names()) >= MOST_FILES:
            raise Overloaded(f"there are {MOST_FILES:,} files already: delete some")
        self.check_room(1)
        return Upload(self, self._folder / f"{secrets.token_hex(12)}{_STAGED}")

    def add(
        self, source: Path, file_id: str, owner: str | None, filename: str, purpose: str, keep_s: float | None = None
    ) -> FileRecord:
        """Move a whole file into the store. What was added under the id before is kept: a crash repeats nothing."""
        if (before := self._record(file_id)) is not None:
            source.unlink(missing_ok=True)
            return before
        now = self._wall()
        keep_s = min(self._settings.keep_days * DAY_S, keep_s or float("inf"))
        data = self.path(file_id)
        self._folder.mkdir(parents=True, exist_ok=True)
        if source.exists():  # not moved by an earlier attempt that ended here
            source.replace(data)
        record = FileRecord(file_id, owner, filename, purpose, data.stat().st_size, int(now), int(now + keep_s))
        with atomic_path(data.with_suffix(_ABOUT)) as path:
            path.write_text(json.dumps(asdict(record)))
        return record

    def get(self, file_id: str, owner: str | None) -> FileRecord:
        """A file. Raises NoSuchFile."""
        record = self._record(file_id)
        if record is None or record.owner != owner or record.expires_at <= self._wall():
            raise NoSuchFile(f"there is no file {file_id[:80]!r}")
        return record

    def all(self, owner: str | None) -> list[FileRecord]:
        """All files of an owner, the oldest first."""
        now = self._wall()
        names = set(self._names())
        self._known = {name: record for name, record in self._known.items() if name in names}
        found = (record for name in names if (record := self._record(name)) is not None)
        mine = [record for record in found if record.owner == owner and record.expires_at > now]
        return sorted(mine, key=lambda record: (record.created_at, record.id))

    def path(self, file_id: str) -> Path:
        """Where the content of a file is."""
        return self._folder / f"{file_id}{_DATA}"

    def open(self, record: FileRecord) -> IO[bytes]:
        """The content of a file. Raises NoSuchFile."""
        try:
            return self.path(record.id).open("rb")
        except FileNotFoundError:
            raise NoSuchFile(f"there is no file {record.id!r}") from None

    def delete(self, record: FileRecord) -> None:
        """Delete a file; a download that has begun goes on."""
        self.path(record.id).with_suffix(_ABOUT).unlink(missing_ok=True)
        self._known.pop(record.id, None)
        self.path(record.id).unlink(missing_ok=True)

    def sweep(self, in_use: Callable[[], set[str]]) -> None:
        """Delete expired files and abandoned uploads. `in_use`: ids of the files that batches read."""
        now = self._wall()
        expired = [
            record
            for name in list(self._names())
            if (record := self._record(name)) is not None and record.expires_at <= now
        ]
        kept = in_use() if expired else set()
        for record in expired:
            if record.id not in kept:
                self.delete(record)
        if not self._folder.is_dir():
            return
        for path in list(self._folder.iterdir()):
            with suppress(FileNotFoundError):
                lost = path.suffix == _STAGED or (path.suffix == _DATA and not path.with_suffix(_ABOUT).exists())
                if lost and time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()

    def check_room(self, n_bytes: int) -> None:
        """Raise StorageFull unless so many bytes fit."""
        most, used = self._settings.max_files_bytes, self._used()
        if used + n_bytes > most:
            raise StorageFull(
                f"the files would exceed {most:,} bytes (serve.batches.max_files_bytes): delete some, or wait until "
                "they expire"
            )
        free = shutil.disk_usage(self._folder).free
        if free < n_bytes:
            raise StorageFull(f"the disk of the files has {free:,} bytes left (serve.batches.folder)")

    def _used(self) -> int:
        used = 0
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    used += entry.stat().st_size if entry.name.endswith((_DATA, _STAGED)) else 0
        return used

    def _names(self) -> Iterator[str]:
        if not self._folder.is_dir():
            return
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(_ABOUT) and is_id("file", entry.name.removesuffix(_ABOUT)):
                    yield entry.name.removesuffix(_ABOUT)

    def _record(self, file_id: str) -> FileRecord | None:
        if not is_id("file", file_id):
            return None
        path = self.path(file_id).with_suffix(_ABOUT)
        known = self._known.get(file_id)
        if known is None or not path.exists():  # another gateway may have deleted it
            known = FileRecord.read(path)
            if known is not None:
                self._known[file_id] = known
        return known


class Upload:
    """A file that is being written; the limit of one file holds where it is read (`coe.serve.http.file_uploads`)."""

    def __init__(self, store: FileStore, path: Path) -> None:
        self._store, self._path = store, path
        self._file = path.open("xb")
        self.size = self._counted = 0

    def write(self, data: bytes) -> None:
        """Write what follows. Raises StorageFull."""
        self.size += len(data)
        with translate_disk_full(self._path):
            self._file.write(data)
        if self.size - self._counted > COUNT_BYTES:
            self._check_room()

    def commit(self, owner: str | None, filename: str, purpose: str, keep_s: float | None) -> FileRecord:
        """End the file: it exists from now on. Raises StorageFull."""
        self._check_room()
        with translate_disk_full(self._path):
            os.fsync(self._file.fileno())
        self._file.close()
        return self._store.add(self._path, f"file-{secrets.token_hex(12)}", owner, filename, purpose, keep_s)

    def discard(self) -> None:
        """Remove what was written, unless it was committed."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _check_room(self) -> None:
        with translate_disk_full(self._path):
            self._file.flush()
        self._counted = self.size
        self._store.check_room(0)  # its own bytes are among those on the disk
