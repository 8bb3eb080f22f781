"""Weights of trained compositions, read once and kept with the resident model that uses them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")
_KEPT: Final = 8


class KeptArtifacts:
    """The most recently used artifacts of a resident model; they are freed with it.

    Args:
        most: artifacts that are kept.
    """

    def __init__(self, most: int = _KEPT) -> None:
        self._most, self._lock = most, threading.Lock()
        self._read: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, read: Callable[[], T]) -> T:
        """What is kept under the key, or what `read` returns. Requests at the same time read it once."""
        with self._lock:
            if key not in self._read:
                self._read[key] = read()
            self._read.move_to_end(key)
            while len(self._read) > self._most:
                self._read.popitem(last=False)
            found: T = self._read[key]
            return found
