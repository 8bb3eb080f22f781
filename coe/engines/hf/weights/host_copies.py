"""Copies of weights in the memory of the host, beside those that compute, under a budget of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
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

    Copies are read-only, and a copy whose files have changed since is not used. The least recently used ones leave as
    others need their room. Threads may call it at the same time.

    Args:
        budget_bytes: most bytes of all copies, reads under way included; 0 keeps none.
        pin: page-locked memory, which an accelerator copies from at full bandwidth.
    """

    def __init__(self, budget_bytes: int, *, pin: bool) -> None:
        self.budget_bytes, self._pin = budget_bytes, pin
        self._lock = threading.Lock()
        self._copies: OrderedDict[Path, HostCopy] = OrderedDict()
        self._reading: dict[Path, tuple[int, threading.Event]] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of the copies, and of reads under way."""
        with self._lock:
            return self._used()

    def holds(self, folder: Path) -> bool:
        """Whether there is a copy of the folder, whose files may have changed since."""
        with self._lock:
            return folder in self._copies

    def get(self, files: WeightFiles, *, stop: threading.Event | None = None) -> HostCopy | None:
        """The copy of these files, which is read if there is none; None if it does not fit the budget. Blocks.

        Two threads that want the same files read them once.

        Raises:
            Stopped, WeightsError: as `WeightFiles.read`; nothing is kept.
        """
        while True:
            with self._lock:
                if (found := self._found(files)) is not None:
                    return found
                reading = self._reading.get(files.folder)
                if reading is None:
                    if not self._make_room(files.size_bytes):
                        return None
                    done = threading.Event()
                    self._reading[files.folder] = (files.size_bytes, done)
                    break
            while not reading[1].wait(_STOP_CHECK_S):
                if stop is not None and stop.is_set():
                    raise Stopped
        copy: HostCopy | None = None
        try:
            copy = HostCopy(files.stamps, files.read(pin=self._pin, stop=stop), files.size_bytes)
        finally:
            with self._lock:
                del self._reading[files.folder]
                # What was written while it was read may be half of each.
                if copy is not None and files.unchanged():
                    self._copies[files.folder] = copy
            done.set()
        return copy

    def clear(self) -> None:
        """Free all copies."""
        with self._lock:
            self._copies.clear()

    def _found(self, files: WeightFiles) -> HostCopy | None:
        found = self._copies.get(files.folder)
        if found is not None and found.stamps != files.stamps:
            del self._copies[files.folder]
            return None
        if found is not None:
            self._copies.move_to_end(files.folder)
        return found

    def _make_room(self, n_bytes: int) -> bool:
        held = sum(size for size, _ in self._reading.values())
        if n_bytes + held > self.budget_bytes:
            return False
        while self._used() + n_bytes > self.budget_bytes:
            self._copies.popitem(last=False)
        return True

    def _used(self) -> int:
        return sum(copy.size_bytes for copy in self._copies.values()) + sum(n for n, _ in self._reading.values())
