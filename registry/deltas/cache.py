"""Restored deltas, each kept once under `$COE_HOME/restored`: what an engine loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from registry.deltas.manifest import Delta, is_delta, read_delta
from registry.digest import digest_of, hash_files
from registry.spec import ExpertSpec
from registry.storage import atomic_directory, coe_home


def restored(folder: Path, base: Path | None = None) -> Path:
    """The folder with the files that a delta restores, by the content of the delta. It appears complete or not at all.

    Args:
        base: folder of the base's safetensors, for a delta that needs it.

    Raises:
        SourceError: the delta or its base is damaged; see `restoring.OpenDelta`.
        DiskFull: the files do not fit; nothing is kept.
    """
    from registry.deltas.restoring import restore  # with NumPy

    out = _place(digest_of(hash_files(folder)))
    if not _is_complete(out, read_delta(folder)):
        with atomic_directory(out) as staged:
            restore(folder, base, staged)
    return out


def restored_adapter(folder: Path) -> Path:
    """The folder of an adapter's safetensors: the given one, or what it restores if it is a delta."""
    return restored(folder) if is_delta(folder) else folder


def forget(spec: ExpertSpec) -> None:
    """Remove what was restored of a delta; the next load restores it again."""
    if spec.restores is not None and spec.digest is not None:
        shutil.rmtree(_place(spec.digest), ignore_errors=True)


def _place(digest: str) -> Path:
    return coe_home() / "restored" / digest.removeprefix("sha256:")[:32]


def _is_complete(out: Path, delta: Delta) -> bool:
    return all((out / f.name).is_file() and (out / f.name).stat().st_size == f.size_bytes for f in delta.files)
