"""The files of a delta's expert, as an expert's digest covers them, without restoring anything."""

from __future__ import annotations

from pathlib import Path

from registry.deltas.manifest import MANIFEST, PAYLOAD, Delta
from registry.digest import hash_files
from registry.spec import FileRecord


def restored_records(delta: Delta) -> list[FileRecord]:
    """The weights that the delta restores."""
    return [FileRecord(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256) for file in delta.files]


def other_records(folder: Path) -> list[FileRecord]:
    """The files beside the coded weights, which are the expert's own."""
    return [record for record in hash_files(folder) if record.name not in (MANIFEST, PAYLOAD)]
