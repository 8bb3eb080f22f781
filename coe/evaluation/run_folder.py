"""The folder of a run: which run it is, its answers so far, its results. One process at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coe.evaluation.answer_log import Record, RunFolderError, read_log
from registry.storage import atomic_path

ANSWERS, OUTCOMES, RUN, _LOCK = "answers.jsonl", "outcomes.parquet", "run.json", ".lock"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An open, locked run folder.

    Attributes:
        fingerprint: hash of the run's manifest, carried by every record.
        records: answers of earlier sessions. `was_cut`: a half-written one was dropped.
        sessions: what earlier sessions did (see `coe.evaluation.report`).
    """

    path: Path
    manifest: Mapping[str, Any]
    fingerprint: str
    records: tuple[Record, ...]
    was_cut: bool
    sessions: tuple[Mapping[str, Any], ...]

    @property
    def answers(self) -> Path:
        """`answers.jsonl`: every answer, as it came."""
        return self.path / ANSWERS

    @property
    def outcomes(self) -> Path:
        """`outcomes.parquet`: the outcome table, written when the run is complete."""
        return self.path / OUTCOMES

    def write_run(self, summary: Mapping[str, Any]) -> None:
        """Replace `run.json`: the manifest, and `summary`."""
        document = {"fingerprint": self.fingerprint, "manifest": self.manifest, **summary}
        with atomic_path(self.path / RUN) as temporary:
            temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """What tells one run from another."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def open_run_folder(path: Path, manifest: Mapping[str, Any], *, fresh: bool = False) -> Iterator[RunFolder]:
    """Take the folder for the run that `manifest` describes; what it holds of that run is resumed.

    Args:
        fresh: forget what the folder holds.

    Raises:
        RunFolderError: it holds another run, damaged files, or is in use by another process.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise RunFolderError(f"{path} is a file; name a folder with --output") from None
    try:
        with FileLock(path / _LOCK, timeout=0):
            yield _take(path, manifest, fresh=fresh)
    except Timeout:
        raise RunFolderError(f"{path} is in use by another process; wait for it or use another --output") from None


def _take(path: Path, manifest: Mapping[str, Any], *, fresh: bool) -> RunFolder:
    if fresh:
        for name in (OUTCOMES, ANSWERS, RUN):
            (path / name).unlink(missing_ok=True)
    fingerprint = fingerprint_of(manifest)
    earlier = _earlier_run(path)
    if earlier is not None and earlier["fingerprint"] != fingerprint:
        difference = "; ".join(_differences(earlier["manifest"], manifest))
        raise RunFolderError(
            f"{path} holds another run ({difference}): use another --output, or --fresh to discard its answers"
        )
    if earlier is None and (path / ANSWERS).exists():
        raise RunFolderError(f"{path} has answers but no {RUN} that says whose: use another --output, or --fresh")
    records, was_cut = read_log(path / ANSWERS, fingerprint)
    sessions = tuple(earlier["sessions"]) if earlier else ()
    folder = RunFolder(path, manifest, fingerprint, tuple(records), was_cut, sessions)
    if earlier is None:  # from here on the answers have an owner
        folder.write_run({"status": "running", "sessions": []})
    return folder


def _earlier_run(path: Path) -> dict[str, Any] | None:
    file = path / RUN
    if not file.exists():
        return None
    try:
        run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if run.keys() >= {"fingerprint", "manifest", "sessions"}:
            return run
    except (ValueError, AttributeError):
        pass
    raise RunFolderError(f"{file} was not written by `coe eval`: use another --output, or --fresh to replace it")


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """`experts: -old +new ~changed`, for each part that differs."""
    for part in now:
        before, after = earlier.get(part, {}), now[part]
        if before != after:
            gone = [f"-{name}" for name in before if name not in after]
            added = [f"+{name}" for name in after if name not in before]
            changed = [f"~{name}" for name in after if name in before and before[name] != after[name]]
            yield f"{part}: {' '.join(gone + added + changed)}"
