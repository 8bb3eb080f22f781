"""Training without gradients: a bounded number of evaluations of a few numbers, as LoraHub (arXiv 2307.13269) does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from coe.errors import ConfigError, EngineError
from coe.latent.training.loop import OnStep, Outcome
from registry.errors import SourceError
from registry.headers import read_json
from registry.storage import atomic_path

EVALUATIONS: Final = "evaluations.json"
_MOST_BYTES: Final = 2**26
_FIRST_RADIUS: Final = 0.5
_LAST_RADIUS: Final = 1e-3


@runtime_checkable
class Search(Protocol):
    """An objective that is trained by a search of its own instead of the loop."""

    def search(self, on_step: OnStep) -> Outcome:
        """Find the tensors, and leave the best ones in place; called again after an interruption, it goes on."""
        ...


class Evaluations:
    """The values of a function at points, kept in a file: a search that starts again meets the same points at once.

    Args:
        path: may not exist yet.
        function: of n numbers.
        on_new: called with the number of evaluations and the value of a new one.
    """

    def __init__(
        self, path: Path, function: Callable[[Sequence[float]], float], on_new: Callable[[int, float], None]
    ) -> None:
        self._path, self._function, self._on_new = path, function, on_new
        self._known: dict[tuple[float, ...], float] = {}
        self.seconds = 0.0
        if path.is_file():
            self._read()

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, point: Sequence[float]) -> float:
        """The value at a point.

        Raises:
            EngineError: it is not a finite number.
        """
        key = tuple(float(x) for x in point)
        if key not in self._known:
            began = time.perf_counter()
            value = self._function(key)
            if not abs(value) < float("inf"):
                raise EngineError(f"the loss at the weights {key} is {value}: the members cannot be mixed so")
            self.seconds += time.perf_counter() - began
            self._known[key] = value
            self._write()
            self._on_new(len(self._known), value)
        return self._known[key]

    @property
    def best(self) -> tuple[float, ...]:
        """The point of the lowest value."""
        return min(self._known, key=lambda key: self._known[key])

    def _read(self) -> None:
        try:
            found = read_json(self._path, most_bytes=_MOST_BYTES)
            self._known = {tuple(map(float, point)): float(value) for point, value in found["values"]}
            self.seconds = float(found["seconds"])
        except (SourceError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self._path} is damaged ({error}): remove it to start again") from error

    def _write(self) -> None:
        document: Mapping[str, Any] = {"seconds": self.seconds, "values": [[*item] for item in self._known.items()]}
        with atomic_path(self._path) as staged:
            staged.write_text(json.dumps(document), encoding="utf-8")


def minimise(function: Evaluations, start: Sequence[float], *, bound: float, most: int) -> tuple[float, ...]:
    """The best point of at most `most` evaluations in [-bound, bound]^n, by COBYQA, which is deterministic."""
    import numpy as np
    from scipy.optimize import Bounds, minimize

    options = {"maxfev": most, "initial_tr_radius": _FIRST_RADIUS, "final_tr_radius": _LAST_RADIUS}
    bounds = Bounds(np.full(len(start), -bound), np.full(len(start), bound))
    minimize(function, np.array(start), method="COBYQA", bounds=bounds, options=options)
    return function.best
