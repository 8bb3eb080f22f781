"""The figures of a training on disk: `metrics.jsonl`, and event files for TensorBoard where it is installed.

    tensorboard --logdir runs        # pip install "composition-of-experts[tensorboard]"

One line a step or validation: {"step": 20, "time": 1790000000.0, "loss": 1.25, ...}. A resumed run drops the lines of
steps that it does again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

FILE: Final = "metrics.jsonl"
_GROUPS: Final = {"valid_loss": "valid/loss", "valid_accuracy": "valid/accuracy"}
"""Names in TensorBoard that differ from `train/NAME`."""


class Metrics:
    """Writes figures as they come. Use as a context manager.

    Args:
        folder: of the files; created if it is missing.
        first_step: steps of a resumed run that are done; later lines of the former process are dropped.
        clock: seconds since the epoch.
    """

    def __init__(self, folder: Path, *, first_step: int = 0, clock: Callable[[], float] = time.time) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._clock = clock
        kept = _lines_until(self.path, first_step) if first_step else []
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        if not first_step:
            for former in folder.glob("events.out.tfevents.*"):
                former.unlink()
        self._board = _board(folder, first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step."""
        line = {"step": step, "time": round(self._clock(), 3), **figures}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(_GROUPS.get(name, f"train/{name}"), value, step)
            self._board.flush()


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of the steps up to `step`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    kept = []
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:  # the process was killed while it wrote this line
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int) and found["step"] <= step:
            kept.append(line)
    return kept


def _board(folder: Path, first_step: int) -> Any:
    """A writer of event files, which the package `tensorboard` brings; None without it."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    make: Any = SummaryWriter
    return make(str(folder), purge_step=first_step + 1 if first_step else None)
