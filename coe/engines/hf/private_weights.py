"""Weights in memory of this process, not in a mapped file.

transformers maps safetensors, and on a CPU weights of the file's own type stay in the mapping: they change with the
file, and the process ends if the file shrinks. It reads the tensors on Windows and for MPS only, without a setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from routers.encoders.loading import model_loading


@contextmanager
def private_weights() -> Iterator[None]:
    """A `model_loading` in which transformers reads safetensors, tensor by tensor."""
    from transformers import modeling_utils

    module: Any = modeling_utils
    with model_loading():
        mapping = module.safe_open
        module.safe_open = partial(_read, mapping)
        try:
            yield
        finally:
            module.safe_open = mapping


def _read(mapping: Any, *args: Any, **settings: Any) -> Any:
    return mapping(*args, **settings | {"backend": "pread"})
