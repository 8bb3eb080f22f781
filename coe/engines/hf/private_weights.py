"""Weights in memory of this process, not in a mapped file.

transformers maps safetensors, and on a CPU weights of the file's own type stay in the mapping: they change with the
file, and the process ends if the file shrinks. It reads the tensors on Windows and for MPS only, without a setting.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, Final


class PrivateWeights:
    """A context in which transformers reads safetensors, tensor by tensor. Loads of several threads may overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._mapping: Any = None

    def __enter__(self) -> None:
        from transformers import modeling_utils

        module: Any = modeling_utils
        with self._lock:
            self._n_inside += 1
            if self._n_inside == 1:
                self._mapping = module.safe_open
                module.safe_open = partial(_read, self._mapping)

    def __exit__(self, *_: object) -> None:
        from transformers import modeling_utils

        module: Any = modeling_utils
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                module.safe_open = self._mapping


def _read(mapping: Any, *args: Any, **settings: Any) -> Any:
    return mapping(*args, **settings | {"backend": "pread"})


PRIVATE_WEIGHTS: Final = PrivateWeights()
