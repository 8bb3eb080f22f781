"""Which gateway runs which batch: locks on files, and a claim that names the process.

A batch is run by the process that holds its lock, and at most `at_once` processes hold one of the slots. The system
releases the locks of a process that ends, however it ends. On a disk of several machines a lock may not reach the
others, so a claim with a heartbeat lies beside it: a claim of another machine holds while it beats.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from registry.storage import atomic_path

SILENT_S: Final = 60.0
"""Seconds without a heartbeat after which the claim of another machine holds no more."""
_CLAIM: Final = "claim.json"


class Claim:
    """The hold on a batch. `beat` it every few seconds, and `release` it at the end."""

    def __init__(self, batch_id: str, folder: Path, locks: tuple[FileLock, ...], wall: Callable[[], float]) -> None:
        self.batch_id = batch_id
        self._path, self._locks, self._wall = folder / _CLAIM, locks, wall

    def beat(self) -> None:
        """State that the process lives."""
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "at": self._wall()}
        with atomic_path(self._path) as path:
            path.write_text(json.dumps(owner))

    def release(self) -> None:
        """Let others claim the batch."""
        self._path.unlink(missing_ok=True)
        for lock in self._locks:
            lock.release()


class Claims:
    """Claims batches in a folder.

    Args:
        at_once: most batches that are claimed, by all processes.
        wall: seconds since the epoch.
    """

    def __init__(self, folder: Path, at_once: int, wall: Callable[[], float] = time.time) -> None:
        self._folder, self._at_once, self._wall = folder / "slots", at_once, wall

    def take(self, batch_id: str, folder: Path) -> Claim | None:
        """Claim a batch; None if another process holds it, or all slots are taken. Blocks for no lock."""
        self._folder.mkdir(parents=True, exist_ok=True)
        slots = (FileLock(self._folder / f"{i}.lock", thread_local=False) for i in range(self._at_once))
        slot = next((lock for lock in slots if _locked(lock)), None)
        if slot is None:
            return None
        lock = FileLock(folder / "lock", thread_local=False)
        if not _locked(lock):
            slot.release()
            return None
        claim = Claim(batch_id, folder, (lock, slot), self._wall)
        if self._is_held_elsewhere(folder):
            lock.release()
            slot.release()
            return None
        claim.beat()
        return claim

    def _is_held_elsewhere(self, folder: Path) -> bool:
        """Whether a process of another machine says that it runs the batch."""
        try:
            owner = json.loads((folder / _CLAIM).read_bytes())
        except (FileNotFoundError, ValueError):
            return False
        return bool(owner["host"] != socket.gethostname() and self._wall() - owner["at"] < SILENT_S)


def _locked(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True
