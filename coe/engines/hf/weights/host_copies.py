"""Copies of weights in the memory of the host, beside those that compute, under a budget of bytes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coe.engines.hf.weights.files import Stamp, Stopped, WeightFiles

if TYPE_CHECKING:
    import torch

_STOP_CHECK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class HostCopy:
    """The tensors of one checkpoint in private memory, as its files had them."""

    stamps: dict[Path, Stamp]
    tensors: dict[str, torch.Tensor]
    size_bytes: int


class HostCopies:
    """The second tier of memory: experts that were read before, or are read ahead, come from here and not from disk.

    Copies are read-only, and a copy whose files have changed since is not used. None is dropped to make room: the cache
    decides which ones stay (`coe.memory.plan`). Threads may call it at the same time.

    Args:
        budget_bytes: most bytes of all copies, reads under way included; 0 keeps none.
        pin: page-locked memory, which an accelerator copies from at full bandwidth.
    """

    def __init__(self, budget_bytes: int, *, pin: bool) -> None:
        self.budget_bytes, self._pin = budget_bytes, pin
        self._lock = threading.Lock()
        self._copies: dict[str, HostCopy] = {}
        self._reading: dict[str, tuple[int, threading.Event]] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of the copies, and of reads under way."""
        with self._lock:
            return self._used()

    def holds(self, ref: str) -> bool:
        """Whether there is a copy for the expert `name@version`, of files that may have changed since."""
        with self._lock:
            return ref in self._copies

    def get(self, ref: str, files: WeightFiles, stop: threading.Event | None = None) -> HostCopy | None:
        """The copy of these files for the expert `name@version`; None without one. Waits for a read under way.

        Raises:
            Stopped: `stop` was set.
        """
        while True:
            with self._lock:
                found, reading = self._found(ref, files), self._reading.get(ref)
            if found is not None or reading is None:
                return found
            _wait(reading[1], stop)

    def read(self, ref: str, files: WeightFiles, stop: threading.Event | None = None) -> int:
        """Read a copy of these files unless there is one; two threads that want the same one read it once. Blocks.

        Returns:
            Its bytes; 0: it does not fit beside the others, or its files changed while they were read.

        Raises:
            Stopped, WeightsError: as `WeightFiles.read`; nothing is kept.
        """
        while True:
            with self._lock:
                if (found := self._found(ref, files)) is not None:
                    return found.size_bytes
                reading = self._reading.get(ref)
                if reading is None:
                    if self._used() + files.size_bytes > self.budget_bytes:
                        return 0
                    done = threading.Event()
                    self._reading[ref] = (files.size_bytes, done)
                    break
            _wait(reading[1], stop)
        copy: HostCopy | None = None
        try:
            copy = HostCopy(files.stamps, files.read(pin=self._pin, stop=stop), files.size_bytes)
        finally:
            with self._lock:
                del self._reading[ref]
                # What was written while it was read may be half of each.
                if copy is not None and files.unchanged():
                    self._copies[ref] = copy
                kept = ref in self._copies
            done.set()
        return files.size_bytes if kept else 0

    def drop(self, ref: str) -> None:
        """Free a copy; nothing happens without one. A switch that copies from it now keeps its memory until it ends."""
        with self._lock:
            self._copies.pop(ref, None)

    def _found(self, ref: str, files: WeightFiles) -> HostCopy | None:
        found = self._copies.get(ref)
        if found is not None and found.stamps != files.stamps:
            del self._copies[ref]
            return None
        return found

    def _used(self) -> int:
        return sum(copy.size_bytes for copy in self._copies.values()) + sum(n for n, _ in self._reading.values())


def _wait(done: threading.Event, stop: threading.Event | None) -> None:
    """Wait for the end of a read. Raises Stopped."""
    while not done.wait(_STOP_CHECK_S):
        if stop is not None and stop.is_set():
            raise Stopped
